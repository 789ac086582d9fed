"""Shares and means with 95% intervals, from sums that are added up prompt by prompt.

What is estimated is a ratio R = sum y / sum n over prompts: comparisons won of comparisons made, say. Prompts are drawn
independently, but what is counted within one is not, so prompts are the sampling units. With k prompts the ratio's
variance is

    var R = k / (k - 1) * sum (y - R n)^2 / (sum n)^2,

which needs the sums of n, y, n^2, ny and y^2 only: a dataset of any size is read once, in bounded memory, and the
interval is the same as if all had been kept.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped
from scipy.stats import norm, t

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
