"""What images look like: closed forms, and what evaluations make of them."""

import numpy as np
import pytest
from test_evaluation import Bright, Brightness, evaluator, shifted

from vp_rl.evaluation.compare import compare
from vp_rl.evaluation.looks import appearance, coarse, diversity, spread


def plain(*colours: tuple[int, int, int], side: int = 32) -> np.ndarray:
    return np.array(colours, np.uint8)[:, None, None].repeat(side, 1).repeat(side, 2)


def test_black_and_white_are_at_distance_one_whatever_their_size() -> None:
    for side in (16, 64, 200):
        black, white = coarse(plain((0, 0, 0), (255, 255, 255), side=side))
        assert np.linalg.norm(black - white) == pytest.approx(1, abs=1e-5)


def test_a_plain_grey_has_no_contrast_no_colour_and_no_edge() -> None:
    found = appearance(plain((51, 51, 51)))
    assert found["brightness"][0] == pytest.approx(0.2, abs=1e-6)
    for name in ("contrast", "colour", "sharpness"):
        assert found[name][0] == pytest.approx(0, abs=1e-6), name


def test_half_black_half_white_has_the_greatest_contrast_and_red_has_hasslers_colour() -> None:
    image = plain((0, 0, 0))
    image[:, :, 16:] = 255
    found = appearance(image)
    assert (found["brightness"][0], found["contrast"][0]) == pytest.approx((0.5, 0.5), abs=1e-6)
    red = appearance(plain((255, 0, 0)))["colour"][0]
    assert red == pytest.approx(0.3 * (1 + 0.25) ** 0.5, abs=1e-6)  # rg = 1, yb = 1/2, everywhere


def test_a_checkerboard_is_sharper_than_its_blurred_self() -> None:
    board = (np.indices((32, 32)).sum(0) % 2 * 255).astype(np.uint8)[None, :, :, None].repeat(3, 3)
    soft = np.full_like(board, 127)
    assert appearance(board)["sharpness"][0] == pytest.approx(4, abs=1e-5)  # each neighbour is another colour
    assert appearance(soft)["sharpness"][0] < 1e-5


def test_turning_an_edge_changes_the_features_though_the_colours_stay() -> None:
    across = (np.arange(64) % 2 * 255).astype(np.uint8)[None, None, :, None].repeat(64, 1).repeat(3, 3)
    features = coarse(np.concatenate([across, across.swapaxes(1, 2)]))
    assert np.abs(features[0, :192] - features[1, :192]).max() < 1e-6
    assert np.linalg.norm(features[0] - features[1]) > 0.5


def test_diversity_is_within_a_prompt_and_spread_between_prompts() -> None:
    features = np.array([[0.0], [2.0], [10.0], [10.0]])
    assert diversity(features, np.array([0, 0, 1, 1])).tolist() == [2, 2, 0, 0]
    assert spread(features, [0, 1, 0, 1]).tolist() == [10, 8, 10, 8]
    assert diversity(features, np.array([0, 1, 2, 2])) is None
    assert spread(features, [0, 1, 2, 3]) is None


def test_a_comparison_has_the_looks_and_the_distance_from_the_base() -> None:
    tool = evaluator(seeds=(0, 1))
    base, tuned = (tool.evaluate(shifted(by), Brightness()) for by in (0.0, 0.5))
    changes = compare(base, tuned)
    assert changes["look/brightness"].low > 0
    assert (changes["look/distance"].base, changes["look/distance"].low > 0) == (0, True)
    assert changes["look/diversity"].base == pytest.approx(base.looks["look/diversity"].mean())
    alone = evaluator().evaluate(Bright(), Brightness())
    assert "look/diversity" not in compare(alone, alone)
