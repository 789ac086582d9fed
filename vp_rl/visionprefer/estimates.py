"""All that is said of chance: shares, means and differences with 95% intervals over prompts, and what many looks cost.

What is estimated is a ratio R = sum y / sum n over prompts: comparisons won of comparisons made, say. Prompts are drawn
independently, but what is counted within one is not, so prompts are the sampling units. With k prompts the ratio's
variance is

    var R = k / (k - 1) * sum (y - R n)^2 / (sum n)^2,

which needs the sums of n, y, n^2, ny and y^2 only: a dataset of any size is read once, in bounded memory, and the
interval is the same as if all had been kept. Differences of the same prompts (`paired`) are kept one by one.
"""

import math
from collections.abc import Hashable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float, Shaped
from scipy.stats import norm, t

FEWEST = 3
"""Prompts: of fewer nothing is concluded."""

Name = TypeVar("Name", bound=Hashable)

_RESAMPLES = 9999
_FEW, _MANY = 30, 1000  # prompts: below, a bootstrap alone is too narrow; above, it is Student's interval
_SIDE = 0.975
_Z = float(norm.ppf(_SIDE))


class Estimate(NamedTuple):
    """An estimate with its 95% interval over prompts; not a number where nothing was counted."""

    value: float
    low: float
    high: float
    count: int
    """What the estimate is out of: comparisons, ratings."""
    prompts: int
    """Those that contribute."""


NOTHING = Estimate(math.nan, math.nan, math.nan, 0, 0)


def sums(
    y: Shaped[np.ndarray, "prompts *cells"], n: Shaped[np.ndarray, "prompts *cells"]
) -> Float[np.ndarray, "6 *cells"]:
    """What `share` and `mean` need of these prompts; sums of several batches of prompts are added.

    Args:
        y: the numerator that each prompt adds, such as comparisons won.
        n: the denominator, such as comparisons made; a prompt where it is 0 does not contribute.
    """
    y, n = y.astype(float), n.astype(float)
    return np.stack([(n > 0).sum(0), n.sum(0), y.sum(0), (n * n).sum(0), (n * y).sum(0), (y * y).sum(0)])


def share(totals: Float[np.ndarray, "6"]) -> Estimate:
    """A share in [0, 1] with Wilson's interval, as for the number of independent trials that would be as uncertain.

    That number (Korn and Graubard 1998) is R (1 - R) / var R, but no more than were counted, and lowered by Student's t
    since prompts may be few. Where all prompts say the same it is the number of prompts.
    """
    return _wilson(totals, 0.0, 1.0, float(totals[1]))


def bounded(totals: Float[np.ndarray, "6"], low: float, high: float) -> Estimate:
    """A mean of numbers that cannot leave [low, high], such as correlations, with an interval that does not either.

    It is `share`'s on another scale. Where few prompts come close to a bound, Student's interval is too narrow.
    """
    return _wilson(totals, low, high, math.inf)


def mean(totals: Float[np.ndarray, "6"]) -> Estimate:
    """A mean of any unit, with Student's interval; the interval is not a number where there is one prompt only."""
    prompts, count, value, variance = _ratio(totals)
    if prompts < 2:
        return NOTHING if not count else Estimate(value, math.nan, math.nan, count, prompts)
    half = float(t.ppf(_SIDE, prompts - 1)) * math.sqrt(variance)
    return Estimate(value, value - half, value + half, count, prompts)


def paired(values: Float[np.ndarray, " prompts"], confidence: float = 0.95, scale: float = 0.0) -> tuple[float, float]:
    """Interval of the mean of independent differences, one of each prompt; not a number of fewer than `FEWEST`.

    The widest of three. The percentile bootstrap, widened as Student's t is wider than a normal distribution whose
    variance leaves out n - 1 (Hesterberg 2015, "What teachers should know about the bootstrap", 4.3). Of few prompts
    Student's interval too, since resamples cannot leave the range of what was drawn. And what has not been seen: with
    that confidence, prompts of no kind that was drawn are a share below 1 - (alpha / 2)^(1 / n) of all (of 128, 3%; of
    8, 37%), and may have moved by `scale` either way, or by the mean. So prompts that all move alike are as sure as by
    the sign test, and that nothing was seen to change does not mean that nothing does.

    Args:
        values: of each prompt.
        confidence: that the interval holds the mean.
        scale: how far a prompt may move, where that is known: 1 for a share, or for a level of ratings.
    """
    number = len(values)
    if number < FEWEST:
        return math.nan, math.nan
    side, mean = (1 - confidence) / 2, float(values.mean())
    unseen = 1 - side ** (1 / number)
    most = max(abs(mean), scale)
    ends = [(mean * (1 - unseen) - unseen * most, mean * (1 - unseen) + unseen * most)]
    if not _FEW <= number <= _MANY:
        half = float(t.ppf(1 - side, number - 1)) * float(values.std(ddof=1)) / math.sqrt(number)
        ends.append((mean - half, mean + half))
    if number <= _MANY:
        reach = math.sqrt(number / (number - 1)) * float(t.ppf(1 - side, number - 1))
        level = max(float(norm.sf(reach)), 5e-10)
        low, high = np.quantile(_means(values), [level, 1 - level]).tolist()
        ends.append((low, high))
    return min(low for low, _ in ends), max(high for _, high in ends)


