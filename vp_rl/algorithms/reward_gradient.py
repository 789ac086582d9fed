"""The reward's own gradient: what ReFL, DRaFT and FlowBP share.

A batch of prompts is an update, or a piece of one that is accumulated: images are sampled up to some step without
gradients, finished with a graph back to the adapter, and scored, and the score is differentiated. An algorithm says
where it takes over (`starts`), how it goes on (`finish`), and what its loss makes of the scores (`of_scores`).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vp_rl.algorithms.base import SCALES, MakeOptimizer, total_norm
from vp_rl.algorithms.phases import PROMPT, Load, Phase, alike
from vp_rl.algorithms.prompt_training import PromptTraining
from vp_rl.interfaces import Policy, Reward
from vp_rl.sampler import Generators, Sampler
from vp_rl.types import Conditioning, Images, Latents, PromptBatch, Scores

_SELF_TEST = 2  # prompts


class Finished(NamedTuple):
    """Images with gradients."""

    images: Images
    """Of each row of latents `each` in a row."""
    each: int = 1
    kl: Float[Tensor, " batch"] | None = None
    """How far the step that they come from is from the reference's; None: that step has no density, or several have."""


class RewardGradient(PromptTraining, ABC):
    """Fine-tunes a policy by back-propagating a differentiable reward.

    Args:
        policy, reward, optimizer, decay, seed: see `PolicyTraining`.
        sampler: how images are made while it trains.
        reward_weight: scale of the reward's loss; matters beside `pretrain_weight` and gradient clipping only.
        pretrain_weight: scale of the denoising loss on the data module's images, which holds the model near them.

    Raises:
        ValueError: the reward is not differentiable.
    """

    def __init__(
        self,
        policy: Policy,
        reward: Reward,
        sampler: Sampler,
        optimizer: MakeOptimizer,
        *,
        reward_weight: float = 1.0,
        pretrain_weight: float = 0.0,
        decay: bool = False,
        seed: int = 0,
    ) -> None:
        if not reward.differentiable:
            raise ValueError(
                f"{type(self).__name__} needs gradients of the reward, and {type(reward).__name__} has none. "
                "Choose a differentiable reward, or algorithm=ddpo, which needs scores only."
            )
        super().__init__(policy, optimizer, reward=reward, decay=decay, seed=seed)
        self.reward: Reward = self.reward  # type: ignore[assignment]  # it has one
        self.sampler, self.reward_weight, self.pretrain_weight = sampler, reward_weight, pretrain_weight
        sampler.stds(policy)  # looks whether the steps fit the schedule, which is then there before anything is faked

    # --- an algorithm

    starts: Sequence[int]
    """The sampling steps before which gradients may begin; each update has one of them, at random."""

    def begin(self, start: int, conditioning: Conditioning, noise: Generators) -> Latents:
        """What `finish` is given, made without gradients: here, the latents that are about to take step `start`."""
        return self.sampler.sample(self.policy, conditioning, noise, until=start)

    @abstractmethod
    def finish(self, latents: Latents, start: int, conditioning: Conditioning, noise: Generators) -> Finished:
        """Makes images of what `begin` gave; gradients reach the adapter.

        Args:
            noise: a generator for each row, for steps that are random.
        """

    def of_scores(self, scores: Scores) -> Float[Tensor, ""]:
        """The loss that a batch's scores make: here, minus their mean."""
        return -scores.mean()

    # --- an update

    def training_step(self, batch: PromptBatch, batch_idx: int) -> Tensor:
        """One batch of prompts: sample, score, push the scores up."""
        # Batches whose gradients are accumulated are one batch in pieces: of the same choices, their places going on.
        update, piece = divmod(batch_idx, self.trainer.accumulate_grad_batches)
        position = self.current_epoch, update
        found = self._images(batch, piece, *position)
        scores = self.score(found.images, [prompt for prompt in batch.prompts for _ in range(found.each)])
        self.scores = scores.detach()[:, None]
        loss = self.reward_weight * self.of_scores(scores)
        if self.pretrain_weight:
            loss = loss + self.pretrain_weight * self._pretrain_loss(batch, piece, *position)
        values = {"train/reward": scores[torch.isfinite(scores)].mean(), "train/loss": loss}
        if found.kl is not None:
            values["train/kl"] = found.kl.mean()
        self.images += len(batch.prompts)
        self.log_dict(values, on_step=False, on_epoch=True, batch_size=len(scores), sync_dist=True)
        return self.weighed(loss, len(scores))

    def _images(self, batch: PromptBatch, piece: int, *position: int) -> Finished:
        start = self.starts[int(torch.randint(len(self.starts), (1,), generator=self.generator(*position)))]
        first, sharing = batch.share
        places = range(len(batch.prompts)) if batch.places is None else batch.places
        before = piece * len(batch.prompts) * self.trainer.world_size // sharing
        noise = self.generators((before + place for place in places), [first], *position)
        scales = self.generators((before + place for place in places), [SCALES], *position)
        conditioning = self.sampler.with_scales(self.policy.encode(batch.prompts), scales)
        return self.finish(self.begin(start, conditioning, noise), start, conditioning, noise)

    def self_test(self, batch: PromptBatch) -> str:
        """The reward's gradient must reach the adapter: finite, and not all zero."""
        prompts = batch.prompts[:_SELF_TEST]
        found = self._images(PromptBatch(prompts), 0, -1)
        trained = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        self.score(found.images, [prompt for prompt in prompts for _ in range(found.each)]).sum().backward()
        norm = total_norm([parameter.grad for parameter in trained if parameter.grad is not None])
        for parameter in trained:
            parameter.grad = None
        reward = type(self.reward).__name__
        if not math.isfinite(norm):
            raise ValueError(
                f"The gradient of {reward} on the adapter is not finite (prompts {prompts}): nothing can be learned "
                "from it. Try trainer.precision=32-true, or other sampling steps (algorithm.window)."
            )
        if norm == 0:
            raise ValueError(
                f"No gradient of {reward} reaches the adapter (prompts {prompts}): nothing would be learned. Are all "
                "images black or white there, or does the reward cut its gradients off?"
            )
        return f"the reward's gradient reaches the adapter, with norm {norm:.1e}"

    def describe(self, batch: PromptBatch) -> str:
        """Its prompts; which steps are trained follows from the update."""
        return str(batch.prompts)

    def _pretrain_loss(self, batch: PromptBatch, piece: int, *position: int) -> Tensor:
        if batch.images is None or batch.captions is None:
            raise ValueError("algorithm.pretrain_weight needs images: set data.images to a VisionPrefer folder.")
        rank, devices = self.trainer.global_rank, self.trainer.world_size
        first = piece * len(batch.images) * devices + rank  # images are dealt to devices in turn
        generators = self.generators(range(first, first + len(batch.images) * devices, devices), [-1], *position)
        return denoising_loss(self.policy, batch.images, batch.captions, generators)

    # --- for the planner

    def made_up(self, latents: Latents) -> Latents:
        """What `begin` could have given, of made-up latents: here, these."""
        return latents

    def phases(self, load: Load, prompt: Conditioning) -> list[Phase]:
        """Sampling without gradients, then a micro-batch through the policy, the decoder and the reward."""
        [train, _], rows = self.bounds, load.train_batch

        @torch.no_grad()
        def step(size: int) -> object:
            return self.sampler.sample(self.policy, alike(prompt, size), until=1)

        def learn(size: int) -> object:
            begun = self.made_up(self.policy.noise(size))
            found = self.finish(begun, self.starts[0], alike(prompt, size), None)
            return self.of_scores(self.reward(found.images, [PROMPT] * len(found.images)))

        steps = load.micro_batches * sum(self.starts) / len(self.starts)
        label = f"activations, {rows} images, with VAE and reward at once"
        return [
            Phase("sampling", f"sampling, {rows} at once", steps, rows, step),
            Phase("training", label, load.micro_batches, rows, learn, setting=train),
        ]


def checkpointed(run: Callable[[Latents], Latents], latents: Latents) -> Latents:
    """What `run` gives, whose activations are computed again for its gradient, rather than kept."""
    result: Tensor = checkpoint(run, latents, use_reentrant=False, preserve_rng_state=False)  # type: ignore[assignment]
    return result


def denoising_loss(
    policy: Policy, images: Images, captions: list[str], generators: Sequence[torch.Generator]
) -> Tensor:
    """Mean squared error of the policy's output on noised images: what it was pretrained with."""
    x0 = policy.encode_images(images)
    noise = torch.stack([torch.randn(x0.shape[1:], generator=generator) for generator in generators]).to(x0.device)
    steps = policy.process.train_timesteps
    timestep = torch.cat([torch.randint(steps, (1,), generator=generator) for generator in generators])
    timestep = timestep.to(x0.device).float()
    output = policy.predict(policy.process.add_noise(x0, noise, timestep), timestep, policy.encode(captions), 1.0)
    return F.mse_loss(output, policy.process.target(x0, noise, timestep))
