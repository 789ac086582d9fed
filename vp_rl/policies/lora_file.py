"""The file of an adapter: ours in diffusers' format, with its scale in its weights; Kohya's and others' are read too.

Programs that know no header (ComfyUI) take alpha for the rank. So it is: the second matrix of each layer is multiplied
by what it counts, and the header says so.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import convert_unet_state_dict_to_peft
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor

FILE = "pytorch_lora_weights.safetensors"  # diffusers' name, which runs use


def layer_of(key: str) -> str:
    """Of a tensor's name in PEFT's words."""
    return key.partition(".lora_")[0]


def scales(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, float]:
    """What each layer's B A counts, by the layer's name, as PEFT reckons it.

    Args:
        state: of a file, its names without the component's.
        settings: its header's; without any, alpha is the rank.
    """
    found, patterns = {}, settings.get("alpha_pattern") or {}
    for key, tensor in state.items():
        if not key.endswith(".lora_A.weight"):
            continue
        layer, rank = layer_of(key), len(tensor)
        alpha = patterns.get(get_pattern_key(patterns.keys(), layer), settings.get("lora_alpha", rank))
        found[layer] = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    return found


def scaled(state: Mapping[str, Tensor], by: Mapping[str, float]) -> dict[str, Tensor]:
    """With each layer's second matrix multiplied; where that is by 1, as it is, to the bit."""
    return {
        key: tensor * by[layer_of(key)] if key.endswith(".lora_B.weight") and by[layer_of(key)] != 1 else tensor
        for key, tensor in state.items()
    }


def plain(settings: Mapping[str, Any], layers: list[str]) -> dict[str, Any]:
    """The settings of what has its scale in its weights, in JSON's types.

    Where layers were chosen by more than their names, the header has their names.
    """
    said = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
    if any(said.get(key) is not None for key in _CHOOSING):
        said |= dict.fromkeys(_CHOOSING) | {"target_modules": sorted(layers)}
    ranks = dict(said.get("rank_pattern") or {})
    return {**said, "lora_alpha": said.get("r"), "alpha_pattern": ranks, "use_rslora": False}


_CHOOSING = ("exclude_modules", "layers_to_transform", "layers_pattern")


def readable_as_its_folder(file: Path) -> None:
    """Gives a file the rights of its folder, but for execution: safetensors keeps what it writes to its owner."""
    file.chmod(file.parent.stat().st_mode & 0o666)


def find(path: Path) -> Path:
    """The file that a path means: itself, a folder's, or a run's; another program's where it is the only one.

    Raises:
        FileNotFoundError: there is none, or there are several.
    """
    if path.is_file():
        return path
    for place in (path / FILE, path / "adapter" / FILE):
        if place.is_file():
            return place
    others = sorted(path.glob("*.safetensors"))
    if len(others) == 1:
        return others[0]
    several = f" Of {len(others)} others there, {others[0].name} first, name one." if others else ""
    raise FileNotFoundError(f"There is no {FILE} in '{path}'; runs write theirs to adapter/.{several}")


def read(file: Path, pipeline: type[DiffusionPipeline], component: str, config: Any) -> dict[str, Tensor]:
    """Its matrices by PEFT's names within the component, in float32, with their scale in them whoever has written them.

    Args:
        file: in diffusers' format, or in one that its loaders turn into that: Kohya's, for U-Nets and FLUX.
        pipeline: diffusers' class of it, which knows the formats.
        component: that is adapted.
        config: the component's: Stability's names of SDXL's layers go by it.

    Raises:
        ValueError: it is no such file, or adapts something else, or more.
    """
    shown = f"The adapter in {file}"
    state, settings = _opened(file, shown)
    if any("dora_scale" in key for key in state):
        raise ValueError(f"{shown} is a DoRA in Kohya's format, which has no reading that all agree on. {MERGE}")
    try:
        named = {"unet_config": config} if component == "unet" else {}
        converted, *_ = pipeline.lora_state_dict(_without_alphas(state), return_lora_metadata=True, **named)
    except (ValueError, KeyError, IndexError, AttributeError, NotImplementedError) as error:
        raise ValueError(f"{shown} is in a format that diffusers does not read: {str(error)[:300]}") from error
    prefix = f"{component}."
    if not any(key.startswith(prefix) for key in converted):
        raise ValueError(
            f"{shown} adapts {min(converted, default='').partition('.')[0]!r} and not this policy's {component}: it "
            "belongs to a model of another family, or is in another program's format."
        )
    if others := {key.partition(".")[0] for key in converted if not key.startswith(prefix)}:
        raise ValueError(f"{shown} adapts {', '.join(sorted(others))} too, which is not trained here. {MERGE}")
    found = {key.removeprefix(prefix): tensor for key, tensor in converted.items()}
    if component == "unet":
        found = convert_unet_state_dict_to_peft(found)  # of older diffusers
    written = {key.removeprefix(prefix): each for key, each in settings.items()}
    return scaled(found, scales(found, written))


MERGE = "Add it into the base with diffusers (load_lora_weights, fuse_lora, save_pretrained): that is then policy.path."


def _opened(file: Path, shown: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Its tensors in float32, and the LoRA's settings in its header; empty: nothing is said there."""
    try:
        with safe_open(file, framework="pt") as opened:
            state = {key: opened.get_tensor(key).float() for key in opened.keys()}  # noqa: SIM118  # not a mapping
            return state, json.loads((opened.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{shown} is no whole safetensors file ({error}).") from error


_MATRICES = (("lora_down.weight", "lora_up.weight"), ("lora_A.weight", "lora_B.weight"))


def _without_alphas(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With each layer's alpha, as Kohya's format has it, in its second matrix: of several diffusers keeps one."""
    found = dict(state)
    for key in [key for key in state if key.endswith(".alpha")]:
        layer = key.removesuffix(".alpha")
        for first, second in _MATRICES:
            if (down := state.get(f"{layer}.{first}")) is not None and f"{layer}.{second}" in state:
                found[f"{layer}.{second}"] = state[f"{layer}.{second}"] * (state[key].item() / len(down))
                found[key] = torch.tensor(float(len(down)))
    return found
