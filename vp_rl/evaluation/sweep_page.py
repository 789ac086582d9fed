"""A sweep's runs on one page: results with intervals, and what each makes of the same prompts."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vp_rl.evaluation.claims import held_by, mark
from vp_rl.evaluation.compare import Change
from vp_rl.evaluation.report import PAGES, duration, embed
from vp_rl.evaluation.rows import Row, row
from vp_rl.files import images as image_files

_METRICS = ("mean_rating", "correct", "reward", "prompt_following")
_WIDTH, _HEIGHT = 1600, 200  # pixels of a run's strip of images, at most


class Run(NamedTuple):
    """A row of the page."""

    name: str
    settings: dict[str, str]
    """What differs from run to run."""
    rows: dict[str, Row]
    """By metric; none where the run has not finished."""
    accuracies: dict[str, str]
    """Of a reward model, in percent."""
    time: str
    base: str
    """An image URL; empty where it is the one of the run before, or there is none."""
    trained: str
    best: bool
    without: bool
    """Whether it left no adapter, as the base model was better on validation."""


def page(
    folders: Sequence[Path], overrides: Sequence[Mapping[str, str]], summaries: Sequence[Mapping[str, Any]]
) -> str:
    """The page of these runs.

    Args:
        folders: of the runs.
        overrides: of each run, by setting, without what a page must not give away.
        summaries: what each found; empty where it has not finished.
    """
    shared = {name: value for name, value in overrides[0].items() if all(o.get(name) == value for o in overrides)}
    changes = _together([changes_of(summary) for summary in summaries])
    without = [summary.get("best", {}).get("beats_base") is False for summary in summaries]
    gains = [
        found["mean_rating"].difference if "mean_rating" in found and not none else -np.inf
        for found, none in zip(changes, without, strict=True)
    ]
    peers = {name: [found[name] for found in changes if name in found] for name in _METRICS}
    runs, base = [], ""
    for place, (folder, given, summary) in enumerate(zip(folders, overrides, summaries, strict=True)):
        before, trained = _strips(folder)
        runs.append(
            Run(
                name=folder.name,
                settings={name: value for name, value in given.items() if name not in shared},
                rows={name: row(name, own, peers[name]) for name, own in changes[place].items()},
                accuracies={name: f"{100 * each:.1f}%" for name, each in accuracies(summary).items()},
                time=duration(summary["training_seconds"]) if "training_seconds" in summary else "",
                base="" if before == base else before,
                trained=trained,
                without=without[place],
                best=place == int(np.argmax(gains)) and np.isfinite(gains[place]) and len(folders) > 1,
            )
        )
        base = before or base
    above = folders[0].parent
    return PAGES.get_template("results.html").render(
        title=shared.get("name") or shared.get("experiment") or "Sweep",
        date=above.name,
        shared=shared,
        settings=_union(run.settings for run in runs),
        metrics={name: next(run.rows[name].label for run in runs if name in run.rows)
                 for name in _METRICS if any(name in run.rows for run in runs)},
        accuracies=_union(run.accuracies for run in runs),
        runs=runs,
        linked={folder.name for folder in folders if (folder / "report.html").is_file()},
        prompts=_prompts(folders),
    )  # fmt: skip


def changes_of(summary: Mapping[str, Any]) -> dict[str, Change]:
    """A run's own; what is null there is not a number."""
    found: dict[str, Change] = {}
    for name, own in summary.get("held_out", {}).items():
        known = {key: each for key, each in own.items() if key in Change.__dataclass_fields__}
        values: dict[str, Any] = {key: math.nan if each is None else each for key, each in known.items()}
        if name in _METRICS:
            found[name] = Change(**values)
    return found


def _together(changes: Sequence[Mapping[str, Change]]) -> list[dict[str, Change]]:
    """Decided as one page: more runs are more looks."""
    held = held_by({(run, name): each.chance for run, own in enumerate(changes) for name, each in own.items()})
    return [{name: mark(each, held[run, name]) for name, each in own.items()} for run, own in enumerate(changes)]


def _union(rows: Any) -> list[str]:
    return list(dict.fromkeys(name for each in rows for name in each))


def accuracies(summary: Mapping[str, Any]) -> dict[str, float]:
    """A reward model's accuracies, each by the rule that stands first: by the mean rating, or by what people prefer."""
    found = {name: next(iter(by_rule.values()))["share"] for name, by_rule in summary.get("accuracy", {}).items()}
    return {name: share for name, share in found.items() if share is not None}


def _strips(run: Path) -> tuple[str, str]:
    """The last of a run's grids of samples, taken apart: the base's row, and the policy's below it."""
    grids = sorted((run / "samples").glob("epoch_*.png"), key=lambda file: int(re.sub(r"\D", "", file.stem) or 0))
    try:
        image = Image.fromarray(image_files.read(grids[-1]))
    except (IndexError, OSError, ValueError):  # none yet, or it is just being written
        return "", ""
    half = image.height // 2
    halves = (image.crop((0, 0, image.width, half - 1)), image.crop((0, half + 1, image.width, image.height)))
    before, trained = (embed(part, _WIDTH, _HEIGHT) for part in halves)
    return before, trained


def _prompts(runs: Sequence[Path]) -> list[str]:
    """Those of the grids' columns, where a run says."""
    for run in runs:
        file = run / "samples" / "prompts.json"
        if file.is_file():
            return json.loads(file.read_text(encoding="utf-8"))
    return []
