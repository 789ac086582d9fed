"""What `scripts/paper.py` found, as `paper.md` with its plots and as one self-contained page, `paper.html`."""

import base64
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from paper_plots import Point, bars, lines
from paper_results import (
    ABLATED,
    METRICS,
    NAMES,
    TUNED,
    Difference,
    Results,
    Z,
    accurate,
    more_accurate,
    more_changed,
    read,
)

from vp_rl.visionprefer.markdown import Markdown, table

_REWARDS = {
    "all": "VP-Score",
    "only_prompt_following": "of prompt following alone",
    "only_aesthetic": "of the aesthetic alone",
    **{f"without_{key}": f"without {name}" for key, name in NAMES.items()},
    "clip": "CLIP's cosine",
    "annotator": "a less careful annotator",
    "share_1_8": "VP-Score of 1/8 of the data",
    "share_1_4": "of 1/4",
    "share_1_2": "of 1/2",
    "noise_30": "VP-Score of labels with noise 0.3",
    "noise_60": "of noise 0.6",
}
_DATA = "share of the data"
_AXES = {
    _DATA: {"share_1_8": ("1/8", 0.125), "share_1_4": ("1/4", 0.25), "share_1_2": ("1/2", 0.5), "all": ("1", 1.0)},
    "noise of the annotator": {"all": ("0", 0.0), "noise_30": ("0.3", 0.3), "noise_60": ("0.6", 0.6)},
}
_NOTE = (
    "This is the embedded world: tiny models that draw coloured shapes, and a judge that measures pixels. It shows "
    "whether the method's claims hold *there*; it is no evidence about real images, and no number of the paper's is "
    "reproduced. Differences are between means over seeds, with 95% intervals of both sources of "
    "error: other seeds (by Student's t) and other held-out prompts. Models and rewards are "
    "compared prompt by prompt; the less careful annotator as if it had prompts of its own."
)


class Claim(NamedTuple):
    """A statement of the paper, and what would follow from it here."""

    says: str
    where: str
    """In the paper."""
    here: str
    measure: Callable[[Results], Difference | None]
    unit: float = 100
    """Points of a share are 100, of a rating 1."""
    enough: bool = False
    """Whether not being worse is all that is said."""


def write_page(folder: Path, seeds: Sequence[int]) -> Path:
    """Writes the page of what is there; what is missing is left out and named."""
    results = read(folder, seeds)
    panels = {label: accuracies(results, places) for label, places in _AXES.items()}
    plots = {
        "tuned.png": bars(tuned(results), "change of the judge's mean rating, with 95% intervals"),
        "data.png": lines(panels, "VP-Score's accuracy in %", log=[_DATA]),
    }
    return framed(folder / "paper.html", "The paper's claims in the embedded world", page(results, seeds), plots)


def framed(file: Path, title: str, text: str, plots: Mapping[str, Figure]) -> Path:
    """Writes Markdown and its plots beside a self-contained page, and the page."""
    for name, figure in plots.items():
        figure.savefig(file.with_name(name), dpi=130)
    file.with_suffix(".md").write_text(text, encoding="utf-8")
    html = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    for name in plots:
        data = base64.b64encode(file.with_name(name).read_bytes()).decode()
        html = html.replace(f'src="{name}"', f'src="data:image/png;base64,{data}"')
    frame = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    file.write_text(frame.replace("TITLE", title).replace("BODY", html), encoding="utf-8")
    return file


def claims() -> list[Claim]:
    """What the paper says, as far as it is known, and what can be asked of the embedded world."""
    return [*of_rewards(), *of_models()]


def of_rewards() -> list[Claim]:
    """About VP-Score's accuracy."""

    def accuracy(one: str, other: str) -> Callable[[Results], Difference | None]:
        return lambda found: more_accurate(found.accuracy.get(one, {}), found.accuracy.get(other, {}))

    better, more = "VP-Score predicts preferences better than {}", "accuracy, points more"
    return [
        Claim(better.format("CLIP"), "Table 2", more, accuracy("all", "clip")),
        Claim(better.format("an aesthetic score"), "Table 2", more, accuracy("all", "only_aesthetic")),
        Claim(
            "its accuracy is comparable to that of annotators",
            "abstract",
            f"{more} than a less careful annotator",
            accuracy("all", "annotator"),
            enough=True,
        ),
        Claim("more training pairs raise its accuracy", "Fig. 15", "all data over 1/8", accuracy("all", "share_1_8")),
        Claim(
            "better annotators make a better reward",
            "annotator study",
            "no noise over noise 0.6",
            accuracy("all", "noise_60"),
        ),
    ]


