"""The guidance curve as a report shows it: plots, what changed at each scale, and best-of-n beside it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from vp_rl.evaluation.claims import FIRST
from vp_rl.evaluation.compare import TOO_FEW, Change
from vp_rl.evaluation.curves import ALARM, INK, LINE, axes_of, svg
from vp_rl.evaluation.guidance_curve import GuidanceCurve, Side
from vp_rl.evaluation.rows import Row, row
from vp_rl.evaluation.verdict import label

_SHOWN = ("mean_rating", "correct")
_SIDES: tuple[tuple[Side, str, str, str], ...] = (("base", INK, "--", "base"), ("tuned", LINE, "-", "trained"))
_TITLES = {"mean_rating": "Judge's mean rating, 1 to 5", "correct": "Fully correct images, %"}


class Chart(NamedTuple):
    """One metric over guidance scales."""

    title: str
    svg: str
    rows: list[Row]
    """Each at its best first, then at each scale."""


def section(curve: GuidanceCurve) -> dict[str, Any]:
    """What the page's template is given of a curve."""
    shown = [name for name in _SHOWN if name in curve.best]
    return {
        "charts": [Chart(_TITLES[name], _plot(curve, name), _rows(curve, name)) for name in shown],
        "base": f"{curve.chosen['base']:g}",
        "tuned": f"{curve.chosen['tuned']:g}",
        "metric": "the judge's mean rating" if curve.metric == FIRST else label(curve.metric).lower(),
        "split": curve.split,
        "choosing": curve.choosing,
        "images": curve.images[None],
        "fewest": min(curve.images.values()),
        "numbers": list(curve.best_of),
        "noise": "deterministic" if curve.sampler.eta == 0 else f"eta {curve.sampler.eta:g}",
        "steps": curve.sampler.steps,
    }


def _rows(curve: GuidanceCurve, name: str) -> list[Row]:
    own = {scale: changes[name] for scale, changes in curve.scales.items()}
    several = {number: changes[name] for number, changes in curve.best_of.items()}
    peers = [curve.best[name], *own.values(), *several.values()]
    found = [row(name, curve.best[name], peers, "each at its best")]
    found += [row(name, each, peers, f"both at {scale:g}") for scale, each in own.items()]
    return found + [row(name, each, peers, f"against best of {number}") for number, each in several.items()]


def _plot(curve: GuidanceCurve, name: str) -> str:
    unit = 100 if name == "correct" else 1
    scales = list(curve.scales)
    with axes_of((4.4, 2.7)) as (figure, axes):
        for side, color, style, called in _SIDES:
            values = {scale: unit * getattr(curve.scales[scale][name], side) for scale in scales}
            line = {"color": color, "linestyle": style, "linewidth": 2, "marker": "o", "markersize": 3.5}
            axes.plot(scales, list(values.values()), label=called, **line)
            best = curve.chosen[side]
            axes.plot(best, values[best], "o", color=color, markersize=9, fillstyle="none")
        worse = [scale for scale in scales if curve.scales[scale][name].direction == "down"]
        axes.plot(worse, [unit * curve.scales[scale][name].tuned for scale in worse], "v", color=ALARM, markersize=8)
        _best_of(axes, {number: unit * own[name].base for number, own in curve.best_of.items()}, scales[-1])
        axes.set_xlabel("guidance scale")
        axes.set_xticks(scales, [f"{scale:g}" for scale in scales])
        axes.locator_params(axis="y", nbins=5)
        axes.legend(  # above the plot
            frameon=False,
            fontsize=9,
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=2,
            borderaxespad=0,
            handlelength=3,
        )
        return svg(figure)


def _best_of(axes: Axes, values: Mapping[int, float], right: float) -> None:
    """A dotted line for each; what the lowest is called stands below it, the others above theirs."""
    for place, number in enumerate(sorted(values, key=lambda number: values[number])):
        axes.axhline(values[number], color=INK, linewidth=1, linestyle=":")
        below = place == 0 and len(values) > 1
        axes.annotate(
            f"base, best of {number}", (right, values[number]), (0, -2 if below else 2), fontsize=8, ha="right",
            textcoords="offset points", va="top" if below else "bottom", annotation_clip=False,
        )  # fmt: skip


def in_words(curve: GuidanceCurve) -> str:
    """For the terminal: a line for best against best, and one for each scale."""
    base, tuned = curve.chosen["base"], curve.chosen["tuned"]
    lines = [f"guidance scales{curve.aside}, base against trained: mean rating, fully correct"]
    lines.append(f"each at its best ({base:g}, {tuned:g}): {_numbers(curve.best)}")
    lines += [f"both at {scale:g}: {_numbers(own)}" for scale, own in curve.scales.items()]
    lines += [f"base's best of {number} against one: {_numbers(own)}" for number, own in curve.best_of.items()]
    return "\n".join(lines)


def _numbers(changes: Mapping[str, Change]) -> str:
    return ", ".join(_number(changes[name]) for name in _SHOWN)


def _number(change: Change) -> str:
    between = TOO_FEW if change.few else f"[{change.low:+.3f}, {change.high:+.3f}]{' *' if change.clear else ''}"
    return f"{change.base:.3f} -> {change.tuned:.3f} ({change.difference:+.3f} {between})"
