"""The linear head that turns an encoder's features into a score."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vp_rl.types import Scores


class Head(nn.Module):
    """Linear layers without activations, then the standardisation: (raw - mean) / std.

    The published initialisation, N(0, 1 / 769^2) for every layer, gives an output of 1e-9 and gradients below Adam's
    epsilon, so training stands still for hundreds of steps. Here each layer keeps its input's variance. It also stays
    in float32 whatever the towers are cast to, as such gradients would vanish in half precision.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, width: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        dropouts = (0.2, 0.2, 0.1)[: len(widths)]  # after the first layers, as published
        self.layers = nn.Sequential()
        for index, (fan_in, fan_out) in enumerate(zip((width, *widths), (*widths, 1), strict=True)):
            linear = nn.Linear(fan_in, fan_out)
            nn.init.normal_(linear.weight, std=fan_in**-0.5)
            nn.init.zeros_(linear.bias)
            self.layers.extend([linear, nn.Dropout(dropouts[index])] if index < len(dropouts) else [linear])
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    def forward(self, features: Float[Tensor, "batch features"]) -> Scores:
        """Scores in float32, under autocast too."""
        with torch.autocast(features.device.type, enabled=False):
            return (self.layers(features.float()).squeeze(1) - self.mean) / self.std

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Head":
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)
