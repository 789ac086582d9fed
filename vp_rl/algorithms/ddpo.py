"""DDPO (Black et al. 2023): the denoising steps as a policy, trained by clipped policy gradient.

The objective is in policy_gradient.py. What differs from the published code (paper.md 3):
1. Several images of each prompt are drawn in a round and standardised among themselves (as in GRPO), so no history of
   scores by prompt is kept.
2. States x_t are trained in micro-batches that fill the device, not step by step. They take turns: a random one of each
   image's steps, then another one of each. So an update is of all prompts alike, and of the same states however many
   devices they are dealt out to.
3. `weight_by_std`: w_t = std_t / mean std (noise-aware weighting, TempFlow-GRPO). The noise of a step's gradient grows
   as 1 / std, so unweighted the last steps, which only touch fine detail, dominate an update. The *expected* gradient
   of a step does not grow so: the weights change its direction. `false` is the published loss.
4. An optional KL to the model without its adapter, weighed as the rest; the published code has none.
5. `window` and `random_steps`: all steps of a window are random, or a few of them, drawn anew for each round, and the
   others are deterministic (MixGRPO; Flow-GRPO-Fast): only random ones are trained.
"""

import torch

from vp_rl.algorithms.base import MakeOptimizer
from vp_rl.algorithms.policy_gradient import Drawn, PolicyGradient
from vp_rl.algorithms.rounds import Part
from vp_rl.configuration import kinds
from vp_rl.interfaces import Policy, Reward
from vp_rl.sampler import Sampler
from vp_rl.types import Latents


class DDPO(PolicyGradient):
    """Fine-tunes a policy against any reward, differentiable or not.

    Args:
        policy, reward, sampler, optimizer, images_per_prompt, sample_batch, inner_epochs, advantage_clip, decay, seed:
            see `OnlineTraining`. The sampler's eta must be above 0.
        train_batch: states x_t trained at once; a round has one for each image and trained step.
        clip_range: how far the ratio may move, on the log-density averaged over latent dimensions.
        window: first and last random step as a share of the sampling steps; the others are deterministic.
        random_steps: of the window, drawn anew for each round; None: all of it.
        timestep_fraction: share of each sample's random steps that is trained on, drawn at random.
        min_std: steps with at most this standard deviation are not trained on; deterministic ones never are.
        weight_by_std: see the module's point 3.
        kl_weight: scale of the KL to the reference; 0 saves its forward passes.

    Raises:
        ValueError: a setting is outside its range, or no step has a density.
    """

    def __init__(
        self,
        policy: Policy,
        reward: Reward,
        sampler: Sampler,
        optimizer: MakeOptimizer,
        *,
        images_per_prompt: kinds.Several = 16,
        sample_batch: kinds.Count = 64,
        train_batch: kinds.Count = 64,
        inner_epochs: kinds.Count = 1,
        clip_range: kinds.Positive = 1e-4,
        advantage_clip: kinds.Positive = 5.0,
        window: kinds.Span = (0.0, 1.0),
        random_steps: kinds.Count | None = None,
        timestep_fraction: kinds.Part = 1.0,
        min_std: kinds.Amount = 0.0,
        weight_by_std: bool = True,
        kl_weight: kinds.Amount = 0.0,
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
            advantage_clip=advantage_clip,
            decay=decay,
            seed=seed,
        )
        if not 0 < timestep_fraction <= 1:
            raise ValueError(f"algorithm.timestep_fraction={timestep_fraction} must be in (0, 1].")
        self.clip_range, self.kl_weight = clip_range, kl_weight
        self._train_on(sampler.window("algorithm.window", *window), min_std, weight_by_std)
        self._window = list(sampler.window("algorithm.window", *window))
        most = len(self.trained_steps)
        if random_steps is not None and not 1 <= random_steps <= most:
            raise ValueError(f"algorithm.random_steps={random_steps} must be from 1 to {most}, the window's steps.")
        self._few = random_steps
        self.examples_per_image = max(1, round(timestep_fraction * (random_steps or most)))
        self.kept = 2 * (sampler.steps + 1)  # twice while they are stacked

    def collect(self, part: Part, *position: int) -> tuple[Latents, Drawn]:
        """Whole trajectories; of each the states before some of its random steps, chosen by the image's own numbers."""
        random, trained = self._window, torch.tensor(self.trained_steps)
        if self._few is not None:
            drawn = torch.randperm(len(trained), generator=self.generator(*position))[: self._few]
            random, trained = trained[drawn].tolist(), trained[drawn]
        path = self.sampler.rollout(self.policy, part.conditioning, part.noise, random)
        order = torch.stack([torch.randperm(len(trained), generator=generator) for generator in part.noise])
        steps = trained[order[:, : self.examples_per_image]].flatten().to(path.latents.device)
        rows = torch.arange(len(part.noise), device=steps.device).repeat_interleave(self.examples_per_image)
        after, log_probs = path.latents[rows, steps + 1, None], path.log_probs[rows, steps, None]
        return path.latents[:, -1], Drawn(path.latents[rows, steps], after, steps, log_probs)
