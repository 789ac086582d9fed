"""Checkpoints of CLIP and of heads on it that others wrote: where they lie, and open_clip's names of parameters."""

import pickle
import re
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

_TOP = {  # open_clip's names -> transformers'
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "text_projection": "text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.proj": "visual_projection.weight",
}
_TRANSPOSED = ("text_projection", "visual.proj")  # multiplied from the right there
_LEAVES = ("weight", "bias")
_NORMS = {
    "ln_final": "text_model.final_layer_norm",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
}
_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


def read(init: str, file: str, revision: str | None, setting: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint, as they are called in it.

    Args:
        init: a file, a folder, or the hub name of a repository.
        file: the checkpoint's name in a folder or repository. Safetensors, or a pickle with nothing but tensors in it
            (`.pt`, `.pth`, `.bin`), of which a dictionary called `state_dict` is taken if there is one.
        revision: of a hub repository.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint, or could run code when it is read.
    """
    path = _find(init, file, revision, setting)
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{setting}={init!r}: {path.name} is no checkpoint, or holds more than tensors, so that reading it could "
            f"run code of whoever made it. Convert it to safetensors where you trust it. ({line(error)})"
        ) from error
    except (SafetensorError, RuntimeError, ValueError, EOFError, OSError) as error:
        raise ValueError(f"{setting}={init!r}: {path.name} is damaged or no checkpoint: {line(error)}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{setting}={init!r}: {path.name} is not a dictionary of tensors by name.")
    return state


def rename(state: dict[str, Tensor], init: str, setting: str) -> dict[str, Tensor]:
    """The same tensors of an open_clip model, with a transformer in each tower, under the names of `CLIPModel`.

    Raises:
        ValueError: it has a name that such a model has not.
    """
    renamed, unknown = dict[str, Tensor](), []
    for name, tensor in state.items():
        prefix, dot, leaf = name.rpartition(".")
        block = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)", name)
        if name in _TOP:
            renamed[_TOP[name]] = tensor.T.contiguous() if name in _TRANSPOSED else tensor
        elif prefix in _NORMS and leaf in _LEAVES:
            renamed[_NORMS[prefix] + dot + leaf] = tensor
        elif block and (layer := _in_block(block[3], tensor)):
            tower = "vision_model" if block[1] else "text_model"
            renamed |= {f"{tower}.encoder.layers.{block[2]}.{key}": part for key, part in layer.items()}
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"{setting}={init!r} is no open_clip model of two transformers: it has {first(unknown)}.")
    return renamed


def _in_block(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A tensor of one layer under its new name; queries, keys and values apart; nothing, for an unknown name."""
    if name in ("attn.in_proj_weight", "attn.in_proj_bias"):
        leaf = name.rpartition("_")[2]
        parts = zip("qkv", tensor.chunk(3), strict=False)
        return {f"self_attn.{part}_proj.{leaf}": values for part, values in parts}
    prefix, dot, leaf = name.rpartition(".")
    return {_BLOCK[prefix] + dot + leaf: tensor} if prefix in _BLOCK and leaf in _LEAVES else {}


def _find(init: str, file: str, revision: str | None, setting: str) -> Path:
    path = Path(init).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / file).is_file():
            there = ", ".join(sorted(each.name for each in path.iterdir())[:8]) or "nothing"
            raise FileNotFoundError(f"{setting}={init!r} has no {file}, but {there}. Name the file by reward.file.")
        return path / file
    try:
        return Path(hf_hub_download(init, file, revision=revision))
    except (EntryNotFoundError, OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{setting}={init!r} is neither a file, nor a folder, nor a hub name like 'owner/model' with "
            f"reward.file={file!r} that could be fetched: {line(error)}"
        ) from error


def first(names: list[str]) -> str:
    """Three of them, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error) or repr(error)).splitlines()[0]
