"""VP-Score on ImageReward's parameters gives ImageReward's scores: its arithmetic is written out here a second time."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import BlipTextConfig, BlipVisionConfig

from vp_rl.rewards.blip_sizes import published
from vp_rl.rewards.vp_score import VPScore

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of ImageReward's raw scores
LENGTH = 35
HEAD = {0: 1024, 2: 128, 4: 64, 6: 16, 7: 1}  # widths by ImageReward's layer numbers; dropout is between
WORDS = ["a", "red", "blue", "cat", "dog", "on", "under", "the", "table", "painted", "in", "oil", "at", "night", "two"]
PROMPTS = [
    "a red cat",
    "two blue dog on the table",
    " ".join(WORDS),
    "a cat painted in oil at night",
    " ".join(WORDS * 3),  # 45 words: cut
    " ".join(["under", "the", "table"] * 12),  # 36
    "night",
    "the dog under the red table",
]
SIZES = [(224, 224), (300, 500), (512, 384), (224, 400), (640, 225), (64, 64), (768, 1024), (333, 777)]


class Sizes(NamedTuple):
    """Of both towers; ImageReward's heads are 64 wide."""

    vision: int
    blocks: int
    text: int
    layers: int
    words: int


SMALL, FULL = Sizes(128, 3, 192, 2, 24), Sizes(1024, 24, 768, 12, 30524)


def configs(sizes: Sizes) -> tuple[BlipVisionConfig, BlipTextConfig]:
    """The published towers, but for these sizes."""
    vision, text = published()
    vision.hidden_size, vision.num_hidden_layers, vision.intermediate_size = (
        sizes.vision,
        sizes.blocks,
        4 * sizes.vision,
    )
    text.hidden_size, text.num_hidden_layers, text.intermediate_size = sizes.text, sizes.layers, 4 * sizes.text
    text.encoder_hidden_size, text.vocab_size = sizes.vision, sizes.words
    vision.num_attention_heads, text.num_attention_heads = sizes.vision // 64, sizes.text // 64
    return vision, text


def parameters(sizes: Sizes) -> dict[str, Tensor]:
    """Random ones under the names in ImageReward.pt; scores of all images and prompts differ."""
    state: dict[str, Tensor] = {}

    def linear(name: str, fan_in: int, fan_out: int) -> None:
        state[f"{name}.weight"] = torch.randn(fan_out, fan_in) * fan_in**-0.5
        state[f"{name}.bias"] = torch.randn(fan_out) * 0.1

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = 1 + 0.1 * torch.randn(width), 0.1 * torch.randn(width)

    eye, read, wide, thin = "blip.visual_encoder", "blip.text_encoder", sizes.vision, sizes.text
    little = 0.03  # so that it matters whether the first norm adds 1e-6 or 1e-5 to the variance
    state[f"{eye}.cls_token"] = little * torch.randn(1, 1, wide)
    state[f"{eye}.pos_embed"] = little * torch.randn(1, 197, wide)
    state[f"{eye}.patch_embed.proj.weight"] = little * torch.randn(wide, 3, 16, 16) * 768**-0.5
    state[f"{eye}.patch_embed.proj.bias"] = little * 0.1 * torch.randn(wide)
    for block in (f"{eye}.blocks.{number}" for number in range(sizes.blocks)):
        norm(f"{block}.norm1", wide)
        linear(f"{block}.attn.qkv", wide, 3 * wide)
        linear(f"{block}.attn.proj", wide, wide)
        norm(f"{block}.norm2", wide)
        linear(f"{block}.mlp.fc1", wide, 4 * wide)
        linear(f"{block}.mlp.fc2", 4 * wide, wide)
    norm(f"{eye}.norm", wide)
    state[f"{read}.embeddings.position_ids"] = torch.arange(512)[None]
    state[f"{read}.embeddings.word_embeddings.weight"] = torch.randn(sizes.words, thin)
    state[f"{read}.embeddings.position_embeddings.weight"] = 0.3 * torch.randn(512, thin)
    norm(f"{read}.embeddings.LayerNorm", thin)
    for layer in (f"{read}.encoder.layer.{number}" for number in range(sizes.layers)):
        for attention, source in (("attention", thin), ("crossattention", wide)):
            linear(f"{layer}.{attention}.self.query", thin, thin)
            linear(f"{layer}.{attention}.self.key", source, thin)
            linear(f"{layer}.{attention}.self.value", source, thin)
            linear(f"{layer}.{attention}.output.dense", thin, thin)
            norm(f"{layer}.{attention}.output.LayerNorm", thin)
        linear(f"{layer}.intermediate.dense", thin, 4 * thin)
        linear(f"{layer}.output.dense", 4 * thin, thin)
        norm(f"{layer}.output.LayerNorm", thin)
    linear("blip.vision_proj", wide, 256)
    linear("blip.text_proj", thin, 256)
    for (layer, fan_out), fan_in in zip(HEAD.items(), (thin, *HEAD.values()), strict=False):
        linear(f"mlp.layers.{layer}", fan_in, fan_out)
    return state


def attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Of heads that are 64 wide; `mask` is 0 where a key is padding."""
    queries, keys, values = (x.unflatten(-1, (-1, 64)).transpose(1, 2) for x in (queries, keys, values))
    logits = queries @ keys.transpose(2, 3) / 8
    if mask is not None:
        logits = logits + (1 - mask[:, None, None, :]) * -10_000.0  # what BLIP's code adds
    return (logits.softmax(-1) @ values).transpose(1, 2).flatten(2)


class Original:
    """ImageReward's forward pass in bare tensor operations, one image and prompt at a time, as its `score` does."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, name: str, x: Tensor, epsilon: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + epsilon).sqrt()
        return scaled * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def look(self, pixels: Tensor) -> Tensor:
        """(1, 3, 224, 224) to (1, 197, width)."""
        eye = "blip.visual_encoder."
        patches = pixels.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        x = patches @ self.state[eye + "patch_embed.proj.weight"].flatten(1).T
        x = x + self.state[eye + "patch_embed.proj.bias"]
        x = torch.cat([self.state[eye + "cls_token"], x], 1) + self.state[eye + "pos_embed"]
        number = 0
        while (block := f"{eye}blocks.{number}") + ".norm1.weight" in self.state:
            queries, keys, values = self.linear(f"{block}.attn.qkv", self.norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1)
            x = x + self.linear(f"{block}.attn.proj", attention(queries, keys, values))
            inner = F.gelu(self.linear(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", x, 1e-6)))
            x = x + self.linear(f"{block}.mlp.fc2", inner)
            number += 1
        return self.norm(eye + "norm", x, 1e-6)

    def attend(self, name: str, x: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
        queries = self.linear(f"{name}.self.query", x)
        keys, values = self.linear(f"{name}.self.key", source), self.linear(f"{name}.self.value", source)
        inner = self.linear(f"{name}.output.dense", attention(queries, keys, values, mask))
        return self.norm(f"{name}.output.LayerNorm", inner + x, 1e-12)

    def read(self, ids: Tensor, mask: Tensor, seen: Tensor) -> Tensor:
        """[CLS] after (1, 35) tokens have looked at the image."""
        text = "blip.text_encoder."
        x = self.state[text + "embeddings.word_embeddings.weight"][ids]
        x = x + self.state[text + "embeddings.position_embeddings.weight"][: ids.shape[1]]
        x = self.norm(text + "embeddings.LayerNorm", x, 1e-12)
        number = 0
        while (layer := f"{text}encoder.layer.{number}") + ".output.dense.weight" in self.state:
            x = self.attend(f"{layer}.attention", x, x, mask)
            x = self.attend(f"{layer}.crossattention", x, seen, None)
            inner = self.linear(f"{layer}.output.dense", F.gelu(self.linear(f"{layer}.intermediate.dense", x)))
            x = self.norm(f"{layer}.output.LayerNorm", inner + x, 1e-12)
            number += 1
        return x[:, 0]

    @torch.no_grad()
    def score(self, pixels: Tensor, prompt: str, vocabulary: list[str]) -> float:
        words = [vocabulary.index(word) for word in ["[CLS]", *prompt.split()[: LENGTH - 2], "[SEP]"]]
        ids = torch.tensor([words + [0] * (LENGTH - len(words))])
        x = self.read(ids, (ids != 0).to(pixels.dtype), self.look(pixels))
        for layer in HEAD:
            x = self.linear(f"mlp.layers.{layer}", x)
        return (x.item() - MEAN) / STD


def exactly(picture: np.ndarray, width: int, height: int) -> np.ndarray:
    """PIL's bicubic filter without its rounding to 8 bit, clipped after each pass as PIL does; 0..255."""
    channels = []
    for channel in picture.astype(np.float32).transpose(2, 0, 1):
        wide = Image.fromarray(channel).resize((width, channel.shape[0]), Image.Resampling.BICUBIC)
        both = Image.fromarray(np.asarray(wide).clip(0, 255)).resize((width, height), Image.Resampling.BICUBIC)
        channels.append(np.asarray(both).clip(0, 255))
    return np.stack(channels, -1)


def in_8_bit(picture: np.ndarray, width: int, height: int) -> np.ndarray:
    """What ImageReward's code itself does."""
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC), np.float32)


def pixels_of(picture: np.ndarray, resize: Callable[[np.ndarray, int, int], np.ndarray]) -> Tensor:
    """Shorter side to 224, centre crop, CLIP's normalisation."""
    height, width = picture.shape[:2]
    resized = resize(picture, 224 * width // min(height, width), 224 * height // min(height, width))
    top, left = (round((side - 224) / 2) for side in resized.shape[:2])
    cut = torch.from_numpy(resized[top : top + 224, left : left + 224].transpose(2, 0, 1).copy())
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).reshape(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).reshape(3, 1, 1)
    return ((cut / 255 - mean) / std)[None]


def pictures() -> list[np.ndarray]:
    """Of many shapes, with smooth parts and noise."""
    rng, made = np.random.default_rng(0), []
    for height, width in SIZES:
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32)
        made.append((smooth + rng.normal(0, 20, smooth.shape)).clip(0, 255).astype(np.uint8))
    return made


