"""The published ways to say how often a reward agrees with people. Tables disagree because these do.

Each protocol gives what every prompt earned and what it could have earned; the accuracy is the ratio of their sums.
That one form makes one interval over prompts serve them all. Ranks are people's: lower is better, equal is a tie.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from vp_rl.data.sets.base import Outcome, Scored

POOLED = "pooled pairs"
PROMPTS = "mean over prompts"
INVERSIONS = "HPD v2's inversions"
TIES = "Pick-a-Pic's ties"
AVERAGED = (PROMPTS, INVERSIONS)
"""Those that count prompts; the others count pairs."""

THRESHOLDS = tuple(step / 10 for step in range(11))
"""Candidates for Pick-a-Pic's tie threshold."""


def pooled(scored: Sequence[Scored]) -> Outcome:
    """ImageReward's: the share of all pairs that people do not tie; equal scores are wrong.

    Source: THUDM/ImageReward at c1392c6, test.py, `acc`: one count over all prompts, `>=` is not right.
    """
    return _outcome(POOLED, scored, _pairs)


def prompt_mean(scored: Sequence[Scored]) -> Outcome:
    """HPS v2's evaluation of ImageReward's set: the same share of each prompt by itself, averaged over prompts.

    A prompt whose images are all tied has no share and is left out; the published code would divide by zero.

    Source: tgxs002/HPSv2 at 866735e, hpsv2/evaluation.py, `evaluate_IR`, and hpsv2/src/training/train.py,
    `calc_ImageReward`.
    """
    return _outcome(PROMPTS, scored, _share)


def inversions(scored: Sequence[Scored]) -> Outcome:
    """HPD v2's: 1 - inversions / C(n, 2) of each prompt, averaged over prompts.

    An inversion is a pair that people and scores order in opposite ways, so that a pair which people tie is never one,
    and the number is higher than the pooled share. The published code makes a ranking of the scores first, in which
    equal ones have an arbitrary order: here such a pair is half an inversion, which is what that comes to on average.

    Source: tgxs002/HPSv2 at 866735e, hpsv2/evaluation.py, `evaluate_rank`, and hpsv2/src/training/train.py,
    `inversion_score`.
    """
    return _outcome(INVERSIONS, scored, _uninverted)


def pick_a_pic(scored: Sequence[Scored]) -> Outcome:
    """Pick-a-Pic's: of pairs, some of them tied, with a threshold below which the reward says tie too.

    The threshold is the first of 0, 0.1, ..., 1 that earns most on the tuning pairs. It is on the difference between
    the two probabilities softmax(scores), so unlike the other protocols this one depends on the scale of the scores.

    Source: yuvalkirstain/PickScore at f79607f, trainer/scripts/eval_preference_predictor.py, `main`, `get_label`,
    `get_pred` and `calc_score`.

    Raises:
        ValueError: a prompt has not two images, or there is no tuning pair.
    """
    tuning = [each for each in scored if each.tuning]
    if any(len(each.scores) != 2 for each in scored) or not tuning:
        raise ValueError("Pick-a-Pic's protocol needs pairs of images, and pairs to choose its tie threshold on.")
    earned = [np.mean([credit(each, threshold) for each in tuning]) for threshold in THRESHOLDS]
    threshold = THRESHOLDS[int(np.argmax(earned))]
    outcome = _outcome(TIES, scored, lambda each: (credit(each, threshold), 1.0))
    return outcome._replace(note=f"tie threshold {threshold:g}, chosen on {len(tuning)} other pairs")


def credit(pair: Scored, threshold: float) -> float:
    """1 where people and reward say the same of two images, 0.5 where one of them says tie, and else 0."""
    first, second = pair.scores.tolist()
    gap = float(np.tanh((first - second) / 2))  # softmax of two: the difference between the probabilities
    predicted = 0.0 if abs(gap) <= threshold else np.sign(gap)
    label = np.sign(pair.ranks[1] - pair.ranks[0])
    if predicted == label:
        return 1.0
    return 0.5 if 0.0 in (predicted, label) else 0.0


def _outcome(protocol: str, scored: Sequence[Scored], count: Callable[[Scored], tuple[float, float]]) -> Outcome:
    """Applies a count of (earned, possible) to every prompt that is reported."""
    reported = [each for each in scored if not each.tuning]
    counts = np.array([count(each) for each in reported], float).reshape(-1, 2)
    return Outcome(counts[:, 0], counts[:, 1], [each.prompt for each in reported], protocol)


def signs(values: Float[np.ndarray, " images"]) -> Float[np.ndarray, " pairs"]:
    """For every pair i < j of images: 1 where value i is higher, -1 where it is lower, 0 where they are equal."""
    first, second = np.triu_indices(len(values), 1)
    return np.sign(values[first] - values[second])


def _pairs(each: Scored) -> tuple[float, float]:
    people, reward = signs(-each.ranks), signs(each.scores)
    return float(((people == reward) & (people != 0)).sum()), float((people != 0).sum())


def _share(each: Scored) -> tuple[float, float]:
    right, untied = _pairs(each)
    return (right / untied, 1.0) if untied else (0.0, 0.0)


def _uninverted(each: Scored) -> tuple[float, float]:
    people, reward = signs(-each.ranks), signs(each.scores)
    if not len(people):
        return 0.0, 0.0
    inverted = (people * reward < 0).sum() + 0.5 * ((people != 0) & (reward == 0)).sum()
    return float(1 - inverted / len(people)), 1.0
