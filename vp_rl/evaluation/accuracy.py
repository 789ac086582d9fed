"""How often a reward model prefers the image that the annotator prefers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from vp_rl.data.sets.base import Outcome
from vp_rl.types import ASPECTS, Aspect
from vp_rl.visionprefer import estimates
from vp_rl.visionprefer.pairs import pairs


@dataclass(frozen=True)
class Accuracy:
    """Share of pairs that are ordered right, with Wilson's 95% interval over prompts: see `estimates.share`."""

    share: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.share:.1%} [{self.low:.1%}, {self.high:.1%}] of {self.pairs} pairs" if self.pairs else "no pairs"


class Lead(NamedTuple):
    """How much more often one predictor is right than another on the same prompts, as a difference of shares.

    Its 95% interval takes each prompt with both of them: what makes a prompt hard for both says nothing against either.
    It is not a number where prompts are too few.
    """

    value: float
    low: float
    high: float


def pairwise_accuracy(
    predictions: Float[np.ndarray, "images aspects"],
    ratings: Int[np.ndarray, "images aspects"],
    prompts: Sequence[str],
    tie: float = 0.0,
    score: Float[np.ndarray, " images"] | None = None,
) -> dict[str, Accuracy]:
    """Accuracy by aspect, by the mean over aspects (`mean`), and over all aspects' pairs together (`pooled`).

    Args:
        predictions: what is judged; a reward's one score is the same in every aspect.
        ratings: the annotator's, which say which image of a pair is the better one; tied pairs do not count.
        prompts: one for each image; pairs are formed within a prompt, and prompts are what is resampled.
        tie: what an equal prediction earns: 0 for a reward, which must tell images apart; 0.5 for a second annotator,
            who may toss a coin.
        score: what the predictions make together, which is judged by the mean; None: their own mean.
    """
    whole = predictions.mean(1) if score is None else score
    groups: dict[str, list[int]] = {}
    for image, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(image)
    rules = ("mean", "pooled", *ASPECTS)
    right, total = np.zeros((len(rules), len(groups))), np.zeros((len(rules), len(groups)))
    for number, images in enumerate(groups.values()):
        own: dict[Aspect, list[int]] = {aspect: ratings[images, index].tolist() for index, aspect in enumerate(ASPECTS)}
        for index, rule in enumerate(rules):
            for better, worse, aspect in pairs(own, rule):
                column = whole[images] if aspect < 0 else predictions[images, aspect]
                gap = column[better] - column[worse]
                right[index, number] += tie if gap == 0 else gap > 0
                total[index, number] += 1
    return {rule: share(right[index], total[index]) for index, rule in enumerate(rules)}


def preferred(right: Bool[np.ndarray, " pairs"], prompts: Sequence[str]) -> Accuracy:
    """Of pairs that are given, each with its prompt."""
    return accuracy(Outcome(right.astype(float), np.ones(len(right)), list(prompts), ""))


def accuracy(outcome: Outcome) -> Accuracy:
    """A protocol's accuracy; prompts of the same text are drawn together. `pairs` counts prompts where it averages."""
    return share(*_by_text(outcome))


def lead(one: Outcome, other: Outcome) -> Lead:
    """By one protocol, on the prompts that both were measured on; not a number where there is none with a pair."""
    both = set(one.prompts) & set(other.prompts)
    sums = np.stack([each for outcome in (one, other) for each in _by_text(_only(outcome, both))], 1)
    if not sums[:, 1].sum() or not sums[:, 3].sum():
        return Lead(float("nan"), float("nan"), float("nan"))
    (right, made, others, theirs), total = sums.T, sums.sum(0)
    one_share, other_share = total[0] / total[1], total[2] / total[3]
    moved = (right - one_share * made) / total[1] - (others - other_share * theirs) / total[3]
    value, counted = one_share - other_share, (made > 0) | (theirs > 0)
    by_prompt = value + counted.sum() * moved[counted]  # whose mean is the lead, and varies as that does
    return Lead(float(value), *estimates.paired(by_prompt, scale=1.0))


def share(right: Float[np.ndarray, " prompts"], total: Float[np.ndarray, " prompts"]) -> Accuracy:
    """sum(right) / sum(total) with its interval; not a number without a pair."""
    found = estimates.share(estimates.sums(right, total))
    return Accuracy(found.value, found.low, found.high, found.count)


def _by_text(outcome: Outcome) -> tuple[Float[np.ndarray, " texts"], Float[np.ndarray, " texts"]]:
    """What was earned and what could be, by text of the prompt, texts being sorted."""
    cluster = np.unique(outcome.prompts, return_inverse=True)[1]
    earned, possible = (np.bincount(cluster, values).astype(float) for values in (outcome.earned, outcome.possible))
    return earned, possible


def _only(outcome: Outcome, prompts: set[str]) -> Outcome:
    kept = np.array([prompt in prompts for prompt in outcome.prompts], bool)
    named = [prompt for prompt in outcome.prompts if prompt in prompts]
    return outcome._replace(earned=outcome.earned[kept], possible=outcome.possible[kept], prompts=named)


def as_markdown(columns: dict[str, dict[str, Accuracy]]) -> str:
    """A table of several predictors: a row for each rule, a column for each predictor, and chance."""
    lines = [f"| pairs by | {' | '.join(columns)} | chance |", "|---|" + "---|" * (len(columns) + 1)]
    for rule in next(iter(columns.values())):
        lines.append(f"| {rule} | {' | '.join(str(column[rule]) for column in columns.values())} | 50.0% |")
    return "\n".join(lines)
