"""Checkpoints of BLIP and ImageReward that others wrote: where they lie, and what our parameters are called in them.

A checkpoint is of one of four layouts. Each lists what its towers are called and what in it the reward has no use for;
any other name is an error.
"""

import pickle
import re
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import BertTokenizer


class _Layout(NamedTuple):
    what: str
    parts: dict[str, str]
    """Their prefix -> ours."""
    unused: tuple[str, ...]
    """Names, or beginnings of names that end in a dot."""
    salesforce: bool
    """Whether the vision tower's parameters have Salesforce's names rather than transformers'."""


_POSITIONS = "text_encoder.embeddings.position_ids"  # 0, 1, 2, ...: a buffer of older versions
_LAYOUTS = (
    _Layout(
        "ImageReward.pt",
        {"blip.visual_encoder.": "vision.", "blip.text_encoder.": "text.", "mlp.": "head."},
        ("blip.vision_proj.", "blip.text_proj.", f"blip.{_POSITIONS}"),
        salesforce=True,
    ),
    _Layout(
        "Salesforce's BLIP",
        {"visual_encoder.": "vision.", "text_encoder.": "text."},
        (
            *("vision_proj.", "text_proj.", "itm_head.", "temp", _POSITIONS),  # contrastive and matching losses
            *("visual_encoder_m.", "text_encoder_m.", "vision_proj_m.", "text_proj_m."),  # momentum copies
            *("image_queue", "text_queue", "queue_ptr", "idx_queue", "ptr_queue"),  # negatives
            "text_decoder.",  # captioning
        ),
        salesforce=True,
    ),
    _Layout(
        "transformers' BlipForImageTextRetrieval",
        {"vision_model.": "vision.", "text_encoder.": "text."},
        ("vision_proj.", "text_proj.", "itm_head.", _POSITIONS),
        salesforce=False,
    ),
    _Layout(
        "transformers' BlipModel",
        {"vision_model.": "vision.", "text_model.": "text."},
        (
            "visual_projection.",
            "text_projection.",
            "logit_scale",
            "text_model.pooler.",
            "text_model.embeddings.position_ids",
        ),
        salesforce=False,
    ),
)
_VISION = (  # Salesforce's names -> transformers'
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.(\d+)\.norm([12])\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
)


def read(init: str, file: str, revision: str | None) -> dict[str, Tensor]:
    """The tensors of a checkpoint, as they are called in it.

    Args:
        init: a file, a folder, or the hub name of a repository.
        file: the checkpoint's name in a folder or repository. Safetensors, or a pickle with nothing but tensors in it
            (`.pt`, `.pth`, `.bin`), of which a dictionary called `model` is taken if there is one.
        revision: of a hub repository.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint, or could run code when it is read.
    """
    path = _find(init, file, revision)
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"reward.init={init!r}: {path.name} holds more than tensors, so reading it could run code of whoever made "
            f"it. Convert it to safetensors where you trust it. ({str(error).splitlines()[0]})"
        ) from error
    except (SafetensorError, RuntimeError, ValueError, EOFError, OSError) as error:
        raise ValueError(f"reward.init={init!r}: {path.name} is damaged or no checkpoint: {error}") from error
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"reward.init={init!r}: {path.name} is not a dictionary of tensors by name.")
    return state


def rename(state: dict[str, Tensor], init: str) -> dict[str, Tensor]:
    """The same tensors under VPScore's names, without what the reward has no use for.

    Raises:
        ValueError: it has names that are of no layout, or of none together.
    """
    layout = next((each for each in _LAYOUTS if all(_any(state, prefix) for prefix in each.parts)), None)
    if layout is None:
        known = ", ".join(each.what for each in _LAYOUTS)
        hint = " VPScore.save wrote it: use reward=vp_score reward.checkpoint=FOLDER." if _any(state, "vision.") else ""
        raise ValueError(f"reward.init={init!r} has names of none of {known}: {_first(state)}.{hint}")
    ours, unknown = dict[str, Tensor](), []
    for name, tensor in state.items():
        if any(name == unused or unused.endswith(".") and name.startswith(unused) for unused in layout.unused):
            continue
        prefix = next((prefix for prefix in layout.parts if name.startswith(prefix)), None)
        if prefix is None:
            unknown.append(name)
            continue
        rest = name.removeprefix(prefix)
        if layout.salesforce and layout.parts[prefix] == "vision.":
            rest = _vision(rest)
        ours[layout.parts[prefix] + rest] = tensor
    if unknown:
        raise ValueError(f"reward.init={init!r} looks like {layout.what}, which has no {_first(unknown)}.")
    return ours


def tokenizer(path: str, words: int) -> BertTokenizer:
    """bert-base-uncased's from a hub name or folder, with BLIP's two words in BLIP's order: `words` in all.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it has another number of words.
    """
    try:
        read, reason = BertTokenizer.from_pretrained(path), "it has no vocabulary"
    except (OSError, ValueError, TypeError) as error:
        read, reason = None, str(error).splitlines()[0]
    if read is None or len(read) <= len(read.all_special_tokens):  # what transformers 5 makes of a name it cannot find
        raise FileNotFoundError(
            f"reward.tokenizer={path!r} is neither a folder with bert-base-uncased's tokenizer nor a hub name that "
            f"could be fetched: {reason}."
        )
    read.add_special_tokens({"bos_token": "[DEC]"})
    read.add_special_tokens({"extra_special_tokens": ["[ENC]"]})
    if len(read) != words:
        raise ValueError(
            f"reward.tokenizer={path!r} has {len(read)} words with [DEC] and [ENC]; the checkpoint's has {words}."
        )
    return read


def resize_positions(positions: Float[Tensor, "1 tokens width"], side: int) -> Float[Tensor, "1 resized width"]:
    """Position embeddings of [CLS] and a square grid, for a grid of `side` patches: bicubic, as BLIP itself does it."""
    first, grid = positions[:, :1], positions[:, 1:]
    old = round(grid.shape[1] ** 0.5)
    if old == side:
        return positions
    grid = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid.float(), size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([first, grid.flatten(2).transpose(1, 2).to(first.dtype)], 1)


def _find(init: str, file: str, revision: str | None) -> Path:
    path = Path(init).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / file).is_file():
            there = ", ".join(sorted(each.name for each in path.iterdir())[:8]) or "nothing"
            raise FileNotFoundError(f"reward.init={init!r} has no {file}, but {there}. Name the file by reward.file.")
        return path / file
    try:
        return Path(hf_hub_download(init, file, revision=revision))
    except (EntryNotFoundError, OSError, ValueError) as error:
        raise FileNotFoundError(
            f"reward.init={init!r} is neither a file, nor a folder, nor a hub name like 'owner/model' with "
            f"reward.file={file!r} that could be fetched: {str(error).splitlines()[0]}"
        ) from error


def _vision(name: str) -> str:
    for pattern, replacement in _VISION:
        renamed, times = re.subn(pattern, replacement, name)
        if times:
            return renamed
    return name  # unknown: the model that is to take it says so


def _any(state: dict[str, Tensor], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in state)


def _first(names: list[str] | dict[str, Tensor]) -> str:
    return ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
