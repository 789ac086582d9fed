"""Checkpoints of others: each layout becomes VPScore's, whole, or is refused by name."""

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_image_reward import PROMPTS, SMALL, configs, parameters, vocabulary
from test_vp_score import images
from torch import Tensor
from transformers import BertTokenizer, BlipConfig, BlipForImageTextRetrieval, BlipModel

from vp_rl.rewards import blip_names, checkpoints
from vp_rl.rewards.vp_score import VPScore

VISION, TEXT = configs(SMALL)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with nothing but a vocabulary, as bert-base-uncased's may be."""
    folder = tmp_path_factory.mktemp("words")
    (folder / "vocab.txt").write_text("\n".join(vocabulary(SMALL.words)))
    return str(folder)


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    """ImageReward.pt's names."""
    torch.manual_seed(0)
    return parameters(SMALL)


def salesforce(published: dict[str, Tensor], side: int = 14) -> dict[str, Tensor]:
    """What Salesforce's pretraining saves: no head, but all that its losses need; positions of `side` x `side`."""
    state = {name.removeprefix("blip."): tensor for name, tensor in published.items() if name.startswith("blip.")}
    state["visual_encoder.pos_embed"] = torch.randn(1, side * side + 1, SMALL.vision)
    momentum = {name.replace(".", "_m.", 1): tensor + 1 for name, tensor in state.items()}
    decoder = {"text_decoder.bert." + name: tensor + 2 for name, tensor in state.items() if "layer.0" in name}
    losses = {
        "itm_head.weight": torch.zeros(2, SMALL.text),
        "itm_head.bias": torch.zeros(2),
        "temp": torch.tensor(0.07),
    }
    queues = {"image_queue": torch.zeros(256, 8), "text_queue": torch.zeros(256, 8), "queue_ptr": torch.zeros(1)}
    return state | momentum | decoder | losses | queues


def load(init: Path | str, words: str, **settings: object) -> VPScore:
    return VPScore.from_blip(str(init), tokenizer=words, vision=VISION, text=TEXT, **settings)


def features(reward: VPScore) -> Tensor:
    return reward.features(images(3, 240, 230), PROMPTS[:3])


def written(state: object, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def test_imagerewards_salesforces_and_transformers_files_give_the_same_towers(
    published: dict[str, Tensor], words: str, tmp_path: Path
) -> None:
    expected = features(load(written(published, tmp_path / "ImageReward.pt"), words))
    blip = salesforce(published) | {"visual_encoder.pos_embed": published["blip.visual_encoder.pos_embed"]}
    original = written({"model": blip, "epoch": 19}, tmp_path / "model_large.pth")
    assert torch.equal(features(load(original, words)), expected)
    config = BlipConfig(vision_config=VISION.to_dict(), text_config=TEXT.to_dict())
    reward = load(original, words)
    for number, (theirs, text) in enumerate(
        [(BlipForImageTextRetrieval(config), "text_encoder"), (BlipModel(config), "text_model")]
    ):
        theirs.vision_model.load_state_dict(reward.vision.state_dict())
        getattr(theirs, text).load_state_dict(reward.text.state_dict(), strict=False)  # it has a pooler
        theirs.save_pretrained(tmp_path / str(number))
        assert torch.equal(features(load(tmp_path / str(number), words)), expected)


def test_only_imagereward_brings_a_head(published: dict[str, Tensor], words: str, tmp_path: Path) -> None:
    whole = load(written(published, tmp_path / "ImageReward.pt"), words, mean=0.5, std=2.0)
    for name, tensor in whole.head.layers.state_dict().items():
        assert torch.equal(tensor, published[f"mlp.layers.{name}"])
    assert (whole.head.mean, whole.head.std) == (0.5, 2.0)
    fresh = load(written(salesforce(published), tmp_path / "model.safetensors"), words)
    assert (fresh.head.mean, fresh.head.std) == (0.0, 1.0)
    assert fresh(images(3), PROMPTS[:3]).std() > 1e-3  # the published initialisation would give 1e-9


def test_the_result_is_frozen_in_evaluation_mode_and_free_of_the_file(
    published: dict[str, Tensor], words: str, tmp_path: Path
) -> None:
    file = written(published, tmp_path / "ImageReward.pt")
    reward = load(file, words)
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    assert not any(module.training for module in reward.modules())
    assert {tensor.device.type for tensor in [*reward.parameters(), *reward.buffers()]} == {"cpu"}
    before = features(reward)
    file.write_bytes(b"\0" * file.stat().st_size)  # in place: a mapped file would change the weights
    assert torch.equal(features(reward), before)


def test_half_precision_is_of_the_towers_alone(published: dict[str, Tensor], words: str, tmp_path: Path) -> None:
    file = written(published, tmp_path / "ImageReward.pt")
    half, full = load(file, words, dtype="bfloat16"), load(file, words)
    assert half.vision.dtype == half.text.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in half.head.parameters()} == {torch.float32}
    scores, exact = (reward(images(8), PROMPTS) for reward in (half, full))
    assert scores.dtype == torch.float32
    # bfloat16 keeps 8 bits: 0.4% of each activation, in some thirty roundings one after the other.
    assert (scores - exact).abs().max() < 0.1 * exact.std()
    with pytest.raises(ValueError, match=r"reward.dtype='half'"):
        load(file, words, dtype="half")


