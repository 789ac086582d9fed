"""Online training on the forward process: an image is noised anew, and its error counts by how good the image is.

What DiffusionNFT and advantage-weighted matching share. No trajectory is kept and no step needs a density, so images
may be sampled by any sampler, also a deterministic one with guidance; a few noise levels of each image are trained.

Rounds, devices and resumption are those of online.py. Errors are taken in the denoiser's own output space, so that
noise (epsilon), v and flow predictions go through the same code. What is trained is the conditional output, without
guidance.
"""

from abc import ABC
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vp_rl.algorithms.base import MakeOptimizer, draw_levels, trained_timesteps
from vp_rl.algorithms.online import OnlineTraining
from vp_rl.algorithms.rounds import Batch, Part
from vp_rl.functional import mean_square
from vp_rl.interfaces import Policy, Reward
from vp_rl.sampler import Sampler
from vp_rl.types import Conditioning, Latents, unscaled

_NOISE = -3  # in place of an image's number: of the random numbers that noise all images of a prompt


class Noised(NamedTuple):
    """Finished images with the noise that they are trained at."""

    x0: Float[Tensor, "batch *latent"]
    noise: Float[Tensor, "batch *latent"]
    timestep: Float[Tensor, " batch"]


class Weights(nn.Module):
    """An older adapter. It goes into checkpoints as extra state, so that a resumed run has it too."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.weights = dict(weights)

    def move(self, policy: Policy, decay: float) -> None:
        """Towards the policy's adapter: decay * old + (1 - decay) * new."""
        now = policy.adapter_weights()
        self.weights = {name: old.to(now[name]).lerp(now[name], 1 - decay) for name, old in self.weights.items()}

    def get_extra_state(self) -> dict[str, Tensor]:
        """The weights by name."""
        return self.weights

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        """Takes them back."""
        self.weights = dict(state)


class ForwardProcess(OnlineTraining, ABC):
    """Learns from its own images noised anew.

    Args:
        policy, reward, sampler, optimizer, images_per_prompt, sample_batch, inner_epochs, advantage_clip, decay, seed:
            see `OnlineTraining`. The sampler may be deterministic and guided.
        train_batch: noised images trained at once; a round has `noise_levels` of each image.
        noise_levels: timesteps that each image is trained at, drawn at random from `window`.
        window: first and last of them, as a share of the denoiser's; 1 is pure noise.
        kl_weight: scale of the mean squared difference of the outputs to those of the model without its adapter.
        reference_guidance: the guidance scale of that model's outputs: above 1, what is learned is held near what the
            model draws with guidance, and is then sampled without (CRD).
        shared_noise: whether the images of a prompt are noised by the same noise to the same timesteps (DGPO): what
            tells them apart is then the images alone, and what they have in common cancels out of the gradient.

    Raises:
        ValueError: a setting is outside its range.
    """

    def __init__(
        self,
        policy: Policy,
        reward: Reward,
        sampler: Sampler,
        optimizer: MakeOptimizer,
        *,
        noise_levels: int,
        window: tuple[float, float],
        kl_weight: float,
        reference_guidance: float = 1.0,
        shared_noise: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__(policy, reward, sampler, optimizer, **settings)
        if noise_levels < 1:
            raise ValueError(f"algorithm.noise_levels={noise_levels} must be at least 1.")
        if not kl_weight >= 0:
            raise ValueError(f"algorithm.kl_weight={kl_weight} must be 0 or more.")
        self.reference_guidance, self.shared_noise = reference_guidance, shared_noise
        self._timesteps = trained_timesteps(policy.process, window)
        self.examples_per_image, self.kl_weight, self.kept = noise_levels, kl_weight, 1
        self.older = Weights(policy.adapter_weights())
        """The adapter that samples, or that outputs are held near to; see the algorithm."""

    def configure_model(self) -> None:
        """Nothing is divided: the older adapter is whole on each device.

        Raises:
            ValueError: the strategy is FSDP2's.
        """
        if self.device_mesh is not None:
            raise ValueError(
                f"{type(self).__name__} has an older adapter, which FSDP does not divide: use trainer=ddp, as the "
                "trained part is small."
            )

    def collect(self, part: Part, *position: int) -> tuple[Latents, Noised]:
        """Finished images, each at noise levels of its own, or at those of its prompt."""
        x0 = self._sample(part)
        draw = partial(draw_levels, x0, self._timesteps, self.examples_per_image)
        if self.shared_noise:
            ahead = self.generators(part.places, [_NOISE], *position)
            found = dict(zip(part.places, map(draw, ahead), strict=True))
            drawn = [found[place] for place in part.of]
        else:
            drawn = list(map(draw, part.noise))
        noise, timesteps = (torch.cat(each) for each in zip(*drawn, strict=True))
        return x0, Noised(x0.repeat_interleave(self.examples_per_image, 0), noise, timesteps)

    def _sample(self, part: Part) -> Latents:
        return self.sampler.sample(self.policy, part.conditioning, part.noise)

    def _output(self, noised: Noised, conditioning: Conditioning) -> Latents:
        return self._guided(noised, conditioning, 1.0)

    def _guided(self, noised: Noised, conditioning: Conditioning, scale: float) -> Latents:
        """Whatever scale the images were sampled with."""
        latents = self.policy.process.add_noise(noised.x0, noised.noise, noised.timestep)
        return self.policy.predict(latents, noised.timestep, unscaled(conditioning), scale)

    def _target(self, noised: Noised) -> Latents:
        return self.policy.process.target(noised.x0, noised.noise, noised.timestep)

    @torch.no_grad()
    def _output_of_older(self, noised: Noised, conditioning: Conditioning) -> Latents:
        with self.policy.using(self.older.weights):
            return self._output(noised, conditioning)

    @torch.no_grad()
    def _output_of_reference(self, noised: Noised, conditioning: Conditioning) -> Latents:
        with self.policy.reference():
            return self._guided(noised, conditioning, self.reference_guidance)

    def distance(self, batch: Batch, conditioning: Conditioning) -> Float[Tensor, " examples"]:
        """Mean squared difference of the outputs to those of the model without its adapter."""
        output = self._output(batch.examples, conditioning)
        return mean_square(output - self._output_of_reference(batch.examples, conditioning))

    def made_up(self, latents: Latents) -> Noised:
        """At the first of the timesteps."""
        return Noised(
            latents, latents, torch.full((len(latents),), float(self._timesteps.start), device=latents.device)
        )
