"""VisionPrefer from prompts to a dataset on disk, in one go.

All images wait in memory, as PNG, until all are rated, and a build that is stopped starts anew: fine for the embedded
world, whose build takes minutes. One that resumes, for real models and paid annotators, is a later piece of work.
"""

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import get_args

from vp_rl.interfaces import Annotator, Policy, PromptSource
from vp_rl.types import ASPECTS, Aspect, Rating, Split
from vp_rl.visionprefer import schema
from vp_rl.visionprefer.annotate import rate_all
from vp_rl.visionprefer.generate import Recipe, generate, recipes
from vp_rl.visionprefer.pairs import pairs

SPLITS: tuple[Split, ...] = get_args(Split)


class Builder:
    """Makes the images of every prompt and has them rated.

    Args:
        prompts: where prompts come from; its splits become the dataset's.
        generators: makers of text-to-image models, by name; each model is made when its turn comes and then let go.
        annotator: who rates.
        annotator_name, template_version: recorded with each rating.
        images_per_prompt: 4 in VisionPrefer.
        guidance_scales, steps: one of each is drawn for every image, so that good and bad images meet.
        batch_size: images made at once; does not change them.
        seed: of everything that is drawn.

    Raises:
        ValueError: there is nothing to build from, or an image would have no other to be compared with.
    """

    def __init__(
        self,
        prompts: PromptSource,
        generators: Mapping[str, Callable[[], Policy]],
        annotator: Annotator,
        *,
        annotator_name: str,
        template_version: str = "1",
        images_per_prompt: int = 4,
        guidance_scales: Sequence[float] = (1.0, 2.0, 4.0, 7.0),
        steps: Sequence[int] = (8, 12, 20),
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        if images_per_prompt < 2:
            raise ValueError(
                f"images_per_prompt={images_per_prompt} must be at least 2: a preference needs two images."
            )
        if not generators or not guidance_scales or not steps or batch_size < 1:
            raise ValueError(
                f"No image can be made with generators={list(generators)}, guidance_scales={list(guidance_scales)}, "
                f"steps={list(steps)} and batch_size={batch_size}: each list needs an entry, and a batch an image."
            )
        self.prompts, self.generators, self.annotator = prompts, generators, annotator
        self.annotator_name, self.template_version = annotator_name, template_version
        self.images_per_prompt, self.batch_size, self.seed = images_per_prompt, batch_size, seed
        self.guidance_scales, self.steps = tuple(guidance_scales), tuple(steps)

    def build(self, folder: Path) -> None:
        """Writes the dataset with its card to `folder`.

        Raises:
            FileExistsError: the folder has something in it.
            ValueError: a prompt is in two splits.
        """
        schema.check_vacant(folder)
        splits = split_of_each(self.prompts)
        prompts = list(splits)
        planned = recipes(
            prompts, self.images_per_prompt, sorted(self.generators), self.guidance_scales, self.steps, self.seed
        )
        images = generate(self.generators, planned, self.batch_size)
        made: dict[str, list[Recipe]] = {prompt: [] for prompt in prompts}
        for recipe in planned:
            made[recipe.prompt].append(recipe)
        ratings = asyncio.run(
            rate_all(self.annotator, prompts, [[images[recipe] for recipe in row] for row in made.values()])
        )
        rows: dict[Split, list[schema.Row]] = {split: [] for split in SPLITS}
        for (prompt, split), rated in zip(splits.items(), ratings, strict=True):
            rows[split].append(self._row(prompt, split, [(recipe, images[recipe]) for recipe in made[prompt]], rated))
        schema.write(rows, folder, card(rows, ratings))

    def _row(
        self, prompt: str, split: Split, images: list[tuple[Recipe, bytes]], ratings: dict[Aspect, list[Rating]]
    ) -> schema.Row:
        number = prompt_id(prompt)
        names = [f"{number}-{recipe.image}" for recipe, _ in images]
        return {
            "prompt_id": number,
            "source_prompt": prompt,
            "prompt": prompt,
            "split": split,
            "images": [_image(name, recipe, png) for name, (recipe, png) in zip(names, images, strict=True)],
            "annotations": [
                {
                    "image_id": name,
                    "aspect": aspect,
                    "rating": rating.rating,
                    "rationale": rating.rationale,
                    "annotator": self.annotator_name,
                    "template_version": self.template_version,
                }
                for aspect in ASPECTS
                for name, rating in zip(names, ratings[aspect], strict=True)
            ],
        }


def split_of_each(source: PromptSource) -> dict[str, Split]:
    """The split of every prompt, in the source's order; a prompt that a split repeats counts once.

    Raises:
        ValueError: a prompt is in two splits, so that what is tested would have been trained on.
    """
    splits: dict[str, Split] = {}
    for split in SPLITS:
        for prompt in source.split(split):
            if splits.setdefault(prompt, split) != split:
                raise ValueError(
                    f"The prompt {prompt[:200]!r} is in two splits, {splits[prompt]} and {split}: keep one."
                )
    return splits


def prompt_id(prompt: str) -> int:
    """A number that follows from the prompt alone, so that building again, or building more, gives the same one."""
    digest = hashlib.sha256(prompt.encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 11  # 53 bits: exact in every JSON reader


def _image(name: str, recipe: Recipe, png: bytes) -> schema.Row:
    return {
        "image_id": name,
        "image": {"bytes": png, "path": None},
        "generator": recipe.generator,
        "guidance_scale": recipe.guidance_scale,
        "seed": recipe.seed,
        "steps": recipe.steps,
        **_size(png),
    }


def _size(png: bytes) -> dict[str, int]:
    """Width and height, from the header that every PNG begins with."""
    return {"width": int.from_bytes(png[16:20], "big"), "height": int.from_bytes(png[20:24], "big")}


def card(rows: dict[Split, list[schema.Row]], ratings: list[dict[Aspect, list[Rating]]]) -> str:
    """The dataset card: counts, and how the ratings are spread."""
    total = sum(len(split_rows) for split_rows in rows.values())
    lines = [
        "---",
        "pretty_name: VisionPrefer (built by vp_rl)",
        "task_categories: [text-to-image]",
        "---",
        "# VisionPrefer, built by vp_rl",
        "",
        f"{total} prompts: " + ", ".join(f"{len(split_rows)} {split}" for split, split_rows in rows.items()) + ".",
        "",
        "| aspect | 1 | 2 | 3 | 4 | 5 | pairs without ties |",
        "|---|---|---|---|---|---|---|",
    ]
    for aspect in ASPECTS:
        counts = Counter(rating.rating for row in ratings for rating in row[aspect])
        kept = sum(len(pairs({a: [r.rating for r in row[a]] for a in ASPECTS}, aspect)) for row in ratings)
        lines.append(f"| {aspect} | " + " | ".join(str(counts[rating]) for rating in range(1, 6)) + f" | {kept} |")
    return "\n".join(lines) + "\n"
