"""One table of a sweep's runs, as CSV, Markdown and a page."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import yaml

from vp_rl.evaluation.compare import TOO_FEW, Change
from vp_rl.evaluation.job import replace
from vp_rl.evaluation.lock import lock_of
from vp_rl.evaluation.settings import override
from vp_rl.evaluation.sweep_page import accuracies, changes_of, page

_METRICS = ("reward", "prompt_following", "mean_rating", "correct")

Cells = dict[str, str]


def write_table(folder: Path) -> list[Cells]:
    """Collects the runs below a multirun folder into `results.csv`, `.md` and `.html`, anew after each run.

    A run that has not finished, or failed, has a row without results.

    Returns:
        The rows of `results.csv`, by column.
    """
    with lock_of(folder):  # of two that end together, the one that has read less must not write last
        return _write(folder)


def _write(folder: Path) -> list[Cells]:
    runs = sorted({path.parent for name in (".hydra", "summary.json") for path in folder.glob(f"*/{name}")}, key=_order)
    overrides = [_overrides(run) for run in runs]
    summaries = [_summary(run / "summary.json") for run in runs]
    rows = [{**o, **_numbers(s)} for o, s in zip(overrides, summaries, strict=True)]
    read = [{**o, **_words(s)} for o, s in zip(overrides, summaries, strict=True)]
    text = io.StringIO()
    writer = csv.DictWriter(text, _columns(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    replace(folder / "results.csv", text.getvalue())
    lines = [_columns(read), ["---"] * len(_columns(read))]
    lines += [[row.get(column, "").replace("|", "\\|") for column in _columns(read)] for row in read]
    replace(folder / "results.md", "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n")
    if runs:
        given = [{name: value for name, value in own.items() if name != "run"} for own in overrides]
        replace(folder / "results.html", page(runs, given, summaries))
    return rows


def _columns(rows: list[Cells]) -> list[str]:
    return list(dict.fromkeys(column for row in rows for column in row)) or ["run"]


def _overrides(run: Path) -> Cells:
    file = run / ".hydra" / "overrides.yaml"
    given = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else []
    return {"run": run.name} | dict(override(entry).split("=", 1) for entry in given if "=" in entry)


def _summary(file: Path) -> dict[str, Any]:
    """What the run found; nothing where it has not finished, be it in the middle of writing."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def _numbers(summary: dict[str, Any]) -> Cells:
    row: dict[str, float] = {}
    for name, change in _changes(summary).items():
        row |= {name: change.tuned, f"{name}.difference": change.difference}
        row |= {} if change.few else {f"{name}.low": change.low, f"{name}.high": change.high}
    return {column: f"{value:.6g}" for column, value in (row | _others(summary)).items()}


def _words(summary: dict[str, Any]) -> Cells:
    row = {}
    for name, c in _changes(summary).items():
        row[name] = f"{c.tuned:.3f} ({c.difference:+.3f} {TOO_FEW if c.few else f'[{c.low:+.3f}, {c.high:+.3f}]'})"
    return row | {column: f"{value:.4g}" for column, value in _others(summary).items()}


def _changes(summary: dict[str, Any]) -> dict[str, Change]:
    found = changes_of(summary)
    return {name: found[name] for name in _METRICS if name in found}


def _others(summary: dict[str, Any]) -> dict[str, float]:
    """A reward model's accuracies, and what the run cost."""
    found = {f"accuracy of {name}": share for name, share in accuracies(summary).items()}
    return found | {name: summary[name] for name in ("training_seconds",) if name in summary}


def _order(run: Path) -> tuple[int, str]:
    return (int(run.name), "") if run.name.isdigit() else (1 << 30, run.name)
