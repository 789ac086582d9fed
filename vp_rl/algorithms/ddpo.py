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
6. `divergence_limit`: Flow-DPPO's mask in the place of the clip. Means of the steps are kept with the states, half as
   much again of main memory: to work them out anew would cost a forward pass for each state.
7. `normalise=parts`: of several rewards each is standardised within its prompt's images (GDPO).
8. `kl_share` and `kl_helpers`: the KL holds those images alone that the reward ranks far above other rewards (GARDO),
   counting as much on each as it would on all were these all. GARDO's released code ranks from the best down, and so
   holds the images that the reward ranks far *below* the others.
"""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vp_rl.algorithms.base import MakeOptimizer
from vp_rl.algorithms.policy_gradient import Drawn, PolicyGradient
from vp_rl.algorithms.rounds import Part
from vp_rl.configuration import kinds
from vp_rl.functional import overrated, parts_advantages
from vp_rl.interfaces import Policy, Reward
from vp_rl.sampler import Sampler
from vp_rl.types import Images, Latents, Scores


@runtime_checkable
class Parted(Protocol):
    """A reward that is a weighted sum of others, as `WeightedReward` is: what `normalise=parts` asks for."""

    weights: Mapping[str, float]

    def parts(self, images: Images, prompts: list[str]) -> Mapping[str, Scores]:
        """Scores by the names of `weights`."""
        ...

    def total(self, parts: Mapping[str, Scores]) -> Scores:
        """The reward's own score, of what `parts` gave."""
        ...


