"""From noise to images: one sampler serves every algorithm.

`sample` makes images, or goes part of the way to them (ReFL); `rollout` keeps the whole trajectory with its
log-probabilities (DDPO); `transition` is any one step, with gradients.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float
from torch import Tensor

from vp_rl.functional import gaussian_log_prob, rows
from vp_rl.interfaces import Policy
from vp_rl.types import Conditioning, Latents, Steps, Trajectory, Transition

Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass(frozen=True)
class Sampler:
    """How images are sampled.

    Attributes:
        steps: denoising steps.
        guidance: classifier-free guidance scale; 1.0 is none and halves the cost.
        eta: noise of each step, 0 (deterministic) to 1 (ancestral).
    """

    steps: int = 20
    guidance: float = 5.0
    eta: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.guidance < 0 or self.eta < 0:
            raise ValueError(f"A sampler needs steps >= 1, guidance >= 0 and eta >= 0; got {self}.")

    @torch.no_grad()
    def sample(
        self, policy: Policy, conditioning: Conditioning, generator: Generators = None, until: int | None = None
    ) -> Latents:
        """Latents for each row of `conditioning`: finished ones, or those before step `until`.

        A generator for each row makes rows independent of batching.
        """
        latents = policy.noise(_batch(conditioning), generator)
        for step in range(self.steps if until is None else until):
            transition = self.transition(policy, latents, self._at(step, latents), conditioning)
            latents = self._draw(transition, generator)
        return latents

    @torch.no_grad()
    def rollout(self, policy: Policy, conditioning: Conditioning, generator: Generators = None) -> Trajectory:
        """The whole way from noise to finished latents, with the log-probability of each step."""
        latents = policy.noise(_batch(conditioning), generator)
        path, log_probs, stds = [latents], [], []
        for step in range(self.steps):
            transition = self.transition(policy, latents, self._at(step, latents), conditioning)
            latents = self._draw(transition, generator)
            path.append(latents)
            log_probs.append(log_prob_of(latents, transition))
            stds.append(transition.std[0])
        return Trajectory(torch.stack(path, 1), torch.stack(log_probs, 1), torch.stack(stds))

    def transition(self, policy: Policy, latents: Latents, step: Steps, conditioning: Conditioning) -> Transition:
        """The policy's Gaussian step from `latents`; rows may be at different steps. Gradients flow."""
        timestep = policy.process.timesteps(self.steps).to(latents.device)[step]
        output = policy.predict(latents, timestep, conditioning, self.guidance)
        return policy.process.transition(output, latents, step, self.steps, self.eta)

    @staticmethod
    def _at(step: int, latents: Latents) -> Steps:
        return torch.full((len(latents),), step, device=latents.device)

    def _draw(self, transition: Transition, generator: Generators) -> Latents:
        if self.eta == 0:
            return transition.mean
        mean = transition.mean
        several = isinstance(generator, Sequence)
        noise = randn_tensor(mean.shape, list(generator) if several else generator, mean.device, mean.dtype)
        return mean + rows(transition.std, mean) * noise


def log_prob_of(latents: Latents, transition: Transition) -> Float[Tensor, " batch"]:
    """Log-density of `latents` under the step that led to them; 0 where the step is deterministic and has none."""
    random = transition.std > 0
    std = torch.where(random, transition.std, 1.0)
    return torch.where(random, gaussian_log_prob(latents, transition.mean, std), 0.0)


def _batch(conditioning: Conditioning) -> int:
    return len(next(iter(conditioning.values())))
