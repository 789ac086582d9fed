"""A base model and its adapter over guidance scales: at the same scale, and each at its best against the other.

People sample with classifier-free guidance, at a scale of their choice. So an adapter has improved a model if it beats
the base at the base's best scale; what it gains at one scale the base may have for nothing at another. Each model's
best scale is chosen on validation prompts, and compared on the test prompts, from the same noise.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from vp_rl.evaluation.best_of import NUMBERS, expected_best
from vp_rl.evaluation.claims import BEST
from vp_rl.evaluation.compare import Change, as_dict, change, compare_metrics, scale_of
from vp_rl.evaluation.images import Evaluation, Evaluator
from vp_rl.interfaces import Policy
from vp_rl.sampler import Sampler

Side = Literal["base", "tuned"]
SIDES: tuple[Side, Side] = ("base", "tuned")
METRICS = ("mean_rating", "correct", "reward")
"""What is compared at each scale."""

Make = Callable[[Side, Evaluator, list[str]], Evaluation | None]
"""A model's evaluation of some prompts; None on all processes but the main one."""
Agree = Callable[[float], float]
"""What the main process has found, on all of them."""
Changes = Mapping[str, Change]
_Whole = dict[tuple[Side, float], Evaluation | None]


@dataclass(frozen=True)
class GuidanceCurve:
    """What two models make of the same prompts and noise at several guidance scales."""

    sampler: Sampler
    """But for its guidance."""
    metric: str
    """What the best scales are chosen by."""
    split: str
    """Whose prompts they are chosen on."""
    choosing: int
    """How many of those."""
    chosen: dict[Side, float]
    """Each model's best scale."""
    validation: dict[Side, dict[float, float]]
    """The metric's mean at each candidate, on the prompts that are chosen by."""
    best: Changes
    """From the base at its best scale to the adapter at its own, with all prompts and seeds."""
    scales: dict[float, Changes]
    """From base to adapter at the same scale."""
    best_of: dict[int, Changes]
    """From the best of so many images by the reward, by the base at its best scale, to one of the adapter's at its."""
    images: dict[float | None, int]
    """Of each model at each of the scales; None: in `best`."""
    aside: str = ""
    """What tells it from the first curve of a page, in words."""

    def parts(self) -> dict[str, Changes]:
        """All of its claims, by what they are of, in words. That several images are better than one is none."""
        found = {f"{BEST}{self.aside}": self.best}
        return found | {f"{at(scale)}{self.aside}": own for scale, own in self.scales.items()}

    def decided(self, found: Mapping[str, Changes]) -> "GuidanceCurve":
        """With what is clear when all that a page looks at is counted."""
        scales = {scale: found[f"{at(scale)}{self.aside}"] for scale in self.scales}
        return replace(self, best=found[f"{BEST}{self.aside}"], scales=scales)

    def worse_at(self) -> list[float]:
        """The scales at which the adapter is clearly worse than the base at the same one, by rating or by share."""
        judged = [name for name in METRICS if name != "reward"]
        return [scale for scale, own in self.scales.items() if any(own[name].direction == "down" for name in judged)]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "sampler": {"steps": self.sampler.steps, "eta": self.sampler.eta},
            "best": dict(self.chosen),
            "chosen": {"by": self.metric, "split": self.split, "prompts": self.choosing, "means": {
                side: {f"{scale:g}": value for scale, value in own.items()} for side, own in self.validation.items()
            }},
            "best_against_best": as_dict(self.best),
            "scales": {f"{scale:g}": as_dict(own) for scale, own in self.scales.items()},
            "best_of": {str(number): as_dict(own) for number, own in self.best_of.items()},
            "images": {"best_against_best" if at is None else f"{at:g}": number for at, number in self.images.items()},
        }  # fmt: skip

    def logged(self) -> dict[str, float]:
        """The differences, by the names that loggers have them under."""
        found = {f"best/{side}_guidance": scale for side, scale in self.chosen.items()}
        found |= {f"best/{name}": each.difference for name, each in self.best.items()}
        for scale, own in self.scales.items():
            found |= {f"guidance_{scale:g}/{name}": each.difference for name, each in own.items()}
        for number, own in self.best_of.items():
            found |= {f"best_of_{number}/{name}": each.difference for name, each in own.items()}
        return found


def at(scale: float) -> str:
    """A scale within a sentence."""
    return f"at guidance {scale:g}"


def together(curves: Sequence[GuidanceCurve]) -> dict[str, Changes]:
    """What all curves of a page claim."""
    return {name: own for curve in curves for name, own in curve.parts().items()}


def without_curve(evaluator: Evaluator, policy: Policy) -> str | None:
    """Why there is no curve, in words; empty where none is wanted; None: there is one."""
    if evaluator.curve is None:
        return ""
    if not policy.guided:
        return "no guidance curve: this model was distilled to do without a scale"
    if not evaluator.watched:
        return f"no guidance curve: no prompt of the {evaluator.watch} split is there to choose the best scale on"
    if set(evaluator.watched) & set(evaluator.prompts):
        return "no guidance curve: the best scale would be chosen by prompts that the result is measured on"
    return None


