"""Pairwise accuracy: closed forms, chance, and intervals that cover."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from vp_rl.data.sets.base import Outcome
from vp_rl.evaluation.accuracy import (
    Accuracy,
    accuracy,
    as_markdown,
    lead,
    pairwise_accuracy,
    preferred,
    share,
)
from vp_rl.evaluation.protocols import POOLED
from vp_rl.types import ASPECTS

PROMPTS = ["a", "a", "a", "b", "b"]
RATINGS = np.array([[1, 3, 5, 5], [2, 3, 4, 5], [3, 3, 3, 1], [5, 1, 2, 2], [5, 4, 2, 3]])


def every_aspect(scores: list[float] | np.ndarray) -> np.ndarray:
    """One score of each image, the same in every aspect, as a reward gives it."""
    return np.repeat(np.asarray(scores, dtype=float)[:, None], len(ASPECTS), axis=1)


def shares(predictions: np.ndarray, tie: float = 0.0) -> dict[str, float]:
    return {rule: accuracy.share for rule, accuracy in pairwise_accuracy(predictions, RATINGS, PROMPTS, tie).items()}


def test_accuracy_is_the_share_of_untied_pairs_within_a_prompt() -> None:
    found = pairwise_accuracy(every_aspect([1, 2, 3, 10, 20]), RATINGS, PROMPTS)
    # Prompt a: aspect 0 ranks 2 > 1 > 0, aspect 1 ties, aspect 2 the reverse, aspect 3 has 0 > 2 and 1 > 2.
    # Prompt b: aspect 0 and 2 tie, aspects 1 and 3 rank 4 > 3. Pairs across prompts do not exist.
    right = {"prompt_following": (3, 3), "aesthetic": (1, 1), "fidelity": (0, 3), "harmlessness": (1, 3)}
    # Sums of ratings: 14, 14, 10 and 10, 14: 0 and 1 beat 2 (both wrong), 4 beats 3 (right).
    right |= {"mean": (1, 3), "pooled": (5, 10)}
    assert {rule: (round(a.share * a.pairs), a.pairs) for rule, a in found.items()} == right


def test_the_ratings_themselves_are_always_right() -> None:
    assert set(shares(RATINGS.astype(float)).values()) == {1.0}
    assert set(shares(-RATINGS.astype(float)).values()) == {0.0}


@pytest.mark.parametrize("tie", [0.0, 0.5])
def test_equal_predictions_earn_what_a_tie_is_worth(tie: float) -> None:
    assert set(shares(every_aspect([7] * 5), tie).values()) == {tie}


def test_the_mean_is_judged_by_the_score_and_each_aspect_by_its_own_prediction() -> None:
    predictions, score = -RATINGS.astype(float), RATINGS.sum(1).astype(float)
    found = pairwise_accuracy(predictions, RATINGS, PROMPTS, score=score)
    assert {rule: each.share for rule, each in found.items()} == {"mean": 1.0} | dict.fromkeys(
        ("pooled", *ASPECTS), 0.0
    )


def test_given_pairs_have_the_share_and_the_interval_of_their_prompts() -> None:
    right = np.arange(100) % 2 == 0
    found = preferred(right, [f"{number // 4}" for number in range(100)])
    earned = np.array([right[4 * number : 4 * number + 4].sum() for number in range(25)], float)
    assert found == share(earned, np.full(25, 4.0))
    assert (found.share, found.pairs) == (0.5, 100)
    # As of the 25 prompts, which all have the same share; 100 pairs would give 0.40 to 0.60.
    wilson = binomtest(12, 24).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((wilson.low, wilson.high), abs=0.02)


def test_only_the_order_of_predictions_matters() -> None:
    scores = np.array([0.3, -2.0, 1.5, 0.0, 0.1])
    assert shares(every_aspect(scores)) == shares(every_aspect(np.exp(3 * scores)))


def test_a_rule_without_pairs_is_not_a_number() -> None:
    found = pairwise_accuracy(every_aspect([1, 2]), np.full((2, 4), 3), ["a", "a"])
    assert all(np.isnan(accuracy.share) and accuracy.pairs == 0 for accuracy in found.values())


def noisy_world(rng: np.random.Generator, prompts: int, signal: float) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Four images a prompt; whether a prompt is easy is shared by its pairs, which makes them dependent."""
    ratings = np.array([rng.permutation(4) + 1 for _ in range(prompts)])
    easy = rng.choice([0.0, 2.0 * signal], size=(prompts, 1))
    scores = easy * ratings + rng.normal(size=ratings.shape)
    names = [f"prompt {number}" for number in range(prompts) for _ in range(4)]
    return every_aspect(scores.ravel()), np.repeat(ratings.reshape(-1, 1), 4, axis=1), names


