"""The lines of a page's comparisons, formatted: what changed, its interval, and the bar that is drawn of it."""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from vp_rl.evaluation.compare import Change
from vp_rl.evaluation.verdict import ALIKE, LOOK, interval, label, number
from vp_rl.types import ASPECTS


class Row(NamedTuple):
    """One line of a comparison, formatted."""

    label: str
    base: str
    tuned: str
    change: str
    interval: str
    direction: str  # `up` or `down` where that is clear (`moved`, where neither is better), else `even`
    bar: tuple[float, float, float]  # low, difference and high as percent of the plot's width; 50 is no change
    shares: tuple[float, float, float]  # percent of the images that rose, stayed, fell


def row(name: str, change: Change, peers: Iterable[Change], called: str = "") -> Row:
    """A metric's line.

    Args:
        name: of the metric.
        change: of that.
        peers: what its bar is drawn on the same scale as.
        called: instead of the metric's label.
    """
    ends = [abs(end) for peer in peers for end in (peer.low, peer.high, peer.difference) if not math.isnan(end)]
    reach = max(ends, default=0.0) or 1.0
    low, high = (change.difference, change.difference) if change.few else (change.low, change.high)
    return Row(
        label=called or label(name),
        base=number(change.base, change, name),
        tuned=number(change.tuned, change, name),
        change=number(change.difference, change, name, signed=True) + (" points" if name == "correct" else ""),
        interval=interval(change, name),
        direction=_direction(name, change),
        bar=(50 + 48 * low / reach, 50 + 48 * change.difference / reach, 50 + 48 * high / reach),
        shares=(100 * change.win, 100 * change.tie, 100 * change.loss),
    )


def _direction(name: str, change: Change) -> str:
    """Of what images look like nothing is better or worse, but that they become alike."""
    if name.startswith(LOOK) and change.clear:
        return "mixed" if name in ALIKE and change.difference < 0 else "moved"
    return change.direction


def rows(changes: Mapping[str, Change]) -> dict[str, Row]:
    """Ratings share a scale, so that their bars can be compared; rewards and shares have scales of their own."""
    rated = changes.keys() & {*ASPECTS, "mean_rating"}
    peers = [changes[name] for name in rated]
    return {name: row(name, change, peers if name in rated else [change]) for name, change in changes.items()}
