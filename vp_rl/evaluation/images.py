"""Images for held-out prompts with fixed seeds, scored by the reward and rated by the held-out judge."""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8

from vp_rl.interfaces import Annotator, Policy, PromptSource, Reward
from vp_rl.sampler import Sampler
from vp_rl.types import ASPECTS, Split, take
from vp_rl.visionprefer.annotate import rate_all
from vp_rl.visionprefer.generate import as_png, to_uint8


@dataclass(frozen=True)
class Evaluation:
    """What one policy made of the held-out prompts. A prompt's images, one for each seed, are next to each other."""

    prompts: list[str]
    """One for each image."""
    seeds: list[int]
    """One for each image."""
    images: UInt8[np.ndarray, "images height width 3"]
    scores: Float[np.ndarray, " images"]
    """By the reward."""
    ratings: Int[np.ndarray, "images aspects"]
    """By the judge, 1 to 5, in the order of `ASPECTS`."""
    rationales: list[tuple[str, ...]]
    """The judge's reasons for each image, in the order of `ASPECTS`."""

    def metrics(self) -> dict[str, Float[np.ndarray, " images"]]:
        """Everything that is compared, by name, for each image; `correct` is 1 where prompt following is rated 5."""
        by_aspect = {aspect: self.ratings[:, index].astype(float) for index, aspect in enumerate(ASPECTS)}
        return {
            "reward": self.scores.astype(float),
            **by_aspect,
            "mean_rating": self.ratings.mean(1),
            "correct": (by_aspect["prompt_following"] == 5).astype(float),
        }

    def means(self) -> dict[str, float]:
        """The metrics averaged over images."""
        return {name: float(values.mean()) for name, values in self.metrics().items()}

    def of_first_seed(self) -> Int[np.ndarray, " prompts"]:
        """The place of one image of each prompt."""
        return np.flatnonzero(np.array(self.seeds) == self.seeds[0])

    def first(self, images: int) -> "Evaluation":
        """The first images only."""
        return Evaluation(
            self.prompts[:images],
            self.seeds[:images],
            self.images[:images],
            self.scores[:images],
            self.ratings[:images],
            self.rationales[:images],
        )


def noise_seed(place: int, seed: int) -> int:
    """What an image's random numbers start from: its prompt's place in the evaluation and its seed, nothing else."""
    return 1_000_003 * seed + place


class Evaluator:
    """Makes and judges images of held-out prompts; the same noise for every policy that it evaluates.

    Args:
        prompts: where the prompts come from.
        annotator: the held-out judge.
        sampler: how users of the model sample, not how it is trained.
        split: which prompts.
        limit: how many of them at most; None is all.
        seeds: one image of each prompt for each seed.
        batch_size: images made at once; does not change them.

    Raises:
        ValueError: there is no image to make.
    """

    def __init__(
        self,
        prompts: PromptSource,
        annotator: Annotator,
        sampler: Sampler,
        split: Split = "test",
        limit: int | None = 128,
        seeds: Iterable[int] = (0,),
        batch_size: int = 64,
    ) -> None:
        if split not in get_args(Split):
            raise ValueError(f"evaluation.split={split!r} is unknown: choose from {', '.join(get_args(Split))}.")
        # Each prompt once: prompts are what intervals resample, so a repeated one would count as new evidence.
        self.prompts = list(dict.fromkeys(prompts.split(split)))[:limit]
        self.seeds = tuple(seeds)
        if not self.prompts or not self.seeds or batch_size < 1:
            raise ValueError(
                f"The evaluation has no image to make: {len(self.prompts)} prompts in the {split} split, "
                f"evaluation.limit={limit}, evaluation.seeds={list(self.seeds)}, evaluation.batch_size={batch_size}."
            )
        self.sampler, self._annotator, self._batch_size = sampler, annotator, batch_size

    @torch.no_grad()
    def evaluate(
        self,
        policy: Policy,
        reward: Reward,
        number: int | None = None,
        on_batch: Callable[[int], object] = lambda images: None,
    ) -> Evaluation:
        """Samples, scores and rates. Nothing is kept on the device, and no global random numbers are drawn.

        Args:
            policy: what makes the images.
            reward: what scores them.
            number: how many prompts, from the first; None is all.
            on_batch: called with the number of images that were just made.
        """
        unique = self.prompts[:number]
        prompts = [prompt for prompt in unique for _ in self.seeds]
        conditioning = policy.encode(unique)
        device = next(iter(conditioning.values())).device
        images, scores = [], []
        for rows in torch.arange(len(prompts)).split(self._batch_size):
            encoded = take(conditioning, (rows // len(self.seeds)).to(device))
            made = policy.decode(self.sampler.sample(policy, encoded, [self._noise(row) for row in rows.tolist()]))
            images.append(to_uint8(made))
            scores.append(reward(made, [prompts[row] for row in rows.tolist()]).float().cpu().numpy())
            on_batch(len(rows))
        pixels = np.concatenate(images)
        ratings, rationales = self._rate(unique, pixels)
        return Evaluation(prompts, list(self.seeds) * len(unique), pixels, np.concatenate(scores), ratings, rationales)

    def _noise(self, row: int) -> torch.Generator:
        place, seed = divmod(row, len(self.seeds))
        return torch.Generator().manual_seed(noise_seed(place, self.seeds[seed]))

    def _rate(self, prompts: list[str], pixels: np.ndarray) -> tuple[np.ndarray, list[tuple[str, ...]]]:
        each = len(self.seeds)
        pictures = [[as_png(image) for image in pixels[i * each : (i + 1) * each]] for i in range(len(prompts))]
        rated = asyncio.run(rate_all(self._annotator, prompts, pictures, quiet=True))
        by_image = [[row[aspect][seed] for aspect in ASPECTS] for row in rated for seed in range(each)]
        ratings = np.array([[rating.rating for rating in image] for image in by_image])
        return ratings, [tuple(rating.rationale for rating in image) for image in by_image]
