"""LAION's aesthetic predictor on a random CLIP: with its real head where it is at hand, with a random one otherwise."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from random_clip import SIZE, save_clip
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPImageProcessorPil, CLIPModel

from vp_rl.rewards.aesthetic import AestheticReward

REAL = Path(__file__).parents[2] / "shared" / "data" / "weights" / "sac+logos+ava1-l14-linearMSE.pth"
WIDTHS = (768, 1024, 128, 64, 16, 1)
LAYERS = (0, 2, 4, 6, 7)  # dropout lies between


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Small towers with an embedding as wide as that of ViT-L/14."""
    path = tmp_path_factory.mktemp("clip")
    save_clip(path, width=768)
    return str(path)


@pytest.fixture(scope="module")
def random_head(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(4)
    state = {}
    for layer, fan_in, fan_out in zip(LAYERS, WIDTHS[:-1], WIDTHS[1:], strict=True):
        state[f"layers.{layer}.weight"] = torch.randn(fan_out, fan_in) / fan_in**0.5
        state[f"layers.{layer}.bias"] = torch.randn(fan_out)
    path = tmp_path_factory.mktemp("head") / "head.pth"
    torch.save(state, path)
    return str(path)


@pytest.fixture(scope="module")
def reward(clip: str, random_head: str) -> AestheticReward:
    return AestheticReward.load(random_head, clip=clip)


def pictures(batch: int, height: int = SIZE, width: int = SIZE) -> Tensor:
    """Of 8 bits, and of different brightness and contrast."""
    coarse = torch.rand(batch, 3, 6, 6, generator=torch.Generator().manual_seed(2))
    coarse = coarse * torch.linspace(0.1, 1, batch).reshape(-1, 1, 1, 1)
    return (F.interpolate(coarse, (height, width), mode="bilinear") * 255).round() / 255


def published(clip: str, head: str, images: Tensor) -> Tensor:
    """The arithmetic of `simple_inference.py`, in double precision behind the embedding."""
    pil = [Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()) for image in images]
    pixels = CLIPImageProcessorPil.from_pretrained(clip)(pil, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        seen = CLIPModel.from_pretrained(clip).get_image_features(pixels).pooler_output.double()
    x = seen / seen.norm(dim=1, keepdim=True)
    state = torch.load(head, map_location="cpu", weights_only=True)
    for layer in LAYERS:
        x = x @ state[f"layers.{layer}.weight"].double().T + state[f"layers.{layer}.bias"].double()
    return x.squeeze(1).float()


def test_scores_are_those_of_the_published_arithmetic(clip: str, random_head: str, reward: AestheticReward) -> None:
    images = pictures(4)
    expected = published(clip, random_head, images)
    assert expected.std() > 1e-3
    # Single precision: an embedding is right to some 1e-6 of its length, which the head multiplies by about 1.
    torch.testing.assert_close(reward(images, [""] * 4), expected, rtol=0, atol=5e-6)


@pytest.mark.skipif(not REAL.exists(), reason="the published head is not at hand")
def test_the_published_head_scores(clip: str) -> None:
    images = pictures(4)
    reward = AestheticReward.load(str(REAL), clip=clip)
    # Single precision: eight digits of a sum that is about 5.
    torch.testing.assert_close(reward(images, [""] * 4), published(clip, str(REAL), images), rtol=0, atol=1e-5)
    assert torch.equal(AestheticReward.load(str(REAL.parent), clip=clip)(images, [""] * 4), reward(images, [""] * 4))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 70), (17, 90), (300, 1)])
def test_rows_of_any_size_are_scored_alone_and_whatever_the_prompt(
    reward: AestheticReward, height: int, width: int
) -> None:
    images = pictures(3, height, width)
    scores = reward(images, ["a", "b", "c"])
    assert scores.dtype == torch.float32
    alone = torch.cat([reward(image[None], ["other words"]) for image in images])
    torch.testing.assert_close(scores, alone, rtol=0, atol=1e-5)  # matrices of another size round otherwise


def test_odd_crops_are_torchvisions(reward: AestheticReward) -> None:
    """64 x 70 becomes 32 x 35: of the 3 columns to crop, half to even are on the left."""
    images = torch.rand(1, 3, 32, 35)
    assert torch.equal(reward(images, [""]), reward(images[..., 2:34], [""]))
    assert not torch.equal(reward(images, [""]), reward(images[..., 1:33], [""]))


def test_gradients_are_finite_differences(reward: AestheticReward) -> None:
    images = (0.2 + 0.6 * pictures(3, 48, 40)).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(images, [""] * 3).sum(), images)
    direction, step = F.normalize(gradient, dim=(1, 2, 3)), 0.05
    with torch.no_grad():
        ahead, behind = (reward(images + sign * step * direction, [""] * 3) for sign in (1, -1))
    # Scores of order 1 are right to about 1e-6, so their quotient to 2e-5; curvature adds a part in a hundred.
    slope = (gradient * direction).sum((1, 2, 3))
    assert (slope > 1e-3).all()
    torch.testing.assert_close((ahead - behind) / (2 * step), slope.detach(), rtol=0.02, atol=2e-5)


def test_it_is_frozen_and_dropout_stays_off(reward: AestheticReward) -> None:
    images = pictures(2)
    before = reward(images, ["", ""])
    torch.nn.ModuleList([reward]).train()
    assert torch.equal(reward(images, ["", ""]), before)
    assert not any(parameter.requires_grad for parameter in reward.parameters())


def test_the_head_stays_in_float32_and_the_text_tower_is_left_out(
    clip: str, random_head: str, reward: AestheticReward
) -> None:
    half = AestheticReward.load(random_head, clip=clip, dtype="bfloat16")
    assert {parameter.dtype for parameter in half.clip.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in half.head.parameters()} == {torch.float32}
    assert not any("text" in name for name, _ in half.named_parameters())
    # bfloat16 keeps 8 bits: embeddings of length 1 are off by some hundredths, the head multiplies them by about 1.
    torch.testing.assert_close(half(pictures(4), [""] * 4), reward(pictures(4), [""] * 4), rtol=0, atol=0.1)


def test_what_does_not_fit_is_told(clip: str, random_head: str, tmp_path: Path) -> None:
    save_clip(tmp_path / "narrow", width=16)
    with pytest.raises(ValueError, match=r"reward.head=.*reward.clip=.*narrow.*another shape: layers.0.weight\."):
        AestheticReward.load(random_head, clip=str(tmp_path / "narrow"))
    state = torch.load(random_head, weights_only=True)
    torch.save({**state, "layers.8.weight": state["layers.7.weight"]}, tmp_path / "more.pth")
    with pytest.raises(ValueError, match=r"left over.*: layers.8.weight\."):
        AestheticReward.load(str(tmp_path / "more.pth"), clip=clip)
    del state["layers.7.bias"]
    torch.save(state, tmp_path / "fewer.pth")
    with pytest.raises(ValueError, match=r"missing.*: layers.7.bias\."):
        AestheticReward.load(str(tmp_path / "fewer.pth"), clip=clip)
    with pytest.raises(FileNotFoundError, match=r"reward.head='some/where' is neither.*aesthetic.pth.*fetched"):
        AestheticReward.load("some/where", file="aesthetic.pth", clip=clip)
    with pytest.raises(FileNotFoundError, match=r"reward.clip='some/where' is neither"):
        AestheticReward.load(random_head, clip="some/where")
    with pytest.raises(ValueError, match=r"reward.dtype='half' must be one of float32, float16, bfloat16"):
        AestheticReward.load(random_head, clip=clip, dtype="half")