def test_random_scores_are_right_by_chance() -> None:
    found = pairwise_accuracy(*noisy_world(np.random.default_rng(0), 500, 0.0))["mean"]
    # 500 prompts; the variance of a prompt's share is below 1/4, so four deviations are below 0.09.
    assert found.share == pytest.approx(0.5, abs=0.09)
    assert found.low < 0.5 < found.high


def test_the_interval_covers_the_truth_about_19_times_in_20() -> None:
    rng = np.random.default_rng(1)
    truth = pairwise_accuracy(*noisy_world(rng, 1000, 0.5))["prompt_following"].share
    runs = 100
    intervals = [pairwise_accuracy(*noisy_world(rng, 25, 0.5))["prompt_following"] for _ in range(runs)]
    covered = sum(one.low <= truth <= one.high for one in intervals)
    # Binomial(100, 0.95) is below 87 once in a thousand. Resampling pairs instead of prompts gives narrower intervals.
    assert covered >= 87
    assert all(one.low <= one.share <= one.high for one in intervals)


def test_pairs_of_one_prompt_do_not_count_as_independent() -> None:
    # Every prompt is all right or all wrong: six pairs say as much as one.
    ratings = np.repeat(np.tile(np.arange(1, 5), 100)[:, None], 4, axis=1)
    signs = np.where(np.arange(100) % 2, 1.0, -1.0).repeat(4)
    found = pairwise_accuracy(every_aspect(signs * ratings[:, 0]), ratings, [str(row // 4) for row in range(400)])[
        "mean"
    ]
    assert found.share == 0.5
    # 1.96 sqrt(0.25 / 100) = 0.098 each side; 600 independent pairs would give 0.04. Quantiles fall on hundredths.
    assert found.high - found.low == pytest.approx(0.196, abs=0.025)


def outcome(earned: list[float], prompts: list[str]) -> Outcome:
    return Outcome(np.array(earned), np.ones(len(earned)), prompts, POOLED)


def test_judgements_of_one_prompt_are_drawn_together() -> None:
    # 50 prompts that are all right or all wrong, each judged four times: 50 independent values, not 200.
    earned = [float(number % 2) for number in range(50) for _ in range(4)]
    apart = accuracy(outcome(earned, [f"{number}" for number in range(200)]))
    together = accuracy(outcome(earned, [f"{number // 4}" for number in range(200)]))
    assert apart.share == together.share == 0.5
    assert together.pairs == 200
    # 2 x 1.96 sqrt(0.25 / n) = 0.277 and 0.139; quantiles of shares fall on steps of 0.02 and 0.005.
    assert together.high - together.low == pytest.approx(0.277, abs=0.03)
    assert apart.high - apart.low == pytest.approx(0.139, abs=0.015)


def by_pairs(right: np.ndarray, pairs: int, prompts: list[str] | None = None) -> Outcome:
    """So many pairs right of each prompt's."""
    names = [f"{number}" for number in range(len(right))] if prompts is None else prompts
    return Outcome(right.astype(float), np.full(len(right), float(pairs)), names, POOLED)


def test_a_lead_is_as_sure_as_the_prompts_agree_on_it_however_much_they_differ() -> None:
    right = np.arange(12) % 4  # some prompts are hard for both
    one, other = by_pairs(right + 1, 4), by_pairs(right, 4)
    unseen = 1 - 0.025 ** (1 / 12)  # of 12 prompts
    found = lead(one, other)
    assert found == pytest.approx((0.25, 0.25 - 1.25 * unseen, 0.25 + 0.75 * unseen))
    assert lead(other, one) == pytest.approx((-0.25, -found.high, -found.low))
    assert accuracy(one).low < accuracy(other).high  # which by themselves would leave it open
    large = lead(by_pairs(np.tile(right + 1, 20), 4), by_pairs(np.tile(right, 20), 4))
    assert large.low > 0.2


def test_a_lead_is_the_difference_of_shares_and_not_the_mean_over_prompts() -> None:
    one = Outcome(np.array([1.0, 6.0]), np.array([1.0, 9.0]), ["a", "b"], POOLED)
    other = Outcome(np.array([0.0, 3.0]), np.array([1.0, 9.0]), ["a", "b"], POOLED)
    assert lead(one, other).value == pytest.approx(0.7 - 0.3)


def test_prompts_are_matched_by_their_text_and_those_of_one_side_only_are_left_out() -> None:
    one = by_pairs(np.array([4, 2, 0]), 4, ["a", "b", "only here"])
    other = by_pairs(np.array([1, 1, 2, 4]), 4, ["b", "b", "a", "only there"])  # b twice, as sets of pairs have it
    assert lead(one, other).value == pytest.approx(6 / 8 - 4 / 12)
    assert all(np.isnan(lead(by_pairs(np.array([1]), 4, ["a"]), by_pairs(np.array([1]), 4, ["b"]))))


def test_rewards_that_are_equally_good_seldom_have_a_lead() -> None:
    rng, found, wider = np.random.default_rng(2), [], []
    for _ in range(200):
        hard = rng.uniform(0.2, 1, 100)  # a prompt is as hard for one as for the other
        both = [by_pairs(rng.binomial(6, hard), 6) for _ in range(2)]
        found.append(lead(*both))
        unpaired = math.hypot(*(each.high - each.low for each in map(accuracy, both)))
        wider.append(unpaired / (found[-1].high - found[-1].low))
    # Binomial(200, 0.05) is above 20 once in a thousand.
    assert sum(not each.low <= 0 <= each.high for each in found) <= 20
    # A share varies by p (1 - p) / 6 in a prompt, 0.031 on average, and by 0.64 / 12 between prompts, which cancels.
    assert np.mean(wider) == pytest.approx(((0.031 + 0.0533) / 0.031) ** 0.5, rel=0.05)


def test_an_outcome_without_anything_to_earn_is_not_a_number() -> None:
    assert accuracy(outcome([], [])).pairs == 0
    assert np.isnan(share(np.zeros(3), np.zeros(3)).share)


def test_the_table_has_a_row_for_each_rule_and_a_column_for_each_predictor() -> None:
    one, other = Accuracy(0.75, 0.7, 0.8, 40), Accuracy(0.5, 0.4, 0.6, 40)
    table = as_markdown({"VP-Score": {"mean": one, "pooled": one}, "noisy": {"mean": other, "pooled": other}})
    assert table.splitlines() == [
        "| pairs by | VP-Score | noisy | chance |",
        "|---|---|---|---|",
        "| mean | 75.0% [70.0%, 80.0%] of 40 pairs | 50.0% [40.0%, 60.0%] of 40 pairs | 50.0% |",
        "| pooled | 75.0% [70.0%, 80.0%] of 40 pairs | 50.0% [40.0%, 60.0%] of 40 pairs | 50.0% |",
    ]


@pytest.mark.parametrize(("truth", "prompts"), [(0.97, 9), (0.97, 40), (0.5, 5), (0.8, 15)])
def test_a_shares_interval_holds_the_truth_near_the_bounds_and_of_few_prompts(truth: float, prompts: int) -> None:
    rng, held = np.random.default_rng(0), 0
    for _ in range(500):
        found = share(rng.binomial(1, truth, prompts).astype(float), np.ones(prompts))
        held += found.low <= truth <= found.high
        assert found.low < found.high
    assert held / 500 > 0.92, "3 sigma below 95%; resampling prompts holds 24% of the first case"


def test_five_right_of_five_is_not_certainty() -> None:
    found = share(np.ones(5), np.ones(5))
    assert found.share == found.high == 1
    assert found.low < 0.57  # Wilson's of five trials, and less, since the spread is estimated from five


def test_of_two_prompts_that_agree_no_lead_is_sure() -> None:
    found = lead(by_pairs(np.array([4, 4]), 4), by_pairs(np.array([0, 0]), 4))
    assert found.value == 1
    assert math.isnan(found.low)
    assert math.isnan(found.high)
