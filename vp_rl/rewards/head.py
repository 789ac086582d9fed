"""The linear head that turns an encoder's features into scores."""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vp_rl.types import ASPECTS, Scores


class Head(nn.Module):
    """Linear layers without activations, then the standardisation of each output: (raw - mean) / std.

    The published initialisation, N(0, 1 / 769^2) for every layer, gives an output of 1e-9 and gradients below Adam's
    epsilon, so training stands still for hundreds of steps. Here each layer keeps its input's variance. It also stays
    in float32 whatever the towers are cast to, as such gradients would vanish in half precision.

    Args:
        width: of the features.
        widths: of the layers between; the published ones are 1024, 128, 64, 16.
        outputs: scores of each row; several share all layers but the last.
    """

    mean: Tensor
    std: Tensor
    correlation: Tensor
    """Of the outputs, on the images that they were standardised on."""
    weights: Tensor
    """Of the outputs in the one score that `combine` makes of them."""

    def __init__(self, width: int, widths: tuple[int, ...], outputs: int = 1) -> None:
        super().__init__()
        dropouts = (0.2, 0.2, 0.1)[: len(widths)]  # after the first layers, as published
        self.layers = nn.Sequential()
        for index, (fan_in, fan_out) in enumerate(zip((width, *widths), (*widths, outputs), strict=True)):
            linear = nn.Linear(fan_in, fan_out)
            nn.init.normal_(linear.weight, std=fan_in**-0.5)
            nn.init.zeros_(linear.bias)
            self.layers.extend([linear, nn.Dropout(dropouts[index])] if index < len(dropouts) else [linear])
        self.register_buffer("mean", torch.zeros(outputs))
        self.register_buffer("std", torch.ones(outputs))
        self.register_buffer("correlation", torch.eye(outputs))
        self.register_buffer("weights", torch.ones(outputs))

    def forward(self, features: Float[Tensor, "batch features"]) -> Float[Tensor, "batch outputs"]:
        """Standardised scores in float32, under autocast too."""
        with torch.autocast(features.device.type, enabled=False):
            return (self.layers(features.float()) - self.mean) / self.std

    def combine(self, scores: Float[Tensor, "batch outputs"]) -> Scores:
        """Their weighted sum over its own standard deviation, sqrt(w' C w) with the correlation C, so standardised."""
        with torch.autocast(scores.device.type, enabled=False):
            deviation = (self.weights @ self.correlation @ self.weights).sqrt()
            return scores.float() @ self.weights / deviation

    def standardise(self, scores: Float[Tensor, "images outputs"]) -> None:
        """Shifts and scales the outputs to come so that these would have mean 0, standard deviation 1.

        Raises:
            ValueError: the scores of an output are all equal, or not finite.
        """
        mean, std = scores.mean(0), scores.std(0)
        for each_mean, each_std in zip(mean.tolist(), std.tolist(), strict=True):
            if not 0 < each_std < float("inf"):
                raise ValueError(
                    f"{len(scores)} scores with mean {each_mean:.4g} and standard deviation {each_std:.4g} cannot be "
                    "standardised: the training has diverged or collapsed. Lower algorithm.optimizer.lr."
                )
        self.mean += mean * self.std
        self.std *= std
        self.correlation.copy_(torch.corrcoef(scores.T).reshape(self.correlation.shape))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Head":
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)


def in_order(weights: Mapping[str, float], outputs: int) -> Float[Tensor, " outputs"]:
    """Weights of aspects as a tensor.

    Raises:
        ValueError: there is one output only, an aspect is unknown, or the weights make no score.
    """
    if outputs == 1:
        raise ValueError("reward.weights need a reward with an output for each aspect (reward.by_aspect=true).")
    given = dict(weights)
    if (
        not given.keys() <= set(ASPECTS)
        or not all(0 <= w < float("inf") for w in given.values())
        or not any(given.values())
    ):
        raise ValueError(
            f"reward.weights={given} must give aspects out of {', '.join(ASPECTS)} numbers of 0 or more, and one of "
            "them more than 0."
        )
    return torch.tensor([float(given.get(aspect, 0.0)) for aspect in ASPECTS])
