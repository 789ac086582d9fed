"""VP-Score on random weights: its preprocessing, its gradients, its head, and what it says of broken folders."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from vp_rl.rewards.blip_sizes import published
from vp_rl.rewards.preprocess import preprocess
from vp_rl.rewards.vp_score import VPScore
from vp_rl.types import ASPECTS

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).reshape(3, 1, 1)  # OpenAI's CLIP, and ImageReward
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).reshape(3, 1, 1)
PROMPTS = ["a red circle", "two blue squares", "a red circle above a blue square", "a blue circle"]


def random_vp_score(
    max_length: int = 12,
    vocab_size: int = 16,
    encoder_hidden_size: int = 24,
    dropout: float = 0.0,
    gradient_checkpointing: bool = False,
    by_aspect: bool = False,
) -> VPScore:
    """Two layers of width 24 and 32 on 32 px, weights large enough that scores differ."""
    torch.manual_seed(0)
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "a",
        "two",
        "red",
        "blue",
        "above",
        "circle",
        "square",
        "##s",
    ]
    small = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "initializer_range": 0.2}
    return VPScore(
        BlipVisionConfig(hidden_size=24, image_size=32, patch_size=8, layer_norm_eps=1e-6, **small),
        BlipTextConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            encoder_hidden_size=encoder_hidden_size,
            max_position_embeddings=16,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=3,
            sep_token_id=3,
            attention_probs_dropout_prob=dropout,
            **small,
        ),
        BertTokenizer(vocab={word: index for index, word in enumerate(words)}),
        head_widths=(32, 16),
        max_length=max_length,
        by_aspect=by_aspect,
        gradient_checkpointing=gradient_checkpointing,
    )


@pytest.fixture
def reward() -> VPScore:
    return random_vp_score().requires_grad_(False).eval()


@pytest.fixture
def saved(reward: VPScore, tmp_path: Path) -> Path:
    reward.save(tmp_path / "saved")
    return tmp_path / "saved"


def images(batch: int, height: int = 32, width: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def as_pil_does(picture: np.ndarray, size: int) -> np.ndarray:
    """Resize the shorter side (bicubic) and crop the centre, as ImageReward does; (3, size, size) in 0..255."""
    height, width = picture.shape[:2]
    short = min(height, width)
    resized = Image.fromarray(picture).resize((size * width // short, size * height // short), Image.Resampling.BICUBIC)
    top, left = round((resized.height - size) / 2), round((resized.width - size) / 2)
    return np.asarray(resized, dtype=np.float64)[top : top + size, left : left + size].transpose(2, 0, 1)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (300, 500), (768, 512), (1024, 1024), (225, 224)])
def test_preprocessing_is_pils_to_its_rounding(height: int, width: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(noise).resize((9, 9)).resize((width, height)))
    for picture in (noise, smooth):
        ours = preprocess(torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 255, 224)[0]
        # PIL rounds to 8 bit after each pass. The second pass can enlarge the half level of the first by the sum of its
        # absolute weights, at most 1.25 (halfway between pixels: -1/16, 9/16, 9/16, -1/16), and adds its own: 1.125.
        error = np.abs(((ours * STD + MEAN) * 255).numpy() - as_pil_does(picture, 224))
        assert error.max() <= 1.13
        assert error.mean() < 0.5


def test_an_image_of_the_right_size_is_only_normalised() -> None:
    pixels = images(2)
    torch.testing.assert_close(preprocess(pixels, 32), (pixels - MEAN) / STD, rtol=0, atol=0)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (17, 90), (90, 33), (128, 128)])
def test_any_size_is_scored(reward: VPScore, height: int, width: int) -> None:
    scores = reward(images(3, height, width), PROMPTS[:3])
    assert scores.shape == (3,)
    assert scores.dtype == torch.float32
    assert torch.isfinite(scores).all()


def test_half_precision_images_are_scored_in_float32(reward: VPScore) -> None:
    scores = reward(images(2, 48, 48).bfloat16(), PROMPTS[:2])
    # bfloat16 keeps 8 bits: pixels move by up to 0.002.
    torch.testing.assert_close(scores, reward(images(2, 48, 48), PROMPTS[:2]), rtol=0, atol=0.05)


def test_a_row_depends_on_its_own_image_and_prompt_only(reward: VPScore) -> None:
    batch, prompts = images(6), [*PROMPTS[:4], PROMPTS[0], PROMPTS[1]]
    together = reward(batch, prompts)
    alone = torch.cat([reward(batch[row : row + 1], [prompts[row]]) for row in range(6)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)  # matrices of another size round otherwise
    assert (together[0] - together[4]).abs() > 1e-3  # same prompt, another image


def test_words_after_the_longest_length_are_cut(reward: VPScore) -> None:
    words = ["red"] * 40
    scores = reward(images(1).expand(2, -1, -1, -1), [" ".join(words), " ".join([*words, "blue"])])
    assert scores[0] == scores[1]


def test_attention_over_the_prompt_is_bidirectional(reward: VPScore) -> None:
    # [CLS] is the first token: were attention causal, it would not know the words.
    first, second = reward.features(images(1).expand(2, -1, -1, -1), PROMPTS[:2])
    assert (first - second).abs().max() > 1e-3


@pytest.mark.parametrize(("height", "width"), [(32, 32), (48, 40), (20, 70)])
def test_gradients_are_those_of_finite_differences_though_the_weights_are_frozen(
    reward: VPScore, height: int, width: int
) -> None:
    batch = 0.25 + images(3, height, width) / 2  # away from 0 and 1, where resizing clips
    batch.requires_grad_()
    reward(batch, PROMPTS[:3]).sum().backward()
    gradient = batch.grad
    assert gradient is not None

    @torch.no_grad()
    def slope(direction: torch.Tensor, step: float) -> torch.Tensor:
        ahead, behind = (reward(batch + sign * step * direction, PROMPTS[:3]) for sign in (1, -1))
        return (ahead - behind) / (2 * step)

    for direction in (gradient, torch.randn_like(batch), torch.randn_like(batch)):
        direction = F.normalize(direction, dim=(1, 2, 3))
        coarse, fine = slope(direction, 0.08), slope(direction, 0.04)
        # A central difference errs by its step squared, so a third of what halving it changes is the rest of the error
        # and is taken off; what remains is smaller. Scores of order 1 in float32 are right to some 1e-6: 1e-6 / 0.04.
        exact, rest = fine + (fine - coarse) / 3, (fine - coarse).abs() / 3
        error = (exact - (gradient * direction).sum((1, 2, 3))).abs()
        assert (error <= rest + 5e-5).all(), (error, rest)
        assert (rest < 0.05 * gradient.flatten(1).norm(dim=1)).all()  # or the comparison would say nothing


def test_fused_attention_gives_what_transformers_own_modules_give(reward: VPScore) -> None:
    vision, text = BlipVisionModel(reward.vision.config), BlipTextModel(reward.text.config, add_pooling_layer=False)
    vision.load_state_dict(reward.vision.state_dict())
    text.load_state_dict(reward.text.state_dict())
    seen = vision.eval()(pixel_values=preprocess(images(4), 32)).last_hidden_state
    torch.testing.assert_close(reward.look(images(4)), seen, rtol=1e-5, atol=1e-5)
    # Padded to the full length as the published code pads; ours only to the longest prompt.
    tokens = reward.tokenizer(PROMPTS, padding="max_length", max_length=12, return_tensors="pt")
    expected = text.eval()(**tokens_of(tokens), encoder_hidden_states=seen).last_hidden_state[:, 0]
    torch.testing.assert_close(reward.features(images(4), PROMPTS), expected, rtol=1e-5, atol=1e-5)


def tokens_of(tokens: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tokens[name] for name in ("input_ids", "attention_mask")}


def test_prompts_are_padded_to_the_longest_and_that_changes_nothing(
    reward: VPScore, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths, read = [], reward.text.forward

    def watch(input_ids: torch.Tensor, **others: torch.Tensor) -> object:
        lengths.append(input_ids.shape[1])
        return read(input_ids=input_ids, **others)

    monkeypatch.setattr(reward.text, "forward", watch)
    short = reward(images(1), ["a circle"])
    long = reward(images(1).repeat(2, 1, 1, 1), ["a circle", "a red circle above a blue square"])
    assert lengths == [4, 9]
    torch.testing.assert_close(long[:1], short, rtol=0, atol=1e-5)  # masked words weigh exactly 0


def test_one_image_for_many_prompts_is_looked_at_once(reward: VPScore, monkeypatch: pytest.MonkeyPatch) -> None:
    looked, look = [], reward.vision.forward

    def watch(pixel_values: torch.Tensor) -> object:
        looked.append(len(pixel_values))
        return look(pixel_values=pixel_values)

    monkeypatch.setattr(reward.vision, "forward", watch)
    prompts = [*PROMPTS, PROMPTS[0]]
    shared, copied = images(1, 40, 50).requires_grad_(), images(1, 40, 50).requires_grad_()
    together = reward(shared.expand(5, -1, -1, -1), prompts)
    apart = reward(copied.repeat(5, 1, 1, 1), prompts)
    assert looked == [1, 5]
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-5)
    weights = torch.arange(5.0)
    (together * weights).sum().backward()
    (apart * weights).sum().backward()
    torch.testing.assert_close(shared.grad, copied.grad, rtol=1e-4, atol=1e-6)


def test_several_images_for_some_prompts_each_are_projected_once(reward: VPScore) -> None:
    tokens = tokens_of(reward.tokenizer([*PROMPTS[:3], *PROMPTS[1:]], padding=True, return_tensors="pt"))
    seen = reward.look(images(2))
    few, many = (
        reward.text(**tokens, encoder_hidden_states=s).last_hidden_state for s in (seen, seen[[0, 0, 0, 1, 1, 1]])
    )
    torch.testing.assert_close(few, many, rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch", [images(2), images(1).expand(2, -1, -1, -1)])
def test_another_number_of_prompts_than_images_is_refused(reward: VPScore, batch: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="2 images cannot be scored for 4 prompts"):
        reward.features(batch, PROMPTS)


def test_dropout_in_attention_is_for_training_only() -> None:
    reward = random_vp_score(dropout=0.5)
    first, second = (reward.features(images(4), PROMPTS) for _ in range(2))
    assert (first - second).abs().max() > 1e-3
    reward.eval()
    assert torch.equal(reward.features(images(4), PROMPTS), reward.features(images(4), PROMPTS))


def test_gradient_checkpointing_computes_layers_twice_and_gives_the_same_gradients() -> None:
    gradients, calls = [], []
    for checkpointed in (False, True):
        reward = random_vp_score(dropout=0.1, gradient_checkpointing=checkpointed)
        count = {"vision": 0, "text": 0}
        for name, module in (
            ("vision", reward.vision.encoder.layers[1].self_attn),
            ("text", reward.text.encoder.layer[0].attention),
        ):
            module.register_forward_hook(lambda *_, name=name, count=count: count.update({name: count[name] + 1}))
        torch.manual_seed(1)
        reward(images(4), PROMPTS).square().sum().backward()
        gradients.append([parameter.grad for parameter in reward.parameters()])
        calls.append(count)
    assert calls == [{"vision": 1, "text": 1}, {"vision": 2, "text": 2}]
    for plain, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-5, atol=1e-6)


def test_the_published_freezing_at_full_size() -> None:
    with torch.device("meta"):
        reward = VPScore(
            *published(), BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4})
        )
    reward.freeze(0.7)
    frozen = {
        tower: [name for name, parameter in getattr(reward, tower).named_parameters() if not parameter.requires_grad]
        for tower in ("text", "vision")
    }
    # Counted on the published code: 103.2 and 202.5 million parameters.
    assert (len(frozen["text"]), len(frozen["vision"])) == (213, 197)
    assert [name for name in frozen["text"] if "layer.8." in name] == ["encoder.layer.8.attention.self.query.weight"]
    assert [name for name in frozen["vision"] if "layers.16." in name] == ["encoder.layers.16.layer_norm1.weight"]
    assert not [name for name in frozen["text"] if re.search(r"layer\.(9|10|11)\.", name)]
    assert not [name for name in frozen["vision"] if re.search(r"layers\.(17|18|19|2\d)\.|post", name)]
    assert all(parameter.requires_grad for parameter in reward.head.parameters())
    number = {
        tower: sum(getattr(reward, tower).get_parameter(n).numel() for n in names) for tower, names in frozen.items()
    }
    assert {tower: round(count / 1e6, 1) for tower, count in number.items()} == {"text": 103.2, "vision": 202.5}


@pytest.mark.parametrize(
    ("fraction", "trained"),
    [
        (0.0, {"vision.embeddings", "vision.encoder", "vision.post_layernorm", "text.embeddings", "text.encoder"}),
        (0.2, {"vision.encoder", "vision.post_layernorm", "text.encoder"}),
        (1.0, set[str]()),
    ],
)
def test_freezing_nothing_the_embeddings_and_both_towers(fraction: float, trained: set[str]) -> None:
    reward = random_vp_score()
    reward.freeze(1.0)
    reward.freeze(fraction)  # whatever was before
    names = {name for name, parameter in reward.named_parameters() if parameter.requires_grad}
    assert {".".join(name.split(".")[:2]) for name in names} == {*trained, "head.layers"}


def test_towers_in_half_precision_are_not_trained(saved: Path) -> None:
    reward = VPScore.load(str(saved), dtype="bfloat16")
    with pytest.raises(ValueError, match="trainer.precision=bf16-mixed"):
        reward.freeze(0.5)
    reward.freeze(1.0)
    reward.train()(images(4), PROMPTS).sum().backward()
    assert all(parameter.grad is not None for parameter in reward.head.parameters())


def test_saving_and_loading_gives_the_same_scores(reward: VPScore, saved: Path) -> None:
    assert torch.equal(VPScore.load(str(saved))(images(4), PROMPTS), reward(images(4), PROMPTS))


def test_half_precision_on_disk_is_float32_in_memory_and_spares_the_head(reward: VPScore, tmp_path: Path) -> None:
    reward.standardise(torch.tensor([[1.00001], [3.0]]))
    reward.save(tmp_path, torch.float16)
    loaded = VPScore.load(str(tmp_path))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    for name, tensor in reward.head.state_dict().items():
        torch.testing.assert_close(loaded.head.state_dict()[name], tensor, rtol=0, atol=0)
    full = sum(tensor.numel() * 4 for tensor in reward.state_dict().values())
    assert (tmp_path / "model.safetensors").stat().st_size < 0.7 * full
    # float16 keeps 11 bits of each weight; a score of order 1 passes through a dozen layers.
    torch.testing.assert_close(loaded(images(4), PROMPTS), reward(images(4), PROMPTS), rtol=0, atol=0.02)


def test_towers_alone_load_with_a_new_head(reward: VPScore, tmp_path: Path) -> None:
    reward.save(tmp_path, head=False)
    assert not [name for name in load_file(tmp_path / "model.safetensors") if name.startswith("head.")]
    loaded = VPScore.load(str(tmp_path))
    assert torch.equal(loaded.features(images(4), PROMPTS), reward.features(images(4), PROMPTS))
    assert loaded(images(4), PROMPTS).std() > 0


def test_a_loaded_reward_is_frozen_and_stays_in_evaluation_mode(saved: Path) -> None:
    holder = torch.nn.ModuleList([VPScore.load(str(saved))]).train()
    assert not any(module.training for module in holder[0].modules())
    assert not any(parameter.requires_grad for parameter in holder.parameters())
    holder[0].freeze(0.0)
    assert all(module.training for module in holder[0].train().modules())
    assert all(parameter.requires_grad for parameter in holder.parameters())


def test_the_head_stays_in_float32_whatever_the_towers_are_cast_to(reward: VPScore) -> None:
    exact = {name: tensor.clone() for name, tensor in reward.head.state_dict().items()}
    halved = reward.bfloat16()
    assert halved.vision.dtype == torch.bfloat16
    assert all(torch.equal(tensor, exact[name]) for name, tensor in halved.head.state_dict().items())
    with torch.autocast("cpu", torch.bfloat16):
        assert halved(images(2), PROMPTS[:2]).dtype == torch.float32


def test_one_score_is_made_of_the_aspects_by_their_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    reward = random_vp_score(by_aspect=True).requires_grad_(False).eval()
    batch, prompts = images(16), PROMPTS * 4
    reward.standardise(reward.outputs(batch, prompts))
    outputs = reward.outputs(batch, prompts)
    torch.testing.assert_close(outputs.mean(0), torch.zeros(4), rtol=0, atol=1e-4)
    torch.testing.assert_close(outputs.std(0), torch.ones(4), rtol=0, atol=1e-4)
    reward.save(tmp_path)
    for weights in (None, {"aesthetic": 2.0}, {"prompt_following": 3.0, "harmlessness": 1.0}):
        loaded = VPScore.load(str(tmp_path), weights=weights)
        scores = loaded(batch, prompts)
        # Standardised too, on the images that the outputs were standardised on, whatever the weights.
        assert scores.mean().item() == pytest.approx(0, abs=1e-4)
        assert scores.std().item() == pytest.approx(1, abs=1e-4)
        given = torch.tensor([(weights or dict.fromkeys(ASPECTS, 1.0)).get(aspect, 0.0) for aspect in ASPECTS])
        expected = outputs @ given
        torch.testing.assert_close(scores, expected / expected.std(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("weights", [{"beauty": 1.0}, {"aesthetic": -1.0}, {"aesthetic": 0.0}, {}])
def test_weights_that_make_no_score_are_refused(tmp_path: Path, weights: dict) -> None:
    random_vp_score(by_aspect=True).save(tmp_path)
    with pytest.raises(ValueError, match=r"reward\.weights"):
        VPScore.load(str(tmp_path), weights=weights)


def test_a_head_is_by_aspect_or_not_as_it_was_trained(saved: Path, tmp_path: Path, reward: VPScore) -> None:
    with pytest.raises(ValueError, match=r"by_aspect=True.*one output"):
        VPScore.load(str(saved), by_aspect=True)
    with pytest.raises(ValueError, match="output for each aspect"):
        VPScore.load(str(saved), weights={"aesthetic": 1.0})
    reward.save(tmp_path, head=False)  # towers alone: the head is new
    assert len(VPScore.load(str(tmp_path), by_aspect=True).head.mean) == 4
    assert len(VPScore.load(str(tmp_path)).head.mean) == 1
    VPScore.load(str(tmp_path), by_aspect=True).save(tmp_path / "trained")
    assert len(VPScore.load(str(tmp_path / "trained")).head.mean) == 4


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_text(text)

    return spoil


def shrink(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text"]["num_hidden_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))


def cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "error", "said"),
    [
        (remove("config.json"), FileNotFoundError, "config.json"),
        (remove("tokenizer.json"), FileNotFoundError, "tokenizer.json"),
        (remove("model.safetensors"), FileNotFoundError, "model.safetensors"),
        (write("config.json", "{"), ValueError, "damaged"),
        (write("config.json", "[]"), ValueError, "damaged"),
        (write("config.json", '{"vision": {"hidden_size": "wide"}}'), ValueError, "damaged"),
        (write("tokenizer.json", "{"), ValueError, "damaged"),
        (cut, ValueError, "damaged"),
        (shrink, ValueError, r"does not fit its own config.json: \d+ tensors .*text.encoder.layer.1"),
    ],
)
def test_a_broken_folder_is_told_in_one_sentence(
    saved: Path, spoil: Callable[[Path], None], error: type[Exception], said: str
) -> None:
    spoil(saved)
    with pytest.raises(error, match=said) as caught:
        VPScore.load(str(saved))
    assert str(saved) in str(caught.value)
    assert "as VPScore.save writes it" in str(caught.value)


def test_a_path_that_is_no_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        VPScore.load(str(tmp_path / "nowhere"))
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(FileNotFoundError, match="is a file"):
        VPScore.load(str(tmp_path / "notes.txt"))


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="max_length=99"):
        random_vp_score(max_length=99)
    with pytest.raises(ValueError, match="vocab_size"):
        random_vp_score(vocab_size=5)
    with pytest.raises(ValueError, match="encoder_hidden_size"):
        random_vp_score(encoder_hidden_size=16)
