"""Preference pairs: the rules, and the whole dataset at once."""

from itertools import product

import numpy as np
import pytest

from vp_rl.types import ASPECTS, Aspect
from vp_rl.visionprefer.pairs import RULES, all_pairs, padded, pairs

SETTINGS: list[dict] = [
    *({"rule": rule, "least_margin": m, "keep_ties": t} for rule, m, t in product(RULES, (0.0, 1.0), (False, True))),
    {"rule": "mean", "least_margin": 0.25},
    {"rule": "mean", "weights": {"prompt_following": 2.0, "aesthetic": 0.7, "fidelity": 0.1, "harmlessness": 0.3}},
    {"rule": "mean", "weights": {"aesthetic": 3.0}, "keep_ties": True},
]


def by_aspect(block: np.ndarray) -> dict[Aspect, list[int]]:
    """One prompt's (images, aspects) as `pairs` takes it."""
    return {aspect: block[:, index].tolist() for index, aspect in enumerate(ASPECTS)}


def drawn(prompts: int = 60, most: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """Ratings of all images, and how many images each prompt has: 0 to `most`."""
    rng = np.random.default_rng(0)
    counts = rng.integers(most + 1, size=prompts)
    return rng.integers(1, 6, (counts.sum(), len(ASPECTS))), counts


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_dataset_gives_the_pairs_of_its_prompts_one_after_the_other(settings: dict) -> None:
    ratings, counts = drawn()
    found = all_pairs(padded(ratings, counts), **settings)
    blocks = np.split(ratings, np.cumsum(counts)[:-1])
    expected = [(prompt, *pair) for prompt, block in enumerate(blocks) for pair in pairs(by_aspect(block), **settings)]
    assert list(zip(*(column.tolist() for column in found[:4]), strict=True)) == expected
    assert len(expected) > 100


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_margin_is_how_much_higher_the_better_image_is_rated(settings: dict) -> None:
    block = padded(*drawn())
    found = all_pairs(block, **settings)
    weights = settings.get("weights") or dict.fromkeys(ASPECTS, 1.0)
    shares = np.array([weights.get(aspect, 0.0) for aspect in ASPECTS]) / sum(weights.values())
    scores = np.concatenate([block, (block @ shares)[..., None]], 2)  # the last one is what aspect -1 takes
    gaps = scores[found.prompt, found.better, found.aspect] - scores[found.prompt, found.worse, found.aspect]
    np.testing.assert_allclose(found.margin, gaps, atol=1e-12)
    assert (
        found.margin.min() >= 0 if settings.get("keep_ties") else found.margin.min() > settings.get("least_margin", 0)
    )


def test_a_rating_per_image_without_padding_is_left_as_it_is() -> None:
    ratings = np.arange(24).reshape(6, 4)
    np.testing.assert_array_equal(padded(ratings, np.array([3, 3])), ratings.reshape(2, 3, 4))


def test_short_prompts_are_padded_with_zeros() -> None:
    block = padded(np.arange(1, 9).reshape(4, 2), np.array([1, 0, 3]))
    assert block.tolist() == [[[1, 2], [0, 0], [0, 0]], [[0, 0]] * 3, [[3, 4], [5, 6], [7, 8]]]


def test_an_image_is_in_no_pair_that_needs_a_rating_it_does_not_have() -> None:
    block = np.array([[[5, 5, 5, 5], [4, 0, 4, 4], [3, 3, 3, 3]]])
    found = all_pairs(block)
    assert {(b, w) for b, w, a in zip(found.better, found.worse, found.aspect, strict=True) if a == 1} == {(0, 2)}
    assert len(found.prompt) == 3 * 3 + 1
    assert len(all_pairs(block, keep_ties=True).prompt) == 3 * 3 + 1
    assert all_pairs(block, "mean").better.tolist() == [0]
    without = {"prompt_following": 1.0, "fidelity": 1.0}
    assert all_pairs(block, "mean", weights=without).better.tolist() == [0, 0, 1]


def test_nothing_gives_no_pairs() -> None:
    for shape in ((0, 0, 4), (0, 4, 4), (3, 1, 4), (3, 0, 4)):
        assert len(all_pairs(np.ones(shape, np.int64), keep_ties=True).prompt) == 0


def test_weights_say_how_much_an_aspect_counts() -> None:
    ratings: dict[Aspect, list[int]] = {
        "prompt_following": [5, 1],
        "aesthetic": [1, 3],
        "fidelity": [1, 3],
        "harmlessness": [2, 2],
    }
    assert pairs(ratings, "mean") == []
    assert pairs(ratings, "mean", weights={"prompt_following": 1.1, "aesthetic": 1.0, "fidelity": 1.0}) == [(0, 1, -1)]
    assert pairs(ratings, "mean", weights={"prompt_following": 0.9, "aesthetic": 1.0, "fidelity": 1.0}) == [(1, 0, -1)]


def test_weights_may_have_any_sum() -> None:
    block = padded(*drawn())
    weights: dict[Aspect, float] = {"prompt_following": 3.0, "aesthetic": 2.0, "fidelity": 1.0, "harmlessness": 0.5}
    small = all_pairs(block, "mean", weights={aspect: weight / 1000 for aspect, weight in weights.items()})
    large = all_pairs(block, "mean", weights=weights)
    assert small.better.tolist() == large.better.tolist()
    np.testing.assert_allclose(small.margin, large.margin)


def test_equal_weights_are_the_plain_mean() -> None:
    block = padded(*drawn())
    weighted, plain = all_pairs(block, "mean", weights=dict.fromkeys(ASPECTS, 7.0)), all_pairs(block, "mean")
    for mine, other in zip(weighted, plain, strict=True):
        np.testing.assert_array_equal(mine, other)


def test_rounding_breaks_no_tie_and_turns_none() -> None:
    whole = (7, 1, 1, 1)
    weights: dict[Aspect, float] = dict(zip(ASPECTS, map(float, whole), strict=True))
    by_sum: dict[int, list[tuple[int, ...]]] = {}
    for image in product(range(1, 6), repeat=4):
        by_sum.setdefault(sum(w * r for w, r in zip(whole, image, strict=True)), []).append(image)
    block = np.array([two for same in by_sum.values() for two in product(same[:6], repeat=2)])
    rounded = (block * (np.array(whole) / 10)).sum(2)
    assert (rounded[:, 0] < rounded[:, 1]).any()  # though they are equal
    assert (rounded[:, 0] > rounded[:, 1]).any()
    assert len(all_pairs(block, "mean", weights=weights).prompt) == 0
    tied = all_pairs(block, "mean", weights=weights, keep_ties=True)
    assert not tied.better.any()
    assert (tied.worse == 1).all()
    assert not tied.margin.any()
    for two in block:
        assert pairs(by_aspect(two), "mean", weights=weights) == []
        assert pairs(by_aspect(two), "mean", weights=weights, keep_ties=True) == [(0, 1, -1)]


def test_a_margin_that_is_just_reached_is_a_tie() -> None:
    ratings = {aspect: [3, 4, 5] for aspect in ASPECTS}
    assert pairs(ratings, "fidelity", least_margin=1.0) == [(2, 0, 2)]
    assert pairs(ratings, "fidelity", least_margin=0.9) == [(1, 0, 2), (2, 0, 2), (2, 1, 2)]


def test_kept_ties_leave_no_two_images_out() -> None:
    ratings, counts = drawn()
    found = all_pairs(padded(ratings, counts), keep_ties=True)
    assert len(found.prompt) == len(ASPECTS) * sum(counts * (counts - 1) // 2)
    tied = found.margin == 0
    assert tied.any()
    assert (found.better < found.worse)[tied].all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "beauty"}, "data.aspects='beauty' is unknown"),
        ({"rule": "mean", "least_margin": -1.0}, "least_margin=-1.0"),
        ({"rule": "mean", "least_margin": float("nan")}, "least_margin=nan"),
        ({"rule": "pooled", "weights": {"fidelity": 1.0}}, "would change nothing"),
        ({"rule": "mean", "weights": {"fidelity": -1.0, "aesthetic": 2.0}}, "make no mean"),
        ({"rule": "mean", "weights": {"fidelity": 0.0}}, "make no mean"),
        ({"rule": "mean", "weights": {}}, "make no mean"),
        ({"rule": "mean", "weights": {"fidelity": float("inf")}}, "make no mean"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pairs(dict.fromkeys(ASPECTS, [1, 2]), **settings)
    with pytest.raises(ValueError, match=message):
        all_pairs(np.ones((1, 2, 4), np.int64), **settings)


def test_several_aspects_are_pooled_in_their_own_order_however_they_are_named() -> None:
    ratings = {aspect: [2, 1 + place, 3] for place, aspect in enumerate(ASPECTS)}
    wanted = [pair for aspect in ("aesthetic", "harmlessness") for pair in pairs(ratings, aspect)]
    assert pairs(ratings, "harmlessness+aesthetic") == pairs(ratings, "aesthetic+harmlessness") == wanted
    assert pairs(ratings, "+".join(ASPECTS)) == pairs(ratings)


@pytest.mark.parametrize("rule", ["", "aesthetic+", "aesthetic+beauty", "aesthetic+aesthetic", "pooled+mean"])
def test_a_rule_names_each_aspect_once(rule: str) -> None:
    with pytest.raises(ValueError, match="data.aspects="):
        pairs(dict.fromkeys(ASPECTS, [1, 2]), rule)
