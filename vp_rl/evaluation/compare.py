"""Two policies on the same prompts and seeds: paired differences with bootstrap intervals, and win rates."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.stats import bootstrap, norm, t

from vp_rl.evaluation.images import Evaluation

_RESAMPLES = 9999


@dataclass(frozen=True)
class Change:
    """One metric, before and after; `low` and `high` bound the mean difference with 95% confidence."""

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

    @property
    def significant(self) -> bool:
        """Whether the interval excludes no change at all."""
        return self.low > 0 or self.high < 0


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
    return {name: change(values, after[name], base.prompt) for name, values in base.metrics().items()}


def change(before: np.ndarray, after: np.ndarray, prompt: np.ndarray) -> Change:
    """Of one metric.

    Args:
        before, after: of each image.
        prompt: the number of each image's prompt, from 0.
    """
    difference = after - before
    by_prompt = np.bincount(prompt, difference) / np.bincount(prompt)
    low, high = interval(by_prompt)
    return Change(
        base=float(before.mean()),
        tuned=float(after.mean()),
        difference=float(by_prompt.mean()),
        low=low,
        high=high,
        win=float((difference > 0).mean()),
        tie=float((difference == 0).mean()),
        loss=float((difference < 0).mean()),
    )


def interval(values: Float[np.ndarray, " prompts"], confidence: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval of the mean of independent values; the mean itself where they are all equal.

    The percentile interval, widened as Student's t is wider than a normal distribution whose variance leaves out n - 1
    (Hesterberg 2015, "What teachers should know about the bootstrap", 4.3). Unwidened, or as BCa, it excludes no
    change in up to a seventh of all comparisons of twelve prompts where there is none.
    """
    number = len(values)
    if number < 2 or np.ptp(values) == 0:
        return float(values.mean()), float(values.mean())
    reach = math.sqrt(number / (number - 1)) * t.ppf((1 + confidence) / 2, number - 1)
    result = bootstrap(
        (values,),
        np.mean,
        confidence_level=min(1 - 2 * float(norm.sf(reach)), 1 - 1e-9),
        n_resamples=_RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
        vectorized=True,
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def as_dict(changes: Mapping[str, Change]) -> dict[str, dict[str, float]]:
    """For JSON."""
    return {name: asdict(change) for name, change in changes.items()}


def as_markdown(changes: Mapping[str, Change], rival: Rival = BASE) -> str:
    """A table for the console."""
    lines = [
        f"| metric | {rival.short} | tuned | change | 95% interval | better | worse |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, c in changes.items():
        lines.append(
            f"| {name} | {c.base:.3f} | {c.tuned:.3f} | {c.difference:+.3f} | [{c.low:+.3f}, {c.high:+.3f}] "
            f"| {c.win:.0%} | {c.loss:.0%} |"
        )
    return "\n".join(lines)
