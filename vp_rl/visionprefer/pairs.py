"""Preference pairs from ratings: derived, never stored."""

from collections.abc import Mapping, Sequence
from itertools import combinations

from vp_rl.types import ASPECTS, Aspect

RULES = ("pooled", "mean", *ASPECTS)


def pairs(ratings: Mapping[Aspect, Sequence[int]], rule: str = "pooled") -> list[tuple[int, int, int]]:
    """(better, worse, aspect) for every pair of a prompt's images that is not tied.

    Args:
        ratings: 1-5 for each image, by aspect.
        rule: `pooled`: each aspect gives its own pairs, which may contradict each other; `mean`: one pair by the mean
            over aspects, with aspect -1; or a single aspect's name. The counts that the paper reports fit `pooled`, but
            which rule it used is not confirmed.

    Returns:
        Indices of the two images and of the aspect in `ASPECTS`.

    Raises:
        ValueError: the rule is unknown.
    """
    if rule not in RULES:
        raise ValueError(f"data.aspects={rule!r} is unknown: choose from {', '.join(RULES)}.")
    if rule == "mean":
        count = len(ratings[ASPECTS[0]])
        return _ranked([sum(ratings[aspect][image] for aspect in ASPECTS) for image in range(count)], -1)
    chosen: list[Aspect] = [aspect for aspect in ASPECTS if rule in ("pooled", aspect)]
    return [pair for aspect in chosen for pair in _ranked(ratings[aspect], ASPECTS.index(aspect))]


def _ranked(ratings: Sequence[int], aspect: int) -> list[tuple[int, int, int]]:
    return [
        (i, j, aspect) if ratings[i] > ratings[j] else (j, i, aspect)
        for i, j in combinations(range(len(ratings)), 2)
        if ratings[i] != ratings[j]
    ]
