"""A run's metrics over its epochs, from the CSV logger's table, as SVG that takes the page's colours."""

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vp_rl.evaluation.signs import Sign

History = Mapping[str, Mapping[float, float]]
"""Each metric's value after how many epochs."""

_TITLES = {
    "train/reward": "Reward while training",
    "held_out/reward": "Reward on held-out prompts",
    "held_out/mean_rating": "Judge's mean rating on held-out prompts",
    "held_out/correct": "Fully correct on held-out prompts, share",
    "train/kl": "KL to the base model, per step",
    "train/clip_fraction": "Share of steps that were clipped",
}
_PANEL = "held_out/panel/"
INK, LINE, ALARM = "#010203", "#040506", "#070809"  # stand-ins, replaced by `svg`: matplotlib takes no CSS colours
_PHASES = {"sampling": "sampling", "reward": "decoding and reward", "training": "updates"}


def history(folder: Path) -> History:
    """What `metrics*.csv` say; a later line for the same epoch replaces an earlier one."""
    series: dict[str, dict[float, float]] = {}
    for file in sorted(folder.glob("metrics*.csv")):
        with file.open(newline="", encoding="utf-8") as handle:
            for row in csv.DictReader(handle):
                for name, value in row.items():
                    if value and row.get("epoch") and name not in ("epoch", "step"):
                        series.setdefault(name, {})[float(row["epoch"]) + 1] = float(value)
    return series


def curves(values: History, signs: Sequence[Sign] = ()) -> list[tuple[str, str]]:
    """(title, SVG) of each metric that readers look for; the epochs of warnings are marked."""
    marks = sorted({sign.epoch for sign in signs if sign.epoch is not None and sign.severity == "warning"})
    panel = {name: f"{name.removeprefix(_PANEL)}, held-out prompts" for name in values if name.startswith(_PANEL)}
    return [
        (title, _plot(sorted(values[name].items()), marks))
        for name, title in (_TITLES | panel).items()
        if len(values.get(name, {})) > 1
    ]


def phases(values: History) -> dict[str, float]:
    """Percent of a training round's time by phase; empty where an algorithm does not tell them apart."""
    seconds = {words: values.get(f"train/seconds_{name}", {}).values() for name, words in _PHASES.items()}
    total = sum(sum(each) for each in seconds.values())
    return {words: 100 * sum(each) / total for words, each in seconds.items()} if total > 0 else {}


def _plot(points: list[tuple[float, float]], marks: Sequence[int]) -> str:
    with axes_of((4.4, 2.5)) as (figure, axes):
        marker = {"marker": "o", "markersize": 3.5} if len(points) <= 30 else {}
        for mark in marks:
            axes.axvline(mark, color=ALARM, linewidth=1.2, linestyle="--")
        axes.plot(*zip(*points, strict=True), color=LINE, linewidth=2, **marker)
        axes.set_xlabel("epochs")
        axes.locator_params(axis="x", integer=True, nbins=5)
        axes.locator_params(axis="y", nbins=5)
        if not any(value for _, value in points):
            axes.set_ylim(0, 1)
        return svg(figure)


@contextmanager
def axes_of(size: tuple[float, float]) -> Iterator[tuple[Figure, Axes]]:
    """An empty plot in the page's style: what is drawn inside takes `INK`, `LINE` and `ALARM`, and goes to `svg`."""
    colors = {f"{part}.color": INK for part in ("text", "xtick", "ytick", "grid")}
    style = {"svg.fonttype": "none", "svg.hashsalt": "vp_rl", "axes.labelcolor": INK, "axes.edgecolor": INK, **colors}
    with matplotlib.rc_context(style):  # type: ignore[arg-type]
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0)
        axes.grid(alpha=0.15)
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        yield figure, axes


def svg(figure: Figure) -> str:
    """The plot, in whatever colours the page around it has."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])  # they would be the same in every plot of a page
    for stand_in, color in ((INK, "currentColor"), (LINE, "var(--accent)"), (ALARM, "var(--down)")):
        text = text.replace(stand_in, color)
    return text
