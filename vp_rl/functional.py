"""Pure maths. Every formula of the system that is not a network is here, in float32, with its source."""

import hashlib

import torch
from jaxtyping import Bool, Float
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


def ranking_loss(
    better: Float[Tensor, " pairs"], worse: Float[Tensor, " pairs"], belief: Float[Tensor, " pairs"] | None = None
) -> Float[Tensor, ""]:
    """-p log sigmoid(d) - (1 - p) log sigmoid(-d) of each pair's d = r_better - r_worse, averaged over pairs.

    With a belief p = 1 that the better one is better, the default, it is ImageReward's equation 1. At p < 1 it is least
    where sigmoid(d) = p: no score is driven apart without end by a label that may be wrong.
    """
    loss = F.softplus(worse.float() - better.float())
    if belief is not None:
        # softplus(d) = softplus(-d) + d
        loss = loss + (1 - belief) * (better.float() - worse.float())
    return loss.mean()


def label_belief(margins: Float[Tensor, " pairs"], scale: float, smoothing: float) -> Float[Tensor, " pairs"]:
    """How far preference labels are to be believed: (1 - e) s + e (1 - s), with s = sigmoid(margin / scale).

    Args:
        margins: how much higher the better image is rated, in the ratings' units.
        scale: the margin at which a label is believed to 73%; 0: s = 1, all are believed alike.
        smoothing: e in [0, 0.5), the share of labels that are thought to be flipped.
    """
    sure = torch.sigmoid(margins / scale) if scale else torch.ones_like(margins)
    return (1 - smoothing) * sure + smoothing * (1 - sure)


def preference_weights(differences: Float[Tensor, "pairs scores"]) -> Float[Tensor, " scores"]:
    """Weights, 0 or more with a sum of 1, of several scores in one that ranks pairs: logistic regression.

    Args:
        differences: better minus worse, of each score.
    """
    logits = torch.zeros(differences.shape[1], requires_grad=True)
    sharpness = torch.zeros((), requires_grad=True)  # how sure the sum is; the weights are for its direction alone
    optimizer = torch.optim.LBFGS([logits, sharpness], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        margin = sharpness.exp() * (differences @ logits.softmax(0))
        # The penalty keeps pairs that are all ranked right from asking for infinite numbers.
        value = F.softplus(-margin).mean() + 1e-3 * (logits.square().sum() + sharpness.square())
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return logits.detach().softmax(0)


def clipped_surrogate(
    log_ratio: Float[Tensor, " batch"], advantages: Float[Tensor, " batch"], clip_range: float
) -> Float[Tensor, " batch"]:
    """max(-A ratio, -A clip(ratio, 1 +- clip_range)): PPO's pessimistic loss of each row, to be minimised."""
    ratio = log_ratio.exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))


def divergence_bounded(
    log_ratio: Float[Tensor, " batch"],
    advantages: Float[Tensor, " batch"],
    divergence: Float[Tensor, " batch"],
    limit: float,
) -> Float[Tensor, " batch"]:
    """-A ratio, or 0 where a step has left the old policy's by `limit` and would go on (Flow-DPPO, arXiv:2606.11025).

    It would go on where the ratio is above 1 and A above 0, or both below. PPO's clip looks at the ratio, of which each
    draw has another one at the same distance of the policies; this looks at the distance itself.

    Args:
        log_ratio, advantages: as for `clipped_surrogate`.
        divergence: KL between the old policy's step and the present one, averaged over latent dimensions.
        limit: in the published code 1e-5.
    """
    goes_on = (divergence >= limit) & (log_ratio.detach() * advantages > 0)
    ratio = torch.where(goes_on, 0.0, log_ratio).exp()  # whose gradient is a number where it would overflow
    return torch.where(goes_on, 0.0, -advantages * ratio)


def seed_of(*position: object) -> int:
    """A seed of 63 bits for the random numbers of one position in a run, such as (seed, epoch, prompt, image).

    A hash without structure: positions that differ in little have seeds that have nothing in common. Torch's generators
    on a CPU use the lower 32 bits, so that among n positions about n^2 / 2^33 pairs share their numbers by chance.
    """
    return int.from_bytes(hashlib.blake2b(repr(position).encode(), digest_size=8).digest(), "little") >> 1


def differ(scores: Float[Tensor, "groups images"]) -> Bool[Tensor, " groups"]:
    """Whether the scores of a group differ by more than rounding: only then is there something to learn from it."""
    apart = scores.amax(1) - scores.amin(1)
    return apart > 1e-6 * scores.mean(1).abs().clamp(min=1)


def group_advantages(
    scores: Float[Tensor, "groups images"], clip: float, epsilon: float = 1e-6
) -> Float[Tensor, "groups images"]:
    """Scores standardised within each prompt's group, then clipped to +-`clip` standard deviations.

    A group of one, or one whose scores are equal up to rounding, says nothing about what is better: its advantages are
    exactly 0. Standardising would blow the rounding of their mean up to the size of a signal.
    """
    centered = scores - scores.mean(1, keepdim=True)
    std = centered.square().mean(1, keepdim=True).sqrt()
    return torch.where(differ(scores)[:, None], (centered / (std + epsilon)).clamp(-clip, clip), 0.0)


