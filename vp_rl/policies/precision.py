"""Autocast is for weights in float32: a model in half precision computes as its own pipeline has it."""

from collections.abc import Callable
from functools import partial

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def keep_norms(model: ModelMixin) -> None:
    """Normalisation of a model in half precision gives half precision under autocast, too, as it does without.

    Autocast would have it in float32: twice the memory and its traffic, for numbers that the next layer rounds at
    once. Sums inside these layers are in float32 in any case.
    """
    dtype = model.dtype
    if dtype == torch.float32:
        return
    for module in model.modules():
        if isinstance(module, _NORMS):
            module.forward = partial(_uncast, module.forward, dtype)


def _uncast(forward: Callable[[Tensor], Tensor], dtype: torch.dtype, values: Tensor) -> Tensor:
    if values.dtype != dtype:  # what was kept wide on purpose stays so
        return forward(values)
    with torch.autocast(values.device.type, enabled=False):
        return forward(values)
