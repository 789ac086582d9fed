"""Online Diffusion-DPO: the best against the worst of a prompt's own images, by any reward.

Each round samples images of every prompt and has them scored; the best and the worst of a prompt are a pair of
Diffusion-DPO (dpo.py has its loss), noised alike to a few noise levels. As for DPO no step needs a density, so that any
sampler will do, and the reference is the policy's, a pull to which is in the loss. Scores count by their order alone:
a reward of any scale may be given, also an annotator's ratings (`reward=annotated`).

For language models this is online DPO (Guo et al. 2024, arXiv:2402.04792), and a group's highest against its lowest
score the choice of Yuan et al. 2024 (arXiv:2401.10020). A prompt whose scores are equal gives no pair: it counts in the
mean as log 2, what a pair begins at, without a gradient.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vp_rl.algorithms.base import MakeOptimizer, draw_levels, trained_timesteps
from vp_rl.algorithms.dpo import Drift, PairLoss
from vp_rl.algorithms.online import OnlineTraining, RolloutLoader
from vp_rl.algorithms.prompt_training import PromptBatches
from vp_rl.algorithms.rounds import Batch, Part
from vp_rl.configuration import kinds
from vp_rl.functional import group_advantages, mean_square
from vp_rl.interfaces import Policy, Reward
from vp_rl.sampler import Sampler
from vp_rl.types import Conditioning, Latents, take, unscaled


class Offered(NamedTuple):
    """A prompt's finished images, with the one noise that its pair is trained at."""

    x0: Float[Tensor, "prompts images *latent"]
    noise: Float[Tensor, "prompts *latent"]
    timestep: Float[Tensor, " prompts"]


class OnlineDPO(OnlineTraining):
    """Fine-tunes a policy on pairs of its own images, of which a reward prefers one.

    Args:
        policy, reward, sampler, optimizer, images_per_prompt, sample_batch, inner_epochs, decay, seed: see
            `OnlineTraining`. The sampler may be deterministic and guided.
        train_batch: pairs trained at once; a round has `noise_levels` of each prompt.
        noise_levels: timesteps that each pair is trained at, drawn at random from `window`.
        window: first and last of them, as a share of the denoiser's; 1 is pure noise.
        beta, bound: see `DiffusionDPO`.

    Raises:
        ValueError: a setting is outside its range.
    """

    whole_prompts = True

    def __init__(
        self,
        policy: Policy,
        reward: Reward,
        sampler: Sampler,
        optimizer: MakeOptimizer,
        *,
        images_per_prompt: kinds.Several = 8,
        sample_batch: kinds.Count = 64,
        train_batch: kinds.Count = 16,
        inner_epochs: kinds.Count = 1,
        noise_levels: kinds.Count = 4,
        window: kinds.Span = (0.0, 1.0),
        beta: kinds.Positive = 5000.0,
        bound: kinds.Share | None = 0.9,
        decay: bool = False,
        seed: kinds.Seed = 0,
    ) -> None:
        super().__init__(
            policy,
            reward,
            sampler,
            optimizer,
            images_per_prompt=images_per_prompt,
            sample_batch=sample_batch,
            train_batch=train_batch,
            inner_epochs=inner_epochs,
            decay=decay,
            seed=seed,
        )
        if noise_levels < 1:
            raise ValueError(f"algorithm.noise_levels={noise_levels} must be at least 1.")
        self.pair_loss, self._drift = PairLoss(beta, bound), Drift()
        self._timesteps = trained_timesteps(policy.process, window)
        self.examples_per_image, self.kept = noise_levels, 2  # twice while they are put together

    def batches(self, prompts: PromptBatches) -> RolloutLoader:
        """See `OnlineTraining`.

        Raises:
            ValueError: several devices share the images of a prompt.
        """
        if prompts.devices_per_prompt > 1:
            raise ValueError(
                f"algorithm=online_dpo compares all images of a prompt on one device, and data.devices_per_prompt="
                f"{prompts.devices_per_prompt} divides them: set it to 1, with as many prompts (data.batch_size, or "
                "geometry.images_per_update) as there are devices."
            )
        return super().batches(prompts)

    def advantages(self, scores: Float[Tensor, "prompts images"]) -> Float[Tensor, "prompts images"]:
        """Their order is what counts, so that none is clipped to another."""
        return group_advantages(scores, math.inf)

    def collect(self, part: Part, *position: int) -> tuple[Latents, Offered]:
        """Finished images, with noise levels for each prompt."""
        rows = torch.arange(len(part.noise)).split(self.sample_batch)
        x0 = torch.cat([self._sample(part, some) for some in rows])
        number = self.examples_per_image
        ahead = self.generators(part.places, [-1], *position)  # of the prompt, beside those of its images
        drawn = [draw_levels(x0, self._timesteps, number, generator) for generator in ahead]
        noise, timesteps = (torch.cat(each) for each in zip(*drawn, strict=True))
        groups = x0.cpu().unflatten(0, (-1, part.each)).repeat_interleave(number, 0)  # the device has no need of them
        return x0, Offered(groups, noise, timesteps)

    def _sample(self, part: Part, rows: Tensor) -> Latents:
        noise = [part.noise[row] for row in rows.tolist()]
        device = next(iter(part.conditioning.values())).device
        return self.sampler.sample(self.policy, take(part.conditioning, rows.to(device)), noise)

    def loss(self, batch: Batch, conditioning: Conditioning) -> tuple[Tensor, dict[str, Tensor]]:
        """Diffusion-DPO's of each prompt's best image against its worst."""
        offered: Offered = batch.examples
        pairs = torch.arange(len(batch.prompt), device=batch.advantages.device)
        best, worst = batch.advantages.argmax(1), batch.advantages.argmin(1)
        both = pairs.repeat(2)
        losses, values = self.pair_loss(
            self.policy,
            offered.x0[both, torch.cat([best, worst])],
            offered.noise[both],
            offered.timestep[both],
            take(unscaled(conditioning), both),
            pairs,
            pairs + len(pairs),
        )
        differ = best != worst  # all of a group of equal scores have an advantage of 0
        losses = torch.where(differ, losses, math.log(2))
        values = {name: torch.where(differ, value, 0.0) for name, value in values.items()}
        return losses.mean(), values

    def on_train_epoch_end(self) -> None:
        """Says so where the preferred images have become less likely, too."""
        super().on_train_epoch_end()
        self._drift.see(self._means.means().get("train/winner_error"))

    def distance(self, batch: Batch, conditioning: Conditioning) -> Float[Tensor, " examples"]:
        """Mean squared difference of the outputs for the best image to the reference's."""
        offered: Offered = batch.examples
        pairs = torch.arange(len(batch.prompt), device=batch.advantages.device)
        best = offered.x0[pairs, batch.advantages.argmax(1)]
        latents = self.policy.process.add_noise(best, offered.noise, offered.timestep)
        conditioning = unscaled(conditioning)
        output = self.policy.predict(latents, offered.timestep, conditioning, 1.0)
        with torch.no_grad(), self.policy.reference():
            reference = self.policy.predict(latents, offered.timestep, conditioning, 1.0)
        return mean_square(output - reference)

    def made_up(self, latents: Latents) -> Offered:
        """At the first of the timesteps."""
        images = latents[:, None].expand(-1, self.images_per_prompt, *latents.shape[1:])
        timestep = torch.full((len(latents),), float(self._timesteps.start), device=latents.device)
        return Offered(images, latents, timestep)