def parts_advantages(
    parts: Float[Tensor, "groups images parts"], weights: Float[Tensor, " parts"], clip: float
) -> Float[Tensor, "groups images"]:
    """Each of several scores standardised within its group, weighted and summed (GDPO, Liu et al. 2026).

    In a group, a weight is then what it says, however much a score varies there. The sum is divided by its root mean
    square over all groups that say anything, as published, so that its size does not grow with the number of scores;
    then it is clipped to +-`clip`.
    """
    each = [group_advantages(part, torch.inf) for part in parts.unbind(-1)]
    total = torch.stack(each, -1) @ weights.to(parts)
    size = total[(total != 0).any(1)].square().mean().sqrt()
    return torch.where(total == 0, 0.0, (total / size).clamp(-clip, clip))


def overrated(
    scores: Float[Tensor, " images"], helpers: Float[Tensor, "images helpers"], share: float
) -> Bool[Tensor, " images"]:
    """The share of images whose rank by their score is furthest above the mean of their ranks by other rewards.

    Ranks are shares of the other images that an image beats, with ties as halves. Images that are ranked no higher by
    the score than by the others are never among them.
    """
    columns = torch.cat([scores[:, None], helpers], 1).unbind(1)
    ranks = [(each[:, None] > each).double().sum(1) + (each[:, None] == each).double().sum(1) / 2 for each in columns]
    above = ranks[0] - torch.stack(ranks[1:]).mean(0)
    highest = above.topk(min(len(above), max(1, round(share * len(above))))).indices
    return torch.zeros_like(above, dtype=torch.bool).index_fill(0, highest, True) & (above > 0)


def hinge_reward_loss(scores: Float[Tensor, " batch"], target: float) -> Float[Tensor, ""]:
    """mean(relu(target - r)): ReFL's phi, which stops pushing an image once its score reaches `target`."""
    return F.relu(target - scores.float()).mean()


def mean_square(difference: Float[Tensor, "batch *latent"]) -> Float[Tensor, " batch"]:
    """Mean over latent dimensions of each row's squared difference: a denoising error, in the output's own units."""
    return difference.float().square().flatten(1).mean(1)


def diffusion_dpo_loss(
    better: Float[Tensor, " pairs"], worse: Float[Tensor, " pairs"], beta: float
) -> Float[Tensor, " pairs"]:
    """-log sigmoid(-beta / 2 (better - worse)) of each pair (Diffusion-DPO, Wallace et al. 2023, equation 14).

    Args:
        better: denoising error of the preferred image less the reference model's, at one timestep and noise for both.
        worse: the same of the other one.
        beta: as in the published code, where it holds the number of timesteps: 5000 for Stable Diffusion.
    """
    return F.softplus(beta / 2 * (better.float() - worse.float()))


def loser_bound(
    better: Float[Tensor, "pairs *latent"], worse: Float[Tensor, "pairs *latent"], slack: float
) -> Float[Tensor, " pairs"]:
    """How much of the loser's gradient each pair may keep so that the winner's error still falls (SDPO, 2511.03317).

    clip((1 - slack) |g_w|^2 / <g_l, g_w>, 0, 1) where <g_l, g_w> > 0, else 1, with g the gradients of both errors in
    the denoiser's output space, which are proportional to output - target. Plain DPO lets both errors rise, the
    winner's by less. The published code has one factor for a whole micro-batch.

    Args:
        better: output - target of the preferred image.
        worse: of the other one.
        slack: mu in [0, 1]: share of the winner's own progress that the loser's gradient must leave.
    """
    winner, loser = better.detach().float().flatten(1), worse.detach().float().flatten(1)
    against = (winner * loser).sum(1)
    share = (1 - slack) * winner.square().sum(1) / against.clamp(min=1e-12)
    return torch.where(against > 0, share.clamp(0, 1), 1.0)


def normalised_error(difference: Float[Tensor, "batch *latent"]) -> Float[Tensor, " batch"]:
    """Mean squared difference over the mean absolute one, a number without gradient: DiffusionNFT's noise weighting."""
    flat = difference.float().flatten(1)
    return flat.square().mean(1) / flat.detach().abs().mean(1).clamp(min=1e-5)


def nft_loss(
    new: Float[Tensor, "batch *latent"],
    old: Float[Tensor, "batch *latent"],
    target: Float[Tensor, "batch *latent"],
    good: Float[Tensor, " batch"],
    beta: float,
) -> Float[Tensor, " batch"]:
    """Negative-aware fine-tuning (DiffusionNFT, Zheng et al. 2025, equation 5): good images pull, bad ones push.

    good * E(old + beta (new - old)) / beta + (1 - good) * E(old - beta (new - old)) / beta, with E the normalised error
    to `target` in the output's own space. The published code takes it in x0 space, which for a velocity is a factor of
    at most 1, and for a prediction of noise one of 14 at the noisiest steps.

    Args:
        new: the denoiser's output, with gradients.
        old: that of the policy that sampled.
        target: what a perfect denoiser would say.
        good: optimality of each image in [0, 1].
        beta: strength of the guidance that is learned.
    """
    old = old.detach()
    pull = normalised_error(old + beta * (new - old) - target)
    push = normalised_error(old - beta * (new - old) - target)
    return (good * pull + (1 - good) * push) / beta
