"""DDPO (Black et al. 2023): the denoising steps as a policy, trained by clipped policy gradient.

Objective: minimise E_t[ w_t max(-A ratio, -A clip(ratio, 1 +- c)) ] + kl_weight * E_t[ KL(policy || reference) ], with
ratio = p(x_next | x_t, prompt) / p_old(x_next | x_t, prompt), A the reward standardised among the images of a prompt.

What differs from the published code (paper.md 3):
1. Several images of each prompt are drawn in a round and standardised among themselves (as in GRPO), so no history of
   scores by prompt is kept.
2. (sample, step) pairs are shuffled together and trained in micro-batches that fill the device, not step by step.
3. w_t = std_t / mean std (noise-aware weighting, TempFlow-GRPO): the gradient of the log-density grows as 1 / std, so
   unweighted the last steps, which only touch fine detail, would dominate. `weight_by_std=false` is the published loss.
4. An optional KL to the model without its adapter; the published code has none.
"""

import math
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vp_rl.algorithms.base import MakeOptimizer, PolicyTraining, PromptBatches
from vp_rl.functional import clipped_surrogate, group_advantages
from vp_rl.interfaces import Policy, Reward
from vp_rl.sampler import Sampler, log_prob_of
from vp_rl.types import Conditioning, PromptBatch, Steps, take

_KL_PROBE = 16  # pairs of a round on which the distance to the reference is measured; 64 cost 8% of the round


class StepBatch(NamedTuple):
    """A micro-batch of (sample, step) pairs of a rollout."""

    latents: Float[Tensor, "batch *latent"]
    next_latents: Float[Tensor, "batch *latent"]
    step: Steps
    log_prob: Float[Tensor, " batch"]
    """Under the policy that sampled."""
    advantage: Float[Tensor, " batch"]
    weight: Float[Tensor, " batch"]
    prompt: Int[Tensor, " batch"]
    """Row of the round's conditioning."""


class Rollout(NamedTuple):
    """A round's images, as what is needed to learn from them: all (sample, step) pairs, and the encoded prompts."""

    pairs: StepBatch
    conditioning: Conditioning


