"""The dataset card's pictures: PNG files as wide as a README, in colours that colour-blind readers can tell apart."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vp_rl.files import images as image_files
from vp_rl.types import ASPECTS
from vp_rl.visionprefer.statistics import Statistics

# Okabe and Ito's palette, which also differs in lightness.
_COLORS = {"prompt_following": "#0072B2", "aesthetic": "#E69F00", "fidelity": "#009E73", "harmlessness": "#CC79A7"}
_LINES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"
_STYLE: dict[str, Any] = {
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # names and prompts may have a $ in them
}
_DPI = 140
_THUMBNAIL = 320  # pixels


class Shown(NamedTuple):
    """An image with what is said of it."""

    data: bytes
    """The file."""
    caption: str
    ratings: Mapping[str, int]
    """By aspect."""


def words(name: str) -> str:
    """A name from the code as people write it."""
    return name.replace("_", " ").capitalize()


def histograms(counts: Int[np.ndarray, "aspects 5"], file: Path) -> None:
    """How often each rating was given, a panel for each aspect.

    Args:
        file: to write.
    """

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(ASPECTS), sharey=True)
        for axes, aspect, own in zip(panels, ASPECTS, counts, strict=True):
            shares = 100 * own / max(own.sum(), 1)
            bars = axes.bar(range(1, 6), shares, color=_COLORS[aspect], width=0.8)
            axes.bar_label(bars, [f"{share:.0f}" for share in shares], padding=2, fontsize=11)
            axes.set_title(words(aspect))
            axes.set_xticks(range(1, 6))
            axes.set_xlabel("rating")
            axes.margins(y=0.12)
        panels[0].set_ylabel("% of images")

    _write(draw, (10, 3.2), file)


def correlation(matrix: Float[np.ndarray, "aspects aspects"], file: Path) -> None:
    """The correlation between aspects as coloured numbers."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        names = [words(aspect) for aspect in ASPECTS]
        picture = axes.imshow(matrix, vmin=-1, vmax=1, cmap="PuOr_r")
        for (row, column), value in np.ndenumerate(matrix):
            ink = "white" if abs(value) > 0.6 else "black"
            axes.text(column, row, "–" if np.isnan(value) else f"{value:.2f}", ha="center", va="center", color=ink)
        axes.set_xticks(range(len(names)), names, rotation=25, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(names)), names)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        figure.colorbar(picture, label="Spearman's correlation", ticks=[-1, -0.5, 0, 0.5, 1])

    _write(draw, (6.6, 4.6), file)


def win_rates(statistics: Statistics, file: Path) -> None:
    """Win rates of generators, by aspect and by the mean, and at each guidance scale; of what there are several of."""
    panels = [_by_generator] if len(statistics.generators) > 1 else []
    panels += [_by_guidance] if len(statistics.guidance) > 1 else []

    def draw(figure: Figure) -> None:
        for panel, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
            panel(axes, statistics)
            axes.grid(alpha=0.25)
            axes.set_axisbelow(True)

    _write(draw, (1 + 5 * len(panels), max(4.2, 1.4 + 0.75 * len(statistics.generators))), file)


def _by_generator(axes: Axes, statistics: Statistics) -> None:
    wins = statistics.generators
    names = list(wins)
    colors = {**_COLORS, "mean": "#000000"}
    for index, (column, color) in enumerate(colors.items()):
        estimates = [wins[name][column] for name in names]
        places = np.arange(len(names)) + 0.14 * (index - 2)
        label = "By the mean" if column == "mean" else words(column)
        _points(axes, places, estimates, color, _MARKERS[index], label, upright=False)
    axes.axvline(50, color="#777777", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(names)), [short(name) for name in names])
    axes.invert_yaxis()
    axes.set_xlabel("% of untied pairs won")
    axes.set_title("Generator against the others")
    axes.legend(fontsize=10, frameon=False, loc="upper center", bbox_to_anchor=(0.4, -0.16), ncols=2)


