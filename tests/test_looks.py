"""What images look like: closed forms, and what evaluations make of them."""

import numpy as np
import pytest
import torch
from test_evaluation import Bright, Brightness, evaluator, shifted

from vp_rl.evaluation.compare import compare
from vp_rl.evaluation.looks import appearance, coarse, diversity, repetition, spread


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


def repeated(*images: np.ndarray) -> list[float]:
    return repetition(torch.from_numpy(np.stack(images)).float()).tolist()


@pytest.mark.parametrize(("side", "period"), [(64, 8), (65, 10), (32, 5)])
def test_tiles_repeat_fully_whether_or_not_they_fit_the_image(side: int, period: int) -> None:
    tile = np.random.default_rng(0).random((period, period))
    tiled = np.tile(tile, (side // period + 1,) * 2)[:side, :side]
    checks = np.indices((side, side)).sum(0) % 2.0
    assert repeated(tiled, checks, 1 - tiled, 0.1 + tiled / 2, tiled.T) == pytest.approx([1] * 5, abs=1e-5)


@pytest.mark.parametrize("side", [16, 32, 64])
def test_noise_hardly_repeats(side: int) -> None:
    # The correlation of n pairs of noise has a standard deviation of 1 / sqrt(n). At least a quarter of the N pixels
    # overlap, so that of fewer than 3 N shifts one is above 4 * 2 / sqrt(N) in less than a tenth of the images.
    assert max(repeated(*np.random.default_rng(1).random((8, side, side)))) < 8 / side


def test_what_is_like_itself_all_along_does_not_repeat() -> None:
    rows = np.arange(64.0)[:, None].repeat(64, 1) / 63
    disc = (np.square(np.indices((64, 64)) - 12).sum(0) < 50).astype(float)
    twice = disc + np.roll(disc, 20, 1)
    plain, gradient, edge, one, two = repeated(np.full((64, 64), 0.3), rows, (rows > 0.5) * 1.0, disc, twice)
    assert max(plain, gradient, edge, one) < 1e-6
    assert two > 0.5


def test_large_images_are_reduced_before_they_are_shifted() -> None:
    tile = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    large = np.kron(np.tile(tile, (8, 8)), np.ones((4, 4), np.uint8))[None, :, :, None].repeat(3, 3)
    assert appearance(large)["repetition"][0] == pytest.approx(1, abs=1e-5)


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
