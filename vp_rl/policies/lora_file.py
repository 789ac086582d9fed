"""The file of an adapter, in diffusers' format: its scale is in its weights, whoever reads it.

Programs that know no header (ComfyUI) take alpha for the rank. So it is: the second matrix of each layer is multiplied
by what it counts, and the header says so.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft.utils.other import get_pattern_key
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