def _by_guidance(axes: Axes, statistics: Statistics) -> None:
    wins = statistics.settings
    generators = sorted({setting.generator for setting in wins})
    scales = sorted({setting.guidance_scale for setting in wins})
    step = 0.012 * (scales[-1] - scales[0]) if scales else 0.0  # apart, so that intervals do not hide each other
    for index, name in enumerate(generators):
        own = {setting.guidance_scale: table["mean"] for setting, table in wins.items() if setting.generator == name}
        places = np.array(sorted(own)) + step * (index - (len(generators) - 1) / 2)
        marker, color = _MARKERS[index % len(_MARKERS)], _LINES[index % len(_LINES)]
        _points(axes, places, [own[scale] for scale in sorted(own)], color, marker, short(name), upright=True)
    axes.axhline(50, color="#777777", linewidth=1, linestyle="--")
    if len(scales) <= 8:
        axes.set_xticks(scales, [f"{scale:g}" for scale in scales])
    axes.set_xlabel("guidance scale")
    axes.set_ylabel("% of untied pairs won")
    axes.set_title("Guidance, by the mean over aspects")
    axes.legend(fontsize=10, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def _points(
    axes: Axes, places: np.ndarray, estimates: Sequence, color: str, marker: str, label: str, *, upright: bool
) -> None:
    """Estimates with their intervals, in percent; joined by a line where they are upright."""
    value, low, high = (100 * np.array([estimate[part] for estimate in estimates], float) for part in range(3))
    spread = np.maximum(np.stack([value - low, high - value]), 0)  # rounding: an interval may begin at its value
    style = {"color": color, "marker": marker, "markersize": 5, "linewidth": 1.4, "capsize": 2, "label": label}
    if upright:
        axes.errorbar(places, value, yerr=spread, **style)
    else:
        axes.errorbar(value, places, xerr=spread, **{**style, "linestyle": "none"})


def sample(images: Sequence[Shown], file: Path) -> None:
    """The images of one prompt side by side, each above its ratings."""

    def draw(figure: Figure) -> None:
        panels = figure.subplots(2, len(images), height_ratios=[2.2, 1], squeeze=False, sharey="row")
        for index, (shown, (above, below)) in enumerate(zip(images, panels.T, strict=True)):
            _picture(above, shown)
            values = [shown.ratings.get(aspect, 0) for aspect in ASPECTS]
            bars = below.barh(range(len(ASPECTS)), values, color=[_COLORS[aspect] for aspect in ASPECTS], height=0.75)
            below.bar_label(bars, [str(value or "–") for value in values], padding=3, fontsize=11)
            below.set_xlim(0, 5.6)
            below.set_xticks([])
            below.set_yticks(range(len(ASPECTS)), [words(aspect) for aspect in ASPECTS])
            below.tick_params(length=0, labelleft=index == 0)
            below.spines[["bottom", "left"]].set_visible(False)
        panels[1, 0].invert_yaxis()

    _write(draw, (2.3 * len(images) + 1.6, 3.9), file)


def _picture(axes: Axes, shown: Shown) -> None:
    axes.axis("off")
    axes.set_title(shown.caption, fontsize=10)
    try:
        image = image_files.rgb(shown.data)
    except ValueError:  # a card is no place to fail over one file of many
        axes.text(0.5, 0.5, "cannot be\ndecoded", ha="center", va="center", transform=axes.transAxes)
        return
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    # A small image is shown as it is, pixel by pixel; a large one is scaled with care.
    axes.imshow(np.asarray(image), interpolation="nearest" if max(image.size) < _THUMBNAIL // 2 else "antialiased")


def short(name: str) -> str:
    """A name that fits beside a picture."""
    return name if len(name) <= 24 else name[:22] + "…"


def _write(draw: Callable[[Figure], None], size: tuple[float, float], file: Path) -> None:
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():  # type: ignore[arg-type]
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from")  # a name in a script that the font lacks
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(file, dpi=_DPI, metadata={"Software": None})
