"""The judge sees both images of a pair at once, in both orders: win, tie and loss by aspect.

Vision-language models prefer one place over the other. So each pair is shown twice, and the two answers are added: an
image that is preferred only where it stands first has won nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vp_rl.evaluation.asking import Asked, Rated, rate
from vp_rl.evaluation.images import Evaluation
from vp_rl.evaluation.store import NOTHING, Store
from vp_rl.interfaces import Annotator
from vp_rl.types import ASPECTS
from vp_rl.visionprefer import estimates

OVERALL = "overall"


@dataclass(frozen=True)
class Duel:
    """Of one aspect, or of all together; shares of the pairs."""

    win: float
    """The policy's image is the better one."""
    tie: float
    loss: float
    low: float
    """Of the 95% interval of `win - loss`; not a number where prompts are too few."""
    high: float
    consistent: float
    """Both orders gave the same answer: far below 1 the judge goes by the place, or guesses."""
    chance: float = 1.0
    """Of a difference as large where nobody is better, looked at alone."""
    clear: bool = False
    """Whether it still holds when all that is looked at with it is counted: see `claims.decide`."""

    @property
    def difference(self) -> float:
        """Win less loss."""
        return self.win - self.loss


def duels(
    judge: Annotator, base: Evaluation, tuned: Evaluation, store: Store = NOTHING.store, *, quiet: bool = True
) -> tuple[dict[str, Duel], Asked]:
    """By aspect, and `overall` by the sum over aspects; and what asking took: 8 questions for each pair of images.

    Args:
        judge: who is shown the pairs.
        base, tuned: the same prompts and seeds before and after.
        store: where the answers on a pair are kept as soon as all four are there.
        quiet: no progress bar.
    """
    pairs = list(zip(base.images, tuned.images, strict=True))
    straight, asked = rate(judge, base.prompts, pairs, store, quiet=quiet)
    turned, more = rate(judge, base.prompts, [pair[::-1] for pair in pairs], store, quiet=quiet)
    one, other = _gain(straight), -_gain(turned)
    gains = {aspect: (one[:, place], other[:, place]) for place, aspect in enumerate(ASPECTS)}
    gains[OVERALL] = one.sum(1), other.sum(1)
    return {name: _duel(*each, base.prompt) for name, each in gains.items()}, asked.plus(more)


def _gain(rated: Sequence[Rated]) -> np.ndarray:
    """By how much the second image is rated higher than the first, of each pair and aspect."""
    ratings = np.array([[[rating.rating for rating in image] for image in pair] for pair in rated])
    return ratings[:, 1] - ratings[:, 0]


def _duel(one: np.ndarray, other: np.ndarray, prompt: np.ndarray) -> Duel:
    outcome = np.sign(one + other)
    by_prompt = np.bincount(prompt, outcome) / np.bincount(prompt)
    low, high = estimates.paired(by_prompt, scale=1.0)
    return Duel(
        win=float((outcome > 0).mean()),
        tie=float((outcome == 0).mean()),
        loss=float((outcome < 0).mean()),
        low=low,
        high=high,
        consistent=float((np.sign(one) == np.sign(other)).mean()),
        chance=estimates.chance(by_prompt, 1.0),
    )
