"""Closed forms and limits of the formulas."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from vp_rl.functional import (
    clipped_surrogate,
    gaussian_kl,
    gaussian_log_prob,
    group_advantages,
    hinge_reward_loss,
    label_belief,
    preference_weights,
    ranking_loss,
    seed_of,
)


def test_gaussian_log_prob_is_the_mean_over_dimensions_of_the_density() -> None:
    value, mean, std = torch.randn(5, 4, 3, 3), torch.randn(5, 4, 3, 3), torch.rand(5) + 0.1
    expected = Normal(mean, std.reshape(5, 1, 1, 1)).log_prob(value).flatten(1).mean(1)
    torch.testing.assert_close(gaussian_log_prob(value, mean, std), expected)


def test_gaussian_log_prob_treats_the_sample_as_data() -> None:
    value, mean = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    gaussian_log_prob(value, mean, torch.ones(2)).sum().backward()
    assert value.grad is None
    assert mean.grad is not None


def test_gaussian_kl_is_torch_distributions_kl() -> None:
    mean, other, std = torch.randn(5, 4, 2), torch.randn(5, 4, 2), torch.rand(5) + 0.1
    scale = std.reshape(5, 1, 1)
    expected = kl_divergence(Normal(mean, scale), Normal(other, scale)).flatten(1).mean(1)
    torch.testing.assert_close(gaussian_kl(mean, other, std), expected)


def test_ranking_loss_is_log_two_for_equal_scores_and_falls_with_the_margin() -> None:
    zeros = torch.zeros(3)
    assert ranking_loss(zeros, zeros).item() == pytest.approx(math.log(2))
    assert ranking_loss(zeros + 20, zeros).item() == pytest.approx(0, abs=1e-8)
    assert ranking_loss(zeros, zeros + 20).item() == pytest.approx(20)


def test_a_label_that_is_half_believed_asks_for_the_gap_that_fits_it() -> None:
    for belief in (0.6, 0.9):
        gap = torch.tensor([math.log(belief / (1 - belief))], requires_grad=True)
        ranking_loss(gap, torch.zeros(1), torch.tensor([belief])).backward()
        assert gap.grad.item() == pytest.approx(0, abs=1e-6)
    a, b = torch.randn(5), torch.randn(5)
    torch.testing.assert_close(ranking_loss(a, b, torch.ones(5)), ranking_loss(a, b))
    torch.testing.assert_close(ranking_loss(a, b, torch.zeros(5)), ranking_loss(b, a))


def test_belief_in_labels_grows_with_the_margin_and_shrinks_with_flips() -> None:
    margins = torch.tensor([0.5, 1.0, 4.0])
    assert label_belief(margins, 0.0, 0.0).tolist() == [1.0, 1.0, 1.0]
    torch.testing.assert_close(label_belief(margins, 0.0, 0.1), torch.full((3,), 0.9))
    torch.testing.assert_close(label_belief(margins, 2.0, 0.0), torch.sigmoid(margins / 2))
    torch.testing.assert_close(label_belief(torch.zeros(1), 1.0, 0.2), torch.tensor([0.5]))


def test_preference_weights_are_those_that_made_the_preferences() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.tensor([0.6, 0.3, 0.1, 0.0])
    scores = torch.randn(4000, 2, 4, generator=generator)
    gap = 3 * (scores[:, 0] - scores[:, 1]) @ truth
    first = torch.rand(4000, generator=generator) < torch.sigmoid(gap)
    differences = torch.where(first[:, None], scores[:, 0] - scores[:, 1], scores[:, 1] - scores[:, 0])
    # Each weight is known to about 0.02 from 4,000 noisy pairs; the penalty pulls towards equality by as much.
    torch.testing.assert_close(preference_weights(differences), truth, rtol=0, atol=0.06)
    separable = preference_weights(differences.abs() * torch.tensor([1.0, 0.0, 0.0, 0.0]))
    assert separable.argmax() == 0
    assert torch.isfinite(separable).all()


def test_clipped_surrogate_has_the_policy_gradient_on_policy() -> None:
    log_ratio = torch.zeros(3, requires_grad=True)
    advantages = torch.tensor([1.0, -2.0, 0.0])
    loss = clipped_surrogate(log_ratio, advantages, 0.1)
    torch.testing.assert_close(loss, -advantages)
    loss.sum().backward()
    torch.testing.assert_close(log_ratio.grad, -advantages)


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "flows"), [(1.0, 1.0, False), (1.0, -1.0, True), (-1.0, -1.0, False)]
)
def test_clipped_surrogate_stops_only_gains_beyond_the_range(log_ratio: float, advantage: float, flows: bool) -> None:
    leaf = torch.tensor([log_ratio], requires_grad=True)
    clipped_surrogate(leaf, torch.tensor([advantage]), 0.2).sum().backward()
    assert (leaf.grad.abs().item() > 0) == flows


def test_group_advantages_have_mean_zero_and_std_one_in_each_group() -> None:
    groups = torch.arange(6.0)[:, None]
    advantages = group_advantages(torch.randn(6, 8) * (groups + 1) + 10 * groups, clip=100)
    for own in advantages:
        assert own.mean().item() == pytest.approx(0, abs=1e-5)
        assert own.std(unbiased=False).item() == pytest.approx(1, abs=1e-4)


def test_group_advantages_ignore_scale_and_shift_of_a_prompt() -> None:
    scores = torch.randn(2, 3)
    shifted = torch.stack([scores[0], 5 * scores[1] - 3])
    torch.testing.assert_close(group_advantages(scores, 9), group_advantages(shifted, 9), rtol=1e-4, atol=1e-4)


def test_group_advantages_of_equal_scores_are_zero_and_outliers_are_clipped() -> None:
    scores = torch.stack([torch.full((50,), 3.0), torch.cat([torch.zeros(49), torch.tensor([1000.0])])])
    advantages = group_advantages(scores, clip=5)
    assert advantages[0].abs().max() == 0
    assert advantages.max() == 5


@pytest.mark.parametrize("score", [20.3456, 3333.3, -0.1, 1e-3, 21.7])
def test_advantages_of_equal_scores_are_zero_whatever_their_mean_is_rounded_to(score: float) -> None:
    """The float32 mean of 16 times 20.3456 is not 20.3456: standardised, that ulp would be an advantage of 0.66."""
    for images in (2, 12, 16, 24):
        assert group_advantages(torch.full((1, images), score), 5).abs().max() == 0
    rounded = torch.full((1, 16), score) * (1 + 5e-8 * torch.arange(16))  # one image in batches of other sizes
    assert group_advantages(rounded, 5).abs().max() == 0
    signal = torch.full((1, 16), score) + torch.arange(16)
    assert group_advantages(signal, 5).abs().max() > 1


def test_seeds_of_neighbouring_positions_collide_as_often_as_chance_has_it() -> None:
    """In the lower 32 bits, which are what torch's generators on a CPU use: n^2 / 2^33 pairs among n positions."""
    positions = [(0, epoch, 0, prompt, image) for epoch in range(200) for prompt in range(32) for image in range(16)]
    seeds = [seed_of(*position) for position in positions]
    assert max(seeds) < 2**63
    assert len(set(seeds)) == len(seeds)
    # Poisson of mean 1.2: 9 or more have a probability of 1e-5. CRC32 of the same words gives 96.
    assert len(seeds) - len({seed % 2**32 for seed in seeds}) < 9


def test_hinge_reward_loss_stops_at_the_target() -> None:
    scores = torch.tensor([0.0, 1.0, 3.0], requires_grad=True)
    loss = hinge_reward_loss(scores, 2.0)
    loss.backward()
    assert loss.item() == pytest.approx((2 + 1 + 0) / 3)
    torch.testing.assert_close(scores.grad, torch.tensor([-1 / 3, -1 / 3, 0.0]))
