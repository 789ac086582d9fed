"""CLIP-shaped rewards on random weights, against transformers' own CLIP and against open_clip's arithmetic."""

import json
import pickle
import random
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from random_clip import END, MEAN, SIZE, STD, config, save_clip, save_processor, shake
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from vp_rl.rewards.clip import CLIPReward
from vp_rl.rewards.preprocess import Colours, letterbox, preprocess
from vp_rl.scenes.grammar import COLORS, scenes
from vp_rl.scenes.render import render

PROMPTS = ["a red circle", "two blue squares", "", "Red, RED: red! " * 20]
SIZES = [(32, 32), (64, 70), (40, 56), (100, 51), (17, 90)]  # 64 x 70 leaves 3 columns to crop, an odd number


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip")
    save_clip(path)
    return path


@pytest.fixture(scope="module")
def reward(folder: Path) -> CLIPReward:
    return CLIPReward.load(str(folder), scale=None)


def pictures(batch: int, height: int = SIZE, width: int = SIZE) -> Tensor:
    """Of 8 bits, smooth enough to be pictures."""
    coarse = torch.rand(batch, 3, 6, 6, generator=torch.Generator().manual_seed(2))
    return (F.interpolate(coarse, (height, width), mode="bilinear") * 255).round() / 255


# --- transformers


def processed(folder: Path, images: Tensor) -> Tensor:
    pil = [Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()) for image in images]
    return CLIPImageProcessorPil.from_pretrained(folder)(pil, return_tensors="pt")["pixel_values"]


