"""DDIM (Song et al. 2021), the sampling process of Stable Diffusion 1.x, 2.x and XL, with its density for DDPO."""

from copy import deepcopy
from typing import NamedTuple

import torch
from diffusers import DDIMParallelScheduler, DDIMScheduler, EulerDiscreteScheduler, SchedulerMixin
from jaxtyping import Float
from torch import Tensor

from vp_rl.functional import rows
from vp_rl.interfaces import Process
from vp_rl.processes.schedulers import for_ddim, prediction_of
from vp_rl.types import Latents, Steps, Transition


class DDIM(Process):
    """The schedule is that of a pipeline's scheduler; the transition is ours (equation 12).

    Predictions of the noise (`epsilon`), of `v_prediction` and of the clean `sample` are understood.

    Args:
        scheduler: as a loaded pipeline has it. Euler's steps are DDIM's; any other sampler has DDIM in its place, with
            a warning.
    """

    def __init__(self, scheduler: SchedulerMixin) -> None:
        self._scheduler = deepcopy(for_ddim(scheduler))  # which remembers the steps that it was last asked for
        config = self._scheduler.config
        self._prediction: str = prediction_of(self._scheduler)
        self._clip: float | None = config["clip_sample_range"] if config.get("clip_sample") else None
        self._alphas: Tensor = self._scheduler.alphas_cumprod.float()
        self._train_steps: int = config["num_train_timesteps"]
        self._cache: dict[tuple[int, torch.device], _Schedule] = {}
        self._starts: dict[int, float] = {}

    @property
    def train_timesteps(self) -> int:
        """Of the scheduler."""
        return self._train_steps

    def timesteps(self, steps: int, device: torch.device | None = None) -> Float[Tensor, " steps"]:
        """The scheduler's timesteps, highest first."""
        return self._schedule(steps, device or torch.device("cpu")).timesteps

    def start(self, steps: int) -> float:
        """1, but for Euler's schedulers that begin as if the first level were of noise alone."""
        self._schedule(steps, torch.device("cpu"))
        return self._starts.get(steps, 1.0)

    def _schedule(self, steps: int, device: torch.device) -> "_Schedule":
        if (steps, device) not in self._cache:
            if not 1 <= steps <= self._train_steps:
                raise ValueError(f"steps must be between 1 and {self._train_steps}, not {steps}.")
            scheduler = deepcopy(self._scheduler)
            scheduler.set_timesteps(steps)
            if len(scheduler.timesteps) != steps or scheduler.timesteps.max() >= self._train_steps:
                raise ValueError(
                    f"steps={steps} does not fit this model's scheduler: it would take {len(scheduler.timesteps)} from "
                    f"timestep {scheduler.timesteps.max():g} of {self._train_steps}. Take another number of steps."
                )
            schedule = (
                self._euler(scheduler) if isinstance(scheduler, EulerDiscreteScheduler) else self._ddim(scheduler)
            )
            self._cache[steps, device] = _Schedule(*(tensor.to(device) for tensor in schedule))
        return self._cache[steps, device]

    def _ddim(self, scheduler: DDIMScheduler | DDIMParallelScheduler) -> "_Schedule":
        now = scheduler.timesteps.long()
        after, last = now - self._train_steps // len(now), torch.tensor(float(scheduler.final_alpha_cumprod))
        alphas_after = torch.where(after >= 0, self._alphas[after.clamp(min=0)], last)
        return _Schedule(now.float(), self._alphas[now], alphas_after, torch.ones(len(now)))

    def _euler(self, scheduler: EulerDiscreteScheduler) -> "_Schedule":
        """Its latents are DDIM's over the square root of alpha, which it gives back undivided only at the end."""
        # With interpolation_type=log_linear there is one level more than steps go through.
        squares = scheduler.sigmas.double().cpu()[: len(scheduler.timesteps) + 1] ** 2
        alphas, lengths = 1 / (1 + squares), torch.ones(len(squares) - 1)
        lengths[-1] = (1 + squares[-1]).sqrt()
        self._starts[len(lengths)] = float(scheduler.init_noise_sigma / (1 + squares[0]).sqrt())
        return _Schedule(scheduler.timesteps.float().cpu(), alphas[:-1].float(), alphas[1:].float(), lengths)

    def transition(self, output: Latents, latents: Latents, step: Steps, steps: int, eta: float) -> Transition:
        """N(mean, std^2) of DDIM's step: eta 0 is deterministic, 1 has the ancestral sampler's variance."""
        output, latents = output.float(), latents.float()
        _, alphas, alphas_after, lengths = self._schedule(steps, latents.device)
        alpha, alpha_after, length = alphas[step], alphas_after[step], lengths[step]
        x0, epsilon = self._denoised(output, latents, rows(alpha, latents))
        variance = (1 - alpha_after) / (1 - alpha) * (1 - alpha / alpha_after)
        std = eta * variance.clamp(min=0).sqrt()
        direction = (1 - alpha_after - std.square()).clamp(min=0).sqrt()
        mean = rows(alpha_after.sqrt(), latents) * x0 + rows(direction, latents) * epsilon
        return Transition(mean=rows(length, latents) * mean, std=length * std, x0=x0)

    def _denoised(self, output: Tensor, latents: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """The clean latents and the noise that the output stands for."""
        signal, noise = alpha.sqrt(), (1 - alpha).sqrt()
        if self._prediction == "epsilon":
            x0, epsilon = (latents - noise * output) / signal, output
        elif self._prediction == "v_prediction":
            x0, epsilon = signal * latents - noise * output, signal * output + noise * latents
        else:
            x0, epsilon = output, (latents - signal * output) / noise
        # As in diffusers, clipping changes x0 alone and leaves the direction to x_t as predicted.
        return (x0 if self._clip is None else x0.clamp(-self._clip, self._clip)), epsilon

    def add_noise(self, x0: Latents, noise: Latents, timestep: Float[Tensor, " batch"]) -> Latents:
        """sqrt(a_t) x0 + sqrt(1 - a_t) noise."""
        alpha = rows(self._alphas.to(x0.device)[timestep.long()], x0)
        return alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise

    def target(self, x0: Latents, noise: Latents, timestep: Float[Tensor, " batch"]) -> Latents:
        """The noise, the velocity or the clean latents, as the scheduler's prediction type says."""
        if self._prediction == "epsilon":
            return noise
        if self._prediction == "sample":
            return x0
        alpha = rows(self._alphas.to(x0.device)[timestep.long()], x0)
        return alpha.sqrt() * noise - (1 - alpha).sqrt() * x0


class _Schedule(NamedTuple):
    """By step: what the denoiser is told, cumulative alpha before and after, and what the step's result is times."""

    timesteps: Float[Tensor, " steps"]
    alphas: Float[Tensor, " steps"]
    alphas_after: Float[Tensor, " steps"]
    lengths: Float[Tensor, " steps"]