class DDPO(PolicyTraining):
    """Fine-tunes a policy against any reward, differentiable or not.

    Args:
        policy, reward, sampler, optimizer, seed: see `PolicyTraining`. The sampler's eta must be above 0.
        images_per_prompt: images of each prompt in a round; their scores are compared among themselves.
        sample_batch: images sampled at once.
        train_batch: (sample, step) pairs trained at once; times the trainer's accumulation it is one update.
        inner_epochs: passes over a round's pairs.
        clip_range: how far the ratio may move, on the log-density averaged over latent dimensions.
        advantage_clip: in standard deviations.
        timestep_fraction: share of each sample's steps that is trained on, drawn at random.
        min_std: steps with at most this standard deviation are not trained on; deterministic ones never are.
        weight_by_std: see the module's point 3.
        kl_weight: scale of the KL to the reference; 0 saves its forward passes.
    """

    def __init__(
        self,
        policy: Policy,
        reward: Reward,
        sampler: Sampler,
        optimizer: MakeOptimizer,
        *,
        images_per_prompt: int = 16,
        sample_batch: int = 64,
        train_batch: int = 64,
        inner_epochs: int = 1,
        clip_range: float = 1e-4,
        advantage_clip: float = 5.0,
        timestep_fraction: float = 1.0,
        min_std: float = 0.0,
        weight_by_std: bool = True,
        kl_weight: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(policy, reward, sampler, optimizer, seed)
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
        self.weight_by_std, self.kl_weight = weight_by_std, kl_weight
        stds = _stds(policy, sampler)
        self.trained_steps = [step for step, std in enumerate(stds.tolist()) if std > min_std]
        if not self.trained_steps:
            raise ValueError(
                f"No sampling step has a density to train on (sampler.eta={sampler.eta}, min_std={min_std}, "
                f"largest std {stds.max():.3g}): DDPO needs a stochastic sampler, so raise sampler.eta."
            )
        self.steps_per_sample = max(1, round(timestep_fraction * len(self.trained_steps)))
        self.conditioning: Conditioning = {}
        self._rounds: list[dict[str, float]] = []

    def batches(self, prompts: PromptBatches) -> "RolloutLoader":
        """Each batch of prompts is one round: sampled when it is asked for, then served as micro-batches."""
        return RolloutLoader(self, prompts)

    def training_step(self, batch: StepBatch, batch_idx: int) -> Tensor:
        """The clipped surrogate of one micro-batch of pairs, plus the KL where it is wanted."""
        conditioning = take(self.conditioning, batch.prompt)
        transition = self.sampler.transition(self.policy, batch.latents, batch.step, conditioning)
        log_ratio = log_prob_of(batch.next_latents, transition) - batch.log_prob
        loss = (batch.weight * clipped_surrogate(log_ratio, batch.advantage, self.clip_range)).mean()
        if self.kl_weight:
            kl = self.kl_to_reference(transition, batch.latents, batch.step, conditioning)
            loss = loss + self.kl_weight * (batch.weight * kl).mean()
        ratio = log_ratio.detach().exp()
        clipped = ((ratio - 1).abs() > self.clip_range).float().mean()
        values = {"train/loss": loss, "train/ratio": ratio.mean(), "train/clip_fraction": clipped}
        self.log_dict(values, on_step=False, on_epoch=True, batch_size=len(ratio), sync_dist=True)
        return loss

    def on_train_epoch_start(self) -> None:
        """Starts the epoch's clock."""
        super().on_train_epoch_start()
        self._rounds = []

    def on_train_epoch_end(self) -> None:
        """Logs what the epoch's rounds gave, and where its time went."""
        super().on_train_epoch_end()
        values = {name: sum(values[name] for values in self._rounds) / len(self._rounds) for name in self._rounds[0]}
        rolling = (values["train/seconds_sampling"] + values["train/seconds_reward"]) * len(self._rounds)
        values["train/seconds_training"] = (self.epoch_seconds() - rolling) / len(self._rounds)
        self.log_dict(values, sync_dist=True)

    @torch.no_grad()
    def rollout(self, batch: PromptBatch, *position: int) -> Rollout:
        """Samples a round's images, scores them, and flattens their steps into pairs."""
        generator, started = self.generator(*position), time.monotonic()
        conditioning = self.policy.encode(batch.prompts)
        prompt = torch.arange(len(batch.prompts), device=self.device).repeat_interleave(self.images_per_prompt)
        parts = [
            self.sampler.rollout(self.policy, take(conditioning, rows), generator)
            for rows in prompt.split(self.sample_batch)
        ]
        sampled = time.monotonic()
        latents = torch.cat([part.latents for part in parts])
        prompts = [batch.prompts[row] for row in prompt.tolist()]
        scores = torch.cat(
            [
                self.score(self.policy.decode(chunk[:, -1]), prompts[start : start + len(chunk)])
                for start, chunk in zip(
                    range(0, len(prompts), self.sample_batch), latents.split(self.sample_batch), strict=True
                )
            ]
        )
        advantages = group_advantages(scores, prompt, self.advantage_clip)
        pairs = self._pairs(latents, torch.cat([part.log_probs for part in parts]), advantages, prompt, generator)
        kl = self._kl_on_a_few(pairs, conditioning)
        self.images += len(scores)
        self._rounds.append(
            {
                "train/reward": scores.mean().item(),
                "train/reward_std": scores.std().item(),
                "train/kl": kl.item(),
                "train/seconds_sampling": sampled - started,
                "train/seconds_reward": time.monotonic() - sampled,
            }
        )
        return Rollout(pairs, conditioning)

    def _pairs(
        self, latents: Tensor, log_probs: Tensor, advantages: Tensor, prompt: Tensor, generator: torch.Generator
    ) -> StepBatch:
        """Flattens trajectories (B, steps + 1, ...) into pairs, sample by sample, each with its own choice of steps."""
        samples, device = len(latents), latents.device
        chosen = torch.rand(samples, len(self.trained_steps), generator=generator).argsort(1)
        steps = torch.tensor(self.trained_steps)[chosen[:, : self.steps_per_sample]].flatten().to(device)
        rows = torch.arange(samples, device=device).repeat_interleave(self.steps_per_sample)
        stds = _stds(self.policy, self.sampler).to(device)
        weight = stds / stds[self.trained_steps].mean() if self.weight_by_std else torch.ones_like(stds)
        return StepBatch(
            latents=latents[rows, steps],
            next_latents=latents[rows, steps + 1],
            step=steps,
            log_prob=log_probs[rows, steps],
            advantage=advantages[rows],
            weight=weight[steps],
            prompt=prompt[rows],
        )

    def _kl_on_a_few(self, pairs: StepBatch, conditioning: Conditioning) -> Tensor:
        """Mean KL of a step to the reference's, on a few pairs spread over the round."""
        rows = torch.linspace(0, len(pairs.step) - 1, min(_KL_PROBE, len(pairs.step))).long().to(pairs.step.device)
        latents, step, few = pairs.latents[rows], pairs.step[rows], take(conditioning, pairs.prompt[rows])
        transition = self.sampler.transition(self.policy, latents, step, few)
        return self.kl_to_reference(transition, latents, step, few).mean()


class RolloutLoader:
    """An epoch of DDPO: for each batch of prompts, a fresh rollout, served as shuffled micro-batches."""

    def __init__(self, algorithm: DDPO, prompts: PromptBatches) -> None:
        self._algorithm, self._prompts = algorithm, prompts

    def __len__(self) -> int:
        """Known beforehand, so that Lightning fetches no batch ahead: its policy would be one update old."""
        algorithm = self._algorithm
        pairs = self._prompts.batch_size * algorithm.images_per_prompt * algorithm.steps_per_sample
        return len(self._prompts) * algorithm.inner_epochs * math.ceil(pairs / algorithm.train_batch)

    def __iter__(self) -> Iterator[StepBatch]:
        algorithm = self._algorithm
        for number, batch in enumerate(self._prompts):
            position = (algorithm.current_epoch, number)
            with algorithm.trainer.precision_plugin.forward_context():
                pairs, algorithm.conditioning = algorithm.rollout(batch, *position)
            generator = algorithm.generator(*position, 1)
            for _ in range(algorithm.inner_epochs):
                order = torch.randperm(len(pairs.step), generator=generator).to(pairs.step.device)
                for rows in order.split(algorithm.train_batch):
                    yield StepBatch(*(field[rows] for field in pairs))


def _stds(policy: Policy, sampler: Sampler) -> Float[Tensor, " steps"]:
    """Standard deviation of each sampling step: it depends on the schedule alone."""
    zeros = torch.zeros(sampler.steps, 1)
    return policy.process.transition(zeros, zeros, torch.arange(sampler.steps), sampler.steps, sampler.eta).std
