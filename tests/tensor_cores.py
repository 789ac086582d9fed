"""bfloat16 as a GPU computes it, on any processor: products summed in float32, and the sum rounded."""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.baddbmm.default,
    torch.ops.aten.convolution.default,
    torch.ops.aten.convolution_backward.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
}
STATISTICS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default: 1}
"""Outputs that stay in float32: the log-sum-exp of attention, which its gradient needs."""


class TensorCores(TorchDispatchMode):
    """Inside it these operations take and give bfloat16, and compute in float32.

    Processors without instructions for bfloat16 do the same 10 to 20 times as slowly, or sum in bfloat16.
    """

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [each for each in args if isinstance(each, torch.Tensor)]
        if operation not in PRODUCTS or all(each.dtype != torch.bfloat16 for each in tensors):
            return operation(*args, **kwargs)
        found = operation(*_cast(list(args), torch.bfloat16, torch.float32), **kwargs)
        if not isinstance(found, tuple):
            return found.to(torch.bfloat16)
        kept = STATISTICS.get(operation)
        return tuple(
            part if place == kept else _cast(part, torch.float32, torch.bfloat16) for place, part in enumerate(found)
        )


def _cast(values: Any, given: torch.dtype, wanted: torch.dtype) -> Any:
    return tree_map_only(torch.Tensor, lambda each: each.to(wanted) if each.dtype == given else each, values)


class OnTensorCores(lightning.Callback):
    """A run's training inside `TensorCores`, its evaluation too."""

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        self.mode = TensorCores()
        self.mode.__enter__()

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        self.mode.__exit__(None, None, None)