# --- positions


def cubic(new: int, old: int) -> np.ndarray:
    """Bicubic interpolation (a = -0.75, the border repeated, no smoothing) of `old` values at `new` places."""
    matrix = np.zeros((new, old))
    for row in range(new):
        centre = (row + 0.5) * old / new - 0.5
        for column in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            x = abs(centre - column)
            near, far = 1.25 * x**3 - 2.25 * x**2 + 1, -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
            matrix[row, min(max(column, 0), old - 1)] += near if x <= 1 else far
    return matrix


@pytest.mark.parametrize("old", [24, 14, 7])
def test_position_embeddings_are_resized_bicubically_and_cls_is_kept(old: int) -> None:
    positions = torch.randn(1, old * old + 1, 5)
    resized = blip_names.resize_positions(positions, 14)
    assert torch.equal(resized[:, 0], positions[:, 0])
    rows = cubic(14, old)
    grid = positions[0, 1:].reshape(old, old, 5).double().numpy()
    expected = np.einsum("ri,sj,ijw->rsw", rows, rows, grid)
    np.testing.assert_allclose(resized[0, 1:].reshape(14, 14, 5), expected, atol=1e-5)


def test_a_checkpoint_for_384_pixels_loads_at_224(published: dict[str, Tensor], words: str, tmp_path: Path) -> None:
    state = salesforce(published, side=24)
    reward = load(written(state, tmp_path / "model.safetensors"), words)
    expected = blip_names.resize_positions(state["visual_encoder.pos_embed"], 14)
    assert torch.equal(reward.vision.embeddings.position_embedding, expected)
    assert reward.vision.config.image_size == 224


# --- what is refused


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {key: tensor for key, tensor in state.items() if key != name}


def with_also(name: str, shape: tuple[int, ...] = (2,)) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: state | {name: torch.zeros(shape)}


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (without("blip.visual_encoder.blocks.1.norm2.bias"), "missing.*vision.encoder.layers.1.layer_norm2.bias"),
        (
            without("blip.text_encoder.encoder.layer.0.crossattention.self.key.weight"),
            "layer.0.crossattention.self.key",
        ),
        (without("mlp.layers.4.weight"), "head.layers.4.weight"),
        (with_also("blip.visual_encoder.blocks.1.gamma"), "left over.*blocks.1.gamma"),
        (with_also("blip.visual_encoder.blocks.3.norm1.weight"), "vision.encoder.layers.3"),
        (with_also("blip.text_encoder.pooler.dense.weight"), "text.pooler.dense.weight"),
        (with_also("blip.text_encoder.embeddings.word_embeddings.weight", (9, 192)), "word_embeddings"),
        (with_also("blip.vision_project.weight"), "like ImageReward.pt, which has no blip.vision_project.weight"),
        (with_also("step"), "which has no step"),
        (lambda state: {f"module.{name}": tensor for name, tensor in state.items()}, "names of none of ImageReward.pt"),
    ],
)
def test_every_tensor_is_accounted_for(
    published: dict[str, Tensor],
    words: str,
    tmp_path: Path,
    spoil: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    said: str,
) -> None:
    file = written(spoil(published), tmp_path / "ImageReward.pt")
    with pytest.raises(ValueError, match=said) as caught:
        load(file, words)
    assert f"reward.init={str(file)!r}" in str(caught.value)


