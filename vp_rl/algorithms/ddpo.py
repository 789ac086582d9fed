"""DDPO (Black et al. 2023): the denoising steps as a policy, trained by clipped policy gradient.

Objective: minimise E_t[ w_t max(-A ratio, -A clip(ratio, 1 +- c)) ] + kl_weight * E_t[ KL(policy || reference) ], with
ratio = p(x_next | x_t, prompt) / p_old(x_next | x_t, prompt), A the reward standardised among the images of a prompt.

What differs from the published code (paper.md 3):
1. Several images of each prompt are drawn in a round and standardised among themselves (as in GRPO), so no history of
   scores by prompt is kept.
2. States x_t are trained in micro-batches that fill the device, not step by step. They take turns: a random one of each
   image's steps, then another one of each. So an update is of all prompts alike, and of the same states however many
   devices they are dealt out to.
3. w_t = std_t / mean std (noise-aware weighting, TempFlow-GRPO): the gradient of the log-density grows as 1 / std, so
   unweighted the last steps, which only touch fine detail, would dominate. `weight_by_std=false` is the published loss.
4. An optional KL to the model without its adapter; the published code has none.
5. `branch`: images of a prompt share all but one random step, drawn for each round from a window, and only that step is
   trained (TempFlow-GRPO's branching, MixGRPO's window). What scores differ by is then the doing of the step that is
   credited for it, the images have a deterministic sampler's quality, and as the steps of a prompt's images start from
   one state, a round trains on as many states as it has prompts.
"""

import math
import time
from collections.abc import Iterable, Iterator

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from vp_rl.algorithms.base import EpochLoader, MakeOptimizer, PolicyTraining, PromptBatches, differ
from vp_rl.algorithms.rounds import Replayed, Rollout, Scoring, Share, StepBatch, of_all, own, share_of
from vp_rl.configuration.kinds import Amount, Count, Part, Positive, Seed, Several, Span
from vp_rl.functional import clipped_surrogate, group_advantages
from vp_rl.interfaces import Policy, Reward
from vp_rl.sampler import Sampler, log_prob_of, repeat
from vp_rl.types import Conditioning, Images, Latents, PromptBatch, Scores, Steps, Transition, take

_DRIFT = {False: 1e-4, True: 1e-2}  # between log-probabilities that rounding makes: in float32, in half precision
_KL_PROBE = 16  # states of a round on which the distance to the reference is measured; 64 cost 8% of the round


