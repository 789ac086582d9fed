"""Pure maths. Every formula of the system that is not a network is here, in float32, with its source."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


def rows(values: Float[Tensor, " batch"], like: Float[Tensor, "batch *latent"]) -> Tensor:
    """Per-row numbers shaped to broadcast over the latent dimensions of `like`."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def gaussian_log_prob(
    value: Float[Tensor, "batch *latent"], mean: Float[Tensor, "batch *latent"], std: Float[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """log N(value; mean, std^2), *averaged* over latent dimensions as DDPO's published code does.

    The average is why DDPO's clip ranges are as small as 1e-4: the ratio is that of a typical dimension. `std` must be
    positive. Gradients flow into `mean`; `value` is taken as data.
    """
    std = rows(std.float(), mean)
    squared = (value.detach().float() - mean.float()).square() / (2 * std.square())
    log_prob = -squared - std.log() - 0.5 * torch.log(torch.tensor(2 * torch.pi))
    return log_prob.flatten(1).mean(1)


def gaussian_kl(
    mean: Float[Tensor, "batch *latent"], other: Float[Tensor, "batch *latent"], std: Float[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """KL between two Gaussians of the same `std`: (mean - other)^2 / (2 std^2), averaged over latent dimensions."""
    return ((mean.float() - other.float()).square() / (2 * rows(std.float(), mean).square())).flatten(1).mean(1)


def ranking_loss(better: Float[Tensor, " pairs"], worse: Float[Tensor, " pairs"]) -> Float[Tensor, ""]:
    """-log sigmoid(r_better - r_worse), averaged over pairs (ImageReward, equation 1)."""
    return F.softplus(worse.float() - better.float()).mean()


def clipped_surrogate(
    log_ratio: Float[Tensor, " batch"], advantages: Float[Tensor, " batch"], clip_range: float
) -> Float[Tensor, " batch"]:
    """max(-A ratio, -A clip(ratio, 1 +- clip_range)): PPO's pessimistic loss of each row, to be minimised."""
    ratio = log_ratio.exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))


def group_advantages(
    scores: Float[Tensor, " batch"], groups: Int[Tensor, " batch"], clip: float, epsilon: float = 1e-6
) -> Float[Tensor, " batch"]:
    """Scores standardised within each prompt's group, then clipped to +-`clip` standard deviations.

    A group of one, or one whose scores are all equal, says nothing about what is better: its advantages are 0.
    """
    _, index, counts = groups.unique(return_inverse=True, return_counts=True)
    counts = counts.float()
    mean = torch.zeros_like(counts).scatter_add_(0, index, scores) / counts
    centered = scores - mean[index]
    variance = torch.zeros_like(counts).scatter_add_(0, index, centered.square()) / counts
    return (centered / (variance.sqrt()[index] + epsilon)).clamp(-clip, clip)


def hinge_reward_loss(scores: Float[Tensor, " batch"], target: float) -> Float[Tensor, ""]:
    """mean(relu(target - r)): ReFL's phi, which stops pushing an image once its score reaches `target`."""
    return F.relu(target - scores.float()).mean()
