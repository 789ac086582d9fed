"""What an adapter came to against its base or another: compared once, then written and said, whoever made images."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vp_rl.evaluation.asking import Asked
from vp_rl.evaluation.categories import by_category
from vp_rl.evaluation.compare import BASE, Change, Rival, as_dict, as_markdown, compare
from vp_rl.evaluation.distances import Distances
from vp_rl.evaluation.duel import Duel
from vp_rl.evaluation.images import Evaluation, Evaluator
from vp_rl.evaluation.report import write_report
from vp_rl.evaluation.signs import Moment, Sign, signs, summary
from vp_rl.secrets import mask

ALONE, PAIRS = "images by themselves", "both of a pair"
"""Ways in which the judge is asked."""


@dataclass(frozen=True)
class Conclusion:
    """Two evaluations of the same prompts and seeds, and everything that follows from them."""

    base: Evaluation
    tuned: Evaluation
    changes: dict[str, Change]
    categories: dict[str, dict[str, Change]]
    """The comparison within each category of prompts."""
    signs: list[Sign]
    history: Sequence[Moment] = ()
    """The evaluations while training, the base first; none where nobody watched."""
    pairs: Mapping[str, Duel] = field(default_factory=dict)
    """What the judge said of both images at once, by aspect."""
    distances: Distances | None = None
    asked: Mapping[str, Asked] = field(default_factory=dict)
    """What the judge took, by the way in which it was asked."""
    rival: Rival = BASE
    """What `base` is of."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        told: dict[str, Any] = {"history": summary(self.history)} if self.history else {}
        if self.pairs:
            told["pairs"] = {name: asdict(duel) for name, duel in self.pairs.items()}
        if self.distances is not None:
            told["distances"] = asdict(self.distances)
        if self.asked:
            told["judge"] = {way: each._asdict() | {"usage": each.usage._asdict()} for way, each in self.asked.items()}
        return {
            "held_out": as_dict(self.changes),
            "categories": {name: as_dict(each) for name, each in self.categories.items()},
            "signs": [asdict(sign) for sign in self.signs],
            **told,
            "prompts": len(set(self.base.prompts)),
            "images": len(self.tuned.prompts),
        }


def conclude(
    evaluator: Evaluator,
    base: Evaluation,
    tuned: Evaluation,
    history: Sequence[Moment] = (),
    reward: str = "the trained reward",
    *,
    pairs: Mapping[str, Duel] | None = None,
    distances: Distances | None = None,
    asked: Mapping[str, Asked] | None = None,
    rival: Rival = BASE,
) -> Conclusion:
    """Compares what `evaluator` made of base and adapter, as a whole and by category, and looks for signs.

    Args:
        history: the evaluations while training, the base first.
        reward: what the trained reward is called.
        pairs, distances: what else has been found.
        asked: what the judge took, by the way in which it was asked.
        rival: what `base` is of. An adapter is not the start of another: between two of them there are no signs.
    """
    changes = compare(base, tuned)
    return Conclusion(
        base,
        tuned,
        changes,
        by_category(base, tuned, evaluator.categories),
        signs(history, changes, reward) if rival is BASE else [],
        history,
        pairs or {},
        distances,
        asked or {},
        rival,
    )


def publish(
    done: Conclusion,
    folder: Path,
    evaluator: Evaluator,
    seconds: Mapping[str, float],
    more: Mapping[str, Any],
    *,
    note: str = "",
    command: str = "",
) -> dict[str, Any]:
    """Writes `summary.json`, `scores.csv` and `report.html` to the folder, and prints the table and the signs.

    Args:
        seconds: wall time by the parts of the run.
        more: for `summary.json`.
        note, command: see `write_report`.

    Returns:
        What is in `summary.json`.
    """
    written = {**done.as_dict(), **more}
    (folder / "summary.json").write_text(mask(json.dumps(written, indent=2)) + "\n")
    _write_scores(folder / "scores.csv", {done.rival.short: done.base, "tuned": done.tuned})
    print(f"\nHeld-out prompts, {done.rival.name} against trained, same seeds\n{as_markdown(done.changes, done.rival)}")
    for name, duel in done.pairs.items():
        print(f"both at once, {name}: " + ", ".join(f"{part} {value:.0%}" for part, value in asdict(duel).items()))
    print("".join(f"\n{sign.severity}: {sign.words}" for sign in done.signs))
    report = write_report(
        folder,
        done.base,
        done.tuned,
        done.changes,
        sampler=evaluator.sampler,
        seconds=seconds,
        note=note,
        signs=done.signs,
        categories=done.categories,
        pairs=done.pairs,
        distances=done.distances,
        asked=done.asked,
        command=command,
        rival=done.rival,
    )
    print(f"\nReport: {report}")
    return written


def _write_scores(file: Path, models: Mapping[str, Evaluation]) -> None:
    """A line for each prompt and seed: every metric of every model's image."""
    columns = {
        f"{model}/{name}": values.tolist()
        for model, evaluation in models.items()
        for name, values in evaluation.metrics().items()
    }
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerow(["prompt", "seed", *columns])
        one = next(iter(models.values()))
        writer.writerows(zip(one.prompts, one.seeds, *columns.values(), strict=True))
