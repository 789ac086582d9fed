"""Rectified flow (Liu et al. 2022), the process of Stable Diffusion 3 and FLUX, with Flow-GRPO's density for DDPO.

Latents go from noise (t = 1) to images (t = 0) on straight lines, x_t = (1 - t) x0 + t eps; the denoiser predicts the
velocity v = eps - x0. Following v by Euler steps is deterministic. Flow-GRPO (Liu et al. 2025, arXiv:2505.05470,
equation 9) replaces that ODE by an SDE with the same marginals: with sigma_t = eta sqrt(t / (1 - t)), noise of standard
deviation sigma_t sqrt(-dt) is added in each step, and a drift of sigma_t^2 / 2t times the predicted noise takes as much
away. Its `eta` (there `a`, the noise level) is 0.7.

Steps that preserve the coefficients (CPS, Wang and Yu 2025, arXiv:2509.05952) are the other way, which Flow-GRPO's code
has too: what is predicted of the noise is turned by an angle, a part of it kept and the rest drawn anew.
"""

import math
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from diffusers import SchedulerMixin
from jaxtyping import Float
from torch import Tensor

from vp_rl.functional import rows
from vp_rl.interfaces import Process
from vp_rl.processes.schedulers import for_flow
from vp_rl.types import Latents, Steps, Transition


class Flow(Process):
    """The schedule is that of a pipeline's scheduler; the transition is ours.

    Two steps are not the SDE's:
    - The first has sigma_t of the second, as in Flow-GRPO's code: at t = 1 it would be infinite.
    - The last is deterministic, at any eta. Flow-GRPO adds noise there too, which stays in the image, and leaves that
      step out of training (`timestep_fraction` 0.99); one without density is left out by itself, and images stay clean.

    Args:
        scheduler: as a loaded pipeline has it; any other sampler of such models than Euler's has Euler's steps in its
            place, with a warning.
        tokens: of an image: what a schedule with `use_dynamic_shifting` is shifted by.
        even: whether t falls in even steps from 1 to 1 / steps before it is shifted, as in FLUX's pipeline; otherwise
            the scheduler itself chooses, as in Stable Diffusion 3's.
    """

    def __init__(self, scheduler: SchedulerMixin, tokens: int, even: bool = False) -> None:
        self._scheduler, self._even = deepcopy(for_flow(scheduler)), even
        config = self._scheduler.config
        self._train_steps: int = config["num_train_timesteps"]
        self._shift = _shift(config, tokens) if config["use_dynamic_shifting"] else None
        self._cache: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    @property
    def train_timesteps(self) -> int:
        """Of the scheduler."""
        return self._train_steps

    def timesteps(self, steps: int, device: torch.device | None = None) -> Float[Tensor, " steps"]:
        """1000 t at each step, highest first."""
        return self._schedule(steps, device or torch.device("cpu"))[0]

    def _schedule(self, steps: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Timesteps (steps,), and t before and after each step (steps + 1,)."""
        if (steps, device) not in self._cache:
            if not 1 <= steps <= self._train_steps:
                raise ValueError(f"steps must be between 1 and {self._train_steps}, not {steps}.")
            scheduler = deepcopy(self._scheduler)
            even = np.linspace(1.0, 1 / steps, steps).tolist() if self._even else None
            scheduler.set_timesteps(steps, sigmas=even, mu=self._shift)
            timesteps, times = torch.as_tensor(scheduler.timesteps), torch.as_tensor(scheduler.sigmas)
            self._cache[steps, device] = timesteps.to(device), times.to(device)
        return self._cache[steps, device]

    def transition(self, output: Latents, latents: Latents, step: Steps, steps: int, eta: float) -> Transition:
        """N(mean, std^2) of Flow-GRPO's step: eta 0 is the Euler step."""
        output, latents = output.float(), latents.float()
        _, times = self._schedule(steps, latents.device)
        now, after = times[step], times[step + 1]
        # sigma_t^2 / t, without the division that the last step would fail at.
        rate = torch.where(after > 0, eta**2 / (1 - now.clamp(max=times[1])), 0.0)
        time, change = rows(now, latents), rows(after - now, latents)
        noise = latents + (1 - time) * output
        mean = latents + change * (output + rows(rate / 2, latents) * noise)
        return Transition(mean=mean, std=(rate * now * (now - after)).sqrt(), x0=latents - time * output)

    def cps_transition(self, output: Latents, latents: Latents, step: Steps, steps: int, eta: float) -> Transition:
        """N(mean, std^2) of a coefficients-preserving step to t': std = t' sin(eta pi / 2), eta from 0 to 1.

        mean = (1 - t') x0 + t' cos(eta pi / 2) e, with x0 and e what is predicted of image and noise. As the squares of
        cosine and sine add up to 1, latents have as much image and as much noise as t' asks for, in whatever many steps
        (the SDE's Euler steps have too much noise if they are few). It is DDIM's own form of noise, in flow's
        coordinates. Eta 0 is the Euler step. The last step is deterministic.

        What it does not keep is the marginals: predictions are means, which vary less than images, and a share of them
        is forgotten in every step, however short. So images are of less variety than the ODE's (and smoother).
        """
        output, latents = output.float(), latents.float()
        _, times = self._schedule(steps, latents.device)
        now, after = times[step], times[step + 1]
        time, angle = rows(now, latents), eta * math.pi / 2
        noise = latents + (1 - time) * output
        forgotten = rows(after, latents) * (1 - math.cos(angle)) * noise
        mean = latents + rows(after - now, latents) * output - forgotten
        return Transition(mean=mean, std=after * math.sin(angle), x0=latents - time * output)

    def add_noise(self, x0: Latents, noise: Latents, timestep: Float[Tensor, " batch"]) -> Latents:
        """(1 - t) x0 + t noise."""
        time = rows(timestep / self._train_steps, x0)
        return (1 - time) * x0 + time * noise

    def target(self, x0: Latents, noise: Latents, timestep: Float[Tensor, " batch"]) -> Latents:
        """The velocity, which is the same at all times."""
        return noise - x0


def _shift(config: Any, tokens: int) -> float:
    """The exponent of the shift: linear in the number of image tokens."""
    small, large = config["base_image_seq_len"], config["max_image_seq_len"]
    slope = (config["max_shift"] - config["base_shift"]) / (large - small)
    return config["base_shift"] + slope * (tokens - small)
