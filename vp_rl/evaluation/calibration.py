"""The plot of how far apart two scores are against how many people agree with their order."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from vp_rl.evaluation.human_accuracy import Bin

# Okabe and Ito's palette, whose colours also differ in lightness; markers say it again.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#7F7F7F")
_MARKERS = "osD^vPX"
_INK = "#010203"  # stands for the page's own colour, since matplotlib takes no CSS
_PARTS = ("text", "xtick", "ytick", "grid")

Curves = Mapping[str, Sequence[Bin]]
"""By reward."""


def as_svg(curves: Curves) -> str:
    """The picture as markup for a page; its text and lines have the page's colour."""
    style = {"svg.fonttype": "none", "svg.hashsalt": "vp_rl", "axes.labelcolor": _INK, "axes.edgecolor": _INK}
    buffer = io.StringIO()
    meta = {"Date": None, "Creator": None, "Format": None, "Type": None}
    _draw(
        curves,
        {**style, **{f"{part}.color": _INK for part in _PARTS}},
        lambda figure: figure.savefig(buffer, format="svg", metadata=meta, transparent=True),
    )
    text = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    return text[text.index("<svg") :].replace(_INK, "currentColor")


def as_png(curves: Curves, file: Path) -> None:
    """The picture as a file."""
    _draw(curves, {}, lambda figure: figure.savefig(file, dpi=140, metadata={"Software": None}))


def _draw(curves: Curves, style: dict[str, Any], save: Callable[[Figure], None]) -> None:
    """Percent who agree, with 95% intervals, over the gap in standard deviations of the scores."""
    with matplotlib.rc_context({"text.parse_math": False, "font.size": 10, **style}):  # type: ignore[arg-type]
        figure = Figure(figsize=(6.2, 3.4), layout="constrained")
        axes = figure.subplots()
        axes.axhline(50, color="#888888", linewidth=1, linestyle="--")
        for index, (name, bins) in enumerate(curves.items()):
            value, low, high = (100 * np.array([each.agree[part] for each in bins]) for part in range(3))
            axes.errorbar(
                [each.gap for each in bins],
                value,
                yerr=np.stack([value - low, high - value]).clip(0),
                color=_COLORS[index % len(_COLORS)],
                marker=_MARKERS[index % len(_MARKERS)],
                markersize=4.5,
                linewidth=1.5,
                capsize=2,
                label=name,
            )
        axes.set_xlabel("gap between two scores, in standard deviations of all")
        axes.set_ylabel("% who prefer the higher score")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
        axes.set_axisbelow(True)
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
        save(figure)
