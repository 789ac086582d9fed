"""Agreement of annotators with each other and with people."""

import math

import krippendorff
import numpy as np
import pytest
import rated
from scipy.stats import kendalltau

from vp_rl.types import ASPECTS
from vp_rl.visionprefer.agreement import (
    Agreement,
    agreement,
    among_people,
    image_ratings,
    shared_ratings,
    with_people,
)
from vp_rl.visionprefer.votes import OVERALL, Choice, Vote


def several(annotators: int = 2, prompts: int = 50, images: int = 4, noise: float = 0.7, seed: int = 0) -> np.ndarray:
    """Annotators who see the same quality, each with a noise of their own."""
    rng = np.random.default_rng(seed)
    quality = rng.normal(3, 1, (prompts, 1, 1)) + rng.normal(0, 0.8, (prompts, images, len(ASPECTS)))
    return np.clip(np.round(quality + rng.normal(0, noise, (annotators, *quality.shape))), 1, 5).astype(np.int64)


def library_alpha(ratings: np.ndarray) -> float:
    """From the ratings themselves, (annotators, images)."""
    return krippendorff.alpha(
        np.where(ratings > 0, ratings, np.nan), level_of_measurement="ordinal", value_domain=[1, 2, 3, 4, 5]
    )


def test_alpha_is_the_librarys_with_and_without_gaps() -> None:
    ratings = several(3)
    gaps = np.where(np.random.default_rng(1).random(ratings.shape) < 0.3, 0, ratings)
    for given in (ratings, gaps):
        found = agreement(given)
        for index, aspect in enumerate(ASPECTS):
            assert found[aspect].alpha.value == pytest.approx(library_alpha(given[..., index].reshape(3, -1)))


def test_alphas_interval_is_the_jackknifes() -> None:
    ratings = several(prompts=12)
    found = agreement(ratings)["fidelity"].alpha
    without = [library_alpha(np.delete(ratings[..., 2], prompt, 1).reshape(2, -1)) for prompt in range(12)]
    half = 2.200985 * math.sqrt(11 * np.var(without))  # Student's t of 11 degrees of freedom
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), abs=1e-6)
    assert (found.count, found.prompts) == (48, 12)


def test_tau_is_scipys_averaged_over_prompts() -> None:
    ratings = several(prompts=40)
    expected = [kendalltau(*ratings[:, prompt, :, 1]).statistic for prompt in range(40)]
    found = agreement(ratings)["aesthetic"].tau
    assert found.value == pytest.approx(np.nanmean(expected))
    assert found.prompts == np.count_nonzero(~np.isnan(expected)) < 40


def test_only_images_that_both_have_rated_are_ranked() -> None:
    whole = several(prompts=30, images=6)
    gaps = whole.copy()
    gaps[0, :, 0] = gaps[1, :, 3] = 0
    common = whole[:, :, [1, 2, 4, 5]]
    for part in ("tau", "alike"):
        assert getattr(agreement(gaps)["fidelity"], part) == getattr(agreement(common)["fidelity"], part)


def test_pairs_ordered_alike_are_those_that_neither_has_tied() -> None:
    one, other = np.array([[[5, 4, 3, 3]], [[3, 4, 5, 1]]])
    found = agreement(np.repeat(np.stack([one, other])[..., None], 4, -1))["fidelity"].alike
    # (0,1), (0,2), (1,2) against each other; (0,3) and (1,3) alike; (2,3) is tied by one.
    assert found[:1] + found[3:] == (2 / 5, 5, 1)


def test_annotators_who_agree_in_all_or_in_nothing_are_told_apart() -> None:
    ratings = several(1, prompts=200)
    perfect = agreement(np.concatenate([ratings, ratings]))["fidelity"]
    assert [each.value for each in perfect] == pytest.approx([1, 1, 1])
    opposite = agreement(np.concatenate([ratings, 6 - ratings]))["fidelity"]
    assert (opposite.tau.value, opposite.alike.value) == pytest.approx((-1, 0))
    strangers = agreement(np.concatenate([ratings, several(1, prompts=200, seed=5)]))["fidelity"]
    assert strangers.alpha.low < 0 < strangers.alpha.high
    assert strangers.tau.low < 0 < strangers.tau.high
    assert strangers.alike.low < 0.5 < strangers.alike.high


def test_any_two_of_three_annotators_are_compared() -> None:
    ratings = several(3)
    three = agreement(ratings)["aesthetic"]
    by_two = [agreement(ratings[[one, other]])["aesthetic"] for one, other in ((0, 1), (0, 2), (1, 2))]
    assert three.alike.count == sum(each.alike.count for each in by_two)
    assert three.tau.value == pytest.approx(
        sum(each.tau.value * each.tau.count for each in by_two) / sum(each.tau.count for each in by_two)
    )


def test_what_cannot_be_told_is_not_a_number() -> None:
    alone = several(prompts=3)
    alone[1] = 0
    for ratings in (several()[:, :0], np.full((2, 5, 4, 4), 3), alone):
        for part in agreement(ratings)["fidelity"]:
            assert math.isnan(part.value)
            assert math.isnan(part.low)
            assert math.isnan(part.high)


