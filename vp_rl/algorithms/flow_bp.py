"""FlowBP-Sparse (Wang et al. 2026, arXiv:2606.11075): the reward's gradient at a few steps of the whole way.

A deterministic step of a diffusion or flow sampler is linear in what it begins with and in the denoiser's output, so
the finished latents are c_T x_T + sum_i c_i output_i with coefficients that the schedule alone gives. An image is
sampled without gradients; K of its steps are drawn, step i (0 is the noisiest) with weight (i + 1)^late_bias, and the
denoiser is run again at them, on the latents that were sampled. The image that is scored is the sampled one; its
gradient is that of the sum above in those K outputs. None goes through the latents from step to step, so that early
steps are reached without the products of Jacobians that blow up.

The gradient of K of the steps is a part of that of all: it is multiplied by 1 + rescale (sum |c| / sum over the K of
|c| - 1). With rescale = 1 the K stand for all, with 0 for themselves.

What differs from the published code (RuoyuWang-2077/FlowBP@93b220a, for rectified flow):
1. DDIM of noise, v and clean predictions as well: its c_i are as closed as Euler's differences of noise levels.
2. Each image has steps of its own, not each batch: an update sees more of the way.
3. Gradients go through both halves of guidance; there the one without prompt is detached.
4. The score is maximised as it is, without a hinge.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vp_rl.algorithms.base import MakeOptimizer
from vp_rl.algorithms.reward_gradient import Finished, RewardGradient, checkpointed
from vp_rl.configuration import kinds
from vp_rl.functional import rows
from vp_rl.interfaces import Policy, Process, Reward
from vp_rl.sampler import Generators, Sampler
from vp_rl.types import Conditioning, Latents

_LARGE = 1e4  # what no latents are
Way = Float[Tensor, "batch points *latent"]
"""Latents from noise to finished ones, before each step and at the end."""


class FlowBP(RewardGradient):
    """Fine-tunes a policy by back-propagating a differentiable reward into a few outputs along its sampling way.

    Args:
        policy, reward, sampler, optimizer, decay, seed, reward_weight, pretrain_weight: see `RewardGradient`. The
            sampler must be deterministic.
        active_steps: K, the steps of each image that have gradients; None: all.
        late_bias: how much rather late steps are drawn; 0: all alike.
        rescale: how far the gradient of the K is scaled up to that of all steps.
        checkpoint_steps: whether each step's activations are computed again for its gradient, rather than kept.

    Raises:
        ValueError: the reward is not differentiable, the sampler is random or not linear, or a setting is outside its
            range.
    """

    def __init__(
        self,
        policy: Policy,
        reward: Reward,
        sampler: Sampler,
        optimizer: MakeOptimizer,
        *,
        active_steps: kinds.Count | None = 4,
        late_bias: kinds.Amount = 1.0,
        rescale: kinds.Amount = 0.5,
        checkpoint_steps: bool = True,
        reward_weight: kinds.Amount = 1.0,
        pretrain_weight: kinds.Amount = 0.0,
        decay: bool = False,
        seed: kinds.Seed = 0,
    ) -> None:
        weights = {"reward_weight": reward_weight, "pretrain_weight": pretrain_weight}
        super().__init__(policy, reward, sampler, optimizer, **weights, decay=decay, seed=seed)
        self._number = sampler.steps if active_steps is None else active_steps
        if not 1 <= self._number <= sampler.steps:
            raise ValueError(f"algorithm.active_steps={active_steps} must be from 1 to sampler.steps={sampler.steps}.")
        if not (late_bias >= 0 and rescale >= 0):
            raise ValueError(f"algorithm.late_bias={late_bias} and rescale={rescale} must be 0 or more.")
        if sampler.eta:
            raise ValueError(f"FlowBP needs a deterministic sampler: set sampler.eta=0 (it is {sampler.eta}).")
        _, self._of_outputs = coefficients(policy.process, sampler.steps)
        self._chances = (torch.arange(sampler.steps) + 1.0) ** late_bias
        self.starts, self._rescale, self._checkpoint = [sampler.steps], rescale, checkpoint_steps

    def begin(self, start: int, conditioning: Conditioning, noise: Generators) -> Way:
        """All latents of the way."""
        return self.sampler.rollout(self.policy, conditioning, noise).latents

    def finish(self, latents: Way, start: int, conditioning: Conditioning, noise: Generators) -> Finished:
        """The images that were sampled; gradients go into the outputs at the steps that are drawn."""
        steps = self._drawn(len(latents), noise).to(latents.device)
        of_outputs = self._of_outputs.to(latents.device)
        active = of_outputs[steps]
        part = active.abs().sum(1, keepdim=True).clamp(min=1e-8)  # 0 where the steps that were drawn count for nothing
        weights = (1 + self._rescale * (of_outputs.abs().sum() / part - 1)) * active
        composed = torch.zeros_like(latents[:, -1])
        for number in range(self._number):
            output = self._output(latents, steps[:, number], conditioning)
            composed = composed + rows(weights[:, number], output) * output
        # The other terms of the sum have no gradient, and its value is the sampled one's.
        return Finished(self.policy.decode(latents[:, -1] + (composed - composed.detach())))

    def _drawn(self, images: int, noise: Generators) -> Int[Tensor, "images active"]:
        """Different steps for each image, by its own generator."""
        if isinstance(noise, Sequence):
            return torch.stack([torch.multinomial(self._chances, self._number, generator=one) for one in noise])
        return torch.multinomial(self._chances.expand(images, -1), self._number, generator=noise)

    def _output(self, way: Way, step: Int[Tensor, " batch"], conditioning: Conditioning) -> Latents:
        there = way[torch.arange(len(way), device=way.device), step]

        def predicted(latents: Latents) -> Latents:
            return self.sampler.output(self.policy, latents, step, conditioning)

        return checkpointed(predicted, there) if self._checkpoint and torch.is_grad_enabled() else predicted(there)

    def made_up(self, latents: Latents) -> Way:
        """The same latents all the way."""
        return latents[:, None].repeat_interleave(self.sampler.steps + 1, 1)


def coefficients(process: Process, steps: int) -> tuple[float, Float[Tensor, " steps"]]:
    """What the deterministic sampler's finished latents are made of: of the first latents, and of each step's output.

    Raises:
        ValueError: its steps are not linear in these.
    """
    at, zeros = torch.arange(steps), torch.zeros(steps, 1)

    def of(output: float, latents: float) -> Tensor:
        mean = process.transition(zeros + output, zeros + latents, at, steps, 0.0).mean
        return mean[:, 0].double()

    kept, gained = of(0.0, 1.0), of(1.0, 0.0)
    for found, expected in ((of(0.0, _LARGE), kept), (of(_LARGE, 0.0), gained)):
        if not torch.allclose(found / _LARGE, expected, rtol=1e-4, atol=1e-4):
            raise ValueError(
                "FlowBP needs a sampler whose steps are linear in the denoiser's output, and this model's scheduler "
                "clips what is predicted (clip_sample). Save the pipeline with clip_sample=False, or take "
                "algorithm=draft, which differentiates any deterministic sampler."
            )
    after = torch.cat([kept.flip(0).cumprod(0).flip(0)[1:], torch.ones(1).double()])
    return kept.prod().item(), (gained * after).float()
