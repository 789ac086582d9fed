"""The published protocols: hand-computed values on one case, laws, and that they disagree."""

from itertools import combinations

import numpy as np
import pytest

from vp_rl.data.sets.base import Outcome, Protocol, Scored
from vp_rl.evaluation import protocols
from vp_rl.evaluation.protocols import INVERSIONS, POOLED, PROMPTS, TIES

# Two people rank the images of three prompts. A: they agree on every pair but that of images 1 and 2, which one orders
# this way and the other that way, so that it is a tie by the averaged rank. B: unanimous. C: all tied by both.
PEOPLE = {"A": [[1, 2, 3, 4], [1, 3, 2, 4]], "B": [[1, 2], [1, 2]], "C": [[1, 1], [1, 1]]}
SCORES = {"A": [0.2, 0.9, 0.1, 0.1], "B": [1.0, 0.0], "C": [5.0, 4.0]}
CASE = [Scored(name, np.mean(PEOPLE[name], axis=0), np.array(SCORES[name])) for name in "ABC"]
# A's pairs: 0-1 wrong, 0-2 right, 0-3 right, 1-2 tied, 1-3 right, 2-3 with equal scores. B's is right, C's is tied.
PAIRS = [
    Scored(each.prompt, each.ranks[[i, j]], each.scores[[i, j]])
    for each in CASE
    for i, j in combinations(range(len(each.scores)), 2)
]
# With a threshold of at least tanh(0.5) = 0.46 and below tanh(1) = 0.76 both are right: the first such one is 0.5.
WIDE = [
    Scored("tied", np.array([1.0, 1.0]), np.array([1.0, 0.0]), tuning=True),
    Scored("untied", np.array([1.0, 2.0]), np.array([2.0, 0.0]), tuning=True),
]
# Only a threshold of 0 is right about this one: tanh(0.05) = 0.05.
NARROW = [Scored("untied", np.array([1.0, 2.0]), np.array([0.1, 0.0]), tuning=True)]


def value(outcome: Outcome) -> float:
    return float(outcome.earned.sum() / outcome.possible.sum())


def test_image_reward_counts_equal_scores_as_wrong_and_leaves_ties_out() -> None:
    outcome = protocols.pooled(CASE)
    assert outcome.earned.tolist() == [3, 1, 0]
    assert outcome.possible.tolist() == [5, 1, 0]
    assert value(outcome) == pytest.approx(4 / 6)


def test_the_mean_over_prompts_has_every_prompt_weigh_the_same() -> None:
    outcome = protocols.prompt_mean(CASE)
    assert outcome.possible.tolist() == [1, 1, 0]  # C has nothing to say
    assert value(outcome) == pytest.approx((3 / 5 + 1) / 2)


def test_a_tie_of_people_is_never_an_inversion() -> None:
    outcome = protocols.inversions(CASE)
    # A: one inversion and one pair of equal scores, of six pairs, the tied one included.
    assert outcome.earned == pytest.approx(np.array([1 - 1.5 / 6, 1.0, 1.0]))
    assert value(outcome) == pytest.approx((0.75 + 1 + 1) / 3)


def test_pick_a_pic_gives_half_where_one_side_says_tie() -> None:
    outcome = protocols.pick_a_pic(PAIRS + NARROW)
    # In the order of PAIRS: wrong, right, right, a tie missed, right, a tie made up; right; a tie missed.
    assert outcome.earned.tolist() == [0, 1, 1, 0.5, 1, 0.5, 1, 0.5]
    assert "tie threshold 0, chosen on 1 " in outcome.note


def test_pick_a_pic_chooses_its_threshold_on_other_pairs() -> None:
    outcome = protocols.pick_a_pic(PAIRS + WIDE)
    # Under 0.5 lie all gaps: tanh(0.35), tanh(0.05), tanh(0.05), tanh(0.4), tanh(0.4), 0; tanh(0.5); tanh(0.5).
    assert outcome.earned.tolist() == [0.5, 0.5, 0.5, 1, 0.5, 0.5, 0.5, 1]
    assert "tie threshold 0.5, chosen on 2 " in outcome.note
    assert len(outcome.prompts) == len(PAIRS)


@pytest.mark.parametrize("scored", [CASE + WIDE, PAIRS])
def test_pick_a_pic_needs_pairs_and_others_to_tune_on(scored: list[Scored]) -> None:
    with pytest.raises(ValueError, match="needs pairs of images"):
        protocols.pick_a_pic(scored)