def guidance_curves(
    evaluator: Evaluator,
    make: Make,
    known: Mapping[Side, Evaluation | None],
    *,
    metric: str,
    trained: float | None,
    agree: Agree = lambda found: found,
) -> list[GuidanceCurve]:
    """One for each eta of `evaluator.curve`. All processes must come here.

    Args:
        evaluator: with the settings of the curve.
        make: makes and judges what is not known.
        known: both models' whole evaluations by the evaluator's own sampler.
        metric: what a model's best scale is chosen by.
        trained: the guidance scale that was trained at; None: training had none.
        agree: gives all processes what the main one has found.

    Returns:
        None at all but on the main process.
    """
    assert evaluator.curve is not None, "see `without_curve`"
    own = evaluator.sampler.eta
    found = []
    for number, eta in enumerate((own,) if evaluator.curve.etas is None else dict.fromkeys(evaluator.curve.etas)):
        scale = max(1.0, evaluator.sampler.guidance)
        there: _Whole = {(side, scale): each for side, each in known.items()} if eta == own else {}
        curve = _Drawing(evaluator, make, eta, there).curve(metric, trained, agree)
        found += [] if curve is None else [replace(curve, aside=f", eta {eta:g}" if number else "")]
    return found


class _Drawing:
    """One curve while it is made.

    Args:
        evaluator, make: see `guidance_curves`.
        eta: of the sampler.
        whole: evaluations of all prompts and seeds, by model and scale.
    """

    def __init__(self, evaluator: Evaluator, make: Make, eta: float, whole: _Whole) -> None:
        assert evaluator.curve is not None
        self._evaluator, self._settings, self._make, self._eta = evaluator, evaluator.curve, make, eta
        self._whole = dict(whole)
        self._few = evaluator.prompts[: self._settings.prompts]
        self._panel: list[str] = []

    def curve(self, metric: str, trained: float | None, agree: Agree) -> GuidanceCurve | None:
        """Chooses, compares, draws; None on all processes but the main one."""
        self._panel = [name for name in self._evaluator.panel if metric == f"panel/{name}"]
        watched = self._evaluator.watched[: self._settings.choosing]
        chosen, validation = dict[Side, float](), dict[Side, dict[float, float]]()
        for side in SIDES:
            chosen[side], validation[side] = self._choose(side, watched, metric, agree)
        base, tuned = (self._all(side, chosen[side]) for side in SIDES)
        scales = self._settings.drawn(trained, self._evaluator.sampler.guidance, list(chosen.values()))
        pairs = {scale: self._both(scale) for scale in scales}
        if base is None or tuned is None:
            return None
        return GuidanceCurve(
            sampler=replace(self._evaluator.sampler, eta=self._eta),
            metric=metric,
            split=self._evaluator.watch,
            choosing=len(watched),
            chosen=chosen,
            validation=validation,
            best=_compared(base, tuned),
            scales={scale: _compared(*pair) for scale, pair in pairs.items()},
            best_of=_best_of(base, tuned, len(self._evaluator.seeds)),
            images={None: len(base.prompts)}
            | {scale: len(one.prompts) for scale, (one, _) in pairs.items() if one is not None},
        )

    def _choose(self, side: Side, prompts: list[str], metric: str, agree: Agree) -> tuple[float, dict[float, float]]:
        """A model's best scale by the metric, the lowest of equal ones; and the means that it was chosen by."""
        means: dict[float, float] = {}
        for scale in sorted(set(self._settings.candidates)):
            done = self._make(side, self._at(scale, self._evaluator.seeds[:1]), prompts)
            means[scale] = math.nan if done is None else done.means()[metric]
        best = max(means, key=lambda scale: -math.inf if math.isnan(means[scale]) else means[scale])
        return agree(best), means

    def _all(self, side: Side, scale: float) -> Evaluation | None:
        """Of all prompts and seeds."""
        if (side, scale) not in self._whole:
            there = self._at(scale, self._evaluator.seeds)
            self._whole[side, scale] = self._make(side, there, self._evaluator.prompts)
        return self._whole[side, scale]

    def _both(self, scale: float) -> tuple[Evaluation | None, Evaluation | None]:
        """All of both models where that is there; else an image of each of the curve's prompts."""
        one, two = SIDES
        if {(one, scale), (two, scale)} <= self._whole.keys():
            return self._whole[one, scale], self._whole[two, scale]
        return self._some(one, scale), self._some(two, scale)

    def _some(self, side: Side, scale: float) -> Evaluation | None:
        if (side, scale) not in self._whole:
            return self._make(side, self._at(scale, self._evaluator.seeds[:1]), self._few)
        whole, each = self._whole[side, scale], len(self._evaluator.seeds)
        return None if whole is None else whole.rows(range(0, each * len(self._few), each))

    def _at(self, scale: float, seeds: Sequence[int]) -> Evaluator:
        sampler = replace(self._evaluator.sampler, guidance=scale, eta=self._eta)
        return self._evaluator.sampling(sampler, seeds, self._panel)


def _compared(base: Evaluation | None, tuned: Evaluation | None) -> Changes:
    assert base is not None, "on the main process all are there"
    assert tuned is not None, "so are these"
    base, tuned = (replace(each, panel={}) for each in (base, tuned))  # which one of them may have, and the other not
    found = compare_metrics(base, tuned)
    return {name: found[name] for name in METRICS if name in found}


def _best_of(base: Evaluation, tuned: Evaluation, seeds: int) -> dict[int, Changes]:
    """None where there is no reward to choose by, or one image of each prompt."""
    if base.scores is None:
        return {}
    scores = base.scores.astype(float).reshape(-1, seeds)
    before, after = (
        {name: values.reshape(-1, seeds) for name, values in each.metrics().items() if name in METRICS}
        for each in (base, tuned)
    )
    prompts = np.arange(len(scores))
    return {
        number: {
            name: change(expected_best(before[name], scores, number), after[name].mean(1), prompts, scale_of(name))
            for name in METRICS
        }
        for number in NUMBERS
        if number <= seeds
    }
