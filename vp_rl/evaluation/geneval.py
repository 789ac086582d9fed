"""GenEval's checks (Ghosh et al. 2023, arXiv 2310.11513): is what the prompt asks for in the image, and nothing wrong?

Rules as in djghosh13/geneval at 16f1681, evaluation/evaluate_images.py: the surest objects of a class are taken, as
many as are asked for; they must have the colour, and each must stand in the relation to each of the other clause's; of
a class that must not be there so often, all are counted. Two things differ: overlapping boxes go before the surest 16
are taken, there after; and areas are without its one more pixel a side. What detects is a `Detector`; everything else
here is pure.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from torch import nn

from vp_rl.visionprefer.object_prompts import Clause, Wanted

Picture = UInt8[np.ndarray, "height width 3"]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels, y down."""

_SLACK = 0.1  # of both boxes' sizes together: by how much less two centres may lie apart along an axis
_ALONG = 0.5  # of the distance between the centres: how much must be along an axis for the relation to hold
_NOTHING = 1e-3  # pixels


class Found(NamedTuple):
    """One object in an image."""

    name: str
    """Its class."""
    confidence: float
    box: Box
    color: str = ""
    """Empty: nobody has looked."""


class Limits(NamedTuple):
    """Which of a detector's objects count. These defaults are GenEval's for Mask2Former; others are sure otherwise."""

    threshold: float = 0.3
    """An object counts that is surer than this,"""
    counting_threshold: float = 0.9
    """or in the task `counting` surer than this,"""
    max_overlap: float = 1.0
    """and whose box overlaps (IoU) by less than this with that of a surer one of its class; 1: it may overlap."""
    max_objects: int = 16
    """Of a class, the surest."""


class Detector(nn.Module, ABC):
    """Finds objects of named classes in an image, and says their colours."""

    limits: Limits

    @abstractmethod
    def check(self, names: Sequence[str], colors: Sequence[str]) -> None:
        """Before anything costly is done.

        Raises:
            ValueError: it does not know a class or a colour.
        """

    @abstractmethod
    def find(self, image: Picture, names: Sequence[str]) -> list[Found]:
        """Its objects, unsure ones and overlapping ones too; each has the class that fits it best of these."""

    @abstractmethod
    def colors(self, image: Picture, found: Sequence[Found]) -> list[str]:
        """The colour of each of these objects of that image."""


class Verdict(NamedTuple):
    """What a check says."""

    correct: bool
    reason: str
    """What is wrong, or that all is as asked."""


def examine(detector: Detector, image: Picture, wanted: Wanted, names: Sequence[str]) -> list[Found]:
    """The objects that count, the surest first; those whose colours matter have one.

    Args:
        detector: finds them.
        image: uint8 RGB.
        wanted: which task it is, and whose colours matter.
        names: classes that the detector tells apart; those that `wanted` does not name are left out at the end.
    """
    kept = keep(detector.find(image, names), detector.limits, wanted.task)
    kept = [each for each in kept if each.name in wanted.names]
    asked = [place for clause in wanted.include if clause.color for place in _surest(kept, clause)]
    bare = [place for place in asked if not kept[place].color]
    for place, color in zip(bare, detector.colors(image, [kept[place] for place in bare]) if bare else (), strict=True):
        kept[place] = kept[place]._replace(color=color)
    return kept


def keep(found: Sequence[Found], limits: Limits, task: str) -> list[Found]:
    """The objects that count, the surest first; of equally sure ones, the one that was found first.

    Overlapping ones go before the surest `max_objects` of each class are taken.
    """
    threshold = limits.counting_threshold if task == "counting" else limits.threshold
    kept: list[Found] = []
    for each in sorted(found, key=lambda one: -one.confidence):
        rivals = [other for other in kept if other.name == each.name]
        apart = limits.max_overlap >= 1 or all(iou(each.box, other.box) < limits.max_overlap for other in rivals)
        if each.confidence > threshold and apart and len(rivals) < limits.max_objects:
            kept.append(each)
    return kept


def iou(a: Box, b: Box) -> float:
    """Intersection of two boxes over their union; 0 where both are empty."""
    shared = _area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    union = _area(a) + _area(b) - shared
    return shared / union if union else 0.0


def _area(box: Box) -> float:
    return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)


def relations(a: Box, b: Box) -> list[str]:
    """How `a` lies to `b`: none, one or two of `RELATIONS`.

    The offset between the centres, made shorter along each axis by a tenth of both boxes' size there, must be more than
    half of the whole offset along an axis.
    """
    offset = np.array([(a[0] + a[2] - b[0] - b[2]) / 2, (a[1] + a[3] - b[1] - b[3]) / 2])
    size = np.array([abs(a[2] - a[0]) + abs(b[2] - b[0]), abs(a[3] - a[1]) + abs(b[3] - b[1])])
    left = np.maximum(np.abs(offset) - _SLACK * size, 0) * np.sign(offset)
    if (np.abs(left) < _NOTHING).all():
        return []
    x, y = left / np.linalg.norm(offset)
    holds = {"left of": x < -_ALONG, "right of": x > _ALONG, "above": y < -_ALONG, "below": y > _ALONG}
    return [name for name, true in holds.items() if true]


def check(found: Sequence[Found], wanted: Wanted) -> Verdict:
    """Whether the image is as asked.

    Args:
        found: the objects that count, the surest first, with colours where they matter: see `examine`.
        wanted: what the prompt asks for.
    """
    faults: list[str] = []
    matched: list[list[Found] | None] = []
    for clause in wanted.include:
        chosen = [found[place] for place in _surest(found, clause)]
        wrong = _include(chosen, clause, sum(each.name == clause.name for each in found), wanted, matched)
        faults += [wrong] if wrong else []
        matched.append(None if wrong else chosen)
    for clause in wanted.exclude:
        there = sum(each.name == clause.name for each in found)
        if there >= clause.count:
            faults.append(f"{clause.name}: found {there}, asked for fewer than {clause.count}")
    return Verdict(not faults, "; ".join(faults) or "all is as asked")


def _surest(found: Sequence[Found], clause: Clause) -> list[int]:
    """The places of those that a clause is about; none, where they are too few."""
    places = [place for place, each in enumerate(found) if each.name == clause.name][: clause.count]
    return places if len(places) == clause.count else []


def _include(
    chosen: Sequence[Found], clause: Clause, there: int, wanted: Wanted, matched: Sequence[Sequence[Found] | None]
) -> str:
    """What is wrong with the objects of a clause; empty, if nothing is."""
    name = clause.name
    if not chosen:
        return f"{name}: found {there or 'none'}, asked for {clause.count}"
    others = [each.color or "of no known colour" for each in chosen if each.color != clause.color]
    if clause.color and others:
        seen = ", ".join(f"{number} {color}" for color, number in Counter(others).items())
        return f"{name}: {len(chosen) - len(others)} of {len(chosen)} {clause.color}, but {seen}"
    if clause.position is None:
        return ""
    relation, place = clause.position
    targets, target = matched[place], wanted.include[place].name
    if targets is None:
        return f"{name}: there is no {target} as asked that it could be {relation}"
    for each in chosen:
        for other in targets:
            true = relations(each.box, other.box)
            if relation not in true:
                return f"{name}: {' and '.join(true) or 'at the same place as'} the {target}, asked for {relation}"
    return ""