@pytest.mark.parametrize(("prompts", "noise"), [(10, 0.7), (60, 1.2)])
def test_intervals_hold_the_truth_in_95_of_100_cases(prompts: int, noise: float) -> None:
    """Binomial error of 600 cases is 0.9%, and more as one prompt's aspects are alike; 3 of them: 3%."""
    truth = agreement(several(prompts=40_000, noise=noise, seed=1))["fidelity"]
    found = [each for seed in range(2, 152) for each in agreement(several(2, prompts, 4, noise, seed)).values()]
    for part in Agreement._fields:
        real = getattr(truth, part).value
        held = [getattr(each, part) for each in found]
        assert 0.92 < np.mean([each.low <= real <= each.high for each in held]) < 0.985


def test_only_prompts_that_two_have_rated_are_shared() -> None:
    ratings = several(3, prompts=6)
    ratings[1, [0, 3]] = ratings[2, [0, 1]] = 0
    rows = rated.rows(dict(zip("abc", ratings, strict=True)))
    more = rated.rows({"a": several(1, 2, 5)[0], "c": several(1, 2, 5)[0]}, first=10)
    found = shared_ratings([rows.slice(0, 4), rows.slice(4), more], "abc")
    np.testing.assert_array_equal(found[:, :5, :4], ratings[:, 1:])
    assert found.shape == (3, 7, 5, 4)
    assert not found[1, 5:].any()
    assert shared_ratings([rows], ["b", "nobody"]).shape[1] == 0


def test_images_are_found_by_name() -> None:
    ratings = several(1, 4, 3)[0]
    ratings[3, 2] = 0
    rows = rated.rows({"a": ratings}, counts=np.array([3, 1, 2, 3]))
    found = image_ratings([rows.slice(0, 2), rows.slice(2)], "a", {"1-0", "2-1", "3-2", "7-7"})
    assert found == {"1-0": tuple(ratings[1, 0]), "2-1": tuple(ratings[2, 1]), "3-2": (0, 0, 0, 0)}


# --- people


def vote(voter: str, prompt: int, sides: str, choice: Choice, aspect: str = "fidelity") -> Vote:
    """On images named by a prompt and a letter."""
    left, right = (f"{prompt}{side}" for side in sides)
    return Vote(voter, prompt, left, right, aspect, choice)


RATINGS = {"1a": (1, 1, 5, 1), "1b": (1, 1, 3, 5), "1c": (1, 1, 3, 1), "2a": (3, 3, 1, 3), "2b": (1, 1, 4, 1)}


def test_people_and_annotator_agree_where_the_preferred_image_is_rated_higher() -> None:
    votes = [
        vote("x", 1, "ab", "left"),  # alike
        vote("y", 1, "ba", "left"),  # not
        vote("x", 2, "ab", "right"),  # alike
        vote("x", 1, "ac", "tie"),  # one tie
        vote("x", 1, "bc", "tie"),  # both tie
        vote("y", 1, "bc", "left"),  # one tie
        vote("x", 3, "ab", "left"),  # unknown images
    ]
    found = with_people(votes, RATINGS)["fidelity"]
    assert found.decided[:1] + found.decided[3:] == (2 / 3, 3, 2)
    assert found.with_ties[:1] + found.with_ties[3:] == (3 / 6, 6, 2)


def test_overall_is_compared_with_the_mean_of_all_aspects() -> None:
    votes = [vote("x", 1, "ab", "right", OVERALL), vote("x", 2, "ab", "left", OVERALL), vote("x", 2, "ab", "left")]
    found = with_people(votes, RATINGS)
    assert found[OVERALL].decided[:1] + found[OVERALL].decided[3:] == (1.0, 2, 2)
    assert found["fidelity"].decided.value == 0
    assert with_people(votes[:1], {"1a": (1, 0, 5, 1), "1b": (1, 1, 1, 1)}) == {}


def test_people_agree_whichever_image_was_on_the_left() -> None:
    votes = [
        vote("x", 1, "ab", "left"),
        vote("y", 1, "ba", "right"),  # as x
        vote("z", 1, "ab", "right"),  # unlike both
        vote("x", 2, "ab", "tie"),
        vote("y", 2, "ba", "tie"),
        vote("z", 2, "ba", "left"),
        vote("x", 1, "ac", "left"),  # nobody else was asked
        vote("x", 1, "ab", "left", "aesthetic"),
        vote("y", 1, "ba", "left", "aesthetic"),
    ]
    found = among_people(votes)
    assert found["fidelity"].decided[:1] + found["fidelity"].decided[3:] == (1 / 3, 3, 1)
    assert found["fidelity"].with_ties[:1] + found["fidelity"].with_ties[3:] == (2 / 6, 6, 2)
    assert found["aesthetic"].decided.value == 0
    assert among_people(votes[-1:]) == {}
