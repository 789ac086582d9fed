"""One reward on one set of human judgements: by each protocol, and by aspect, by generator and by size of the gap."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vp_rl.data.sets.base import HumanSet, Judged, Outcome, Protocol, Scored
from vp_rl.evaluation.accuracy import Accuracy, accuracy, share
from vp_rl.evaluation.protocols import pooled
from vp_rl.evaluation.scoring import Scores
from vp_rl.visionprefer import estimates
from vp_rl.visionprefer.estimates import Estimate

ALL_ASPECTS = "all aspects' pairs"
_BINS, _EACH = 10, 20  # parts, of at least so many pairs

Reported = Sequence[tuple[Judged, np.ndarray]]
"""Judgements with the scores of their images."""


class Measured(NamedTuple):
    """An accuracy with the protocol that it is by."""

    accuracy: Accuracy
    outcome: Outcome
    """What it is from, prompt by prompt."""


class GeneratorSlice(NamedTuple):
    """Pairs of one generator's images with others'."""

    accuracy: Accuracy
    """Of those that people do not tie."""
    people: float
    """Share that it wins by people, a tie being half."""
    reward: float
    """Share that it wins by the reward: where this is higher, the reward likes its images more than people do."""


class Bin(NamedTuple):
    """Pairs whose scores are about as far apart."""

    gap: float
    """Their mean gap, in standard deviations of the set's scores."""
    agree: Estimate
    """Share of the people who prefer the image with the higher score; its `count` is of pairs."""


class Result(NamedTuple):
    """Everything about one reward on one set."""

    reward: str
    title: str
    """Of the set."""
    about: str
    """The set's note."""
    measured: list[Measured]
    """By the set's own protocol first; the pooled share is always among them."""
    aspects: dict[str, Accuracy]
    """Pooled pairs in single aspects, where the set has any."""
    generators: dict[str, GeneratorSlice]
    """Where the set says what made its images, and several did."""
    calibration: list[Bin]
    prompts: int
    """That were reported on."""
    images: int
    """That were scored for them."""
    unreadable: dict[str, str]
    """Images that are left out, with what is wrong with them."""


def measure(reward: str, human: HumanSet, judged: Sequence[Judged], scores: Scores) -> Result:
    """Puts scores beside judgements. Images that could not be read are left out, and prompts with less than two others.

    Raises:
        ValueError: nothing is left.
    """
    kept = [cut for each in judged if len((cut := _cut(each, scores))[1]) > 1]
    reported = [(each, values) for each, values in kept if not each.tuning]
    if not reported:
        raise ValueError(f"{human.title} has no prompt with two images that can be read: there is nothing to measure.")
    scored = [Scored(each.prompt, each.ranks, values, each.tuning) for each, values in kept]
    return Result(
        reward=reward,
        title=human.title,
        about=human.note,
        measured=_measured(human.protocols, scored),
        aspects=_aspects(reported),
        generators=_generators(reported),
        calibration=_calibration(reported),
        prompts=len(reported),
        images=len({(name, each.prompt) for each, _ in reported for name in each.images}),
        unreadable=scores.unreadable,
    )


def _cut(each: Judged, scores: Scores) -> tuple[Judged, Float[np.ndarray, " images"]]:
    """A judgement of the images that have a score, and these scores."""
    found = [scores.by_image.get((name, each.prompt)) for name in each.images]
    rows = [row for row, score in enumerate(found) if score is not None]
    values = np.array([found[row] for row in rows], float)
    if len(rows) == len(found):
        return each, values
    cut = each._replace(
        images=tuple(each.images[row] for row in rows),
        ranks=each.ranks[rows],
        shares=each.shares[np.ix_(rows, rows)],
        generators=tuple(each.generators[row] for row in rows) if each.generators else (),
        aspects={name: ranks[rows] for name, ranks in each.aspects.items()},
    )
    return cut, values


def _measured(protocols: Sequence[Protocol], scored: Sequence[Scored]) -> list[Measured]:
    outcomes = [protocol(scored) for protocol in (*protocols, pooled)]
    by_name = {outcome.protocol: outcome for outcome in outcomes}  # the pooled one may be there twice
    return [Measured(accuracy(outcome), outcome) for outcome in by_name.values()]


def _aspects(reported: Reported) -> dict[str, Accuracy]:
    ranked = [(name, Scored(each.prompt, own, v)) for each, v in reported for name, own in each.aspects.items()]
    by_aspect: dict[str, list[Scored]] = {}
    for name, scored in ranked:
        by_aspect.setdefault(name, []).append(scored)
    together = {ALL_ASPECTS: [scored for _, scored in ranked]} if len(by_aspect) > 1 else {}
    return {name: accuracy(pooled(own)) for name, own in (together | by_aspect).items()}


def _generators(reported: Reported) -> dict[str, GeneratorSlice]:
    names = sorted({generator for each, _ in reported for generator in each.generators})
    if len(names) < 2:
        return {}
    found = {}
    for name in names:
        sums = np.array([_against_others(each, values, name) for each, values in reported])
        cluster = _clusters(reported)
        right, total = np.bincount(cluster, sums[:, 0]), np.bincount(cluster, sums[:, 1])
        people, reward, pairs = sums[:, 2:].sum(0)
        found[name] = GeneratorSlice(
            share(right, total), *((people / pairs, reward / pairs) if pairs else (np.nan,) * 2)
        )
    return found


def _against_others(
    each: Judged, values: Float[np.ndarray, " images"], name: str
) -> tuple[float, float, float, float, float]:
    """Right pairs and untied pairs; and of all pairs, what it wins by people, by the reward, and how many there are."""
    own = np.array([generator == name for generator in each.generators], bool)
    mine, others = np.nonzero(own)[0], np.nonzero(~own)[0]
    people = np.sign(each.ranks[others][None] - each.ranks[mine][:, None])
    reward = np.sign(values[mine][:, None] - values[others][None])
    right, untied = ((people == reward) & (people != 0)).sum(), (people != 0).sum()
    won = each.shares[np.ix_(mine, others)].sum()
    return float(right), float(untied), float(won), float((0.5 + 0.5 * reward).sum()), float(people.size)


def _clusters(reported: Reported) -> Int[np.ndarray, " prompts"]:
    return np.unique([each.prompt for each, _ in reported], return_inverse=True)[1]


def _calibration(reported: Reported) -> list[Bin]:
    """Pairs from the smallest gap between their scores to the largest, in parts of one size."""
    gaps, agree, cluster = [], [], []
    for (each, values), number in zip(reported, _clusters(reported), strict=True):
        first, second = np.triu_indices(len(values), 1)
        gap = values[first] - values[second]
        people = each.shares[first, second]
        gaps.append(np.abs(gap))
        agree.append(np.where(gap > 0, people, np.where(gap < 0, 1 - people, 0.5)))
        cluster.append(np.full(len(gap), number))
    gap, people, row = np.concatenate(gaps), np.concatenate(agree), np.concatenate(cluster)
    spread = np.concatenate([values for _, values in reported]).std() or 1.0
    order = np.argsort(gap, kind="stable")
    parts = np.array_split(order, min(_BINS, max(1, len(order) // _EACH)))
    return [
        Bin(
            float(gap[part].mean() / spread),
            estimates.share(estimates.sums(np.bincount(row[part], people[part]), np.bincount(row[part]))),
        )
        for part in parts
    ]
