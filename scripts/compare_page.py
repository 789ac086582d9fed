"""What `scripts/compare.py` found, as `compare.md` with its plot and as one self-contained page, `compare.html`."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from paper_page import framed, shown
from paper_plots import Point, bars
from paper_results import METRICS, Changes, Difference, Z, changes, more_changed, read_csv

from vp_rl.visionprefer.markdown import Markdown, table


class Method(NamedTuple):
    """What is run of a method, and what it is called."""

    label: str
    experiment: str
    settings: tuple[str, ...] = ()
    """Beside the experiment's own; {data} is the dataset's folder."""


_DDPO = ("data.batches_per_epoch=2",)  # without guidance, which gains more with guidance too: docs/log.md
_RANDOM = (
    "algorithm.window=[0,0.6]",
    "algorithm.random_steps=2",
    "algorithm.train_batch=64",
    "trainer.accumulate_grad_batches=4",
)
METHODS = {
    "ddpo": Method("DDPO, two random steps", "ddpo_vpscore", (*_DDPO, "algorithm=ddpo", *_RANDOM)),
    "branch_ddpo": Method("DDPO, branching", "ddpo_vpscore", _DDPO),
    "nft": Method("DiffusionNFT", "nft_vpscore"),
    "awm": Method("advantage-weighted matching", "awm_vpscore"),
    "online_dpo": Method("online DPO", "online_dpo_vpscore"),
    "refl": Method("ReFL", "refl_vpscore"),
    "draft": Method("DRaFT", "draft_vpscore"),
    "flow_bp": Method("FlowBP", "flow_bp_vpscore"),
    "dpo": Method("Diffusion-DPO on VisionPrefer", "dpo_visionprefer", ("data.folder={data}",)),
}
_NOTE = (
    "This is the embedded world: tiny models that draw coloured shapes, and a judge that measures pixels. It shows how "
    "the methods compare *there*, at the settings of their experiments; it is no evidence about real images. Changes "
    "are from the base model on the same held-out prompts and noise, means over seeds, with 95% intervals of both "
    "sources of error: other seeds (by Student's t) and other prompts."
)
_FIRST = {"mean_rating": "mean rating", "correct": "fully correct", "reward": "VP-Score"}
SHOWN = _FIRST | METRICS  # a wide table's last columns are scrolled to


def write_page(folder: Path, methods: Sequence[str], seeds: Sequence[int]) -> Path:
    """Writes the page of what is there; a method without a finished run is left out and named."""
    found = {method: of_method(folder, method, seeds) for method in methods}
    points = [
        Point(METHODS[method].label, 0.0, change.value, Z * change.error)
        for method in methods
        if (change := more_changed(found[method]["mean_rating"])) is not None
    ]
    plots = {"compare.png": bars(points, "change of the judge's mean rating, with 95% intervals")} if points else {}
    return framed(folder / "compare.html", "Methods compared in the embedded world", page(folder, found, seeds), plots)


def of_method(folder: Path, method: str, seeds: Sequence[int]) -> dict[str, Changes]:
    """By metric and seed, what a tuned model has over the base."""
    by_seed = {seed: changes(folder / f"{method}-{seed}" / "scores.csv", SHOWN) for seed in seeds}
    return {metric: {seed: each[metric] for seed, each in by_seed.items() if metric in each} for metric in SHOWN}


def page(folder: Path, found: dict[str, dict[str, Changes]], seeds: Sequence[int]) -> str:
    """As Markdown."""
    rows, missing = [], []
    for method, by_metric in found.items():
        cells = {metric: more_changed(values) for metric, values in by_metric.items()}
        if cells["mean_rating"] is None:
            missing.append(METHODS[method].label)
            continue
        measured = [words(change, 100 if metric == "correct" else 1) for metric, change in cells.items()]
        rows.append([METHODS[method].label, str(cells["mean_rating"].seeds), *effort(folder, method, seeds), *measured])
    heads = ["method", "seeds", "minutes", "images/s", "KL", "diversity", *SHOWN.values()]
    parts = [
        "# Methods compared in the embedded world",
        _NOTE,
        "Ratings are by the held-out judge, 1 to 5; fully correct images in points; diversity is the change of how far "
        "apart a prompt's images are, in percent of the base model's; KL is each method's own measure.",
        table(heads, rows),
    ]
    if rows:
        parts.append("![Change of the mean rating](compare.png)")
    if missing:
        parts += ["## Not measured yet", "\n".join(f"- {each}" for each in missing)]
    return "\n\n".join(parts) + "\n"


def words(change: Difference | None, unit: float) -> str:
    """A change with its interval; a dash for what is not there."""
    return "–" if change is None else shown(change, unit)


def effort(folder: Path, method: str, seeds: Sequence[int]) -> list[Markdown | str]:
    """Minutes of training, images a second, the last KL, and the change of diversity: means over seeds."""
    own = [folder / f"{method}-{seed}" for seed in seeds if (folder / f"{method}-{seed}" / "summary.json").is_file()]
    found = [json.loads((run / "summary.json").read_text(encoding="utf-8")) for run in own]
    logged = [read_csv(run / "metrics.csv") for run in own]
    spread = [each["held_out"].get("look/diversity") for each in found]
    return [
        f"{fmean(each['training_seconds'] for each in found) / 60:.1f}",
        mean_of([last(rows, "train/images_per_second") for rows in logged], "{:.1f}"),
        mean_of([last(rows, "train/kl") for rows in logged], "{:.2g}"),
        mean_of([None if s is None else 100 * (s["tuned"] / s["base"] - 1) for s in spread], "{:+.0f}%"),
    ]


def last(rows: Sequence[dict[str, str]], name: str) -> float | None:
    """The last value that was logged."""
    values = [float(row[name]) for row in rows if row.get(name)]
    return values[-1] if values else None


def mean_of(values: Sequence[float | None], form: str) -> Markdown:
    """Of those that are there; a dash for none."""
    known = [value for value in values if value is not None]
    return Markdown(form.format(fmean(known)) if known else "–")
