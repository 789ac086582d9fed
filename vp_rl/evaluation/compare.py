"""Two policies on the same prompts and seeds: paired differences with bootstrap intervals, and win rates."""

from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Float
from scipy.stats import bootstrap

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


def compare(base: Evaluation, tuned: Evaluation) -> dict[str, Change]:
    """The change of every metric; prompts are resampled with all their seeds, since those are not independent.

    Raises:
        ValueError: the two evaluations are not of the same prompts and seeds.
    """
    if (base.prompts, base.seeds) != (tuned.prompts, tuned.seeds):
        raise ValueError(
            "Only evaluations of the same prompts and seeds can be compared: make both with one Evaluator."
        )
    prompt = np.unique(base.prompts, return_inverse=True)[1]
    after = tuned.metrics()
    return {name: _change(before, after[name], prompt) for name, before in base.metrics().items()}


def _change(before: np.ndarray, after: np.ndarray, prompt: np.ndarray) -> Change:
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


def interval(values: Float[np.ndarray, " prompts"]) -> tuple[float, float]:
    """95% bootstrap interval (BCa) of the mean of independent values; the mean itself where they are all equal."""
    if len(values) < 2 or np.ptp(values) == 0:
        return float(values.mean()), float(values.mean())
    result = bootstrap((values,), np.mean, n_resamples=_RESAMPLES, rng=np.random.default_rng(0), vectorized=True)
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def as_dict(changes: dict[str, Change]) -> dict[str, dict[str, float]]:
    """For JSON."""
    return {name: asdict(change) for name, change in changes.items()}


def as_markdown(changes: dict[str, Change]) -> str:
    """A table for the console."""
    lines = ["| metric | base | tuned | change | 95% interval | better | worse |", "|---|---|---|---|---|---|---|"]
    for name, c in changes.items():
        lines.append(
            f"| {name} | {c.base:.3f} | {c.tuned:.3f} | {c.difference:+.3f} | [{c.low:+.3f}, {c.high:+.3f}] "
            f"| {c.win:.0%} | {c.loss:.0%} |"
        )
    return "\n".join(lines)
