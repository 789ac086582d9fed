"""What an adapter came to against its base or another: compared once, then written and said, whoever made images."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vp_rl.evaluation.asking import Asked
from vp_rl.evaluation.categories import by_category
from vp_rl.evaluation.claims import Compared, decide
from vp_rl.evaluation.compare import BASE, Rival, as_dict, as_markdown, compare
from vp_rl.evaluation.distances import Distances
from vp_rl.evaluation.duel import Duel
from vp_rl.evaluation.guidance_curve import GuidanceCurve, together
from vp_rl.evaluation.guidance_page import in_words
from vp_rl.evaluation.images import Evaluation, Evaluator
from vp_rl.evaluation.report import write_report
from vp_rl.evaluation.signs import Moment, Sign, signs, summary
from vp_rl.evaluation.trades import trades
from vp_rl.evaluation.verdict import Chosen
from vp_rl.secrets import mask
from vp_rl.visionprefer.estimates import without_nan

ALONE, PAIRS = "images by themselves", "both of a pair"
"""Ways in which the judge is asked."""


@dataclass(frozen=True)
class Conclusion:
    """Two evaluations of the same prompts and seeds, and everything that follows from them."""

    base: Evaluation
    tuned: Evaluation
    compared: Compared
    """All that differs, decided together: of all prompts, in each category, and by both images at once."""
    signs: list[Sign]
    history: Sequence[Moment] = ()
    """The evaluations while training, the base first; none where nobody watched."""
    distances: Distances | None = None
    asked: Mapping[str, Asked] = field(default_factory=dict)
    """What the judge took, by the way in which it was asked."""
    rival: Rival = BASE
    """What `base` is of."""
    curves: Sequence[GuidanceCurve] = ()
    """Over guidance scales; the first is what the page is about, where there is one."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        told: dict[str, Any] = {"history": summary(self.history)} if self.history else {}
        if self.compared.pairs:
            told["pairs"] = {name: asdict(duel) for name, duel in self.compared.pairs.items()}
        if self.distances is not None:
            told["distances"] = asdict(self.distances)
        if self.asked:
            told["judge"] = {way: each._asdict() | {"usage": each.usage._asdict()} for way, each in self.asked.items()}
        if self.curves:
            first, *more = (each.as_dict() for each in self.curves)
            told["guidance_curve"] = first | ({"more": more} if more else {})
        return {
            "held_out": as_dict(self.compared.changes),
            "categories": {name: as_dict(each) for name, each in self.compared.categories.items()},
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
    curves: Sequence[GuidanceCurve] = (),
) -> Conclusion:
    """Compares what `evaluator` made of base and adapter, as a whole and by category, and looks for signs.

    Args:
        history: the evaluations while training, the base first.
        reward: what the trained reward is called.
        pairs, distances: what else has been found.
        asked: what the judge took, by the way in which it was asked.
        rival: what `base` is of. An adapter is not the start of another: between two of them there are no signs.
        curves: over guidance scales.
    """
    parts = by_category(base, tuned, {name: set(own) for name, own in evaluator.categories.items()})
    found = decide(compare(base, tuned), parts, pairs, together(curves))
    told: list[Sign] = []
    if rival is BASE:
        told = signs(history, found.changes, reward) + trades({"": found.changes, **parts}, evaluator.categories)
    told.sort(key=lambda sign: sign.severity == "note")
    curves = [each.decided(found.guided) for each in curves]
    return Conclusion(base, tuned, found, told, history, distances, asked or {}, rival, curves)


def publish(
    done: Conclusion,
    folder: Path,
    evaluator: Evaluator,
    seconds: Mapping[str, float],
    more: Mapping[str, Any],
    *,
    note: str = "",
    command: str = "",
    chosen: Chosen | None = None,
) -> dict[str, Any]:
    """Writes `summary.json`, `scores.csv` and `report.html` to the folder, and prints the table and the signs.

    Args:
        seconds: wall time by the parts of the run.
        more: for `summary.json`.
        note, command, chosen: see `write_report`.

    Returns:
        What is in `summary.json`.
    """
    written = without_nan({**done.as_dict(), **more})
    summary = json.dumps(written, indent=2, allow_nan=False)
    (folder / "summary.json").write_text(mask(summary) + "\n")
    _write_scores(folder / "scores.csv", {done.rival.short: done.base, "tuned": done.tuned})
    print(f"\nHeld-out prompts, {done.rival.name} against trained, same seeds")
    print(as_markdown(done.compared.changes, done.rival))
    print("".join(f"\n{in_words(curve)}\n" for curve in done.curves), end="")
    print("* clear when all that the report compares is counted together")
    for name, duel in done.compared.pairs.items():
        shares = {"win": duel.win, "tie": duel.tie, "loss": duel.loss, "same in both orders": duel.consistent}
        print(f"both at once, {name}: " + ", ".join(f"{part} {value:.0%}" for part, value in shares.items()))
    print("".join(f"\n{sign.severity}: {sign.words}" for sign in done.signs))
    if chosen is not None and not chosen.beats_base:
        print(f"\n{chosen.warning}")
    report = write_report(
        folder,
        done.base,
        done.tuned,
        done.compared,
        sampler=evaluator.sampler,
        seconds=seconds,
        note=note,
        signs=done.signs,
        distances=done.distances,
        asked=done.asked,
        command=command,
        rival=done.rival,
        chosen=chosen,
        curves=done.curves,
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
