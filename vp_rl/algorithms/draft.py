"""DRaFT (Clark et al. 2023, arXiv:2309.17400): the reward's gradient through the last sampling steps.

Objective: maximise E[r(image, prompt)], the gradient being that of the last K steps alone. K = 1 is ReFL at the last
step without its hinge; K = all steps is the gradient of the whole sampler. `renoise` is DRaFT-LV: the finished latents
of the last step are noised again n times and denoised again, each with a gradient, which averages out what one noise
would say.

Where a schedule's last step begins at timestep 0 or 1, as diffusers' "leading" spacing has it, that step changes hardly
anything, and its gradient is hardly any: take K = 2 or more there.

What differs from the paper: a window of steps can be checkpointed, one by one, so that memory does not grow with K;
guidance and the sampler are settings.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vp_rl.algorithms.base import MakeOptimizer
from vp_rl.algorithms.reward_gradient import Finished, RewardGradient, checkpointed
from vp_rl.configuration import kinds
from vp_rl.interfaces import Policy, Reward
from vp_rl.sampler import Generators, Sampler
from vp_rl.types import Conditioning, Latents


class DRaFT(RewardGradient):
    """Fine-tunes a policy by back-propagating a differentiable reward through its last sampling steps.

    Args:
        policy, reward, sampler, optimizer, decay, seed, reward_weight, pretrain_weight: see `RewardGradient`. The
            sampler must be deterministic.
        last_steps: K, the steps that gradients go through; None: all.
        renoise: n, with K = 1: re-noised copies of each image (DRaFT-LV); 0: the image itself.
        checkpoint_steps: whether each step's activations are computed again for its gradient, rather than kept.

    Raises:
        ValueError: the reward is not differentiable, the sampler is random, or the steps are none it has.
    """

    def __init__(
        self,
        policy: Policy,
        reward: Reward,
        sampler: Sampler,
        optimizer: MakeOptimizer,
        *,
        last_steps: kinds.Count | None = 1,
        renoise: kinds.Whole = 0,
        checkpoint_steps: bool = True,
        reward_weight: kinds.Amount = 1.0,
        pretrain_weight: kinds.Amount = 0.0,
        decay: bool = False,
        seed: kinds.Seed = 0,
    ) -> None:
        weights = {"reward_weight": reward_weight, "pretrain_weight": pretrain_weight}
        super().__init__(policy, reward, sampler, optimizer, **weights, decay=decay, seed=seed)
        steps = sampler.steps if last_steps is None else last_steps
        if not 1 <= steps <= sampler.steps:
            raise ValueError(f"algorithm.last_steps={last_steps} must be from 1 to sampler.steps={sampler.steps}.")
        if renoise < 0 or (renoise and steps > 1):
            raise ValueError(f"algorithm.renoise={renoise} must be 0 or more, and needs algorithm.last_steps=1.")
        if sampler.eta:
            raise ValueError(f"DRaFT differentiates a deterministic sampler: set sampler.eta=0 (it is {sampler.eta}).")
        self.starts, self._renoise, self._checkpoint = [sampler.steps - steps], renoise, checkpoint_steps

    def finish(self, latents: Latents, start: int, conditioning: Conditioning, noise: Generators) -> Finished:
        """The last steps with gradients; with `renoise` the last one, of several noisings of its result."""
        if not self._renoise:
            for step in range(start, self.sampler.steps):
                latents = self._step(latents, step, conditioning)
            return Finished(self.policy.decode(latents))
        last, number = self.sampler.steps - 1, self._renoise
        with torch.no_grad():
            finished = self._step(latents, last, conditioning).repeat_interleave(number, 0)
            drawn = self._noise_like(latents, noise)
        timestep = self.policy.process.timesteps(self.sampler.steps, latents.device)[last].expand(len(finished))
        conditions = {name: tensor.repeat_interleave(number, 0) for name, tensor in conditioning.items()}
        again = self.policy.process.add_noise(finished, drawn, timestep)
        return Finished(self.policy.decode(self._step(again, last, conditions)), each=number)

    def _step(self, latents: Latents, step: int, conditioning: Conditioning) -> Latents:
        def taken(latents: Latents) -> Latents:
            at = torch.full((len(latents),), step, device=latents.device)
            return self.sampler.transition(self.policy, latents, at, conditioning).mean

        if self._checkpoint and torch.is_grad_enabled():
            return checkpointed(taken, latents)
        return taken(latents)

    def _noise_like(self, latents: Latents, noise: Generators) -> Tensor:
        """For each row `renoise` noises of its own."""
        each = list(noise) if isinstance(noise, Sequence) else [noise] * len(latents)
        drawn = [torch.randn(latents.shape[1:], generator=one) for one in each for _ in range(self._renoise)]
        return torch.stack(drawn).to(latents)
