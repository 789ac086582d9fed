"""Preference pairs from ratings: derived, never stored."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vp_rl.types import ASPECTS, Aspect

RULES = ("pooled", "mean", *ASPECTS)
_ROUNDING = 1e-9  # weighted means that differ by less are one number, rounded in two ways


class Pairs(NamedTuple):
    """Preference pairs of many prompts, prompt by prompt."""

    prompt: Int[np.ndarray, " pairs"]
    """Row in the ratings."""
    better: Int[np.ndarray, " pairs"]
    """Place of the preferred image among the prompt's."""
    worse: Int[np.ndarray, " pairs"]
    aspect: Int[np.ndarray, " pairs"]
    """Index into `ASPECTS`, or -1 where the pair is by the mean over aspects."""
    margin: Float[np.ndarray, " pairs"]
    """How much higher the better one is rated: 0 to 4."""


def pairs(
    ratings: Mapping[Aspect, Sequence[int]],
    rule: str = "pooled",
    *,
    weights: Mapping[Aspect, float] | None = None,
    least_margin: float = 0.0,
    keep_ties: bool = False,
) -> list[tuple[int, int, int]]:
    """(better, worse, aspect) for every pair of a prompt's images that is not tied.

    Args:
        ratings: 1-5 for each image, by aspect.
        rule: `pooled`: each aspect gives its own pairs, which may contradict each other; `mean`: one pair by the mean
            over aspects, with aspect -1; or an aspect's name, or several as `fidelity+harmlessness`, pooled. The counts
            that the paper reports fit `pooled`, but which rule it used is not confirmed.
        weights: of the aspects in the mean, each 0 or more, of any sum; an aspect that is not named weighs nothing.
            None: all weigh the same.
        least_margin: images are tied unless their ratings differ by more than this.
        keep_ties: tied pairs come as well: the lower rated image as the worse one, or else the later one.

    Returns:
        Indices of the two images and of the aspect in `ASPECTS`.

    Raises:
        ValueError: the rule is unknown; a weight or the margin makes no sense; there are weights, but no mean.
    """
    shares = _shares(rule, weights, least_margin)
    if rule != "mean":
        columns = {ASPECTS.index(aspect): ratings[aspect] for aspect in shares}
    else:
        images = range(len(ratings[ASPECTS[0]]))
        columns = {-1: [sum(share * ratings[aspect][image] for aspect, share in shares.items()) for image in images]}
    found = []
    for aspect, column in columns.items():
        for i, j in combinations(range(len(column)), 2):
            gap = column[i] - column[j]
            if keep_ties or abs(gap) > least_margin + _ROUNDING:
                found.append((j, i, aspect) if gap < -_ROUNDING else (i, j, aspect))
    return found


def all_pairs(
    ratings: Int[np.ndarray, "prompts images aspects"],
    rule: str = "pooled",
    *,
    weights: Mapping[Aspect, float] | None = None,
    least_margin: float = 0.0,
    keep_ties: bool = False,
) -> Pairs:
    """What `pairs` gives for each prompt, in the same order, for a whole dataset at once.

    Args:
        ratings: 1-5, in the order of `ASPECTS`; 0 where there is no rating or no such image (see `padded`). An image
            is in no pair that would need a rating it does not have.
        rule, weights, least_margin, keep_ties: see `pairs`.

    Raises:
        ValueError: as `pairs` does.
    """
    shares = _shares(rule, weights, least_margin)
    chosen = [ASPECTS.index(aspect) for aspect in shares]
    scores = np.where(ratings > 0, ratings, np.nan)[..., chosen]
    if rule == "mean":
        scores, chosen = scores @ np.array([*shares.values()])[:, None], [-1]
    first, second = np.triu_indices(ratings.shape[1], 1)
    gaps = (scores[:, first] - scores[:, second]).swapaxes(1, 2)  # prompts, aspects, pairs: the order of `pairs`
    kept = ~np.isnan(gaps) if keep_ties else np.abs(gaps) > least_margin + _ROUNDING
    prompt, column, pair = np.nonzero(kept)
    gap = gaps[kept]
    turned = gap < -_ROUNDING
    return Pairs(
        prompt=prompt,
        better=np.where(turned, second[pair], first[pair]),
        worse=np.where(turned, first[pair], second[pair]),
        aspect=np.array(chosen)[column],
        margin=np.where(np.abs(gap) > _ROUNDING, np.abs(gap), 0.0),
    )


def aspects_of(rule: str) -> tuple[Aspect, ...]:
    """The aspects that a rule looks at, in the order of `ASPECTS`.

    Raises:
        ValueError: it is none; or names an aspect twice.
    """
    if rule in ("pooled", "mean"):
        return ASPECTS
    named = rule.split("+")
    if not set(named) <= set(ASPECTS) or len(set(named)) < len(named):
        raise ValueError(
            f"data.aspects={rule!r} is unknown: choose from {', '.join(RULES)}, or several of them as "
            "'fidelity+harmlessness'."
        )
    return tuple(aspect for aspect in ASPECTS if aspect in named)


def padded(
    values: Int[np.ndarray, "images *cells"], counts: Int[np.ndarray, " prompts"]
) -> Int[np.ndarray, "prompts most *cells"]:
    """What is known of all images, prompt after prompt, as a block with a row for each prompt, zeros at the short ends.

    Args:
        values: of every image; its ratings, for instance.
        counts: images of each prompt.
    """
    row = np.repeat(np.arange(len(counts)), counts)
    place = np.arange(len(values)) - np.repeat(np.cumsum(counts) - counts, counts)
    block = np.zeros((len(counts), counts.max(initial=0), *values.shape[1:]), values.dtype)
    block[row, place] = values
    return block


def _shares(rule: str, weights: Mapping[Aspect, float] | None, least_margin: float) -> dict[Aspect, float]:
    """The aspects that a rule looks at, with their share in the mean."""
    looked_at = aspects_of(rule)
    if not 0 <= least_margin < math.inf:
        raise ValueError(f"least_margin={least_margin} must be 0 or more: it is a difference between ratings.")
    if weights is not None and rule != "mean":
        raise ValueError(f"weights={dict(weights)} would change nothing with data.aspects={rule!r}: choose 'mean'.")
    if weights is None:
        return {aspect: 1 / len(looked_at) for aspect in looked_at}
    total = sum(weights.values())
    if not set(weights) <= set(ASPECTS) or not all(0 <= w < math.inf for w in weights.values()) or not total > 0:
        raise ValueError(
            f"weights={dict(weights)} make no mean: give aspects out of {', '.join(ASPECTS)} numbers of 0 or more, "
            "and one of them more than 0."
        )
    return {aspect: weight / total for aspect in ASPECTS if (weight := weights.get(aspect, 0.0)) > 0}