class DDPO(PolicyTraining):
    """Fine-tunes a policy against any reward, differentiable or not.

    Args:
        policy, reward, sampler, optimizer, decay, seed: see `PolicyTraining`. The sampler's eta must be above 0.
        images_per_prompt: images of each prompt in a round; their scores are compared among themselves, also where
            several devices make them (`data.devices_per_prompt`).
        sample_batch: images sampled at once.
        train_batch: states x_t trained at once; times the trainer's accumulation it is one update. A round has one for
            each image and trained step, with `branch` one for each prompt.
        inner_epochs: passes over a round's states.
        clip_range: how far the ratio may move, on the log-density averaged over latent dimensions.
        advantage_clip: in standard deviations.
        timestep_fraction: share of each sample's steps that is trained on, drawn at random; with `branch` it is one.
        min_std: steps with at most this standard deviation are not trained on; deterministic ones never are.
        weight_by_std: see the module's point 3.
        branch: see point 5: first and last branching step as a share of the sampling steps; None: all steps are random.
        kl_weight: scale of the KL to the reference; 0 saves its forward passes.
    """

    def __init__(
        self,
        policy: Policy,
        reward: Reward,
        sampler: Sampler,
        optimizer: MakeOptimizer,
        *,
        images_per_prompt: Several = 16,
        sample_batch: Count = 64,
        train_batch: Count = 64,
        inner_epochs: Count = 1,
        clip_range: Positive = 1e-4,
        advantage_clip: Positive = 5.0,
        timestep_fraction: Part = 1.0,
        min_std: Amount = 0.0,
        weight_by_std: bool = True,
        branch: Span | None = None,
        kl_weight: Amount = 0.0,
        decay: bool = False,
        seed: Seed = 0,
    ) -> None:
        super().__init__(policy, reward, sampler, optimizer, decay, seed)
        if images_per_prompt < 2:
            raise ValueError("algorithm.images_per_prompt must be at least 2: a single image has nothing to beat.")
        sizes = {"sample_batch": sample_batch, "train_batch": train_batch, "inner_epochs": inner_epochs}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"algorithm.{name}={size} must be at least 1.")
        if not 0 < timestep_fraction <= 1:
            raise ValueError(f"algorithm.timestep_fraction={timestep_fraction} must be in (0, 1].")
        self.images_per_prompt, self.sample_batch, self.train_batch = images_per_prompt, sample_batch, train_batch
        self.inner_epochs, self.clip_range, self.advantage_clip = inner_epochs, clip_range, advantage_clip
        self.kl_weight = kl_weight
        self.branch = branch
        stds = sampler.stds(policy)
        window = range(sampler.steps) if branch is None else sampler.window("algorithm.branch", *branch)
        self.trained_steps = [step for step in window if stds[step] > min_std]
        if not self.trained_steps:
            raise ValueError(
                f"No sampling step has a density to train on (sampler.eta={sampler.eta}, min_std={min_std}, "
                f"largest std {stds.max():.3g}): DDPO needs a stochastic sampler, so raise sampler.eta."
            )
        self.steps_per_sample = max(1, round(timestep_fraction * len(self.trained_steps))) if branch is None else 1
        self.states_per_prompt = images_per_prompt * self.steps_per_sample if branch is None else 1
        self._weight = stds / stds[self.trained_steps].mean() if weight_by_std else torch.ones_like(stds)
        self.conditioning: Conditioning = {}
        self.prompts: list[str] = []  # of the running round
        self._sharing = 1  # devices that each of them is on
        self._sampled_after = -1  # that many updates
        self._rounds: list[dict[str, float]] = []
        self._replayed = Replayed()

    def batches(self, prompts: PromptBatches) -> "RolloutLoader":
        """Each batch of prompts is one round: sampled when it is asked for, then served as micro-batches."""
        sharing = prompts.devices_per_prompt
        if self.images_per_prompt % sharing:
            raise ValueError(
                f"algorithm.images_per_prompt={self.images_per_prompt} cannot be divided among "
                f"data.devices_per_prompt={sharing} devices: give a multiple."
            )
        return RolloutLoader(self, prompts)

    def batches_per_round(self, prompts: int, devices_per_prompt: int = 1) -> int:
        """Micro-batches that a device serves a round of so many prompts of its own as."""
        each = self.states_per_prompt // (devices_per_prompt if self.branch is None else 1)
        return self.inner_epochs * math.ceil(prompts * each / self.train_batch)

    def resumable_after(self, batches: int) -> bool:
        """Between rounds: a round's images are not kept, and could not be sampled again by a policy that has moved."""
        return batches % self.batches_per_round(len(self.prompts), self._sharing) == 0

    def training_step(self, batch: StepBatch, batch_idx: int) -> Tensor:
        """The clipped surrogate of one micro-batch of states, plus the KL where it is wanted."""
        transition = self._transition(batch)
        log_ratio = self._log_ratio(batch, transition)
        surrogate = clipped_surrogate(log_ratio, batch.advantages.flatten(), self.clip_range)
        loss = (batch.weight.repeat_interleave(batch.next_latents.shape[1]) * surrogate).mean()
        if self.kl_weight:
            conditioning = take(self.conditioning, batch.prompt)
            kl = self.kl_to_reference(transition, batch.latents, batch.step, conditioning)
            loss = loss + self.kl_weight * (batch.weight * kl).mean()
        sampled = self.global_step == self._sampled_after  # by the policy as it still is
        self._replayed.add(loss.detach(), log_ratio.detach(), self.clip_range, sampled)
        return loss

    def _transition(self, batch: StepBatch) -> Transition:
        return self.sampler.transition(self.policy, batch.latents, batch.step, take(self.conditioning, batch.prompt))

    @staticmethod
    def _log_ratio(batch: StepBatch, transition: Transition) -> Float[Tensor, " samples"]:
        draws = batch.next_latents.shape[1]
        return log_prob_of(batch.next_latents.flatten(0, 1), repeat(transition, draws)) - batch.log_probs.flatten()

    def self_test(self, batch: StepBatch) -> str:
        """Replays steps of the round under the policy that sampled them: their log-probabilities must be the same.

        With gradients, as many at once as are trained: so it is the code of training that is compiled, and tested.
        """
        log_ratio = self._log_ratio(batch, self._transition(batch))
        drift = log_ratio.detach().abs().max().item()
        tolerance = _DRIFT[self.in_half_precision()]
        if not drift <= tolerance:
            raise ValueError(
                f"Before any update the policy gives its own steps log-probabilities that differ by {drift:.2g} from "
                f"those it sampled them with (rounding makes at most {tolerance:.0e}): DDPO would learn from that "
                "difference. Is dropout on, or is sampling done in another precision than training?"
            )
        return f"replayed log-probabilities are those of sampling, to {drift:.1e}"

    def describe(self, batch: StepBatch) -> str:
        """Its prompts and sampling steps."""
        prompts = [self.prompts[row] for row in batch.prompt.unique().tolist()]
        return f"sampling steps {batch.step.unique().tolist()} of {prompts}"

    def on_train_epoch_start(self) -> None:
        """Starts the epoch's clock."""
        super().on_train_epoch_start()
        self._rounds, self._replayed = [], Replayed()

    def on_train_epoch_end(self) -> None:
        """Logs what the epoch's rounds gave, and where its time went."""
        super().on_train_epoch_end()
        values = {name: sum(values[name] for values in self._rounds) / len(self._rounds) for name in self._rounds[0]}
        rolling = (values["train/seconds_sampling"] + values["train/seconds_reward"]) * len(self._rounds)
        values["train/seconds_training"] = (self.epoch_seconds() - rolling) / len(self._rounds)
        self.log_dict(values | self._replayed.means(), sync_dist=True)
        if (drift := self._replayed.drift()) is not None:
            self.log("train/log_prob_drift", drift, sync_dist=True, reduce_fx="max")

    @torch.no_grad()
    def rollout(self, batch: PromptBatch, *position: int) -> Rollout:
        """Samples a round's images, scores them, and keeps the states that their random steps start from."""
        share, started = share_of(batch, self.images_per_prompt, self.trainer.world_size), time.monotonic()
        self.prompts, self._sharing = batch.prompts, batch.share[1]
        conditioning = self.policy.encode(batch.prompts)
        prompt = torch.arange(len(batch.prompts)).repeat_interleave(len(share.images))
        sample = self._trajectories if self.branch is None else self._branches
        with Scoring(self.policy.decode, self._score, self.sample_batch, self.reward.elsewhere) as scoring:
            states = sample(conditioning, prompt, share, scoring, *position)
            scores = scoring.result().to(self.device)
        rolled = time.monotonic() - started
        everyone = of_all(scores.unflatten(0, (len(batch.prompts), -1)), self._sharing)
        self.scores, self._sampled_after = everyone[share.places], self.global_step
        scored = torch.isfinite(everyone).all(1)  # where not, there is no score to stand out from
        known = torch.where(scored[:, None], everyone, 0.0)
        advantages = own(group_advantages(known, self.advantage_clip), share).repeat_interleave(self.steps_per_sample)
        states = states._replace(advantages=advantages.reshape(states.log_probs.shape).to(states.step.device))
        kl = self._kl_on_a_few(states, conditioning)
        self.images += len(scores)
        self._rounds.append(
            {
                "train/reward": everyone[scored].mean().item(),
                "train/reward_std": everyone[scored].std().item(),
                "train/zero_variance_groups": 1 - differ(everyone).float().mean().item(),
                "train/kl": kl.item(),
                "train/seconds_sampling": rolled - scoring.seconds,
                "train/seconds_reward": scoring.seconds,
            }
        )
        return Rollout(states, conditioning, share)

    @torch.no_grad()
    def _score(self, images: Images, prompts: list[str]) -> Scores:
        """In any thread: gradients and autocast are a matter of each."""
        with self.trainer.precision_plugin.forward_context():
            return self.score(images, prompts)

    def _trajectories(
        self, conditioning: Conditioning, prompt: Tensor, share: Share, scoring: Scoring, *position: int
    ) -> StepBatch:
        """The states sample by sample, each sample with its own choice of steps."""
        noise = self.generators(share.places, share.images, *position)

        def parts() -> Iterator[tuple[Latents, Tensor]]:
            for rows in _slices(len(prompt), self.sample_batch):
                path = self.sampler.rollout(self.policy, take(conditioning, prompt[rows]), noise[rows])
                scoring.add(path.latents[:, -1], self._prompts_of(prompt[rows]))
                yield path.latents, path.log_probs

        latents, log_probs = self._stored(parts())
        chosen = self._shuffled(share, len(self.trained_steps), *position)
        steps = torch.tensor(self.trained_steps)[chosen[:, : self.steps_per_sample]].flatten()
        rows = torch.arange(len(prompt)).repeat_interleave(self.steps_per_sample)
        next_latents, log_probs = latents[rows, steps + 1, None], log_probs[rows, steps, None]
        return self._states(latents[rows, steps], next_latents, steps, log_probs, prompt[rows])

    def _branches(
        self, conditioning: Conditioning, prompt: Tensor, share: Share, scoring: Scoring, *position: int
    ) -> StepBatch:
        """One state for each prompt: where its images part."""
        choice = torch.randint(len(self.trained_steps), (1,), generator=self.generator(*position))
        step, each = self.trained_steps[int(choice)], len(share.images)
        prompts = prompt[::each]
        start = self.generators(share.places, [-1], *position)
        noise = self.generators(share.places, share.images, *position)

        def parts() -> Iterator[tuple[Latents, Latents, Tensor]]:
            for rows in _slices(len(prompts), max(1, self.sample_batch // each)):
                found = self.sampler.branch(
                    self.policy,
                    take(conditioning, prompts[rows]),
                    step,
                    each,
                    start[rows],
                    self.sample_batch,
                    noise[rows.start * each : rows.stop * each],
                )
                scoring.add(found.finished.flatten(0, 1), self._prompts_of(prompts[rows].repeat_interleave(each)))
                yield found[:3]

        latents, next_latents, log_probs = self._stored(parts())
        return self._states(latents, next_latents, torch.full_like(prompts, step), log_probs, prompts)

    def _prompts_of(self, rows: Int[Tensor, " images"]) -> list[str]:
        return [self.prompts[row] for row in rows.tolist()]

    @staticmethod
    def _stored(parts: Iterable[tuple[Tensor, ...]]) -> list[Tensor]:
        """Each kind of tensor in one piece, in main memory: a round's states are gigabytes, a micro-batch's are few."""
        return [torch.cat(tensors) for tensors in zip(*([t.cpu() for t in part] for part in parts), strict=True)]

    def _states(
        self, latents: Latents, next_latents: Tensor, step: Steps, log_probs: Tensor, prompt: Tensor
    ) -> StepBatch:
        """With their weights; the advantages are known when the images are scored."""
        weight = self._weight.to(step.device)[step]
        return StepBatch(latents, next_latents, step, log_probs, torch.zeros_like(log_probs), weight, prompt)

    def order(self, share: Share, *position: int) -> Int[Tensor, " states"]:
        """Rows of a rollout's states in the order of training: see the module's point 2."""
        if self.branch is not None:
            return torch.arange(len(share.places))
        steps = self._shuffled(share, self.steps_per_sample, *position)
        rows = steps + self.steps_per_sample * torch.arange(len(steps))[:, None]
        return rearrange(rows, "(prompt image) step -> (step image prompt)", image=len(share.images))

    def _shuffled(self, share: Share, number: int, *position: int) -> Int[Tensor, "samples {number}"]:
        """For each of this device's samples, that many numbers in an order of its own."""
        shape = share.prompts, self.images_per_prompt, number
        return own(torch.rand(shape, generator=self.generator(*position)).argsort(2), share)

    def _kl_on_a_few(self, states: StepBatch, conditioning: Conditioning) -> Tensor:
        """Mean KL of a step to the reference's, on a few states spread over the round."""
        rows = torch.linspace(0, len(states.step) - 1, min(_KL_PROBE, len(states.step))).long()
        found = []
        for some in rows.split(self.sample_batch):  # no more at once than there is memory for
            parts = states.latents, states.step, states.prompt
            latents, step, prompt = (each[some].to(self.device) for each in parts)
            few = take(conditioning, prompt)
            with self.policy.eagerly():
                transition = self.sampler.transition(self.policy, latents, step, few)
                found.append(self.kl_to_reference(transition, latents, step, few))
        return torch.cat(found).mean()


class RolloutLoader(EpochLoader):
    """An epoch of DDPO: for each batch of prompts, a fresh rollout, served as micro-batches."""

    def __init__(self, algorithm: DDPO, prompts: PromptBatches) -> None:
        super().__init__(algorithm, prompts)
        self._ddpo = algorithm

    def __len__(self) -> int:
        """Known beforehand, so that Lightning fetches no batch ahead: its policy would be one update old."""
        return len(self._prompts) * self._per_round()

    def __iter__(self) -> Iterator[StepBatch]:
        algorithm = self._ddpo
        before = self.done() // self._per_round()
        pinned = algorithm.device.type == "cuda"  # Lightning then sends it without waiting for the device
        for number, batch in enumerate(self._prompts):
            if number < before:
                continue
            position = (algorithm.current_epoch, number)
            with algorithm.trainer.precision_plugin.forward_context():
                states, algorithm.conditioning, share = algorithm.rollout(batch, *position)
            for turn in range(algorithm.inner_epochs):
                order = algorithm.order(share, *position, turn).to(states.step.device)
                for rows in order.split(algorithm.train_batch):
                    batch = (field[rows] for field in states)
                    yield StepBatch(*(field.pin_memory() if pinned else field for field in batch))
            del states  # before the next round's are made

    def _per_round(self) -> int:
        return self._ddpo.batches_per_round(self._prompts.batch_size, self._prompts.devices_per_prompt)


def _slices(number: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, number)) for start in range(0, number, size)]
