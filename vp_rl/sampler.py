"""From noise to images: one sampler serves every algorithm.

`sample` makes images, or goes part of the way to them (ReFL); `rollout` keeps the whole trajectory with its
log-probabilities (DDPO), `branch` one random step on an otherwise deterministic way (branching DDPO);
`transition` is any one step, with gradients.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float
from torch import Tensor

from vp_rl.configuration.kinds import Amount, Count, Noise, Scales
from vp_rl.functional import gaussian_kl, gaussian_log_prob, rows
from vp_rl.interfaces import Policy
from vp_rl.types import SCALE, Branches, Conditioning, Latents, Negative, Steps, Trajectory, Transition, take

Generators = torch.Generator | Sequence[torch.Generator] | None


@runtime_checkable
class KeepsCoefficients(Protocol):
    """A process that has coefficients-preserving steps (CPS) beside its own."""

    def cps_transition(self, output: Latents, latents: Latents, step: Steps, steps: int, eta: float) -> Transition:
        """Like `Process.transition`."""
        ...


@dataclass(frozen=True)
class Sampler:
    """How images are sampled.

    Attributes:
        steps: denoising steps.
        guidance: classifier-free guidance scale; 1.0 is none and halves the cost, and so is 0, as model cards write it.
        eta: noise of each step, 0 (deterministic) to 1 (ancestral).
        noise: how it is added: `sde`, as the process has it, or `cps`, for flow models: see `Flow.cps_transition`.
        negative: what guidance points away from while it trains: `train`, the policy, both halves learning; `detach`,
            the policy, its half for the prompt alone learning, which saves a quarter of a training step; `base`, the
            model without its adapter. Whoever samples with plain diffusers has the policy in both halves.
        scales: guidance scales of which one is drawn for each prompt, in place of `guidance`; None: that one.
    """

    steps: Count = 20
    guidance: Amount = 5.0
    eta: Amount = 0.0
    noise: Noise = "sde"
    negative: Negative = "train"
    scales: Scales | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or self.guidance < 0 or self.eta < 0:
            raise ValueError(f"A sampler needs steps >= 1, guidance >= 0 and eta >= 0; got {self}.")
        if self.scales is not None and not (self.scales and min(self.scales) >= 1):
            raise ValueError(
                f"sampler.scales={self.scales} must be guidance scales of at least 1; null: guidance alone."
            )
        if 0 < self.guidance < 1:
            raise ValueError(
                f"A sampler's guidance={self.guidance} is between 0 and 1: diffusers takes that for none, and its "
                "formula for leading away from the prompt. Set it to 1, which is none, or above."
            )
        if self.noise == "cps" and self.eta > 1:
            raise ValueError(f"sampler.eta={self.eta} must be at most 1 with sampler.noise=cps: all noise is new then.")

    def window(self, setting: str, low: float, high: float) -> range:
        """The steps between two shares of all steps, at least one.

        Raises:
            ValueError: these are not rising shares; names the `setting` that gave them.
        """
        if not 0 <= low <= high <= 1:
            raise ValueError(f"{setting}={(low, high)} must be two rising shares of the steps, in [0, 1].")
        first = min(int(low * self.steps), self.steps - 1)
        return range(first, max(first + 1, int(high * self.steps)))

    def stds(self, policy: Policy) -> Float[Tensor, " steps"]:
        """Standard deviation of each step: it depends on the schedule alone."""
        zeros = torch.zeros(self.steps, 1)
        return self._step(policy, zeros, zeros, torch.arange(self.steps)).std

    def with_scales(self, conditioning: Conditioning, generators: Sequence[torch.Generator]) -> Conditioning:
        """The prompts' conditioning with a guidance scale drawn for each, if there are several to draw from."""
        if self.scales is None:
            return conditioning
        drawn = [self.scales[int(torch.randint(len(self.scales), (1,), generator=each))] for each in generators]
        like = next(iter(conditioning.values()))
        return {**conditioning, SCALE: torch.tensor(drawn, device=like.device)}

    @torch.no_grad()
    def sample(
        self, policy: Policy, conditioning: Conditioning, generator: Generators = None, until: int | None = None
    ) -> Latents:
        """Latents for each row of `conditioning`: finished ones, or those before step `until`.

        A generator for each row makes rows independent of batching.
        """
        latents = self._noise(policy, conditioning, generator)
        with policy.merged():
            return self.walk(policy, latents, range(self.steps)[:until], conditioning, generator)

    @torch.no_grad()
    def rollout(
        self,
        policy: Policy,
        conditioning: Conditioning,
        generator: Generators = None,
        random: Collection[int] | None = None,
        means: bool = False,
    ) -> Trajectory:
        """The whole way from noise to finished latents, with the log-probability of each step.

        Args:
            random: the steps that are taken with noise, the others without (MixGRPO); None: all of them.
            means: whether the steps' means are kept too.
        """
        still = replace(self, eta=0.0)
        latents = self._noise(policy, conditioning, generator)
        path, centres, log_probs, stds = [latents], [], [], []
        with policy.merged():
            for step in range(self.steps):
                sampler = self if random is None or step in random else still
                transition = sampler.transition(policy, latents, self._at(step, latents), conditioning)
                latents = sampler.draw(transition, generator)
                path.append(latents)
                centres += [transition.mean] if means else []
                log_probs.append(log_prob_of(latents, transition))
                stds.append(transition.std[0])
        kept = torch.stack(centres, 1) if means else latents[:, None][:, :0]
        return Trajectory(torch.stack(path, 1), torch.stack(log_probs, 1), torch.stack(stds), kept)

    @torch.no_grad()
    def branch(
        self,
        policy: Policy,
        conditioning: Conditioning,
        step: int,
        each: int,
        generator: Generators = None,
        batch: int = 64,
        parting: Generators = None,
    ) -> Branches:
        """`each` samples for each row of `conditioning` that part at `step` alone.

        They share the starting noise and the deterministic way to `step`, draw their own noise there, and go on
        without any, `batch` at a time. So whatever tells them apart is the doing of that one step.

        Args:
            generator: of the starting noise: one for each row makes rows independent of batching.
            parting: of the noise at `step`, one for each sample; None: `generator`, if that is a single one.
        """
        still = replace(self, eta=0.0)
        with policy.merged():
            latents = still.sample(policy, conditioning, generator, until=step)
            apart = repeat(self.transition(policy, latents, self._at(step, latents), conditioning), each)
            after = self.draw(apart, generator if parting is None else parting)
            row = torch.arange(len(latents), device=latents.device).repeat_interleave(each)
            finished = [
                still.walk(policy, chunk, range(step + 1, self.steps), take(conditioning, rows))
                for chunk, rows in zip(after.split(batch), row.split(batch), strict=True)
            ]
        shape = (len(latents), each)
        return Branches(
            latents,
            after.unflatten(0, shape),
            log_prob_of(after, apart).unflatten(0, shape),
            torch.cat(finished).unflatten(0, shape),
        )

    def transition(self, policy: Policy, latents: Latents, step: Steps, conditioning: Conditioning) -> Transition:
        """The policy's Gaussian step from `latents`; rows may be at different steps. Gradients flow."""
        return self._step(policy, self.output(policy, latents, step, conditioning), latents, step)

    def output(self, policy: Policy, latents: Latents, step: Steps, conditioning: Conditioning) -> Latents:
        """The denoiser's output at steps, after guidance. Gradients flow."""
        timestep = policy.process.timesteps(self.steps, latents.device)[step]
        # Rows without a drawn scale are the planner's: it counts the most that there may be.
        guidance = self.guidance if self.scales is None else max(self.scales)
        if self.negative == "train":  # a policy without a negative half need not know of it
            return policy.predict(latents, timestep, conditioning, guidance)
        return policy.predict(latents, timestep, conditioning, guidance, self.negative)

    def _step(self, policy: Policy, output: Latents, latents: Latents, step: Steps) -> Transition:
        process = policy.process
        if self.noise == "sde":
            return process.transition(output, latents, step, self.steps, self.eta)
        if not isinstance(process, KeepsCoefficients):
            raise ValueError(
                f"sampler.noise=cps is for flow models (policy=sd3, flux), and this policy's steps are "
                f"{type(process).__name__}'s, which keep the coefficients as they are: leave sampler.noise at sde."
            )
        return process.cps_transition(output, latents, step, self.steps, self.eta)

    def kl_to_reference(
        self, policy: Policy, transition: Transition, latents: Latents, step: Steps, conditioning: Conditioning
    ) -> Float[Tensor, " batch"]:
        """KL of the policy's steps to those without its adapter, averaged over latent dimensions.

        Gradients flow into `transition` alone. Its steps must be random ones.
        """
        with torch.no_grad(), policy.reference():
            reference = self.transition(policy, latents, step, conditioning)
        return gaussian_kl(transition.mean, reference.mean, transition.std)

    def _noise(self, policy: Policy, conditioning: Conditioning, generator: Generators) -> Latents:
        return policy.noise(_batch(conditioning), generator) * policy.process.start(self.steps)

    def walk(
        self,
        policy: Policy,
        latents: Latents,
        steps: range,
        conditioning: Conditioning,
        generator: Generators = None,
    ) -> Latents:
        """Latents after these steps, in their order. Gradients flow, unless the caller switches them off."""
        for step in steps:
            latents = self.draw(self.transition(policy, latents, self._at(step, latents), conditioning), generator)
        return latents

    @staticmethod
    def _at(step: int, latents: Latents) -> Steps:
        return torch.full((len(latents),), step, device=latents.device)

    def draw(self, transition: Transition, generator: Generators) -> Latents:
        """A sample of a step: its mean, and noise where it has any."""
        if self.eta == 0:
            return transition.mean
        return transition.mean + rows(transition.std, transition.mean) * _noise_like(transition.mean, generator)


def repeat(transition: Transition, each: int) -> Transition:
    """Every row `each` times, for several draws from the same step."""
    return Transition(*(tensor.repeat_interleave(each, 0) for tensor in transition))


def log_prob_of(latents: Latents, transition: Transition) -> Float[Tensor, " batch"]:
    """Log-density of `latents` under the step that led to them; 0 where the step is deterministic and has none."""
    random = transition.std > 0
    std = torch.where(random, transition.std, 1.0)
    return torch.where(random, gaussian_log_prob(latents, transition.mean, std), 0.0)


def _noise_like(latents: Latents, generator: Generators) -> Latents:
    """As diffusers draws it: where its generators are. From there it is sent without waiting for the device."""
    several = isinstance(generator, Sequence)
    place = generator[0].device if several else generator.device if generator else latents.device
    noise = randn_tensor(latents.shape, list(generator) if several else generator, place, latents.dtype)
    if latents.is_cuda and not noise.is_cuda:
        noise = noise.pin_memory()
    return noise.to(latents.device, non_blocking=True)


def _batch(conditioning: Conditioning) -> int:
    return len(next(iter(conditioning.values())))