def test_the_protocols_differ_on_one_case() -> None:
    found = {
        outcome.protocol: round(value(outcome), 4)
        for outcome in (
            protocols.pooled(CASE),
            protocols.prompt_mean(CASE),
            protocols.inversions(CASE),
            protocols.pick_a_pic(PAIRS + NARROW),
        )
    }
    assert found == {POOLED: 0.6667, PROMPTS: 0.8, INVERSIONS: 0.9167, TIES: 0.6875}


# --- laws, on random rankings with ties

RANKS_ONLY = (protocols.pooled, protocols.prompt_mean, protocols.inversions)


def random_case(seed: int) -> list[Scored]:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 9, size=12)
    return [Scored(f"{i}", rng.integers(1, 5, n).astype(float), rng.integers(0, 6, n) / 2) for i, n in enumerate(sizes)]


@pytest.mark.parametrize("protocol", RANKS_ONLY)
def test_peoples_own_order_is_always_right_and_its_reverse_never(protocol: Protocol) -> None:
    case = random_case(0)
    assert value(protocol([each._replace(scores=-each.ranks) for each in case])) == 1
    untied = [each._replace(ranks=np.arange(len(each.ranks), dtype=float)) for each in case]
    assert value(protocol([each._replace(scores=each.ranks) for each in untied])) == 0


@pytest.mark.parametrize("protocol", RANKS_ONLY)
def test_only_the_order_of_scores_and_not_that_of_images_matters(protocol: Protocol) -> None:
    case, rng = random_case(1), np.random.default_rng(2)
    expected = value(protocol(case))
    assert value(protocol([each._replace(scores=np.exp(3 * each.scores)) for each in case])) == pytest.approx(expected)
    orders = [rng.permutation(len(each.ranks)) for each in case]
    turned = [e._replace(ranks=e.ranks[o], scores=e.scores[o]) for e, o in zip(case, orders, strict=True)]
    assert value(protocol(turned)) == pytest.approx(expected)


def test_equal_scores_are_half_an_inversion_which_is_what_an_arbitrary_order_comes_to() -> None:
    each = random_case(3)[0]._replace(ranks=np.array([1.0, 2.0, 2.0, 3.0]), scores=np.array([2.0, 1.0, 1.0, 1.0]))
    rng = np.random.default_rng(4)
    broken = [each._replace(scores=each.scores + 1e-6 * rng.random(4)) for _ in range(4000)]
    # Two of the six pairs are open, each inverted with probability 1/2: the mean's deviation is below 1/6 / sqrt(4000).
    assert value(protocols.inversions([each])) == pytest.approx(value(protocols.inversions(broken)), abs=0.011)


def test_the_pairwise_definition_is_what_is_counted() -> None:
    """Written out as loops over pairs, one case at a time."""
    case = random_case(5)
    right = total = 0
    for each in case:
        for i, j in combinations(range(len(each.ranks)), 2):
            if each.ranks[i] != each.ranks[j]:
                better, worse = (i, j) if each.ranks[i] < each.ranks[j] else (j, i)
                right += each.scores[better] > each.scores[worse]
                total += 1
    outcome = protocols.pooled(case)
    assert (outcome.earned.sum(), outcome.possible.sum()) == (right, total)


def test_pick_a_pic_alone_depends_on_the_scale_of_the_scores() -> None:
    small = [each._replace(scores=each.scores / 100) for each in PAIRS]
    assert value(protocols.pick_a_pic(small + WIDE)) == value(protocols.pick_a_pic(PAIRS + WIDE))  # all ties, both ways
    large = [each._replace(scores=each.scores * 100) for each in PAIRS]
    assert value(protocols.pick_a_pic(large + WIDE)) != value(protocols.pick_a_pic(PAIRS + WIDE))


def test_a_prompt_with_one_image_counts_for_nothing() -> None:
    alone = [Scored("alone", np.array([1.0]), np.array([0.5]))]
    for protocol in RANKS_ONLY:
        assert protocol(alone).possible.tolist() == [0]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_gap_as_wide_as_the_threshold_is_a_tie_and_a_wider_one_is_not(sign: float) -> None:
    tied = Scored("p", np.array([1.0, 1.0]), np.array([sign, 0.0]))
    untied = tied._replace(ranks=np.array([1.0, 2.0]) if sign > 0 else np.array([2.0, 1.0]))
    gap = float(np.tanh(0.5))
    below = float(np.nextafter(gap, 0))
    assert [protocols.credit(tied, threshold) for threshold in (gap, below)] == [1.0, 0.5]
    assert [protocols.credit(untied, threshold) for threshold in (gap, below)] == [0.5, 1.0]
    assert protocols.credit(untied._replace(ranks=untied.ranks[::-1]), below) == 0.0