def chance(values: Float[np.ndarray, " prompts"], scale: float = 0.0) -> float:
    """How probable, where nothing has changed, a mean so far from 0 is: the larger of two of `paired`'s reasons.

    Student's test, and what has not been seen; never less than by the sign test of prompts that all moved one way. 1 of
    fewer than `FEWEST` prompts.
    """
    number, mean = len(values), abs(float(values.mean())) if len(values) else 0.0
    if number < FEWEST or mean == 0:
        return 1.0
    most = max(mean, scale)
    error = float(values.std(ddof=1)) / math.sqrt(number)
    student = 2 * float(t.sf(mean / error, number - 1)) if error else 0.0
    return min(1.0, max(student, 2 * (most / (mean + most)) ** number))


def holm(chances: Mapping[Name, float], first: Name | None = None) -> dict[Name, float]:
    """Chances after as many looks as there are: what is below alpha then holds, all of it, but in alpha of all cases.

    Holm's procedure (1979), which needs no independence. What is asked first has half of alpha to itself, so that
    looking at much else too hardly hides it.

    Args:
        chances: of each comparison, by itself.
        first: the one that the whole is about; None: all are alike.
    """
    others = len(chances) - (first in chances)
    own = max(others, 1) if first in chances else 1  # how many of the others it weighs
    weights = {name: own if name == first else 1 for name in chances}
    left, least, found = sum(weights.values()), 0.0, {}
    for name in sorted(chances, key=lambda each: chances[each] / weights[each]):
        least = max(least, min(1.0, chances[name] * left / weights[name]))
        found[name] = least
        left -= weights[name]
    return found


def without_nan(value: Any) -> Any:
    """For JSON, which has no name for what is not a number: null."""
    if isinstance(value, Mapping):
        return {name: without_nan(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _means(values: Float[np.ndarray, " prompts"]) -> Float[np.ndarray, " resamples"]:
    return _drawn(len(values)) @ values / len(values)


@lru_cache(maxsize=8)
def _drawn(number: int) -> Float[np.ndarray, "resamples prompts"]:
    """How often each prompt is in each resample: the same ones for every measure of as many prompts."""
    rows = np.random.default_rng(0).integers(0, number, (_RESAMPLES, number))
    flat = rows + number * np.arange(_RESAMPLES)[:, None]
    return np.bincount(flat.ravel(), minlength=rows.size).reshape(rows.shape).astype(float)


def _wilson(totals: Float[np.ndarray, "6"], lowest: float, highest: float, most: float) -> Estimate:
    """Wilson's interval for at most so many trials, stretched from [0, 1] to [lowest, highest]."""
    prompts, count, value, variance = _ratio(totals)
    if not count:
        return NOTHING
    if prompts < 2:
        return Estimate(value, lowest, highest, count, prompts)
    width = highest - lowest
    part = (value - lowest) / width
    spread = max(0.0, part * (1 - part))
    trials = min(most, spread * width**2 / variance) if variance > 0 and spread > 0 else prompts
    trials *= (_Z / float(t.ppf(_SIDE, prompts - 1))) ** 2
    centre = (part + _Z**2 / (2 * trials)) / (1 + _Z**2 / trials)
    half = _Z / (1 + _Z**2 / trials) * math.sqrt(spread / trials + _Z**2 / (4 * trials**2))
    low, high = (lowest + width * min(1.0, max(0.0, end)) for end in (centre - half, centre + half))
    return Estimate(value, low, high, count, prompts)


def _ratio(totals: Float[np.ndarray, "6"]) -> tuple[int, int, float, float]:
    """Prompts, sum of n, the ratio, and its variance."""
    prompts, n, y, nn, ny, yy = totals.tolist()
    if prompts < 2:
        return int(prompts), int(n), y / n if n else math.nan, math.nan
    value = y / n
    squares = max(0.0, yy - 2 * value * ny + value**2 * nn)  # rounding may take it below 0
    return int(prompts), int(n), value, prompts / (prompts - 1) * squares / n**2
