"""What our parameters are called in checkpoints of BLIP and ImageReward that others wrote.

A checkpoint is of one of four layouts. Each lists what its towers are called and what in it the reward has no use for;
any other name is an error.
"""

import re
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from transformers import BertTokenizer

from vp_rl.rewards.checkpoints import first, line


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


def rename(state: dict[str, Tensor], init: str) -> dict[str, Tensor]:
    """The same tensors under VPScore's names, without what the reward has no use for.

    Raises:
        ValueError: it has names that are of no layout, or of none together.
    """
    layout = next((each for each in _LAYOUTS if all(_any(state, prefix) for prefix in each.parts)), None)
    if layout is None:
        known = ", ".join(each.what for each in _LAYOUTS)
        hint = " VPScore.save wrote it: use reward=vp_score reward.checkpoint=FOLDER." if _any(state, "vision.") else ""
        raise ValueError(f"reward.init={init!r} has names of none of {known}: {first(sorted(state))}.{hint}")
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
        raise ValueError(f"reward.init={init!r} looks like {layout.what}, which has no {first(sorted(unknown))}.")
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
        read, reason = None, line(error)
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


def _vision(name: str) -> str:
    for pattern, replacement in _VISION:
        renamed, times = re.subn(pattern, replacement, name)
        if times:
            return renamed
    return name  # unknown: the model that is to take it says so


def _any(state: dict[str, Tensor], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in state)
