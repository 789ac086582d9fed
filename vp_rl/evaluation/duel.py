"""The judge sees both images of a pair at once, in both orders: win, tie and loss by aspect.

Vision-language models prefer one place over the other. So each pair is shown twice, and the two answers are added: an
image that is preferred only where it stands first has won nothing.
"""

import asyncio
from dataclasses import dataclass

import numpy as np

from vp_rl.evaluation.compare import interval
from vp_rl.evaluation.images import Evaluation
from vp_rl.interfaces import Annotator
from vp_rl.types import ASPECTS
from vp_rl.visionprefer.annotate import rate_all
from vp_rl.visionprefer.generate import as_png

OVERALL = "overall"


@dataclass(frozen=True)
class Duel:
    """Of one aspect, or of all together; shares of the pairs."""

    win: float
    """The policy's image is the better one."""
    tie: float
    loss: float
    low: float
    """Of the 95% interval of `win - loss`."""
    high: float
    consistent: float
    """Both orders gave the same answer: far below 1 the judge goes by the place, or guesses."""


def duels(judge: Annotator, base: Evaluation, tuned: Evaluation) -> dict[str, Duel]:
    """By aspect, and `overall` by the sum over aspects. Asks 8 questions for each pair of images.

    Args:
        judge: who is shown the pairs.
        base, tuned: the same prompts and seeds before and after.
    """
    pairs = [(as_png(a), as_png(b)) for a, b in zip(base.images, tuned.images, strict=True)]
    straight = asyncio.run(rate_all(judge, base.prompts, pairs))
    turned = asyncio.run(rate_all(judge, base.prompts, [pair[::-1] for pair in pairs]))
    gains: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for aspect in ASPECTS:
        first = np.array([row[aspect][1].rating - row[aspect][0].rating for row in straight])
        gains[aspect] = first, np.array([row[aspect][0].rating - row[aspect][1].rating for row in turned])
    both = list(gains.values())
    gains[OVERALL] = np.sum([one for one, _ in both], axis=0), np.sum([other for _, other in both], axis=0)
    return {name: _duel(*each, base.prompt) for name, each in gains.items()}


def _duel(one: np.ndarray, other: np.ndarray, prompt: np.ndarray) -> Duel:
    outcome = np.sign(one + other)
    low, high = interval(np.bincount(prompt, outcome) / np.bincount(prompt))
    return Duel(
        win=float((outcome > 0).mean()),
        tie=float((outcome == 0).mean()),
        loss=float((outcome < 0).mean()),
        low=low,
        high=high,
        consistent=float((np.sign(one) == np.sign(other)).mean()),
    )
