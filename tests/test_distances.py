"""FID and CMMD: closed forms, and what they must not depend on."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vp_rl.evaluation.distances import cmmd, distances, encode, fid, images_in


class Corner:
    """An encoder whose features are the pixels of a corner."""

    def look(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, :, :1, :2].flatten(1)


def exact(mean: list[float], covariance: list[list[float]], number: int = 64) -> torch.Tensor:
    """Rows with just that mean and sample covariance."""
    raw = torch.randn(number, len(mean), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    white = raw - raw.mean(0)
    white = white @ torch.linalg.inv(torch.linalg.cholesky(white.T.cov())).T
    return (
        white @ torch.linalg.cholesky(torch.tensor(covariance, dtype=torch.float64)).T + torch.tensor(mean)
    ).double()


def test_the_fid_of_two_gaussians_is_the_closed_form() -> None:
    one, other = exact([0.0, 1.0], [[4.0, 0.0], [0.0, 9.0]]), exact([3.0, -3.0], [[1.0, 0.0], [0.0, 16.0]])
    # |m - m'|^2 + (2 - 1)^2 + (3 - 4)^2
    assert fid(one, other) == pytest.approx(9 + 16 + 1 + 1, abs=1e-8)
    a, b = [[2.0, 1.0], [1.0, 2.0]], [[3.0, -1.0], [-1.0, 1.0]]
    # tr (AB)^(1/2) of 2 x 2 matrices is sqrt(tr AB + 2 sqrt(det AB)); tr AB = 2 * 3 + 1 * (-1) + 1 * (-1) + 2 * 1 = 6
    root = math.sqrt(6 + 2 * math.sqrt(3 * 2))
    assert fid(exact([0.0, 0.0], a), exact([0.0, 0.0], b)) == pytest.approx(4 + 4 - 2 * root, abs=1e-8)
    assert fid(one, one) == pytest.approx(0, abs=1e-6)


def test_the_cmmd_of_two_points_is_the_closed_form_and_of_equal_sets_zero() -> None:
    here, there = torch.zeros(5, 3), torch.tensor([[3.0, 4.0, 0.0]]).repeat(7, 1)
    assert cmmd(here, there) == pytest.approx(1000 * 2 * (1 - math.exp(-25 / 200)), rel=1e-9)
    rows = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    # float64 sums of 1600 kernels near 1, times 1000
    assert cmmd(rows, rows) == pytest.approx(0, abs=1e-8)
    # Biased: two halves of one set differ by about (1 / n + 1 / m) (1 - E k), where unbiased ones would average 0.
    assert cmmd(rows[:20], rows[20:]) > 0


@pytest.mark.parametrize("measure", [fid, cmmd])
def test_order_means_nothing_and_distances_go_both_ways(measure) -> None:  # noqa: ANN001
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(number, 6, generator=generator) for number in (50, 1100))
    distance = measure(one, other)
    assert measure(one.flip(0), other[torch.randperm(1100, generator=generator)]) == pytest.approx(distance, rel=1e-9)
    assert measure(other, one) == pytest.approx(distance, rel=1e-9)
    assert measure(one + 1, other + 1) == pytest.approx(distance, rel=1e-4)  # of float32 features


def test_images_of_any_size_are_encoded_in_their_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sizes = [(4, 4)] * 70 + [(3, 5), (4, 4), (9, 2)]
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{number:03d}.png")
    features = encode(Corner(), images_in(tmp_path), torch.device("cpu"))
    expected = np.stack([image[:1, :2].transpose(2, 0, 1).reshape(-1) / 255 for image in images])
    np.testing.assert_allclose(features.numpy(), expected, atol=1e-6)


def test_base_adapter_and_reference_are_compared_and_too_few_images_are_warned_of(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base, tuned = rng.integers(0, 256, (2, 6, 4, 4, 3), dtype=np.uint8)
    for number in range(12):
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(tmp_path / f"{number}.jpg")
    cpu = torch.device("cpu")
    few = distances(Corner(), "corner", base, tuned, tmp_path, cpu)
    assert list(few.fid) == list(few.cmmd) == ["base and adapter", "reference and base", "reference and adapter"]
    assert (few.images, few.reference, few.features) == (6, 12, 6)
    assert "rank is at most 5" in few.warning
    enough = distances(Corner(), "corner", np.concatenate([base, tuned]), np.concatenate([tuned, base]), None, cpu)
    assert enough.warning == ""
    assert enough.fid["base and adapter"] == pytest.approx(0, abs=1e-6)
    assert enough.cmmd["base and adapter"] == pytest.approx(0, abs=1e-8)


def test_a_reference_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="reference="):
        list(images_in(tmp_path))
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"reference: '.*broken.png': .*Take it out"):
        list(images_in(tmp_path))
    one = np.zeros((1, 4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="raise limit"):
        distances(Corner(), "corner", one, one, None, torch.device("cpu"))