def test_what_vp_score_saved_is_sent_to_its_own_setting(
    published: dict[str, Tensor], words: str, tmp_path: Path
) -> None:
    load(written(published, tmp_path / "ImageReward.pt"), words).save(tmp_path / "ours")
    with pytest.raises(ValueError, match="reward=vp_score reward.checkpoint=FOLDER"):
        load(tmp_path / "ours", words)
    with pytest.raises(FileNotFoundError, match="reward=vp_score_large reward.init"):
        VPScore.load(str(tmp_path / "ImageReward.pt"))


class Harm:
    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("it ran",))


def test_a_pickle_with_code_in_it_is_not_run(words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="holds more than tensors"):
        load(written({"model": Harm()}, tmp_path / "evil.pt"), words)
    assert "it ran" not in capsys.readouterr().out
    (tmp_path / "older.pt").write_bytes(pickle.dumps({"model": 1}))
    with pytest.raises(ValueError, match="older.pt is damaged or no checkpoint"):
        load(tmp_path / "older.pt", words)


def test_files_that_are_not_there_or_no_checkpoints_are_told(words: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no model.safetensors, but nothing"):
        load(tmp_path, words)
    with pytest.raises(FileNotFoundError, match="neither a file, nor a folder, nor a hub name"):
        load("somebody/some-blip", words)  # the hub is out of reach in tests
    with pytest.raises(FileNotFoundError, match="neither a file, nor a folder, nor a hub name"):
        load("/no/such/file.pt", words)
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        load(tmp_path, words)
    with pytest.raises(ValueError, match="is not a dictionary of tensors"):
        load(written({"a": 1}, tmp_path / "a.pt"), words)


def test_a_hub_repository_is_asked_for_the_named_file(
    published: dict[str, Tensor], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(repository: str, file: str, revision: str | None) -> str:
        asked.append((repository, file, revision))
        return str(written(published, tmp_path / file))

    monkeypatch.setattr(checkpoints, "hf_hub_download", download)
    load("THUDM/ImageReward", words, file="ImageReward.pt", revision="abc")
    assert asked == [("THUDM/ImageReward", "ImageReward.pt", "abc")]


def test_a_tokenizer_of_other_words_is_refused(published: dict[str, Tensor], words: str, tmp_path: Path) -> None:
    file = written(published, tmp_path / "ImageReward.pt")
    (tmp_path / "vocab.txt").write_text("\n".join([*vocabulary(SMALL.words), "more"]))
    with pytest.raises(ValueError, match=r"has 25 words with \[DEC\] and \[ENC\]; the checkpoint's has 24"):
        load(file, str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"reward.tokenizer='nobody/nothing'"):
        load(file, "nobody/nothing")


def test_blips_two_words_come_after_berts(words: str) -> None:
    tokenizer = blip_names.tokenizer(words, SMALL.words)
    assert tokenizer.convert_tokens_to_ids(["[CLS]", "[DEC]", "[ENC]"]) == [2, SMALL.words - 2, SMALL.words - 1]
    again = BertTokenizer.from_pretrained(words)
    assert tokenizer("a red cat").input_ids == again("a red cat").input_ids


def test_a_standard_deviation_of_zero_is_refused(words: str) -> None:
    with pytest.raises(ValueError, match=r"reward.std=0"):
        load("any", words, std=0)
