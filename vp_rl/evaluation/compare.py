"""Two policies on the same prompts and seeds: paired differences with their intervals, and win rates."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

import numpy as np

from vp_rl.evaluation.images import Evaluation
from vp_rl.types import ASPECTS
from vp_rl.visionprefer import estimates

LEVELS = {*ASPECTS, "mean_rating", "correct"}
"""What the judge says: ratings in steps of 1, or a quarter of that for their mean, and what is so or not."""

TOO_FEW = "too few prompts"
"""Stands where an interval would."""


@dataclass(frozen=True)
class Change:
    """One metric, before and after; `low` and `high` bound the mean difference with 95% confidence.

    They are not numbers where prompts are too few for any.
    """

    base: float
    tuned: float
    difference: float
    low: float
    high: float
    win: float
    """Share of images whose value rose."""
    tie: float
    loss: float
    """Share of images whose value fell."""
    chance: float = 1.0
    """Of a difference as large where nothing has changed, looked at alone."""
    clear: bool = False
    """Whether it still holds when all that is looked at with it is counted: see `claims.decide`."""

    @property
    def few(self) -> bool:
        """Whether there are too few prompts to say anything."""
        return math.isnan(self.low)

    @property
    def direction(self) -> Literal["up", "down", "even"]:
        """Where it went, if that is clear."""
        return "even" if not self.clear else "up" if self.difference > 0 else "down"


class Rival(NamedTuple):
    """What an adapter is compared with, in words."""

    name: str
    short: str
    rose: str
    """Of what the adapter has more of."""
    fell: str
    same: str


BASE = Rival("the base model", "base", "rose by", "fell by", "did not clearly change")
OTHER = Rival("the other adapter", "other", "is higher by", "is lower by", "does not clearly differ")


def compare(base: Evaluation, tuned: Evaluation) -> dict[str, Change]:
    """The change of every metric, of the panel as `panel/NAME`, and of what images look like as `look/NAME`.

    `look/distance` is each image's distance from the base's, which is 0 for the base itself. Prompts are resampled with
    all their seeds, since those are not independent.

    Raises:
        ValueError: see `compare_metrics`.
    """
    changes = compare_metrics(base, tuned)
    before, after = dict(base.looks), dict(tuned.looks)
    after["look/distance"] = np.linalg.norm(tuned.features - base.features, axis=1)
    before["look/distance"] = np.zeros(len(base.prompts))
    return changes | {name: change(values, after[name], base.prompt) for name, values in before.items()}


def compare_metrics(base: Evaluation, tuned: Evaluation) -> dict[str, Change]:
    """Of what is better or worse alone.

    Raises:
        ValueError: the two evaluations are not of the same prompts and seeds.
    """
    if (base.prompts, base.seeds) != (tuned.prompts, tuned.seeds):
        raise ValueError(
            "Only evaluations of the same prompts and seeds can be compared: make both with one Evaluator."
        )
    after = tuned.metrics()
    return {name: change(values, after[name], base.prompt, scale_of(name)) for name, values in base.metrics().items()}


def scale_of(name: str) -> float:
    """How far a prompt may move at least by this metric: see `estimates.paired`."""
    return 0.25 if name == "mean_rating" else 1.0 if name in LEVELS else 0.0


def change(before: np.ndarray, after: np.ndarray, prompt: np.ndarray, scale: float = 0.0) -> Change:
    """Of one metric.

    Args:
        before, after: of each image.
        prompt: the number of each image's prompt, from 0.
        scale: see `estimates.paired`.
    """
    difference = after - before
    by_prompt = np.bincount(prompt, difference) / np.bincount(prompt)
    low, high = estimates.paired(by_prompt, scale=scale)
    return Change(
        base=float(before.mean()),
        tuned=float(after.mean()),
        difference=float(by_prompt.mean()),
        low=low,
        high=high,
        win=float((difference > 0).mean()),
        tie=float((difference == 0).mean()),
        loss=float((difference < 0).mean()),
        chance=estimates.chance(by_prompt, scale),
    )


def as_dict(changes: Mapping[str, Change]) -> dict[str, dict[str, float | bool]]:
    """All of them, as plain values."""
    return {name: asdict(change) for name, change in changes.items()}


def as_markdown(changes: Mapping[str, Change], rival: Rival = BASE) -> str:
    """A table for the console."""
    lines = [
        f"| metric | {rival.short} | tuned | change | 95% interval | better | worse |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, c in changes.items():
        between = TOO_FEW if c.few else f"[{c.low:+.3f}, {c.high:+.3f}]{' *' if c.clear else ''}"
        lines.append(
            f"| {name} | {c.base:.3f} | {c.tuned:.3f} | {c.difference:+.3f} | {between} | {c.win:.0%} | {c.loss:.0%} |"
        )
    return "\n".join(lines)
