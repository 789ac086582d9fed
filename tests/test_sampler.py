"""One sampler for every algorithm: replay, determinism, and where gradients flow."""

import pytest
import torch
from fakes import LinearPolicy

from vp_rl.sampler import Sampler, log_prob_of


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_replayed_log_probabilities_are_the_sampled_ones(eta: float) -> None:
    policy, sampler = LinearPolicy(), Sampler(steps=6, guidance=1.0, eta=eta)
    conditioning = policy.encode(["a"] * 4)
    trajectory = sampler.rollout(policy, conditioning, torch.Generator().manual_seed(0))
    for step in range(6):
        transition = sampler.transition(policy, trajectory.latents[:, step], torch.full((4,), step), conditioning)
        replayed = log_prob_of(trajectory.latents[:, step + 1], transition)
        torch.testing.assert_close(replayed, trajectory.log_probs[:, step], rtol=0, atol=1e-6)


def test_rollout_and_sample_draw_the_same_latents_from_the_same_generator() -> None:
    policy, sampler = LinearPolicy(), Sampler(steps=6, guidance=1.0, eta=1.0)
    conditioning = policy.encode(["a"] * 4)
    sampled = sampler.sample(policy, conditioning, torch.Generator().manual_seed(3))
    trajectory = sampler.rollout(policy, conditioning, torch.Generator().manual_seed(3))
    assert torch.equal(sampled, trajectory.latents[:, -1])


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_generator_for_each_row_makes_rows_independent_of_batching(eta: float) -> None:
    policy, sampler = LinearPolicy(), Sampler(steps=4, guidance=1.0, eta=eta)

    def sample(rows: range) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(row) for row in rows]
        return sampler.sample(policy, policy.encode(["a"] * len(rows)), generators)

    torch.testing.assert_close(sample(range(5)), torch.cat([sample(range(2)), sample(range(2, 5))]))


def test_without_noise_a_step_has_no_density() -> None:
    policy, sampler = LinearPolicy(), Sampler(steps=4, guidance=1.0, eta=0.0)
    trajectory = sampler.rollout(policy, policy.encode(["a"] * 2), torch.Generator().manual_seed(0))
    assert trajectory.log_probs.abs().max() == 0
    assert trajectory.stds.abs().max() == 0


@pytest.mark.parametrize("stop", [0, 3, 5])
def test_sampling_part_of_the_way_gives_the_rollouts_latents_there(stop: int) -> None:
    policy, sampler = LinearPolicy(gain=0.5), Sampler(steps=6, guidance=1.0, eta=1.0)
    latents = sampler.sample(policy, policy.encode(["a"]), torch.Generator().manual_seed(0), until=stop)
    trajectory = sampler.rollout(policy, policy.encode(["a"]), torch.Generator().manual_seed(0))
    assert torch.equal(latents, trajectory.latents[:, stop])


@pytest.mark.parametrize("stop", [0, 3, 5])
def test_a_step_lets_gradients_through_itself_only(stop: int) -> None:
    """x0 = gain * x_t + bias, so d x0 / d bias is 1 if x_t is cut off, and more if earlier steps are not."""
    policy, sampler = LinearPolicy(gain=0.5), Sampler(steps=6, guidance=1.0, eta=1.0)
    conditioning = policy.encode(["a"])
    latents = sampler.sample(policy, conditioning, torch.Generator().manual_seed(0), until=stop)
    x0 = sampler.transition(policy, latents, torch.tensor([stop]), conditioning).x0
    (gradient,) = torch.autograd.grad(x0.sum(), policy.bias)
    torch.testing.assert_close(gradient, torch.ones(3, 1, 1))


def test_sampling_leaves_no_graph() -> None:
    policy, sampler = LinearPolicy(), Sampler(steps=2, guidance=1.0, eta=1.0)
    trajectory = sampler.rollout(policy, policy.encode(["a"]))
    assert not any(tensor.requires_grad for tensor in trajectory)


@pytest.mark.parametrize("step", [0, 2, 4])
def test_branches_share_everything_but_one_step(step: int) -> None:
    policy, sampler = LinearPolicy(gain=0.5), Sampler(steps=6, guidance=1.0, eta=1.0)
    conditioning = policy.encode(["a", "b"])
    branches = sampler.branch(policy, conditioning, step, 3, torch.Generator().manual_seed(0))
    still = Sampler(steps=6, guidance=1.0, eta=0.0)
    before = still.sample(policy, conditioning, torch.Generator().manual_seed(0), until=step)
    assert torch.equal(branches.latents, before)
    assert len(branches.next_latents.flatten(0, 1).unique(dim=0)) == 6
    # The way on is deterministic: the finished latents follow from those after the step.
    latents, everyone = branches.next_latents.flatten(0, 1), policy.encode(["a"] * 6)
    for later in range(step + 1, 6):
        latents = still.transition(policy, latents, torch.full((6,), later), everyone).mean
    torch.testing.assert_close(branches.finished.flatten(0, 1), latents)
    replayed = sampler.transition(policy, before, torch.full((2,), step), conditioning)
    for draw in range(3):
        log_prob = log_prob_of(branches.next_latents[:, draw], replayed)
        torch.testing.assert_close(log_prob, branches.log_probs[:, draw], rtol=0, atol=1e-6)


def test_a_generator_for_each_start_and_each_branch_makes_them_independent_of_batching() -> None:
    policy, sampler = LinearPolicy(gain=0.5), Sampler(steps=6, guidance=1.0, eta=1.0)

    def branch(rows: range) -> torch.Tensor:
        start = [torch.Generator().manual_seed(row) for row in rows]
        parting = [torch.Generator().manual_seed(100 + 3 * row + number) for row in rows for number in range(3)]
        return sampler.branch(policy, policy.encode(["a"] * len(rows)), 2, 3, start, 64, parting).finished

    torch.testing.assert_close(branch(range(4)), torch.cat([branch(range(1)), branch(range(1, 4))]))


def test_branches_do_not_depend_on_how_many_are_finished_at_once() -> None:
    policy, sampler = LinearPolicy(gain=0.5), Sampler(steps=6, guidance=1.0, eta=1.0)

    def branch(batch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return sampler.branch(policy, policy.encode(["a", "b"]), 1, 3, generator, batch).finished

    torch.testing.assert_close(branch(2), branch(64))


def test_a_guidance_that_upstream_takes_otherwise_is_refused_and_none_is_none() -> None:
    for guidance in (0.5, 0.001, 0.999):
        with pytest.raises(ValueError, match=rf"guidance={guidance} is between 0 and 1.*Set it to 1"):
            Sampler(guidance=guidance)
    for guidance in (0.0, 1.0, 1.5):
        assert Sampler(guidance=guidance).guidance == guidance


def test_a_window_has_a_step_however_narrow_it_is_and_none_that_it_has_not() -> None:
    sampler = Sampler(steps=20, guidance=1.0)
    shares = [each / 40 for each in range(41)]
    for low, high in [(low, high) for low in shares for high in shares if low <= high]:
        window = sampler.window("algorithm.window", low, high)
        assert len(window) >= 1
        assert 0 <= window.start < window.stop <= 20
        assert len(window) == 1 or (window.start <= 20 * low and window.stop <= 20 * high)