def vocabulary(words: int) -> list[str]:
    """bert-base-uncased's special words, ours, others up to BLIP's two."""
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    return known + [f"word{number}" for number in range(words - 2 - len(known))]


class Both(NamedTuple):
    ours: VPScore
    original: Original
    words: list[str]


def both(folder: Path, sizes: Sizes) -> Both:
    """Ours and the original on the same file."""
    torch.manual_seed(0)
    words = vocabulary(sizes.words)
    (folder / "vocab.txt").write_text("\n".join(words))
    torch.save(parameters(sizes), folder / "ImageReward.pt")
    vision, text = configs(sizes)
    file, tokenizer = str(folder / "ImageReward.pt"), str(folder)
    ours = VPScore.from_blip(file, tokenizer=tokenizer, vision=vision, text=text, mean=MEAN, std=STD)
    return Both(ours, Original(torch.load(file, weights_only=True, mmap=True)), words)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Both:
    return both(tmp_path_factory.mktemp("image_reward"), SMALL)


@torch.no_grad()
def ours_of(ours: VPScore, shown: list[np.ndarray]) -> Tensor:
    images = [torch.from_numpy(picture.copy()).permute(2, 0, 1)[None] / 255 for picture in shown]
    return torch.cat([ours(image, [prompt]) for image, prompt in zip(images, PROMPTS, strict=True)])


def original_of(pair: Both, shown: list[np.ndarray], resize: Callable[[np.ndarray, int, int], np.ndarray]) -> Tensor:
    scores = [pair.original.score(pixels_of(p, resize), t, pair.words) for p, t in zip(shown, PROMPTS, strict=True)]
    return torch.tensor(scores)


def test_scores_are_the_originals_for_long_prompts_and_images_of_any_shape(small: Both) -> None:
    ours, original = ours_of(small.ours, pictures()), original_of(small, pictures(), exactly)
    assert original.std() > 0.1  # they are not all alike
    torch.testing.assert_close(ours, original, rtol=1e-4, atol=0)


def test_pils_rounding_to_8_bit_moves_scores_little(small: Both) -> None:
    # The original resizes to whole numbers of 0..255. Its scores are ours but for that, to a hundredth of their spread.
    ours, original = ours_of(small.ours, pictures()), original_of(small, pictures(), in_8_bit)
    assert (ours - original).abs().max() < 0.01 * original.std()
    same = [row for row, size in enumerate(SIZES) if size == (224, 224) or size == (224, 400)]
    torch.testing.assert_close(ours[same], original[same], rtol=1e-4, atol=0)  # nothing to resize


def test_a_converted_folder_keeps_scores_and_constants(small: Both, tmp_path: Path) -> None:
    small.ours.save(tmp_path)
    loaded = VPScore.load(str(tmp_path))
    assert torch.equal(ours_of(loaded, pictures()), ours_of(small.ours, pictures()))
    assert (loaded.head.mean.item(), loaded.head.std.item()) == pytest.approx((MEAN, STD), rel=1e-7)


@pytest.mark.slow
def test_scores_are_the_originals_at_full_size(tmp_path: Path) -> None:
    pair = both(tmp_path, FULL)
    assert sum(p.numel() for p in pair.ours.vision.parameters()) == 303_301_632
    assert sum(p.numel() for p in pair.ours.text.parameters()) == 141_977_088
    assert sum(p.numel() for p in pair.ours.head.parameters()) == 927_969
    original = original_of(pair, pictures(), exactly)
    torch.testing.assert_close(ours_of(pair.ours, pictures()), original, rtol=1e-4, atol=0)
