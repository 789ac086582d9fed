"""What the jobs of `scripts/paper.py` left, and how much more one of them has than another."""

import csv
import json
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

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
    """Standard error over held-out prompts."""
    parts: Float[np.ndarray, " prompts"] | None = None
    """What each prompt adds to the error, where that is known: they add up to zero, and their squares to its square."""


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
        for reward, found in accuracies(folder / f"accuracy-{seed}" / "by_prompt.csv").items():
            name = reward.removeprefix("reward-").removesuffix(f"-{seed}")
            accuracy.setdefault(name, {})[seed] = found
        summary = folder / f"reward-all-{seed}" / "summary.json"
        table = json.loads(summary.read_text(encoding="utf-8"))["accuracy"] if summary.is_file() else {}
        for name, by_rule in table.items():
            if "noisy" in name:
                own = by_rule["mean"]
                error = (own["high"] - own["low"]) / (2 * Z)
                accuracy.setdefault("annotator", {})[seed] = Measured(own["share"], error)
        for name in {**TUNED, **ABLATED}:
            for metric, values in changes(folder / f"{name}-{seed}" / "scores.csv").items():
                change.setdefault((name, metric), {})[seed] = values
    return Results(accuracy, change)


def accuracies(file: Path) -> dict[str, Measured]:
    """By reward: its share of right pairs, by the first protocol of the file."""
    rows = read_csv(file)
    rows = [row for row in rows if row["protocol"] == rows[0]["protocol"]]
    found = {}
    for reward in dict.fromkeys(row["reward"] for row in rows):
        # A prompt is at the same place for every reward: they are read from one set.
        own = np.array([(row["earned"], row["possible"]) for row in rows if row["reward"] == reward], float)
        right, pairs = own.T
        value, prompts = right.sum() / pairs.sum(), len(own)
        # As `visionprefer.estimates` has a ratio's variance, but by prompt: another reward's can be subtracted.
        moved = (right - value * pairs) / pairs.sum()
        parts = moved * math.sqrt(prompts / max(1, prompts - 1))
        found[reward] = Measured(float(value), norm(parts), parts)
    return found


def read_csv(file: Path) -> list[dict[str, str]]:
    """The rows of a table, where there is one."""
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def norm(parts: Float[np.ndarray, " prompts"]) -> float:
    """The standard error that they make together."""
    return float(np.linalg.norm(parts))


def changes(file: Path, metrics: Collection[str] = METRICS) -> dict[str, Float[np.ndarray, " prompts"]]:
    """By metric: how much more the tuned model's images of a prompt have than the base's, averaged over their seeds.

    Args:
        file: `scores.csv` of a run.
        metrics: those of interest; one that the file has not is left out.
    """
    rows = read_csv(file)
    if not rows:
        return {}
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    by_prompt = {
        metric: [
            [float(row[f"tuned/{metric}"]) - float(row[f"base/{metric}"]) for row in rows if row["prompt"] == prompt]
            for prompt in prompts
        ]
        for metric in metrics
        if f"tuned/{metric}" in rows[0]
    }
    return {metric: np.array(values).mean(1) for metric, values in by_prompt.items()}


def accurate(found: Found) -> Difference:
    """A reward's accuracy over seeds."""
    each = list(found.values())
    return difference([one.value for one in each], *together([one.parts for one in each], [one.error for one in each]))


def more_accurate(one: Found, other: Found) -> Difference | None:
    """How much more often `one` is right than `other`, over the seeds that both have; by prompt, if it can be."""
    both = [(one[seed], other[seed]) for seed in one if seed in other]
    if not both:
        return None
    parts = [None if a.parts is None or b.parts is None else a.parts - b.parts for a, b in both]
    within = together(parts, [math.hypot(a.error, b.error) for a, b in both])
    return difference([a.value - b.value for a, b in both], *within)


def together(parts: Sequence[Float[np.ndarray, " prompts"] | None], errors: Sequence[float]) -> tuple[float, float]:
    """Error of a mean over seeds, and how much of it is each seed's own.

    All have the same prompts, so that several are little surer of them than one.
    """
    known = [each for each in parts if each is not None]
    if len(known) < len(parts):
        return fmean(errors), 0.0
    return norm(np.mean(known, axis=0)), alone(np.array(known))


def alone(by_prompt: Float[np.ndarray, "seeds prompts"]) -> float:
    """Error of the mean over seeds from what each seed has of each prompt beside what the prompt has in all of them."""
    seeds = len(by_prompt)
    rest = by_prompt - by_prompt.mean(0) - (by_prompt - by_prompt.mean(0)).mean(1, keepdims=True)
    return norm(rest.ravel()) / math.sqrt(seeds * (seeds - 1)) if seeds > 1 else 0.0


def more_changed(one: Changes, other: Changes | None = None) -> Difference | None:
    """How much further from the base `one` is than `other`, or than the base itself, over the seeds that both have."""
    if other is None:
        other = {seed: np.zeros_like(values) for seed, values in one.items()}
    gaps = np.array([one[seed] - other[seed] for seed in one if seed in other])
    if not gaps.size:
        return None
    prompts = gaps.shape[1]
    scale = math.sqrt(prompts * (prompts - 1)) if prompts > 1 else math.inf
    by_prompt = gaps.mean(0)
    within = norm(by_prompt - by_prompt.mean()) / scale
    return difference(gaps.mean(1).tolist(), within, alone((gaps - gaps.mean(1, keepdims=True)) / scale))


def difference(by_seed: list[float], within: float, both: float = 0.0) -> Difference:
    """Over seeds, with the errors of both its sources: other seeds would have come out otherwise, and other prompts.

    Args:
        by_seed: of each seed.
        within: error over prompts.
        both: what is in the one and in the other, and counts once (Cameron, Gelbach and Miller 2011, "Robust inference
            with multiway clustering").
    """
    seeds = len(by_seed)
    # Of few seeds the spread is a rough estimate: by Student's t its interval is that much wider.
    between = stdev(by_seed) / math.sqrt(seeds) * t.ppf(0.975, seeds - 1) / Z if seeds > 1 else 0.0
    least = max(within, between)
    return Difference(fmean(by_seed), max(least, math.sqrt(max(0.0, between**2 + within**2 - both**2))), seeds)