class DDPO(PolicyGradient):
    """Fine-tunes a policy against any reward, differentiable or not.

    Args:
        policy, reward, sampler, optimizer, images_per_prompt, sample_batch, inner_epochs, advantage_clip, decay, seed:
            see `OnlineTraining`. The sampler's eta must be above 0.
        train_batch: states x_t trained at once; a round has one for each image and trained step.
        clip_range: how far the ratio may move, on the log-density averaged over latent dimensions.
        divergence_limit: how far a step may, in its KL to the one that sampled, in the place of that; None: the ratio.
        normalise: what is standardised within a prompt's images: the `total`, or each of the `parts` of the reward.
        window: first and last random step as a share of the sampling steps; the others are deterministic.
        random_steps: of the window, drawn anew for each round; None: all of it.
        timestep_fraction: share of each sample's random steps that is trained on, drawn at random.
        min_std: steps with at most this standard deviation are not trained on; deterministic ones never are.
        weight_by_std: see the module's point 3.
        kl_weight: scale of the KL to the reference; 0 saves its forward passes.
        kl_share: of a round's images: those that the KL holds, where there are `kl_helpers`.
        kl_helpers: rewards by name, to rank images by beside the reward.

    Raises:
        ValueError: a setting is outside its range or does not fit another, or no step has a density.
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
        divergence_limit: kinds.Positive | None = None,
        advantage_clip: kinds.Positive = 5.0,
        normalise: kinds.Normalised = "total",
        window: kinds.Span = (0.0, 1.0),
        random_steps: kinds.Count | None = None,
        timestep_fraction: kinds.Part = 1.0,
        min_std: kinds.Amount = 0.0,
        weight_by_std: bool = True,
        kl_weight: kinds.Amount = 0.0,
        kl_share: kinds.Part = 1.0,
        kl_helpers: Mapping[str, Reward] | None = None,
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
        self.clip_range, self.divergence_limit, self.kl_weight = clip_range, divergence_limit, kl_weight
        self._compare(normalise, kl_share, kl_helpers or {})
        steps = sampler.window("algorithm.window", *window)
        self._window = list(steps)
        self._train_on(steps, min_std, weight_by_std)
        most = len(self.trained_steps)
        if random_steps is not None and not 1 <= random_steps <= most:
            raise ValueError(f"algorithm.random_steps={random_steps} must be from 1 to {most}, the window's steps.")
        self._few = random_steps
        self.examples_per_image = max(1, round(timestep_fraction * (random_steps or most)))
        self.kept = 2 * (sampler.steps + 1)  # twice while they are stacked
        self.kept += 0 if divergence_limit is None else 2 * sampler.steps

    def _compare(self, normalise: str, kl_share: float, kl_helpers: Mapping[str, Reward]) -> None:
        if normalise == "parts" and not isinstance(self.reward, Parted):
            raise ValueError(
                f"algorithm.normalise=parts needs a reward of several, and {type(self.reward).__name__} is one: take "
                "reward=weighted, or algorithm.normalise=total."
            )
        if kl_helpers and not (self.kl_weight and kl_share < 1):
            raise ValueError(
                f"algorithm.kl_helpers choose the images that the KL holds, and kl_weight={self.kl_weight} or "
                f"kl_share={kl_share} leaves no choice: raise algorithm.kl_weight above 0, and set kl_share=0.1."
            )
        if kl_share < 1 and not kl_helpers:
            raise ValueError(
                f"algorithm.kl_share={kl_share} needs other rewards to choose by: add "
                "+reward@algorithm.kl_helpers.NAME=OPTION, or set it to 1."
            )
        self.kl_share, self.kl_helpers = kl_share, nn.ModuleDict(dict(kl_helpers)).requires_grad_(False).eval()
        self._by_parts = normalise == "parts"
        self._elsewhere = all(reward.elsewhere for reward in (self.reward, *kl_helpers.values()))

    def judged(self, images: Images, prompts: list[str]) -> Float[Tensor, "images columns"]:
        """The score; then its parts, if they are asked for; then those of helpers."""
        if self._by_parts:
            assert isinstance(self.reward, Parted)
            parts = self.reward.parts(images, prompts)
            total = self.finite(self.reward.total(parts), prompts, self.reward)
            columns = [total, *(parts[name] for name in self.reward.weights)]
        else:
            columns = [self.score(images, prompts)]
        for helper in self.kl_helpers.values():
            assert isinstance(helper, Reward)
            columns.append(self.finite(helper(images, prompts), prompts, helper))
        return torch.stack(columns, 1)

    def learned(self, judged: Float[Tensor, "prompts images columns"]) -> Float[Tensor, "prompts images signals"]:
        """Advantages by the total or by its parts, and where there are helpers, which images the KL holds."""
        if self._by_parts:
            assert isinstance(self.reward, Parted)
            weights = torch.tensor(list(self.reward.weights.values()))
            signals = [parts_advantages(judged[..., 1 : 1 + len(weights)], weights, self.advantage_clip)]
        else:
            signals = [self.advantages(judged[..., 0])]
        if self.kl_helpers:
            helpers = judged[..., -len(self.kl_helpers) :].flatten(0, 1)
            held = overrated(judged[..., 0].flatten(), helpers, self.kl_share)
            share = held.float().mean().clamp(min=1 / max(1, len(held)))
            signals.append((held.float() / share).unflatten(0, judged.shape[:2]))
        return torch.stack(signals, -1)

    def collect(self, part: Part, *position: int) -> tuple[Latents, Drawn]:
        """Whole trajectories; of each the states before some of its random steps, chosen by the image's own numbers."""
        random, trained = self._window, torch.tensor(self.trained_steps)
        if self._few is not None:
            drawn = torch.randperm(len(trained), generator=self.generator(*position))[: self._few]
            random, trained = trained[drawn].tolist(), trained[drawn]
        path = self.sampler.rollout(self.policy, part.conditioning, part.noise, random, bool(self.divergence_limit))
        order = torch.stack([torch.randperm(len(trained), generator=generator) for generator in part.noise])
        steps = trained[order[:, : self.examples_per_image]].flatten().to(path.latents.device)
        rows = torch.arange(len(part.noise), device=steps.device).repeat_interleave(self.examples_per_image)
        after, log_probs = path.latents[rows, steps + 1, None], path.log_probs[rows, steps, None]
        means = path.means[rows, steps, None] if self.divergence_limit else after[:, :0]
        return path.latents[:, -1], Drawn(path.latents[rows, steps], after, steps, log_probs, means)
