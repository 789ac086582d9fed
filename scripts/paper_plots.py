"""The plots of `scripts/paper.py`."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure


class Point(NamedTuple):
    """A mean with the half width of its 95% interval."""

    label: str
    place: float
    """On the horizontal axis, where there is one."""
    value: float
    margin: float


def bars(points: Sequence[Point], label: str) -> Figure:
    """A bar for each, below each other."""
    figure = Figure((9, 3.6), layout="constrained")
    axes = figure.subplots()
    places = range(len(points))
    margins = [point.margin for point in points]
    axes.barh(
        places, [p.value for p in points], xerr=margins, color="#0072B2", ecolor="#444444", capsize=3, height=0.65
    )
    axes.set_yticks(places, [point.label for point in points])
    axes.invert_yaxis()
    axes.axvline(0, color="#444444", linewidth=0.8)
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def lines(panels: Mapping[str, Sequence[Point]], label: str, log: Sequence[str] = ()) -> Figure:
    """A line in each panel; those named in `log` have a horizontal axis of powers of two."""
    figure = Figure((9, 3.2), layout="constrained")
    columns = figure.subplots(1, len(panels), sharey=True)
    for axes, (name, points) in zip(columns, panels.items(), strict=True):
        margins = [point.margin for point in points]
        places = [point.place for point in points]
        axes.errorbar(places, [p.value for p in points], yerr=margins, marker="o", capsize=3, color="#0072B2")
        if name in log:
            axes.set_xscale("log", base=2)
        axes.set_xticks(places, [point.label for point in points])
        axes.set_xlabel(name)
        axes.spines[["top", "right"]].set_visible(False)
    columns[0].set_ylabel(label)
    return figure
