"""DDIM (Song et al. 2021), the sampling process of Stable Diffusion 1.x and 2.x, with its density for DDPO."""

from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from jaxtyping import Float
from torch import Tensor

from vp_rl.functional import rows
from vp_rl.interfaces import Process
from vp_rl.types import Latents, Steps, Transition


class DDIM(Process):
    """The schedule is diffusers' own, built from a pipeline's scheduler config; the transition is ours (equation 12).

    Predictions of the noise (`epsilon`), of `v_prediction` and of the clean `sample` are understood.
    """

    def __init__(self, scheduler_config: dict[str, Any]) -> None:
        self._config = dict(scheduler_config)
        scheduler = DDIMScheduler.from_config(self._config)
        if scheduler.config["thresholding"]:
            raise ValueError("This scheduler uses dynamic thresholding, for which a step has no Gaussian density.")
        if scheduler.config["prediction_type"] not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(f"Unknown prediction type {scheduler.config['prediction_type']!r} in the scheduler.")
        self._prediction: str = scheduler.config["prediction_type"]
        self._clip: float | None = scheduler.config["clip_sample_range"] if scheduler.config["clip_sample"] else None
        self._alphas: Tensor = scheduler.alphas_cumprod.float()
        self._final_alpha = float(scheduler.final_alpha_cumprod)
        self._train_steps: int = scheduler.config["num_train_timesteps"]
        self._cache: dict[tuple[int, torch.device], tuple[Tensor, Tensor, Tensor]] = {}

    @property
    def train_timesteps(self) -> int:
        """Of the scheduler."""
        return self._train_steps

    def timesteps(self, steps: int, device: torch.device | None = None) -> Float[Tensor, " steps"]:
        """The scheduler's timesteps, highest first."""
        return self._schedule(steps, device or torch.device("cpu"))[0]

    def _schedule(self, steps: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Timesteps, cumulative alpha at each step and after it; each (steps,)."""
        if (steps, device) not in self._cache:
            if not 1 <= steps <= self._train_steps:
                raise ValueError(f"steps must be between 1 and {self._train_steps}, not {steps}.")
            scheduler = DDIMScheduler.from_config(self._config)
            scheduler.set_timesteps(steps)
            now = scheduler.timesteps.long()
            after = now - self._train_steps // steps
            alpha_after = torch.where(after >= 0, self._alphas[after.clamp(min=0)], torch.tensor(self._final_alpha))
            schedule = (now.float(), self._alphas[now], alpha_after)
            self._cache[steps, device] = tuple(tensor.to(device) for tensor in schedule)  # type: ignore[assignment]
        return self._cache[steps, device]

    def transition(self, output: Latents, latents: Latents, step: Steps, steps: int, eta: float) -> Transition:
        """N(mean, std^2) of DDIM's step: eta 0 is deterministic, 1 has the ancestral sampler's variance."""
        output, latents = output.float(), latents.float()
        _, alphas, alphas_after = self._schedule(steps, latents.device)
        alpha, alpha_after = alphas[step], alphas_after[step]
        x0, epsilon = self._denoised(output, latents, rows(alpha, latents))
        variance = (1 - alpha_after) / (1 - alpha) * (1 - alpha / alpha_after)
        std = eta * variance.clamp(min=0).sqrt()
        direction = (1 - alpha_after - std.square()).clamp(min=0).sqrt()
        mean = rows(alpha_after.sqrt(), latents) * x0 + rows(direction, latents) * epsilon
        return Transition(mean=mean, std=std, x0=x0)

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
