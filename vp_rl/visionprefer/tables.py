"""The dataset card's tables."""

from collections.abc import Mapping, Sequence

import numpy as np

from vp_rl.types import ASPECTS
from vp_rl.visionprefer.agreement import Accord, Agreement
from vp_rl.visionprefer.journal import Spent
from vp_rl.visionprefer.markdown import Markdown, number, percent, table
from vp_rl.visionprefer.plots import words
from vp_rl.visionprefer.statistics import BothOrders, Positions, Statistics

_NAMES = [words(aspect) for aspect in ASPECTS]


def counts(splits: Mapping[str, int], statistics: Statistics) -> Markdown:
    """Prompts of each split, and what they have."""
    rows: list[tuple[str, int]] = [(f"Prompts for {split}", prompts) for split, prompts in splits.items()]
    rows += [("Prompts", statistics.prompts), ("Images", statistics.images), ("Ratings", statistics.ratings)]
    if len(statistics.annotators) > 1:
        rows += [(f"Ratings by {name}", given) for name, given in statistics.annotators.items()]
    return table(["", "number"], [(name, f"{value:,}") for name, value in rows])


def pairs(statistics: Statistics) -> Markdown:
    """Pairs without ties, by rule."""
    rows = []
    for rule, kept in statistics.pairs.items():
        possible = statistics.possible_pairs * (len(ASPECTS) if rule == "pooled" else 1)
        ties = Markdown(f"{1 - kept / possible:.1%}" if possible else "–")
        rows.append((words(rule) if rule in ASPECTS else rule, f"{kept:,}", ties))
    return table(["pairs by", "without ties", "ties"], rows)


def ratings(statistics: Statistics) -> Markdown:
    """How often each was given, and the mean."""
    rows = zip(_NAMES, statistics.histogram, strict=True)
    return table(["", 1, 2, 3, 4, 5, "mean"], [(name, *(f"{n:,}" for n in own), _mean(own)) for name, own in rows])


def by_generator(statistics: Statistics) -> Markdown:
    """Mean ratings, and of how many."""
    rows = [(name, f"{own.sum() // len(ASPECTS):,}", *map(_mean, own)) for name, own in statistics.histograms.items()]
    return table(["generator", "images", *_NAMES], rows)


def wins(statistics: Statistics) -> Markdown:
    """By generator, guidance and steps, each where there are several."""
    kinds = {"": statistics.generators, "guidance ": statistics.guidance, "steps ": statistics.steps}
    rows = []
    for kind, found in kinds.items():
        for label, own in found.items():
            if len(found) > 1:
                by_aspect = [percent(own[aspect], interval=False) for aspect in ASPECTS]
                rows.append((f"{kind}{label:g}" if kind else label, percent(own["mean"]), *by_aspect))
    return table(["images of", "by the mean", *_NAMES], rows)


def positions(found: Positions) -> Markdown:
    """By place, all aspects together."""
    rows = [
        (place + 1, number(found.ratings[place]["pooled"], 3), percent(found.wins[place]["pooled"]))
        for place in found.ratings
    ]
    return table(["place", "mean rating", "pairs won"], rows)


def orders(found: BothOrders) -> Markdown:
    """By aspect."""
    rows = [
        (words(aspect), percent(found.same[aspect]), percent(found.alike[aspect]), number(found.earlier[aspect], 3))
        for aspect in (*ASPECTS, "pooled")
    ]
    return table(["", "same rating", "pairs ordered alike", "rated higher where earlier, by"], rows)


def agreements(found: Mapping[str, Mapping[str, Agreement]]) -> Markdown:
    """By the other annotator and aspect."""
    rows = [
        (other, words(aspect), own.alpha.count, number(own.alpha), number(own.tau), percent(own.alike))
        for other, by_aspect in found.items()
        for aspect, own in by_aspect.items()
    ]
    return table(["with", "aspect", "images", "alpha", "tau", "alike"], rows)


def people(found: Mapping[str, Mapping[str, Accord]]) -> Markdown:
    """By who is compared, and aspect."""
    rows = [
        (who, words(aspect), own.with_ties.count, percent(own.decided), percent(own.with_ties))
        for who, by_aspect in found.items()
        for aspect, own in by_aspect.items()
    ]
    return table(["", "aspect", "comparisons", "the same, ties apart", "the same, with ties"], rows)


def spent(found: Sequence[Spent]) -> Markdown:
    """By stage and outcome, and in all."""
    rows: list[Sequence[object]] = [
        (each.stage, each.respondent, each.outcome, *_cost(each.calls, *each.usage)) for each in found
    ]
    total = [sum(column) for column in zip(*((each.calls, *each.usage) for each in found), strict=True)]
    rows.append(("all", "", "", *_cost(*total)))
    return table(["stage", "asked", "answers", "calls", "input tokens", "output tokens", "USD"], rows)


def licences(found: Mapping[str, str]) -> Markdown:
    """By what was used."""
    return table(["", "licence"], found.items())


def _cost(calls: float, input_tokens: float, output_tokens: float, usd: float) -> tuple[str, ...]:
    return f"{calls:,}", f"{input_tokens:,}", f"{output_tokens:,}", Markdown(f"{usd:,.2f}")


def _mean(histogram: np.ndarray) -> Markdown:
    return Markdown(f"{histogram @ np.arange(1, 6) / histogram.sum():.2f}" if histogram.sum() else "–")