def of_models() -> list[Claim]:
    """About models that are tuned against it."""

    def rating(
        one: str, other: str | None = None, metric: str = "mean_rating"
    ) -> Callable[[Results], Difference | None]:
        return lambda found: more_changed(
            found.change.get((one, metric), {}), found.change.get((other, metric), {}) if other else None
        )

    tuned, improves = (
        "a model tuned against VP-Score beats one tuned against {}",
        "RL against VP-Score improves a model",
    )
    weaker = {
        "CLIP": ("Fig. 4", "refl-clip"),
        "an aesthetic score": ("Fig. 4", "refl-only_aesthetic"),
        "prompt following alone": ("ours", "refl-only_prompt_following"),
    }
    aspects = [
        Claim(
            f"supervision of {name} improves {name}",
            "Tables 7-9",
            f"ReFL: {name}, with it over without",
            rating("refl-all", f"refl-without_{key}", key),
            1,
        )
        for key, name in NAMES.items()
    ]
    return [
        Claim(improves, "Table 4", "DDPO: mean rating", rating("ddpo-all"), 1),
        Claim(improves, "Table 4", "ReFL: mean rating", rating("refl-all"), 1),
        Claim(
            "compositional prompts are followed better",
            "abstract",
            "DDPO: fully correct images, points",
            rating("ddpo-all", None, "correct"),
        ),
        *[
            Claim(tuned.format(name), where, "ReFL: mean rating", rating("refl-all", other), 1)
            for name, (where, other) in weaker.items()
        ],
        *aspects,
    ]


def verdict(claim: Claim, found: Difference) -> str:
    """Whether the interval leaves room for doubt."""
    low, high = found.interval()
    if claim.enough:
        return "disagrees" if high < 0 else "agrees"
    return "agrees" if low > 0 else "disagrees" if high < 0 else "undecided"


def page(results: Results, seeds: Sequence[int]) -> str:
    """As Markdown."""
    rows, missing = [], []
    for claim in claims():
        found = claim.measure(results)
        if found is None:
            missing.append(f"{claim.says} ({claim.here})")
            continue
        rows.append((claim.says, claim.where, claim.here, shown(found, claim.unit), verdict(claim, found)))
    counts = {word: sum(row[-1] == word for row in rows) for word in ("agrees", "disagrees", "undecided")}
    summary = (
        f"**{counts['agrees']} claims agree, {counts['disagrees']} disagree, {counts['undecided']} are undecided.**"
    )
    parts = [
        "# The paper's claims in the embedded world",
        _NOTE,
        f"Seeds: {', '.join(map(str, seeds))}. {summary}",
        table(["the paper says", "where", "measured here", "difference", "verdict"], rows),
        "## Rewards",
        "Share of pairs of held-out prompts in the judge's order, by the mean of its four ratings, in percent.",
        table(["reward", *[f"seed {seed}" for seed in seeds], "mean"], reward_rows(results, seeds)),
        "![Accuracy by data and by noise](data.png)",
        "## Tuned models",
        "Change from the base model as the held-out judge rates it, 1 to 5; fully correct images in points.",
        table(["tuned by, against", *METRICS.values()], model_rows(results, TUNED)),
        "![Tuned models](tuned.png)",
        "## Aspects left out",
        "ReFL against VP-Scores that were trained without one aspect.",
        table(["VP-Score", *METRICS.values()], model_rows(results, ABLATED)),
    ]
    if missing:
        parts += ["## Not measured yet", "\n".join(f"- {each}" for each in missing)]
    return "\n\n".join(parts) + "\n"


def shown(found: Difference, unit: float) -> Markdown:
    """A difference with its interval."""
    low, high = found.interval()
    digits = 1 if unit == 100 else 2
    return Markdown(f"{unit * found.value:+.{digits}f} [{unit * low:+.{digits}f}, {unit * high:+.{digits}f}]")


def reward_rows(results: Results, seeds: Sequence[int]) -> list[list[str]]:
    """A reward a row."""
    return [
        [
            label,
            *[f"{100 * found[seed].value:.1f}" if seed in found else "–" for seed in seeds],
            f"{100 * fmean(each.value for each in found.values()):.1f}",
        ]
        for name, label in _REWARDS.items()
        if (found := results.accuracy.get(name))
    ]


def model_rows(results: Results, models: dict[str, str]) -> list[list[object]]:
    """A tuned model a row."""
    rows = []
    for name, label in models.items():
        cells = [more_changed(results.change.get((name, metric), {})) for metric in METRICS]
        if any(cells):
            units = [100 if metric == "correct" else 1 for metric in METRICS]
            rows.append([label, *[shown(c, unit) if c else "–" for c, unit in zip(cells, units, strict=True)]])
    return rows


def tuned(results: Results) -> list[Point]:
    """Change of the mean rating by tuned model."""
    labels = {**{name: f"ReFL, VP-Score {label}" for name, label in ABLATED.items()}, **TUNED}
    names = list(dict.fromkeys([*TUNED, *ABLATED]))
    found = [(name, more_changed(results.change.get((name, "mean_rating"), {}))) for name in names]
    return [Point(labels[name], 0.0, f.value, Z * f.error) for name, f in found if f]


def accuracies(results: Results, places: dict[str, tuple[str, float]]) -> list[Point]:
    """Accuracy of rewards, in percent, each at its place on an axis."""
    found = [
        (label, place, accurate(results.accuracy[name]))
        for name, (label, place) in places.items()
        if name in results.accuracy
    ]
    return [Point(label, place, 100 * f.value, 100 * Z * f.error) for label, place, f in found]
