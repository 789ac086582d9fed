"""An annotator's ratings as a reward: a vision-language model's, for instance, by the guidelines that people get."""

import asyncio
import io
import math
from collections.abc import Mapping
from typing import Annotated, get_args

import numpy as np
import torch
from annotated_types import Interval
from einops import rearrange
from PIL import Image

from vp_rl.configuration.kinds import Count
from vp_rl.interfaces import Annotator, Reward, Unanswered
from vp_rl.types import ASPECTS, Aspect, Images, Scores
from vp_rl.waiting import wait

_ATTEMPTS = 3  # at an answer that can be read


class AnnotatedReward(Reward):
    """The weighted mean of an image's ratings by aspect, from 1 to 5.

    Each image is a question of its own for each aspect, so that its score does not depend on its neighbours: a round of
    64 images asks 256 questions, or 64 with a single weight. Answers are not kept, and no budget is.

    The run's held-out judge must be another annotator.

    Args:
        annotator: who is asked. It repeats what fails in passing by its own rules.
        weights: by aspect, 0 or more; aspects without one are not asked for. None: all four equally.
        concurrency: questions asked at once; None: as many as the annotator likes.
        unrated: the rating that stands for a refusal, or for an answer that cannot be read in three attempts, from 1
            to 5: 1.0 where what is refused should be avoided. None: such an answer ends the run.

    Raises:
        ValueError: a setting that makes no sense, or the annotator cannot be asked at all.
    """

    differentiable = False

    def __init__(
        self,
        annotator: Annotator,
        weights: Mapping[str, float] | None = None,
        concurrency: Count | None = None,
        unrated: Annotated[float, Interval(ge=1, le=5)] | None = None,
    ) -> None:
        super().__init__()
        annotator.check()
        self._annotator, self.elsewhere = annotator, annotator.elsewhere
        self._weights = _shares(dict.fromkeys(ASPECTS, 1.0) if weights is None else weights)
        self._concurrency = annotator.concurrency if concurrency is None else concurrency
        if self._concurrency < 1:
            raise ValueError(f"reward.concurrency={concurrency} must be at least 1, or null.")
        if unrated is not None and not 1 <= unrated <= 5:
            raise ValueError(f"reward.unrated={unrated} must be a rating between 1 and 5, or null.")
        self._unrated = unrated

    def forward(self, images: Images, prompts: list[str]) -> Scores:
        """Scores from 1 to 5 on the images' device; not a number for one that is not finite: nobody is shown it.

        Raises:
            ConnectionError: the annotator did not answer, though it tried.
            ValueError: it refuses an image or cannot be read, and `unrated` is None; or it never will answer.
        """
        finite = images.detach().isfinite().flatten(1).all(1)
        shown = [prompt for prompt, whole in zip(prompts, finite.tolist(), strict=True) if whole]
        scores = torch.full((len(prompts),), torch.nan, device=images.device)
        scores[finite] = torch.tensor(wait(self._rate_all(images[finite], shown)), device=images.device)
        return scores

    async def _rate_all(self, images: Images, prompts: list[str]) -> list[float]:
        gate = asyncio.Semaphore(self._concurrency)

        async def one(prompt: str, picture: bytes, aspect: Aspect) -> float:
            async with gate:
                return await self._rate(prompt, picture, aspect)

        try:
            async with asyncio.TaskGroup() as group:
                rows = [
                    {aspect: group.create_task(one(prompt, picture, aspect)) for aspect in self._weights}
                    for prompt, picture in zip(prompts, _as_png(images), strict=True)
                ]
        except ExceptionGroup as errors:  # callers tell users of a ValueError; they cannot see it in a group
            raise errors.exceptions[0] from None
        return [sum(share * row[aspect].result() for aspect, share in self._weights.items()) for row in rows]

    async def _rate(self, prompt: str, picture: bytes, aspect: Aspect) -> float:
        problem = ""
        for _ in range(_ATTEMPTS):
            try:
                answer = await self._annotator.ask(prompt, [picture], aspect)
            except Unanswered as error:
                raise ConnectionError(
                    f"The reward's annotator {self._annotator.name} did not answer: {error}. When it does, go on from "
                    "the last checkpoint (resume=auto)."
                ) from error
            if answer.refused:
                problem = f"refused: {answer.text[:300]!r}"
                break
            try:
                return float(self._annotator.read(answer.text, 1)[0].rating)
            except ValueError as error:
                problem = f"answered what cannot be read: {error}"
        if self._unrated is None:
            raise ValueError(
                f"The reward's annotator {self._annotator.name}, asked for {aspect} of an image of {prompt[:200]!r}, "
                f"{problem}. Set reward.unrated to the rating that such images get, 1.0 for instance."
            )
        return self._unrated


def _shares(weights: Mapping[str, float]) -> dict[Aspect, float]:
    for name, weight in weights.items():
        if name not in get_args(Aspect):
            raise ValueError(f"reward.weights has {name!r}, which is no aspect: choose from {', '.join(ASPECTS)}.")
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"reward.weights.{name}={weight} must be 0 or more.")
    total = sum(weights.values())
    if not total > 0:
        raise ValueError("All of reward.weights are 0, so that nothing would be asked: raise one.")
    return {aspect: weights[aspect] / total for aspect in ASPECTS if weights.get(aspect, 0) > 0}


def _as_png(images: Images) -> list[bytes]:
    pixels = rearrange((images.detach().clamp(0, 1) * 255).round().to(torch.uint8), "b c h w -> b h w c").cpu().numpy()
    return [_encoded(image) for image in pixels]


def _encoded(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png")
    return buffer.getvalue()