def transformers_scores(folder: Path, pixels: Tensor, prompts: list[str]) -> Tensor:
    """As PickScore's README computes them, padding and its mask included."""
    tokens = CLIPTokenizer.from_pretrained(folder)(
        prompts, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
    )
    assert tokens.attention_mask.shape == (len(prompts), 77)
    with torch.no_grad():
        return CLIPModel.from_pretrained(folder)(**tokens, pixel_values=pixels).logits_per_image.diagonal()


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_scores_are_those_of_transformers(folder: Path, reward: CLIPReward, height: int, width: int) -> None:
    images = pictures(4, height, width)
    theirs = processed(folder, images)
    expected = transformers_scores(folder, theirs, PROMPTS)
    assert expected.std() > 0.1
    without_preprocessing = reward.scale * (reward.towers.look(theirs) * reward.read(PROMPTS)).sum(1)
    torch.testing.assert_close(without_preprocessing, expected, rtol=0, atol=1e-5)

    # Pixels are PIL's up to its rounding to 8 bit, at most 1.13 levels (see test_vp_score.py).
    ours = preprocess(images, SIZE, reward.colours, lambda half: int(half // 1)).requires_grad_()
    unit = torch.tensor(STD).reshape(3, 1, 1) * 255
    off = (ours.detach() - theirs).abs() * unit
    assert off.max() <= 1.13
    # So scores differ by the gradient's share of that, to first order; half as much again for curvature.
    scores = reward.scale * (reward.towers.look(ours) * reward.read(PROMPTS)).sum(1)
    (gradient,) = torch.autograd.grad(scores.sum(), ours)
    bound = 1.5 * (gradient.abs() * (off / unit)).sum((1, 2, 3)) + 1e-5
    assert ((reward(images, PROMPTS) - expected).abs() <= bound).all()


def test_without_resizing_scores_are_equal(folder: Path, reward: CLIPReward) -> None:
    images = pictures(4)
    expected = transformers_scores(folder, processed(folder, images), PROMPTS)
    torch.testing.assert_close(reward(images, PROMPTS), expected, rtol=0, atol=1e-5)


def test_the_scale_is_a_number_or_the_checkpoints_own(folder: Path, reward: CLIPReward) -> None:
    images, logit_scale = pictures(4), CLIPModel.from_pretrained(folder).logit_scale
    cosine = CLIPReward.load(str(folder))(images, PROMPTS)
    assert cosine.abs().max() <= 1
    torch.testing.assert_close(reward(images, PROMPTS), cosine * logit_scale.exp().detach())
    torch.testing.assert_close(CLIPReward.load(str(folder), scale=100.0)(images, PROMPTS), cosine * 100)


@pytest.mark.parametrize("end", [2, 7, END])
def test_the_prompt_is_read_at_its_end_whatever_the_configuration_calls_it(
    reward: CLIPReward, tmp_path: Path, end: int
) -> None:
    """Models from before transformers looked at `eos_token_id` say 2 there; it stood for the highest token."""
    save_clip(tmp_path, end=end)
    other = CLIPReward.load(str(tmp_path), scale=None)
    assert other.towers.text.config.eos_token_id == end
    assert torch.equal(other(pictures(4), PROMPTS), reward(pictures(4), PROMPTS))


def test_activations_are_the_configurations(reward: CLIPReward, tmp_path: Path) -> None:
    save_clip(tmp_path, act="quick_gelu")
    quick, images = CLIPReward.load(str(tmp_path), scale=None), pictures(4)
    expected = transformers_scores(tmp_path, processed(tmp_path, images), PROMPTS)
    torch.testing.assert_close(quick(images, PROMPTS), expected, rtol=0, atol=1e-5)
    assert (quick(images, PROMPTS) - reward(images, PROMPTS)).abs().max() > 1e-3


# --- open_clip: its arithmetic under its names


class Block(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(width, inner), gelu=nn.GELU(), c_proj=nn.Linear(inner, width))
        )

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Stack(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList([Block(width, 48) for _ in range(2)])

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 24, 8, 8, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(24))
        self.positional_embedding = nn.Parameter(torch.empty(17, 24))
        self.ln_pre, self.ln_post = nn.LayerNorm(24), nn.LayerNorm(24)
        self.transformer = Stack(24)
        self.proj = nn.Parameter(torch.empty(24, 16))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(pixels), 1, -1), patches], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenCLIP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = Visual()
        self.token_embedding = nn.Embedding(END + 1, 32)
        self.positional_embedding = nn.Parameter(torch.empty(77, 32))
        self.transformer = Stack(32)
        self.ln_final = nn.LayerNorm(32)
        self.text_projection = nn.Parameter(torch.empty(32, 16))
        self.logit_scale = nn.Parameter(torch.empty(()))
        shake(self)

    def forward(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        mask = torch.full((77, 77), float("-inf")).triu(1)
        x = self.ln_final(self.transformer(self.token_embedding(tokens) + self.positional_embedding, mask))
        text = x[torch.arange(len(x)), tokens.argmax(1)] @ self.text_projection
        return F.cosine_similarity(self.visual(pixels), text)


@pytest.fixture
def open_clip() -> OpenCLIP:
    torch.manual_seed(3)
    return OpenCLIP().requires_grad_(False).eval()


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Everything but weights."""
    path = tmp_path_factory.mktemp("architecture")
    config().save_pretrained(path)
    save_processor(path)
    return str(path)


def padded_with_zeros(source: str, prompts: list[str]) -> Tensor:
    tokens = torch.zeros(len(prompts), 77, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids = CLIPTokenizer.from_pretrained(source)(prompt).input_ids
        ids = ids if len(ids) <= 77 else [*ids[:76], END]
        tokens[row, : len(ids)] = torch.tensor(ids)
    return tokens


def as_hps_does(images: Tensor) -> Tensor:
    """`ResizeMaxSize` and normalisation, resized by PIL in floating point, which clips nothing."""
    height, width = images.shape[-2:]
    scale = SIZE / max(height, width)
    shape = round(width * scale), round(height * scale)
    out = np.zeros((len(images), 3, SIZE, SIZE), dtype=np.float32)
    top, left = (SIZE - shape[1]) // 2, (SIZE - shape[0]) // 2
    for place in np.ndindex(len(images), 3):
        channel = Image.fromarray(images[place].numpy()).resize(shape, Image.Resampling.BICUBIC)
        out[*place, top : top + shape[1], left : left + shape[0]] = np.asarray(channel)
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (MEAN, STD))
    return (torch.from_numpy(out) - mean) / std


def saved_as_pickle(state: dict[str, Tensor], path: Path) -> str:
    torch.save({"epoch": 3, "state_dict": state}, path / "HPS.pt")
    return str(path / "HPS.pt")


def saved_as_old_pickle(state: dict[str, Tensor], path: Path) -> str:
    torch.save({"state_dict": state}, path / "old.pt", _use_new_zipfile_serialization=False)
    return str(path / "old.pt")


def saved_as_safetensors(state: dict[str, Tensor], path: Path) -> str:
    save_file(state, path / "open_clip_pytorch_model.safetensors")
    return str(path / "open_clip_pytorch_model.safetensors")


@pytest.mark.parametrize("save", [saved_as_pickle, saved_as_old_pickle, saved_as_safetensors])
def test_scores_are_those_of_open_clip(
    open_clip: OpenCLIP, architecture: str, tmp_path: Path, save: Callable[[dict[str, Tensor], Path], str]
) -> None:
    file = save(open_clip.state_dict(), tmp_path)
    reward = CLIPReward.from_open_clip(file, architecture=architecture, fit="pad")
    for height, width in SIZES:
        images = pictures(4, height, width)
        expected = open_clip(as_hps_does(images), padded_with_zeros(architecture, PROMPTS))
        assert expected.std() > 0.05
        torch.testing.assert_close(reward(images, PROMPTS), expected, rtol=0, atol=1e-5)
    assert reward.towers.logit_scale == pytest.approx(open_clip.logit_scale.exp().item())


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("salt &amp; pepper", "salt & pepper"),
        ("a &amp;quot;red&amp;quot; fox", 'a "red" fox'),
        ("a cafÃ© by the sea", "a café by the sea"),
        ("the artist\u2019s cat", "the artist's cat"),
    ],
)
def test_open_clip_mends_what_a_prompt_is_written_with_and_transformers_does_not(
    open_clip: OpenCLIP, architecture: str, folder: Path, tmp_path: Path, written: str, meant: str
) -> None:
    """`basic_clean` of open_clip's tokenizer, which the published scores went through."""
    hps = CLIPReward.from_open_clip(saved_as_pickle(open_clip.state_dict(), tmp_path), architecture=architecture)
    assert torch.equal(hps.read([written]), hps.read([meant]))
    clip = CLIPReward.load(str(folder))
    assert not torch.equal(clip.read([written]), clip.read([meant]))


def test_a_folder_and_the_checkpoints_name_in_it_will_do(
    open_clip: OpenCLIP, architecture: str, tmp_path: Path
) -> None:
    saved_as_pickle(open_clip.state_dict(), tmp_path)
    CLIPReward.from_open_clip(str(tmp_path), file="HPS.pt", architecture=architecture)
    with pytest.raises(FileNotFoundError, match=r"has no other.pt, but HPS.pt. Name the file by reward.file"):
        CLIPReward.from_open_clip(str(tmp_path), file="other.pt", architecture=architecture)
    with pytest.raises(FileNotFoundError, match=r"some/where.*HPS.pt.*fetched"):
        CLIPReward.from_open_clip("some/where", file="HPS.pt", architecture=architecture)


@pytest.mark.parametrize("name", sorted(OpenCLIP().state_dict()))
def test_every_tensor_counts(open_clip: OpenCLIP, architecture: str, tmp_path: Path, name: str) -> None:
    """Left out, it is missing by transformers' name; under another name it is unknown by that name."""
    state = open_clip.state_dict()
    tensor = state.pop(name)
    leaf = name.rpartition(".")[2]
    other = {
        "in_proj_weight": "k_proj.weight",
        "in_proj_bias": "k_proj.bias",
        "proj": "visual_projection.weight",
        "positional_embedding": "position_embedding.weight",
    }
    with pytest.raises(ValueError, match=rf"reward.init=.*{other.get(leaf, leaf)}.* missing\."):
        CLIPReward.from_open_clip(saved_as_pickle(state, tmp_path), architecture=architecture)
    state[f"{name}_"] = tensor
    with pytest.raises(ValueError, match=rf"reward.init=.*no open_clip model.* {name}_\."):
        CLIPReward.from_open_clip(saved_as_pickle(state, tmp_path), architecture=architecture)


def test_a_tensor_of_another_shape_is_named(open_clip: OpenCLIP, architecture: str, tmp_path: Path) -> None:
    state = open_clip.state_dict() | {"visual.proj": torch.zeros(24, 8)}
    with pytest.raises(ValueError, match=r"reward.architecture=.*: visual_projection.weight of another shape"):
        CLIPReward.from_open_clip(saved_as_pickle(state, tmp_path), architecture=architecture)


class Payload:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return Path.touch, (Path("was_run"),)  # type: ignore[return-value]


def test_a_pickle_runs_no_code(open_clip: OpenCLIP, architecture: str, tmp_path: Path) -> None:
    torch.save({"state_dict": open_clip.state_dict(), "extra": Payload()}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="could run code"):
        CLIPReward.from_open_clip(str(tmp_path / "a.pt"), architecture=architecture)
    (tmp_path / "b.pt").write_bytes(pickle.dumps([1, 2], protocol=2))
    with pytest.raises(ValueError, match=r"b\.pt is"):
        CLIPReward.from_open_clip(str(tmp_path / "b.pt"), architecture=architecture)
    (tmp_path / "c.safetensors").write_bytes(b"abc")
    with pytest.raises(ValueError, match=r"c\.safetensors is damaged"):
        CLIPReward.from_open_clip(str(tmp_path / "c.safetensors"), architecture=architecture)


# --- what every reward promises


@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize(("height", "width"), [*SIZES, (300, 1), (128, 128)])
def test_any_size_is_scored(folder: Path, fit: str, height: int, width: int) -> None:
    scores = CLIPReward.load(str(folder), fit=fit)(pictures(4, height, width), PROMPTS)
    assert scores.dtype == torch.float32
    assert torch.isfinite(scores).all()


def test_padding_is_black_and_central() -> None:
    plain = Colours((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert letterbox(torch.ones(1, 3, 2, 5), 5, plain)[0, 0].tolist() == [
        [0.0] * 5,
        [1.0] * 5,
        [1.0] * 5,
        *[[0.0] * 5] * 2,
    ]
    tall = letterbox(torch.ones(1, 3, 40, 20), 10, plain)
    torch.testing.assert_close(tall[0, 0, 0], torch.tensor([0.0, 0, 1, 1, 1, 1, 1, 0, 0, 0]))


def test_a_row_depends_on_its_own_image_and_prompt_only(reward: CLIPReward) -> None:
    images, prompts = pictures(6, 40, 56), [*PROMPTS, PROMPTS[0], PROMPTS[1]]
    together = reward(images, prompts)
    alone = torch.cat([reward(images[row : row + 1], [prompts[row]]) for row in range(6)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)  # matrices of another size round otherwise
    assert (together[0] - together[4]).abs() > 1e-3  # same prompt, another image


def test_each_prompt_and_each_image_goes_through_its_tower_once(reward: CLIPReward) -> None:
    seen, read = [], []
    hooks = [
        reward.towers.vision.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0]))),
        reward.towers.text.register_forward_hook(lambda _, inputs, __: read.append(len(inputs[0]))),
    ]
    images = pictures(4)
    repeated = reward(images, [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[0]])
    one_image = reward(images[:1].expand(4, -1, -1, -1), PROMPTS)
    for hook in hooks:
        hook.remove()
    assert seen == [4, 1]
    assert read == [2, 4]
    torch.testing.assert_close(repeated[3], reward(images[3:], PROMPTS[:1])[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(one_image, reward(images[:1].repeat(4, 1, 1, 1), PROMPTS), rtol=0, atol=1e-5)


def test_words_after_the_77th_token_are_cut(reward: CLIPReward) -> None:
    image = pictures(1).expand(2, -1, -1, -1)
    within, beyond = (
        reward(image, ["red " * 74 + "a", "red " * 74 + "b"]),
        reward(image, ["red " * 75 + "a", "red " * 75]),
    )
    assert within[0] != within[1]
    assert beyond[0] == beyond[1]


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_gradients_are_finite_differences(folder: Path, fit: str) -> None:
    reward = CLIPReward.load(str(folder), scale=None, fit=fit)
    images = (0.2 + 0.6 * pictures(4, 48, 40)).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(images, PROMPTS).sum(), images)
    assert all(parameter.grad is None for parameter in reward.parameters())
    direction, step = F.normalize(gradient, dim=(1, 2, 3)), 0.02
    with torch.no_grad():
        ahead, behind = (reward(images + sign * step * direction, PROMPTS) for sign in (1, -1))
    # Scores of order 1 are right to about 1e-6, so their quotient to 5e-5; curvature adds a part in a hundred.
    slope = (gradient * direction).sum((1, 2, 3))
    assert (slope > 1e-3).all()
    torch.testing.assert_close((ahead - behind) / (2 * step), slope.detach(), rtol=0.02, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_towers_in_half_precision_score_in_float32_at_the_same_scale(
    folder: Path, reward: CLIPReward, dtype: str
) -> None:
    half = CLIPReward.load(str(folder), scale=None, dtype=dtype)
    assert half.scale == reward.scale
    scores = half(pictures(4), PROMPTS)
    assert scores.dtype == torch.float32
    # bfloat16 keeps 8 bits: a relative error of 0.004 in each of a dozen steps.
    torch.testing.assert_close(scores / reward.scale, reward(pictures(4), PROMPTS) / reward.scale, rtol=0, atol=0.05)


def test_it_is_frozen_and_stays_in_evaluation_mode(reward: CLIPReward) -> None:
    nn.ModuleList([reward]).train()
    assert not any(module.training for module in reward.towers.modules())
    assert not any(parameter.requires_grad for parameter in reward.parameters())


# --- what can be wrong


def test_tokenizer_and_preprocessing_may_lie_elsewhere(reward: CLIPReward, architecture: str, tmp_path: Path) -> None:
    model = save_clip(tmp_path / "whole")
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(FileNotFoundError, match=r"reward.model=.*no tokenizer. reward.processor can name"):
        CLIPReward.load(str(tmp_path / "bare"))
    elsewhere = CLIPReward.load(str(tmp_path / "bare"), processor=architecture, scale=None)
    assert torch.equal(elsewhere(pictures(4), PROMPTS), reward(pictures(4), PROMPTS))


def write(name: str, text: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_text(text)

    return spoil


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def change(name: str, *keys: str, to: object) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        whole = inner = json.loads((folder / name).read_text())
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = to
        (folder / name).write_text(json.dumps(whole))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "error", "said"),
    [
        (remove("config.json"), ValueError, "damaged config.json"),
        (write("config.json", "{"), FileNotFoundError, "config.json"),
        (change("config.json", "text_config", "hidden_size", to="wide"), ValueError, "damaged config.json"),
        (change("config.json", "model_type", to="blip"), ValueError, "of type 'blip'"),
        (change("config.json", "text_config", "num_hidden_layers", to=1), ValueError, r"own config.json: .*left over"),
        (change("config.json", "text_config", "num_hidden_layers", to=3), ValueError, r"own config.json: .*missing"),
        (change("config.json", "projection_dim", to=8), ValueError, r"text_projection.weight.*of another shape"),
        (remove("model.safetensors"), FileNotFoundError, "weights of a CLIP model"),
        (cut, ValueError, "damaged weights"),
        (remove("tokenizer.json"), FileNotFoundError, "no tokenizer"),
        (write("tokenizer.json", "{"), ValueError, "damaged tokenizer"),
        (change("config.json", "vision_config", "image_size", to=[32, 40]), ValueError, "not square"),
        (remove("preprocessor_config.json"), FileNotFoundError, "preprocessor_config.json"),
        (write("preprocessor_config.json", "{"), FileNotFoundError, "preprocessor_config.json"),
        (change("preprocessor_config.json", "resample", to=2), ValueError, "not of CLIP at 32 pixels: resample=2"),
        (change("preprocessor_config.json", "size", to={"shortest_edge": 40}), ValueError, "shortest_edge.*40"),
    ],
)
def test_a_broken_folder_is_told_in_one_sentence(
    tmp_path: Path, spoil: Callable[[Path], None], error: type[Exception], said: str
) -> None:
    save_clip(tmp_path)
    spoil(tmp_path)
    with pytest.raises(error, match=said) as caught:
        CLIPReward.load(str(tmp_path))
    assert str(caught.value).startswith(f"reward.model={str(tmp_path)!r}")


def test_what_is_no_folder_and_no_hub_name_is_told(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"reward.model='some/where' is neither a folder .* connect"):
        CLIPReward.load("some/where")
    with pytest.raises(FileNotFoundError, match="neither a folder"):
        CLIPReward.load(str(tmp_path / "nowhere"))
    (tmp_path / "a.pt").write_bytes(b"\x80\x02")
    with pytest.raises(FileNotFoundError, match=r"is a file; .*reward=hps_v2"):
        CLIPReward.load(str(tmp_path / "a.pt"))
    with pytest.raises(FileNotFoundError, match=r"reward.processor='some/where' has no tokenizer"):
        CLIPReward.load(str(folder), processor="some/where")


def test_wrong_settings_are_told(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"reward.scale=-1"):
        CLIPReward.load(str(folder), scale=-1.0)
    with pytest.raises(ValueError, match=r"reward.fit='squeeze' must be one of crop, pad"):
        CLIPReward.load(str(folder), fit="squeeze")
    with pytest.raises(ValueError, match=r"reward.dtype='half' must be one of float32, float16, bfloat16"):
        CLIPReward.load(str(folder), dtype="half")


def test_another_tokenizer_is_told(folder: Path, tmp_path: Path) -> None:
    model = save_clip(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"of {END + 2} words; the model reads {model.config.text_config.vocab_size}"):
        CLIPReward.load(str(tmp_path))


def test_the_embedded_clip_prefers_prompts_of_the_true_colours() -> None:
    reward = CLIPReward.load("tiny-clip")
    drawn, rng = scenes("test", 60), random.Random(0)
    pixels = np.stack([render(scene, rng) for scene in drawn])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    prompts = [scene.prompt for scene in drawn]
    own = reward(images, prompts)
    other = reward(images, [re.sub("|".join(COLORS), "cyan", prompt) for prompt in prompts])
    altered = [row for row, prompt in enumerate(prompts) if "cyan" not in prompt]
    assert (own > other)[altered].float().mean() > 0.9
