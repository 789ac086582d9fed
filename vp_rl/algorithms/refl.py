"""ReFL (Xu et al. 2023): gradients of the reward through one late denoising step.

Objective: minimise weight * E[relu(target - r(x0_hat(x_t), prompt))] + pretrain_weight * E[|eps - eps_theta|^2].

What differs from the published script (paper.md 2.7):
1. A LoRA is trained, not the whole U-Net.
2. The stop step is drawn for each batch from a window of sampling steps given as a share of all steps, so that it
   means the same at 10 steps as at 40.
3. The pretraining loss, which the paper alternates and the script leaves out, is a term of every step: 0 by default.
4. Guidance and the sampler are settings; as in the script, the default is none.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vp_rl.algorithms.base import MakeOptimizer, PolicyTraining, total_norm
from vp_rl.configuration.kinds import Amount, Real, Seed, Span
from vp_rl.functional import hinge_reward_loss
from vp_rl.interfaces import Policy, Reward
from vp_rl.sampler import Sampler
from vp_rl.types import Conditioning, Images, Latents, PromptBatch, Steps

_SELF_TEST = 2  # prompts


class ReFL(PolicyTraining):
    """Fine-tunes a policy by back-propagating a differentiable reward.

    Args:
        policy, reward, sampler, optimizer, decay, seed: see `PolicyTraining`.
        window: first and last stop step as a share of the sampling steps; (0.75, 1.0) is the published 30-39 of 40.
        target: score at which an image is good enough and is pushed no further.
        reward_weight: scale of the reward loss; matters beside `pretrain_weight` and gradient clipping only.
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
        window: Span = (0.75, 1.0),
        target: Real = 2.0,
        reward_weight: Amount = 1e-3,
        pretrain_weight: Amount = 0.0,
        decay: bool = False,
        seed: Seed = 0,
    ) -> None:
        if not reward.differentiable:
            raise ValueError(
                f"ReFL needs gradients of the reward, and {type(reward).__name__} has none. "
                "Choose a differentiable reward, or algorithm=ddpo, which needs scores only."
            )
        super().__init__(policy, reward, sampler, optimizer, decay, seed)
        self.stops = sampler.window("algorithm.window", *window)
        self.target, self.reward_weight, self.pretrain_weight = target, reward_weight, pretrain_weight

    def training_step(self, batch: PromptBatch, batch_idx: int) -> Tensor:
        """One batch of prompts: sample to a random step, predict the image there, push its score up."""
        # Batches whose gradients are accumulated are one batch in pieces: of one stop step, their places going on.
        update, piece = divmod(batch_idx, self.trainer.accumulate_grad_batches)
        position = self.current_epoch, update
        latents, step, conditioning = self._sample(batch, piece, *position)
        transition = self.sampler.transition(self.policy, latents, step, conditioning)
        scores = self.score(self.policy.decode(transition.x0), batch.prompts)
        self.scores = scores.detach()[:, None]
        loss = self.reward_weight * hinge_reward_loss(scores, self.target)
        if self.pretrain_weight:
            loss = loss + self.pretrain_weight * self._pretrain_loss(batch, piece, *position)
        values = {"train/reward": scores[torch.isfinite(scores)].mean(), "train/loss": loss}
        if transition.std.all():  # a deterministic step has no density, so no KL
            values["train/kl"] = self.kl_to_reference(transition, latents, step, conditioning).mean()
        self.images += len(scores)
        self.log_dict(values, on_step=False, on_epoch=True, batch_size=len(scores), sync_dist=True)
        return loss

    def _sample(self, batch: PromptBatch, piece: int, *position: int) -> tuple[Latents, Steps, Conditioning]:
        """Latents before a random stop step, that step, and the encoded prompts."""
        stop = self.stops[int(torch.randint(len(self.stops), (1,), generator=self.generator(*position)))]
        first, sharing = batch.share
        places = range(len(batch.prompts)) if batch.places is None else batch.places
        before = piece * len(batch.prompts) * self.trainer.world_size // sharing
        noise = self.generators((before + place for place in places), [first], *position)
        conditioning = self.policy.encode(batch.prompts)
        latents = self.sampler.sample(self.policy, conditioning, noise, until=stop)
        return latents, torch.full((len(latents),), stop, device=latents.device), conditioning

    def self_test(self, batch: PromptBatch) -> str:
        """The reward's gradient must reach the adapter: finite, and not all zero."""
        prompts = batch.prompts[:_SELF_TEST]
        latents, step, conditioning = self._sample(PromptBatch(prompts), 0, -1)
        transition = self.sampler.transition(self.policy, latents, step, conditioning)
        trained = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        self.score(self.policy.decode(transition.x0), prompts).sum().backward()
        norm = total_norm([parameter.grad for parameter in trained if parameter.grad is not None])
        for parameter in trained:
            parameter.grad = None
        reward = type(self.reward).__name__
        if not math.isfinite(norm):
            raise ValueError(
                f"The gradient of {reward} on the adapter is not finite (stop step {int(step[0])}, prompts {prompts}): "
                "nothing can be learned from it. Try trainer.precision=32-true, or another algorithm.window."
            )
        if norm == 0:
            raise ValueError(
                f"No gradient of {reward} reaches the adapter (stop step {int(step[0])}, prompts {prompts}): nothing "
                "would be learned. Are all images black or white there, or does the reward cut its gradients off?"
            )
        return f"the reward's gradient reaches the adapter, with norm {norm:.1e}"

    def describe(self, batch: PromptBatch) -> str:
        """Its prompts; the stop step follows from the update."""
        return str(batch.prompts)

    def _pretrain_loss(self, batch: PromptBatch, piece: int, *position: int) -> Tensor:
        if batch.images is None or batch.captions is None:
            raise ValueError("algorithm.pretrain_weight needs images: set data.images to a VisionPrefer folder.")
        rank, devices = self.trainer.global_rank, self.trainer.world_size
        first = piece * len(batch.images) * devices + rank  # images are dealt to devices in turn
        generators = self.generators(range(first, first + len(batch.images) * devices, devices), [-1], *position)
        return denoising_loss(self.policy, batch.images, batch.captions, generators)


def denoising_loss(
    policy: Policy, images: Images, captions: list[str], generators: Sequence[torch.Generator]
) -> Tensor:
    """Mean squared error of the policy's output on noised images: what it was pretrained with."""
    x0 = policy.encode_images(images)
    noise = torch.stack([torch.randn(x0.shape[1:], generator=generator) for generator in generators]).to(x0.device)
    timestep = torch.cat([torch.randint(1000, (1,), generator=generator) for generator in generators])
    timestep = timestep.to(x0.device).float()
    output = policy.predict(policy.process.add_noise(x0, noise, timestep), timestep, policy.encode(captions), 1.0)
    return F.mse_loss(output, policy.process.target(x0, noise, timestep))
