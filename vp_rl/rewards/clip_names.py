"""open_clip's names of parameters."""

import re

from torch import Tensor

from vp_rl.rewards.checkpoints import first

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
