"""A pipeline's parts are whole, and of the kind that its policy was written for; what is not is told by the part."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import tiny_pipelines
import torch
from hydra.utils import get_object
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file

from vp_rl.policies.pipelines import load_vae

PARTS = {
    "sd15": ["unet", "vae", "text_encoder"],
    "sdxl": ["unet", "vae", "text_encoder", "text_encoder_2"],
    "sd3": ["transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"],
    "flux": ["transformer", "vae", "text_encoder", "text_encoder_2"],
}
DEFAULT = [("sd15", "unet"), ("sdxl", "text_encoder_2"), ("sd3", "text_encoder_3"), ("flux", "vae")]
EACH = [
    pytest.param(case, part, marks=[] if (case, part) in DEFAULT else pytest.mark.slow)
    for case, parts in PARTS.items()
    for part in parts
]
Tensors = dict[str, torch.Tensor]


def spoilt(case: str, part: str, spoil: Callable[[Tensors], Tensors], folder: Path) -> Path:
    """The model of a case with other tensors in one part."""
    shutil.copytree(families.folder(case), folder, copy_function=os.link)
    (file,) = (folder / part).glob("*.safetensors")
    state = spoil(load_file(file))
    file.unlink()  # a link
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file, metadata={"format": "pt"})
    return folder


def edited(case: str, file: str, settings: dict[str, Any], folder: Path) -> Path:
    """The model of a case with other settings in one of its JSON files."""
    shutil.copytree(families.folder(case), folder, copy_function=os.link)
    content = json.loads((folder / file).read_text()) | settings
    (folder / file).unlink()
    (folder / file).write_text(json.dumps({key: value for key, value in content.items() if value != "absent"}))
    return folder


def load(case: str, folder: Path) -> Any:
    kind = get_object(families.read_yaml(case)._target_)
    return kind(str(folder), None, resolution=16, **({"t5_tokens": 24} if case in ("sd3", "flux") else {}))


def middle(state: Tensors) -> str:
    """One of its tensors, not in a norm, which some libraries begin with the right numbers."""
    names = sorted(name for name, tensor in state.items() if tensor.ndim > 1)
    return names[len(names) // 2]


@pytest.mark.parametrize(("case", "part"), EACH)
def test_a_part_without_one_of_its_tensors_is_refused(case: str, part: str, tmp_path: Path) -> None:
    gone: list[str] = []

    def lose(state: Tensors) -> Tensors:
        gone.append(middle(state))
        return {name: tensor for name, tensor in state.items() if name not in gone}

    folder = spoilt(case, part, lose, tmp_path / "model")
    with pytest.raises(ValueError, match=rf"its {part} is not whole: 1 of its tensors are missing") as caught:
        load(case, folder)
    assert gone[0].removeprefix("text_model.") in str(caught.value)
    assert f"policy.path={str(folder)!r}" in str(caught.value)


@pytest.mark.parametrize(("case", "part"), EACH)
def test_a_part_with_a_tensor_of_no_layer_is_refused(case: str, part: str, tmp_path: Path) -> None:
    folder = spoilt(case, part, lambda state: {**state, "control.weight": torch.ones(2)}, tmp_path / "model")
    with pytest.raises(ValueError, match=rf"its {part} is not whole: 1 tensors belong to no layer.*'control.weight'"):
        load(case, folder)


@pytest.mark.parametrize(("case", "part"), [("sd15", "unet"), ("sd15", "text_encoder"), ("flux", "transformer")])
def test_a_part_with_a_tensor_of_another_shape_is_refused(case: str, part: str, tmp_path: Path) -> None:
    def reshape(state: Tensors) -> Tensors:
        return {**state, middle(state): torch.ones(3, 5)}

    with pytest.raises(ValueError, match=rf"could not be loaded.*its {part}: "):
        load(case, spoilt(case, part, reshape, tmp_path / "model"))


@pytest.mark.parametrize(("case", "part"), [("sd15", "unet"), ("sd15", "text_encoder"), ("flux", "transformer")])
def test_a_pipeline_that_was_saved_with_a_lora_is_told_how_to_be_saved(case: str, part: str, tmp_path: Path) -> None:
    pipeline = tiny_pipelines.load(families.folder(case))
    targets = ["q_proj"] if part == "text_encoder" else ["to_q"]
    inject_adapter_in_model(LoraConfig(r=2, target_modules=targets), getattr(pipeline, part))
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"its {part} is not whole: .*base_layer.*saved with a LoRA.*fuse_lora"):
        load(case, tmp_path)


def test_a_vae_of_its_own_is_whole_too(tmp_path: Path) -> None:
    tiny_pipelines.vae().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    del state[middle(state)]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"policy\.vae='.*' is not whole: 1 of its tensors are missing"):
        load_vae(str(tmp_path), "float32")


@pytest.mark.parametrize(
    ("part", "rename"),
    [
        ("text_encoder", lambda state: {**state, "text_model.embeddings.position_ids": torch.arange(20)[None]}),
        (
            "vae",
            lambda state: {
                name.replace(".to_q.", ".query.")
                .replace(".to_k.", ".key.")
                .replace(".to_v.", ".value.")
                .replace(".to_out.0.", ".proj_attn."): tensor
                for name, tensor in state.items()
            },
        ),
    ],
)
def test_names_that_older_versions_wrote_are_still_read(
    part: str, rename: Callable[[Tensors], Tensors], tmp_path: Path
) -> None:
    policy, own = load("sd15", spoilt("sd15", part, rename, tmp_path / "model")), families.make("sd15", lora=None)
    ours, theirs = getattr(policy, part).state_dict(), getattr(own, part).state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_a_part_of_another_class_is_named(tmp_path: Path) -> None:
    folder = edited("sd15", "model_index.json", {"vae": ["diffusers", "AutoencoderTiny"]}, tmp_path / "tiny")
    shutil.rmtree(folder / "vae")
    with pytest.raises(ValueError, match=r"its vae is a AutoencoderTiny; this policy reads a AutoencoderKL"):
        load("sd15", folder)
    folder = edited("sdxl", "model_index.json", {"text_encoder": [None, None]}, tmp_path / "none")
    with pytest.raises(ValueError, match=r"it has no text_encoder, which this policy needs"):
        load("sdxl", folder)


@pytest.mark.parametrize(
    ("case", "tokenizer"), [("sd15", "tokenizer"), ("sdxl", "tokenizer_2"), ("sd3", "tokenizer"), ("flux", "tokenizer")]
)
@pytest.mark.parametrize("limit", ["absent", 512])
def test_a_tokenizer_that_does_not_say_how_far_its_encoder_reads_is_told(
    case: str, tokenizer: str, limit: Any, tmp_path: Path
) -> None:
    file = f"{tokenizer}/tokenizer_config.json"
    folder = edited(case, file, {"model_max_length": limit}, tmp_path / "model")
    with pytest.raises(ValueError, match=rf"its {tokenizer} says model_max_length=.*set model_max_length to 20 in"):
        load(case, folder)


def test_tokens_that_the_text_encoder_has_not_learned_are_told(tmp_path: Path) -> None:
    folder = shutil.copytree(families.folder("sd15"), tmp_path / "model")
    tokenizer = tiny_pipelines.clip_tokenizer()
    tokenizer.add_tokens(["<toy>"])
    tokenizer.save_pretrained(folder / "tokenizer")
    with pytest.raises(ValueError, match=r"its tokenizer has a token of number \d+, and its text encoder knows \d+"):
        load("sd15", folder)


def test_a_model_whose_images_are_not_square_asks_for_a_resolution(tmp_path: Path) -> None:
    folder = edited("sd15", "unet/config.json", {"sample_size": [8, 12]}, tmp_path / "model")
    kind = get_object(families.read_yaml("sd15")._target_)
    with pytest.raises(ValueError, match=r"not square.*set policy\.resolution"):
        kind(str(folder), None)
    assert kind(str(folder), None, resolution=16).latent_shape == (4, 8, 8)
