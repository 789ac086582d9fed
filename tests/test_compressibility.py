"""JPEG compressibility, against files that PIL writes."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from vp_rl.rewards.compressibility import CompressibilityReward

NOISE = torch.randint(0, 256, (3, 40, 56), generator=torch.Generator().manual_seed(0)) / 255
PLAIN = torch.full((3, 40, 56), 0.5)


@pytest.mark.parametrize("image", [NOISE, PLAIN])
def test_scores_are_minus_the_kilobytes_of_the_file(tmp_path: Path, image: torch.Tensor) -> None:
    pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=95)
    (score,) = CompressibilityReward()(image[None], ["ignored"])
    assert score.item() == pytest.approx(-(tmp_path / "a.jpg").stat().st_size / 1000)


def test_the_other_sign_prefers_detail() -> None:
    images = torch.stack([NOISE, PLAIN])
    small, large = (
        CompressibilityReward()(images, ["", ""]),
        CompressibilityReward(incompressible=True)(images, ["", ""]),
    )
    assert torch.equal(small, -large)
    assert small[1] > small[0]
    assert small.dtype == torch.float32


def test_rows_are_scored_alone_and_without_gradients() -> None:
    images = torch.stack([NOISE, PLAIN, NOISE.flip(2)]).requires_grad_()
    reward = CompressibilityReward()
    scores = reward(images, ["a", "b", "c"])
    assert torch.equal(scores, torch.cat([reward(image[None], [""]) for image in images]))
    assert not scores.requires_grad
    assert not reward.differentiable


def test_values_are_rounded_and_clipped_to_8_bits() -> None:
    reward = CompressibilityReward()
    near = torch.stack([NOISE, NOISE + 0.4 / 255, NOISE.bfloat16().float()])
    scores = reward(near, [""] * 3)
    assert scores[0] == scores[1]
    assert torch.equal(reward(torch.full((1, 3, 8, 8), 1.3), [""]), reward(torch.ones(1, 3, 8, 8), [""]))
    assert reward(NOISE[None].bfloat16(), [""]) == scores[2]


@pytest.mark.parametrize("incompressible", [False, True])
def test_what_is_no_picture_has_no_score(incompressible: bool) -> None:
    images = torch.stack([NOISE, NOISE, NOISE, PLAIN])
    images[0, 0, 0, 0], images[2] = torch.nan, torch.inf
    scores = CompressibilityReward(incompressible)(images, [""] * 4)
    assert scores.isnan().tolist() == [True, False, True, False]
    assert torch.equal(scores[[1, 3]], CompressibilityReward(incompressible)(images[[1, 3]], ["", ""]))
