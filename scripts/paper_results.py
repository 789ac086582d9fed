"""What the jobs of `scripts/paper.py` left, and how much more one of them has than another."""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.stats import t

Z = 1.96  # of a 95% interval
TUNED = {
    "ddpo-all": "DDPO, VP-Score",
    "refl-all": "ReFL, VP-Score",
    "refl-only_prompt_following": "ReFL, VP-Score of prompt following alone",
    "refl-only_aesthetic": "ReFL, VP-Score of the aesthetic alone",
    "refl-clip": "ReFL, CLIP's cosine",
}
NAMES = {
    "prompt_following": "prompt following",
    "aesthetic": "aesthetic",
    "fidelity": "fidelity",
    "harmlessness": "harmlessness",
}
ABLATED = {"refl-all": "all four", **{f"refl-without_{key}": f"without {name}" for key, name in NAMES.items()}}
METRICS = {"mean_rating": "mean rating", **NAMES, "correct": "fully correct"}


class Measured(NamedTuple):
    """One number of one run."""

    value: float
    error: float
    """Standard error, from its interval over held-out prompts."""


Found = dict[int, Measured]
"""By seed."""
Changes = dict[int, Float[np.ndarray, " prompts"]]
"""Of a tuned model from the base, by seed and held-out prompt."""


class Results(NamedTuple):
    """Everything that was measured."""

    accuracy: dict[str, Found]
    """By reward: share of pairs in the judge's order by the mean of its four ratings."""
    change: dict[tuple[str, str], Changes]
    """By tuned model and metric."""


class Difference(NamedTuple):
    """What one thing has over another."""

    value: float
    error: float
    seeds: int

    def interval(self) -> tuple[float, float]:
        """With 95% confidence."""
        return self.value - Z * self.error, self.value + Z * self.error


def read(folder: Path, seeds: Sequence[int]) -> Results:
    """What the finished jobs left."""
    accuracy: dict[str, Found] = {}
    change: dict[tuple[str, str], Changes] = {}
    for seed in seeds:
        for entry in load(folder / f"accuracy-{seed}" / "accuracy.json", []):
            name = entry["reward"].removeprefix("reward-").removesuffix(f"-{seed}")
            accuracy.setdefault(name, {})[seed] = measured(next(iter(entry["accuracy"].values())), "share")
        table = load(folder / f"reward-all-{seed}" / "summary.json", {}).get("accuracy", {})
        for name, by_rule in table.items():
            if "noisy" in name:
                accuracy.setdefault("annotator", {})[seed] = measured(by_rule["mean"], "share")
        for name in {**TUNED, **ABLATED}:
            for metric, values in changes(folder / f"{name}-{seed}" / "scores.csv").items():
                change.setdefault((name, metric), {})[seed] = values
    return Results(accuracy, change)


def load(file: Path, otherwise: Any) -> Any:
    """A JSON file, where there is one."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else otherwise


def changes(file: Path) -> dict[str, Float[np.ndarray, " prompts"]]:
    """By metric: how much more the tuned model's images of a prompt have than the base's, averaged over their seeds."""
    if not file.is_file():
        return {}
    with file.open(newline="", encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened))
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    by_prompt = {
        metric: [
            [float(row[f"tuned/{metric}"]) - float(row[f"base/{metric}"]) for row in rows if row["prompt"] == prompt]
            for prompt in prompts
        ]
        for metric in METRICS
    }
    return {metric: np.array(values).mean(1) for metric, values in by_prompt.items()}


def measured(found: dict[str, float], key: str) -> Measured:
    """A number with a standard error as wide as its interval says."""
    return Measured(found[key], (found["high"] - found["low"]) / (2 * Z))


def accurate(found: Found) -> Difference:
    """A reward's accuracy over seeds. All have the same prompts, so several are no surer of them than one."""
    within = fmean(each.error for each in found.values())
    return difference([each.value for each in found.values()], within)


def more_accurate(one: Found, other: Found) -> Difference | None:
    """How much more often `one` is right than `other`, over the seeds that both have."""
    both = [(one[seed], other[seed]) for seed in one if seed in other]
    if not both:
        return None
    within = fmean(math.hypot(a.error, b.error) for a, b in both)
    return difference([a.value - b.value for a, b in both], within)


def more_changed(one: Changes, other: Changes | None = None) -> Difference | None:
    """How much further from the base `one` is than `other`, or than the base itself, over the seeds that both have."""
    if other is None:
        other = {seed: np.zeros_like(values) for seed, values in one.items()}
    gaps = np.array([one[seed] - other[seed] for seed in one if seed in other])
    if not gaps.size:
        return None
    by_prompt = gaps.mean(0)
    within = float(by_prompt.std(ddof=1)) / math.sqrt(len(by_prompt)) if len(by_prompt) > 1 else 0.0
    return difference(gaps.mean(1).tolist(), within)


def difference(by_seed: list[float], within: float) -> Difference:
    """Over seeds, as sure as the less sure of its two sources: seeds, and prompts with the error `within`."""
    seeds = len(by_seed)
    # Of few seeds the spread is a rough estimate: by Student's t its interval is that much wider.
    between = stdev(by_seed) / math.sqrt(seeds) * t.ppf(0.975, seeds - 1) / Z if seeds > 1 else 0.0
    return Difference(fmean(by_seed), max(within, between), seeds)
