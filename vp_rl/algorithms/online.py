"""Rounds: images of prompts are sampled and scored, then learned from in micro-batches.

An online algorithm says what it keeps of its images (`collect`) and what its loss is (`loss`). All else is here: what
each device does, scoring while sampling goes on, advantages among the images of a prompt, the order of micro-batches,
resuming between rounds, and what the planner has to know.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from vp_rl.algorithms.base import SCALES, MakeOptimizer
from vp_rl.algorithms.phases import Cut, Load, Phase, alike, rollout_phases
from vp_rl.algorithms.prompt_training import EpochLoader, PromptBatches, PromptTraining
from vp_rl.algorithms.rounds import Batch, Means, Part, Rollout, Scoring, Share, batch_of, of_all, own, share_of
from vp_rl.functional import differ, group_advantages
from vp_rl.interfaces import Policy, Reward
from vp_rl.sampler import Sampler
from vp_rl.types import Conditioning, Images, Latents, PromptBatch, take

_PROBED = 16  # examples of a round on which the distance to the reference is measured; 64 cost 8% of the round


class OnlineTraining(PromptTraining, ABC):
    """Learns from images that it samples itself, by any reward's scores.

    Args:
        policy, reward, optimizer, decay, seed: see `PolicyTraining`.
        sampler: how images are made while it trains.
        images_per_prompt: images of each prompt in a round; their scores are compared among themselves, also where
            several devices make them (`data.devices_per_prompt`).
        sample_batch: images sampled at once.
        train_batch: examples trained at once; times the trainer's accumulation it is one update.
        inner_epochs: passes over a round's examples.
        advantage_clip: in standard deviations.

    Raises:
        ValueError: a size is below 1, or there is one image of each prompt.
    """

    examples_per_image: int = 1
    """Rows that `collect` gives of each image; with `whole_prompts`, of each prompt."""
    whole_prompts: bool = False
    """Whether an example is of all images of a prompt."""
    kept: float = 0
    """Latents that `collect` holds of each image on the device while it samples: for the planner."""
    largest: ClassVar[frozenset[str]] = frozenset()
    """Metrics of `loss` whose largest value counts, rather than the mean."""
    bounds: ClassVar[tuple[str, str]] = ("algorithm.train_batch", "algorithm.sample_batch")
    rounding: ClassVar[frozenset[str]] = frozenset({"algorithm.sample_batch"})
    dealt: ClassVar[frozenset[str]] = frozenset({"algorithm.train_batch"})

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
        advantage_clip: float = 5.0,
        decay: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(policy, optimizer, reward=reward, decay=decay, seed=seed)
        if images_per_prompt < 2:
            raise ValueError("algorithm.images_per_prompt must be at least 2: a single image has nothing to beat.")
        sizes = {"sample_batch": sample_batch, "train_batch": train_batch, "inner_epochs": inner_epochs}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"algorithm.{name}={size} must be at least 1.")
        self.reward: Reward = self.reward  # type: ignore[assignment]  # it has one
        self.sampler, self.images_per_prompt = sampler, images_per_prompt
        self.sample_batch, self.train_batch, self.inner_epochs = sample_batch, train_batch, inner_epochs
        self.advantage_clip = advantage_clip
        sampler.stds(policy)  # looks whether the steps fit the schedule, which is then there before anything is faked
        self.conditioning: Conditioning = {}
        self.prompts: list[str] = []  # of the running round
        self.on_policy = False
        """Whether the policy is still the one that sampled the round."""
        self._elsewhere = reward.elsewhere  # whether others than this device do all that `judged` does
        self._sharing = 1  # devices that each prompt is on
        self._sampled_after = -1  # that many updates
        self._rounds: list[dict[str, float]] = []
        self._means = Means(self.largest)

    # --- an algorithm

    @abstractmethod
    def collect(self, part: Part, *position: int) -> tuple[Latents, Any]:
        """Samples images: finished latents, image by image, and the examples to keep, a NamedTuple of tensors.

        Args:
            part: what to sample; at most `sample_batch` images, with `whole_prompts` of at least one prompt.
            position: epoch and round, for random choices that are the same for all images.
        """

    @abstractmethod
    def loss(self, batch: Batch, conditioning: Conditioning) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss of a micro-batch, and by name what is to be logged of it: a value for each of its samples, or one.

        Args:
            batch: on the policy's device.
            conditioning: a row for each example.
        """

    @abstractmethod
    def made_up(self, latents: Latents) -> Any:
        """Examples of these latents, right in shapes and types alone: the planner tries `loss` on them."""

    def advantages(self, scores: Float[Tensor, "prompts images"]) -> Float[Tensor, "prompts images"]:
        """How much better than its prompt's others each image of all devices is: standardised among them."""
        return group_advantages(scores, self.advantage_clip)

    def judged(self, images: Images, prompts: list[str]) -> Float[Tensor, "images columns"]:
        """The scores of images, and in more columns whatever else `learned` is to know of them: here, nothing."""
        return self.score(images, prompts)[:, None]

    def learned(self, judged: Float[Tensor, "prompts images columns"]) -> Float[Tensor, "prompts images signals"]:
        """Of what was judged on all devices, what is learned by: advantages, and in a second column `kl_weights`."""
        return self.advantages(judged[..., 0])[..., None]

    def distance(self, batch: Batch, conditioning: Conditioning) -> Float[Tensor, " examples"] | None:
        """How far the policy is from the model without its adapter, of each example; None: it is not measured."""
        return None

    def before_round(self, number: int) -> None:
        """What is to be done before a round is sampled: here, nothing. An older policy that samples moves on here.

        Args:
            number: rounds of the run before it.
        """

    # --- a round

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
        images = 1 if self.whole_prompts else self.images_per_prompt // devices_per_prompt
        return self.inner_epochs * math.ceil(prompts * images * self.examples_per_image / self.train_batch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one micro-batch."""
        self.on_policy = self.global_step == self._sampled_after
        loss, values = self.loss(batch, take(self.conditioning, batch.prompt))
        self._means.add({"train/loss": loss.detach()} | values, batch.advantages.numel())
        return self.weighed(loss, batch.advantages.numel())

    def on_train_epoch_start(self) -> None:
        """Starts the epoch's clock."""
        super().on_train_epoch_start()
        self._rounds, self._means = [], Means(self.largest)

    def on_train_epoch_end(self) -> None:
        """Logs what the epoch's rounds gave, and where its time went."""
        super().on_train_epoch_end()
        values = {name: sum(values[name] for values in self._rounds) / len(self._rounds) for name in self._rounds[0]}
        rolling = (values["train/seconds_sampling"] + values["train/seconds_reward"]) * len(self._rounds)
        values["train/seconds_training"] = (self.epoch_seconds() - rolling) / len(self._rounds)
        self.log_dict(values | self._means.means(), sync_dist=True)
        for name, value in self._means.maxima().items():
            self.log(name, value, sync_dist=True, reduce_fx="max")

    @torch.no_grad()
    def rollout(self, batch: PromptBatch, *position: int) -> Rollout:
        """Samples a round's images, scores them, and keeps what is learned from."""
        share, started = share_of(batch, self.images_per_prompt, self.trainer.world_size), time.monotonic()
        self.prompts, self._sharing = batch.prompts, batch.share[1]
        scales = self.generators(share.places, [SCALES], *position)
        conditioning = self.sampler.with_scales(self.policy.encode(batch.prompts), scales)
        with Scoring(self.policy.decode, self._judged, self.sample_batch, self._elsewhere) as scoring:
            examples = self._sampled(conditioning, share, scoring, *position)
            scores = scoring.result().to(self.device)
        rolled = time.monotonic() - started
        judged = of_all(scores.unflatten(0, (len(batch.prompts), -1)), self._sharing)
        everyone, scored = judged[..., 0], torch.isfinite(judged).all(2).all(1)  # else nothing to stand out from
        self.scores, self._sampled_after = everyone[share.places], self.global_step
        learned = self.learned(judged[scored])
        signals = learned.new_zeros(*everyone.shape, learned.shape[-1]).masked_scatter(scored[:, None, None], learned)
        signals = own(signals, share)
        found = batch_of(examples, signals, len(share.places), self.examples_per_image, self.whole_prompts)
        self.images += len(scores)
        values = {
            "train/reward": everyone[scored].mean().item(),
            "train/reward_std": everyone[scored].std().item(),
            "train/zero_variance_groups": 1 - differ(everyone).float().mean().item(),
            "train/seconds_sampling": rolled - scoring.seconds,
            "train/seconds_reward": scoring.seconds,
        }
        distance = self._distance_of_a_few(found, conditioning)
        self._rounds.append(values if distance is None else values | {"train/kl": distance.item()})
        return Rollout(found, conditioning, share)

    @torch.no_grad()
    def _judged(self, images: Images, prompts: list[str]) -> Float[Tensor, "images columns"]:
        """In any thread: gradients and autocast are a matter of each."""
        with self.trainer.precision_plugin.forward_context():
            return self.judged(images, prompts)

    def _sampled(self, conditioning: Conditioning, share: Share, scoring: Scoring, *position: int) -> Any:
        """The round's examples, in main memory: they are gigabytes, a micro-batch's are few."""
        each = len(share.images)
        noise = self.generators(share.places, share.images, *position)
        prompt = torch.arange(len(share.places)).repeat_interleave(each)
        size = max(1, self.sample_batch // each) * each if self.whole_prompts else self.sample_batch
        kept: list[Any] = []
        for start in range(0, len(prompt), size):
            rows = prompt[start : start + size]
            of = [share.places[row] for row in rows.tolist()]
            part = Part(take(conditioning, rows), noise[start : start + size], list(dict.fromkeys(of)), each, of)
            finished, examples = self.collect(part, *position)
            scoring.add(finished, [self.prompts[row] for row in rows.tolist()])
            kept.append(type(examples)(*(field.cpu() for field in examples)))
        return type(kept[0])(*(torch.cat(fields) for fields in zip(*kept, strict=True)))

    def order(self, share: Share, *position: int) -> Int[Tensor, " examples"]:
        """Rows of a round's examples in the order of training: a random one of each image, then another one of each.

        So an update is of all prompts alike, and of the same examples however many devices they are dealt out to.
        """
        images = range(1) if self.whole_prompts else share.images
        turns = [
            torch.randperm(self.examples_per_image, generator=generator)
            for generator in self.generators(share.places, images, *position)
        ]
        rows = torch.stack(turns) + self.examples_per_image * torch.arange(len(turns))[:, None]
        return rearrange(rows, "(prompt image) turn -> (turn image prompt)", image=len(images))

    def _distance_of_a_few(self, batch: Batch, conditioning: Conditioning) -> Tensor | None:
        """Mean distance to the reference on a few examples spread over the round."""
        rows = torch.linspace(0, len(batch.prompt) - 1, min(_PROBED, len(batch.prompt))).long()
        found = []
        for some in rows.split(self.sample_batch):  # no more at once than there is memory for
            few = batch.take(some, self.device)
            with self.policy.eagerly():
                found.append(self.distance(few, take(conditioning, few.prompt)))
        return None if found[0] is None else torch.cat(found).mean()

    def describe(self, batch: Batch) -> str:
        """Its prompts."""
        return str([self.prompts[row] for row in batch.prompt.unique().tolist()])

    # --- for the planner

    @classmethod
    def together(cls, settings: Mapping[str, Any], devices: int) -> Any:
        """A round's prompts, an epoch's rounds, and the examples of an update."""
        prompts = settings["data.batch_size"] / settings.get("data.devices_per_prompt", 1)
        examples = settings["algorithm.train_batch"] * settings["trainer.accumulate_grad_batches"]
        return prompts * devices, settings.get("data.batches_per_epoch", 1), examples * devices

    def cut(self) -> Cut:
        """See `Cut`."""
        return Cut(self.images_per_prompt, self.examples_per_image, self.whole_prompts, self.inner_epochs)

    def load(self, data: Mapping[str, Any], accumulate: int) -> tuple[Load, int]:
        """A device's round, and the updates of each pass over it."""
        prompts, sharing = data["batch_size"], data.get("devices_per_prompt", 1)
        images, micro_batches = prompts * self.images_per_prompt // sharing, self.batches_per_round(prompts, sharing)
        load = Load(images, prompts, min(self.sample_batch, images), self.train_batch, micro_batches)
        return load, max(1, math.ceil(micro_batches / self.inner_epochs / accumulate))

    def settings_of(self, load: Load, accumulate: int, devices_per_prompt: int) -> dict[str, int]:
        """See `PolicyTraining`."""
        return {
            "data.batch_size": load.prompts,
            "data.devices_per_prompt": devices_per_prompt,
            "trainer.accumulate_grad_batches": accumulate,
            "algorithm.train_batch": load.train_batch,
            "algorithm.sample_batch": load.sample_batch,
        }

    def resize(self, sizes: Mapping[str, int]) -> None:
        """Takes `algorithm.train_batch` and `algorithm.sample_batch`."""
        self.train_batch = sizes.get("algorithm.train_batch", self.train_batch)
        self.sample_batch = sizes.get("algorithm.sample_batch", self.sample_batch)

    def phases(self, load: Load, prompt: Conditioning) -> list[Phase]:
        """Sampling, decoding, scoring, training."""
        train, sample = self.bounds

        def learn(rows: int) -> object:
            latents = self.policy.noise(rows)
            drawn = torch.ones(rows, self.images_per_prompt if self.whole_prompts else 1, device=latents.device)
            prompts = torch.zeros(rows, dtype=torch.long, device=latents.device)
            return self.loss(Batch(self.made_up(latents), drawn, prompts), alike(prompt, rows))[0]

        label = f"activations, {load.train_batch} examples at once"
        training = Phase("training", label, load.micro_batches, load.train_batch, learn, setting=train)
        return [*rollout_phases(self, load, prompt, sample, self.denoised(load), self.kept), training]

    def denoised(self, load: Load) -> float:
        """Sampling steps of each image, on average."""
        return self.sampler.steps


class RolloutLoader(EpochLoader):
    """An epoch of rounds: for each batch of prompts a fresh rollout, served as micro-batches."""

    def __init__(self, algorithm: OnlineTraining, prompts: PromptBatches) -> None:
        super().__init__(algorithm, prompts)
        self._online = algorithm

    def __len__(self) -> int:
        """Known beforehand, so that Lightning fetches no batch ahead: its policy would be one update old."""
        return len(self._prompts) * self._per_round()

    def __iter__(self) -> Iterator[Batch]:
        online = self._online
        before = self.done() // self._per_round()
        pinned = online.device.type == "cuda"  # Lightning then sends it without waiting for the device
        for number, prompts in enumerate(self._prompts):
            if number < before:
                continue
            position = (online.current_epoch, number)
            online.before_round(online.current_epoch * len(self._prompts) + number)
            with online.trainer.precision_plugin.forward_context():
                batch, online.conditioning, share = online.rollout(prompts, *position)
            for turn in range(online.inner_epochs):
                for rows in online.order(share, *position, turn).split(online.train_batch):
                    part = batch.take(rows)
                    yield part.pinned() if pinned else part
            del batch  # before the next round's is made

    def resumable_after(self, batches: int) -> bool:
        """Between rounds: a round's images are not kept, and could not be sampled again by a policy that has moved."""
        return batches % self._per_round() == 0

    def _per_round(self) -> int:
        return self._online.batches_per_round(self._prompts.batch_size, self._prompts.devices_per_prompt)
