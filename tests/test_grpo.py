"""GRPO on flow models and what has been added to it, against the published formulas and by what must hold exactly."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from fakes import BlackBox, LinearPolicy, QuadraticReward, fit
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from test_parallel import Liked, Mixing, assert_same, run
from test_weighted import Channel
from torch import Tensor

from vp_rl.algorithms.ddpo import DDPO
from vp_rl.algorithms.rounds import Batch, Rollout
from vp_rl.callbacks.guards import Guards
from vp_rl.functional import (
    divergence_bounded,
    gaussian_kl,
    gaussian_log_prob,
    group_advantages,
    overrated,
    parts_advantages,
)
from vp_rl.interfaces import Reward
from vp_rl.planning.estimate import Estimator
from vp_rl.processes.ddim import DDIM
from vp_rl.processes.flow import Flow
from vp_rl.rewards.weighted import WeightedReward
from vp_rl.sampler import Sampler, log_prob_of
from vp_rl.types import Transition

CONF = Path(__file__).parents[1] / "conf"
STEPS, ETA = 10, 0.7
CPS = Sampler(5, 1.0, 0.7, "cps")


def sd3(shift: float = 3.0) -> Flow:
    return Flow(FlowMatchEulerDiscreteScheduler(shift=shift), 256)


def times(process: Flow, steps: int = STEPS) -> list[float]:
    return [*(process.timesteps(steps).double() / 1000).tolist(), 0.0]


def at(step: int, rows: int = 1) -> Tensor:
    return torch.full((rows,), step)


class FlowPolicy(LinearPolicy):
    """The same on straight lines from noise to images: x0 = gain * x_t + bias as a velocity."""

    def __init__(self) -> None:
        super().__init__()
        self.process = sd3(1.0)

    def predict(self, latents: Tensor, timestep: Tensor, *rest: Any) -> Tensor:
        time = (timestep / 1000).reshape(-1, 1, 1, 1)
        return (latents - super().predict(latents, timestep, *rest)) / time


def ddpo(policy: LinearPolicy, reward: Reward | None = None, lr: float = 0.03, **settings: Any) -> DDPO:
    sampler = settings.pop("sampler", Sampler(5, 1.0, 1.0))
    made: dict[str, Any] = {"clip_range": 0.2, "images_per_prompt": 8} | settings
    return DDPO(policy, reward or BlackBox(), sampler, partial(torch.optim.Adam, lr=lr), **made)


def trained(algorithm: DDPO, epochs: int = 3) -> Tensor:
    fit(algorithm, epochs=epochs)
    return algorithm.policy.bias.detach()


# --- Flow-GRPO


def flow_grpo(sigma: float, after: float, largest: float, x: Tensor, v: Tensor) -> tuple[Tensor, float, float]:
    """The step's mean, its published std_dev_t, and the square root of -dt, as in sd3_sde_with_logprob.py."""
    dt = after - sigma
    std = math.sqrt(sigma / (1 - (largest if sigma == 1 else sigma))) * ETA
    mean = x * (1 + std**2 / (2 * sigma) * dt) + v * (1 + std**2 * (1 - sigma) / (2 * sigma)) * dt
    return mean, std, math.sqrt(-dt)


@pytest.mark.parametrize("step", range(STEPS - 1))
def test_a_flow_models_step_is_flow_grpos_and_its_kl_theirs_over_the_steps_length(step: int) -> None:
    process = sd3()
    sigma, after = times(process)[step : step + 2]
    x, v, other, drawn = torch.randn(4, 1, 4, 2, 2)
    ours = process.transition(v, x, at(step), STEPS, ETA)
    mean, std, root = flow_grpo(sigma, after, times(process)[1], x, v)
    torch.testing.assert_close(ours.mean, mean, rtol=1e-5, atol=1e-5)
    log_prob = (
        -((drawn - mean) ** 2) / (2 * (std * root) ** 2) - math.log(std * root) - math.log(math.sqrt(2 * math.pi))
    )
    found = gaussian_log_prob(drawn, ours.mean, ours.std)
    torch.testing.assert_close(found, log_prob.mean((1, 2, 3)), rtol=1e-4, atol=1e-4)
    reference = flow_grpo(sigma, after, times(process)[1], x, other)[0]
    theirs = ((mean - reference) ** 2).mean((1, 2, 3)) / (2 * std**2)  # train_sd3.py's kl_loss: without sqrt(-dt)
    kl = gaussian_kl(ours.mean, process.transition(other, x, at(step), STEPS, ETA).mean, ours.std)
    torch.testing.assert_close(kl, theirs / (sigma - after), rtol=1e-3, atol=1e-6)
    assert 3.7 < (kl / theirs).item() < 25.1


def test_the_experiments_kl_weight_pulls_as_much_as_flow_grpos_beta() -> None:
    """Over the trained steps together, where the adapter changes the velocity alike at all of them."""
    process, beta = sd3(), 0.01
    t = times(process)
    theirs, ours = [], []
    for step in range(STEPS - 1):
        mean, std, root = flow_grpo(t[step], t[step + 1], t[1], torch.zeros(1), torch.ones(1))
        theirs.append(mean.item() ** 2 / (2 * std**2))
        ours.append(mean.item() ** 2 / (2 * (std * root) ** 2))
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", ["experiment=grpo_vpscore_sd3"])
    assert config.algorithm.kl_weight == pytest.approx(beta * sum(theirs) / sum(ours), rel=0.02)
    assert (config.sampler.eta, config.sampler.steps, config.algorithm.clip_range) == (ETA, STEPS, 1e-4)
    assert (config.algorithm.advantage_clip, config.trainer.gradient_clip_val) == (5.0, 1.0)
    assert (config.algorithm.inner_epochs, config.algorithm.optimizer.lr) == (1, 3e-4)


# --- steps that preserve the coefficients


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("step", range(STEPS))
def test_a_cps_step_is_flow_grpos(step: int, eta: float) -> None:
    process = sd3()
    sigma, after = times(process)[step : step + 2]
    x, v = torch.randn(2, 1, 4, 2, 2)
    std = after * math.sin(eta * math.pi / 2)
    kept = math.sqrt(after**2 - std**2)
    mean = (x - sigma * v) * (1 - after) + (x + v * (1 - sigma)) * kept
    found = process.cps_transition(v, x, at(step), STEPS, eta)
    torch.testing.assert_close(found.mean, mean, rtol=1e-5, atol=2e-6)
    assert found.std.item() == pytest.approx(std, abs=1e-6)
    torch.testing.assert_close(found.x0, x - sigma * v)


@pytest.mark.parametrize("step", range(STEPS))
def test_a_cps_step_without_noise_is_the_euler_step_to_the_bit(step: int) -> None:
    x, v = torch.randn(2, 3, 4, 2, 2)
    found, euler = (make(v, x, at(step, 3), STEPS, 0.0) for make in (sd3().cps_transition, sd3().transition))
    assert torch.equal(found.mean, euler.mean)
    assert not found.std.any()


@pytest.mark.parametrize("eta", [0.3, 0.7, 1.0])
def test_a_cps_step_leaves_as_much_image_and_as_much_noise_as_there_belongs(eta: float) -> None:
    """With what is truly in the latents: (1 - t') x0 + t' of unit variance; the SDE's step has more noise."""
    process, x0, noise = sd3(), torch.randn(1, 4), torch.randn(1, 4)
    for step in range(STEPS):
        t, after = times(process)[step : step + 2]
        found = process.cps_transition(noise - x0, (1 - t) * x0 + t * noise, at(step), STEPS, eta)
        of_noise = found.mean - (1 - after) * x0
        weight = ((of_noise * noise).sum() / noise.square().sum()).item()
        torch.testing.assert_close(of_noise, weight * noise, rtol=0, atol=2e-6)  # and none of the image
        assert weight**2 + found.std.item() ** 2 == pytest.approx(after**2, abs=2e-6)
        ours = process.transition(noise - x0, (1 - t) * x0 + t * noise, at(step), STEPS, eta)
        excess = ((ours.mean - (1 - after) * x0) * noise).sum() / noise.square().sum()
        assert excess.item() ** 2 + ours.std.item() ** 2 >= after**2 - 2e-6


def test_a_cps_step_is_ddims_own_in_flows_coordinates() -> None:
    """DDIM's latents are flow's over the root of (1 - t)^2 + t^2, and its eta gives the same noise at another value."""
    ddim, process = DDIM(DDIMScheduler(prediction_type="epsilon", clip_sample=False)), sd3()
    _, alphas, alphas_after, _ = ddim._schedule(STEPS, torch.device("cpu"))
    for step in range(STEPS - 1):
        now, after = ((1 - a).sqrt() / (a.sqrt() + (1 - a).sqrt()) for a in (alphas[step], alphas_after[step]))
        process._cache[STEPS, torch.device("cpu")] = (torch.zeros(1), torch.stack([now, after]))
        scale, scale_after = (1 / (a.sqrt() + (1 - a).sqrt()) for a in (alphas[step], alphas_after[step]))
        x0, noise = torch.randn(2, 1, 4)
        latents = alphas[step].sqrt() * x0 + (1 - alphas[step]).sqrt() * noise
        theirs = ddim.transition(noise, latents, at(step), STEPS, 0.8)
        angle = math.asin((theirs.std * scale_after / after).item()) * 2 / math.pi
        ours = process.cps_transition(noise - x0, latents * scale, at(0), STEPS, angle)
        torch.testing.assert_close(ours.std, theirs.std * scale_after)
        torch.testing.assert_close(ours.mean, theirs.mean * scale_after, rtol=1e-4, atol=1e-5)


def test_cps_gives_images_less_variety_than_they_have_however_many_steps() -> None:
    """What docs/methods.md says of it: of N(0.5, 0.6^2), whose exact velocity is known, to N(0.5, 0.51^2)."""
    process, steps, (mean, std) = sd3(1.0), 500, (0.5, 0.6)
    m, variance = 0.0, 1.0
    for step in range(steps):
        t = times(process, steps)[step]
        x = torch.tensor([[0.0], [1.0]])
        slope = (t - (1 - t) * std**2) / ((1 - t) ** 2 * std**2 + t**2)
        found = process.cps_transition(-mean + slope * (x - (1 - t) * mean), x, at(step, 2), steps, 0.7)
        offset, gain = found.mean[0].item(), (found.mean[1] - found.mean[0]).item()
        m, variance = offset + gain * m, gain**2 * variance + found.std[0].item() ** 2
    assert m == pytest.approx(mean, abs=1e-3)
    assert variance**0.5 == pytest.approx(0.51, abs=0.005)


def test_cps_is_refused_where_it_means_nothing() -> None:
    with pytest.raises(ValueError, match=r"sampler\.noise=cps is for flow models .* DDIM's, .* leave sampler\.noise"):
        ddpo(LinearPolicy(), sampler=CPS)
    with pytest.raises(ValueError, match=r"sampler\.eta=1\.2 must be at most 1 with sampler\.noise=cps"):
        Sampler(5, 1.0, 1.2, "cps")


def test_a_policy_that_is_sampled_by_cps_learns() -> None:
    """The optimum of a linear-Gaussian policy: the replayed densities, and their gradients, are those of the steps."""
    policy = FlowPolicy()
    algorithm = ddpo(policy, lr=0.06, sampler=CPS, images_per_prompt=16, decay=True)
    metrics = fit(algorithm, epochs=40, callbacks=[Guards()]).callback_metrics
    assert metrics["train/log_prob_drift"] < 1e-4
    latents = CPS.sample(policy, policy.encode(["a"] * 4096), torch.Generator().manual_seed(1))
    target = QuadraticReward().target
    # Four standard errors of 4096 images, which differ by about 0.5 in each colour.
    torch.testing.assert_close(latents.mean((0, 2, 3)), target, rtol=0, atol=0.03)


# --- Flow-DPPO's mask


def test_the_mask_is_the_published_one() -> None:
    log_ratio, advantages = 1e-3 * torch.randn(400), torch.randn(400)
    divergence, limit = 2e-5 * torch.rand(400), 1e-5
    expected, gradient = [], []
    for row in range(400):
        ratio, advantage = math.exp(log_ratio[row].item()), advantages[row].item()
        far = not divergence[row].item() < limit
        dropped = far and ((ratio > 1 and advantage > 0) or (ratio < 1 and advantage < 0))
        expected.append(0.0 if dropped else -advantage * ratio)
        gradient.append(0.0 if dropped else -advantage * ratio)
    leaf = log_ratio.clone().requires_grad_()
    loss = divergence_bounded(leaf, advantages, divergence, limit)
    torch.testing.assert_close(loss, torch.tensor(expected))
    loss.sum().backward()
    torch.testing.assert_close(leaf.grad, torch.tensor(gradient))
    assert 50 < expected.count(0.0) < 150  # a quarter of them


def test_a_term_that_overflows_is_left_out_without_a_trace() -> None:
    leaf = torch.tensor([200.0], requires_grad=True)
    loss = divergence_bounded(leaf, torch.ones(1), torch.ones(1), 1e-5)
    loss.sum().backward()
    assert loss.item() == 0
    assert leaf.grad is not None
    assert leaf.grad.item() == 0


def test_on_policy_nothing_is_masked_and_the_update_is_the_clips() -> None:
    """One update a round: the ratio is 1, and both losses have the same gradient."""
    clipped = trained(ddpo(LinearPolicy(), train_batch=1000))
    masked = ddpo(LinearPolicy(), train_batch=1000, divergence_limit=1e-5)
    metrics = fit(masked, epochs=3, callbacks=[Guards()]).callback_metrics
    assert metrics["train/clip_fraction"] == 0
    torch.testing.assert_close(masked.policy.bias.detach(), clipped, rtol=1e-5, atol=1e-7)
    assert clipped.norm() > 0.01


def test_without_a_bound_in_reach_mask_and_clip_are_the_same_loss() -> None:
    many = {"inner_epochs": 3, "train_batch": 40}
    clipped = trained(ddpo(LinearPolicy(), clip_range=1e3, **many))
    masked = trained(ddpo(LinearPolicy(), divergence_limit=1e3, **many))
    torch.testing.assert_close(masked, clipped, rtol=1e-4, atol=1e-6)
    bounded = ddpo(LinearPolicy(), divergence_limit=1e-5, **many)
    assert fit(bounded, epochs=3).callback_metrics["train/clip_fraction"] > 0.1
    assert bounded.policy.bias.norm() < masked.norm()


def rolled(algorithm: DDPO) -> list[Rollout]:
    """The rounds of a run of one epoch."""
    rounds, rollout = [], algorithm.rollout
    algorithm.rollout = lambda *given: (rounds.append(rollout(*given)), rounds[-1])[1]  # type: ignore[method-assign]
    fit(algorithm)
    return rounds


def test_the_kept_means_are_those_of_the_densities_that_are_kept() -> None:
    policy = LinearPolicy()
    algorithm = ddpo(policy, divergence_limit=1e-5, timestep_fraction=0.5)
    [round_] = rolled(algorithm)
    drawn = round_.batch.examples
    std = algorithm.sampler.stds(policy)[drawn.step]
    steps = Transition(drawn.means[:, 0], std, drawn.means[:, 0])
    assert torch.equal(log_prob_of(drawn.next_latents[:, 0], steps), drawn.log_probs[:, 0])
    [plain] = rolled(ddpo(LinearPolicy(), timestep_fraction=0.5))
    assert plain.batch.examples.means.numel() == 0
    assert torch.equal(plain.batch.examples.latents, drawn.latents)


def test_a_limit_below_what_rounding_makes_is_refused_before_the_first_update() -> None:
    algorithm = ddpo(LinearPolicy(), divergence_limit=1e-5)
    collect = algorithm.collect

    def rounded(*given: Any) -> Any:
        finished, drawn = collect(*given)
        return finished, drawn._replace(means=drawn.means + 0.02)

    algorithm.collect = rounded  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"algorithm\.divergence_limit=1e-05 is no more than that: raise it"):
        fit(algorithm, callbacks=[Guards()])


def test_the_planner_counts_the_means() -> None:
    plain, masked = ddpo(LinearPolicy()), ddpo(LinearPolicy(), divergence_limit=1e-5)
    assert (plain.kept, masked.kept) == (2 * 6, 2 * 6 + 2 * 5)
    latents = torch.zeros(3, 3, 1, 1)
    assert masked.made_up(latents).means.shape == (3, 1, 3, 1, 1)
    assert plain.made_up(latents).means.numel() == 0


# --- GDPO


def gdpo(parts: np.ndarray, weights: list[float]) -> np.ndarray:
    """Flow-Factory's compute_gdpo in numpy: groups of images of parts."""
    total = np.zeros(parts.shape[:2])
    for part, weight in enumerate(weights):
        for group in range(len(parts)):
            own = parts[group, :, part]
            total[group] += weight * (own - own.mean()) / max(own.std(), 1e-6)
    return (total - total.mean()) / max(total.std(), 1e-6)


def test_advantages_by_parts_are_the_published_ones() -> None:
    parts = torch.randn(6, 8, 3, dtype=torch.float64) * torch.tensor([1.0, 30.0, 1e-2]) + 5
    weights = [1.0, 0.5, -0.3]
    found = parts_advantages(parts, torch.tensor(weights), 9.0)
    np.testing.assert_allclose(found.numpy(), gdpo(parts.numpy(), weights), atol=5e-4)  # epsilons of 1e-6 of a std 1e-2


def test_of_one_part_advantages_are_those_of_its_score() -> None:
    scores = torch.cat([torch.randn(5, 8), torch.full((1, 8), 2.5)])
    found = parts_advantages(scores[..., None], torch.tensor([0.7]), 2.0)
    torch.testing.assert_close(found, group_advantages(scores, 2.0), rtol=1e-4, atol=1e-5)
    assert found[-1].abs().max() == 0
    assert not parts_advantages(torch.ones(3, 4, 2), torch.ones(2), 5.0).any()


def test_by_parts_a_weight_is_the_same_in_every_group_however_much_a_score_varies_there() -> None:
    parts, weights = torch.randn(4, 8, 2), torch.tensor([1.0, 0.5])
    wide = parts.clone()
    wide[1, :, 1] *= 1000.0  # in one prompt's images
    found, scaled = (parts_advantages(each, weights, 9.0) for each in (parts, wide))
    torch.testing.assert_close(scaled, found, rtol=1e-3, atol=1e-4)
    total, scaled = (group_advantages(each @ weights, 9.0) for each in (parts, wide))
    assert (scaled - total)[1].abs().max() > 0.1  # the sum's are the second score's alone there


def of_two(**settings: Any) -> WeightedReward:
    """With weights in another order than the rewards, and statistics that count for nothing by parts."""
    rewards = {"near": BlackBox(), "red": Channel(0, 100.0)}
    return WeightedReward(rewards, {"red": -0.3, "near": 1.0}, **settings)


def test_a_round_by_parts_has_the_advantages_of_its_parts() -> None:
    algorithm = ddpo(LinearPolicy(), of_two(), normalise="parts", timestep_fraction=0.2)
    [round_] = rolled(algorithm)
    images = algorithm.sampler.rollout(
        LinearPolicy(),
        {"text": torch.zeros(32, 1)},
        algorithm.generators(range(4), range(8), 0, 0),
    ).latents[:, -1]
    parts = torch.stack([BlackBox()(images, ["a"] * 32), 100 * images[:, 0].mean((1, 2))], 1).unflatten(0, (4, 8))
    expected = parts_advantages(parts, torch.tensor([1.0, -0.3]), 5.0)
    torch.testing.assert_close(round_.batch.advantages.reshape(4, 8), expected, rtol=1e-4, atol=1e-4)
    assert round_.batch.kl_weights is None


def test_parts_of_a_reward_that_has_none_are_refused() -> None:
    with pytest.raises(ValueError, match=r"normalise=parts needs a reward of several, and BlackBox is one: take rew"):
        ddpo(LinearPolicy(), normalise="parts")


# --- GARDO's gate


def test_the_images_that_the_reward_alone_ranks_high_are_held() -> None:
    scores = torch.arange(10.0)
    helpers = torch.stack([torch.arange(10.0), 10 * torch.arange(10.0) - 3], 1)
    assert not overrated(scores, helpers, 0.5).any()  # all agree
    helpers[9] = -100.0  # the highest by the score is the lowest by the others
    assert overrated(scores, helpers, 0.1).nonzero().flatten().tolist() == [9]
    assert overrated(scores, helpers, 1.0).nonzero().flatten().tolist() == [9]  # the others have become better by it
    helpers[:, 0] = torch.arange(10.0)  # one of the two sees nothing wrong
    helpers[8] = -200.0
    assert overrated(scores, helpers, 0.1).nonzero().flatten().tolist() == [8]


def test_the_gate_depends_on_ranks_alone_and_holds_the_share() -> None:
    scores, helpers = torch.randn(200), torch.randn(200, 2)
    held = overrated(scores, helpers, 0.1)
    assert held.sum() == 20
    assert torch.equal(overrated(scores.exp(), helpers**3, 0.1), held)
    order = torch.randperm(200)
    assert torch.equal(overrated(scores[order], helpers[order], 0.1), held[order])
    rank = lambda each: each.argsort().argsort().double()  # noqa: E731
    above = rank(scores) - (rank(helpers[:, 0]) + rank(helpers[:, 1])) / 2
    assert above[held].min() >= above[~held].max()


def test_ties_are_halves_so_that_their_order_plays_no_part() -> None:
    scores, helpers = torch.zeros(4), torch.tensor([[3.0], [2.0], [1.0], [0.0]])
    assert overrated(scores, helpers, 1.0).tolist() == [False, False, True, True]
    assert overrated(scores, helpers.flip(0), 1.0).tolist() == [True, True, False, False]


def gated(policy: LinearPolicy, **settings: Any) -> DDPO:
    made: dict[str, Any] = {"kl_weight": 0.5, "kl_share": 0.25, "kl_helpers": {"red": Channel(0)}} | settings
    return ddpo(policy, **made)


def test_a_rounds_kl_weights_are_1_on_average_and_0_where_the_reward_is_not_alone() -> None:
    algorithm = gated(LinearPolicy(), timestep_fraction=0.2)
    [round_] = rolled(algorithm)
    weights = round_.batch.kl_weights
    assert weights is not None
    assert weights.shape == (32, 1)
    assert weights.unique().tolist() == [0.0, 4.0]
    assert weights.mean().item() == 1
    plain = rolled(ddpo(LinearPolicy(), kl_weight=0.5, timestep_fraction=0.2))[0]
    torch.testing.assert_close(round_.batch.advantages, plain.batch.advantages)


def test_the_kl_pulls_on_the_held_images_alone() -> None:
    policy = LinearPolicy()
    policy.bias.data.fill_(0.3)
    algorithm = gated(policy)
    latents, step = torch.randn(4, 3, 1, 1), torch.zeros(4, dtype=torch.long)
    algorithm.sampler = Sampler(5, 1.0, 1.0)
    drawn = algorithm.made_up(latents)._replace(step=step)
    conditioning = {"text": torch.zeros(4, 1)}
    weights = torch.tensor([[0.0], [3.0], [0.0], [0.0]])
    kl = algorithm.distance(Batch(drawn, torch.zeros(4, 1), step), conditioning)
    loss, _ = algorithm.loss(Batch(drawn, torch.zeros(4, 1), step, weights), conditioning)
    weight = algorithm._weight[0]
    torch.testing.assert_close(loss, 0.5 * weight * 3 * kl[1] / 4)
    everywhere, _ = algorithm.loss(Batch(drawn, torch.zeros(4, 1), step), conditioning)
    torch.testing.assert_close(everywhere, 0.5 * weight * kl.mean())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kl_helpers": {}}, r"kl_share=0\.25 needs other rewards to choose by: add \+reward@algorithm\.kl_helpers"),
        ({"kl_share": 1.0}, r"kl_share=1\.0 leaves no choice: raise .* set kl_share=0\.1"),
        ({"kl_weight": 0.0}, r"kl_weight=0\.0 or"),
    ],
)
def test_a_gate_without_a_choice_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        gated(LinearPolicy(), **settings)


def test_helpers_are_frozen_and_in_the_planners_count() -> None:
    class Heavy(Channel):
        def __init__(self) -> None:
            super().__init__(0)
            self.layer = torch.nn.Linear(100, 10)

    algorithm = gated(LinearPolicy(), kl_helpers={"heavy": Heavy()})
    assert not any(p.requires_grad for p in algorithm.kl_helpers.parameters())
    named = {part.name: part.bytes for part in Estimator(algorithm, partial(torch.optim.Adam, lr=1e-3)).weights()}
    assert named["frozen weights: kl_helpers"] == 4 * 1010


def test_a_helpers_score_that_is_no_number_names_the_helper() -> None:
    class Lost(Channel):
        def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
            return super().forward(images, prompts) * math.nan

    with pytest.raises(ValueError, match="Lost gave nan for the image of"):
        fit(gated(LinearPolicy(), kl_helpers={"lost": Lost(0)}))


def test_the_yaml_takes_helpers_by_name_and_the_parts_of_the_weighted_reward() -> None:
    given = ["algorithm=ddpo", "reward=weighted", "algorithm.normalise=parts", "algorithm.divergence_limit=1e-5"]
    gate = ["algorithm.kl_weight=0.1", "algorithm.kl_share=0.2", "+reward@algorithm.kl_helpers.size=compressibility"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", [*given, *gate, "~algorithm.window"])  # YAML has no tuples
    algorithm = instantiate(config.algorithm)
    judged = algorithm.judged(torch.rand(4, 3, 32, 32), ["a red circle"] * 4)
    assert judged.shape == (4, 4)  # the score, its two parts, the helper
    assert torch.equal(judged[:, 2], judged[:, 3])  # compressibility is both
    assert algorithm.learned(judged.unflatten(0, (1, 4))).shape == (1, 4, 2)


# --- all of them together

ALL: dict[str, Any] = {
    "divergence_limit": 1e-3,
    "normalise": "parts",
    "kl_weight": 0.1,
    "kl_share": 0.3,
    "random_steps": 2,
}


def everything(batch: int = 64, **settings: Any) -> DDPO:
    """By a reward of two parts with given statistics, which no device has to wait for."""
    given = {"liked": (0.0, 1.0), "red": (0.0, 1.0)}
    reward = WeightedReward({"liked": Liked(), "red": Channel(0)}, {"liked": 1.0, "red": 0.5}, statistics=given)
    made = ALL | {"kl_helpers": {"near": BlackBox()}, "images_per_prompt": 4} | settings
    optimizer = partial(torch.optim.SGD, lr=0.01)
    return DDPO(Mixing(), reward, Sampler(4, 1.0, 1.0), optimizer, train_batch=batch, **made)


def test_a_resumed_run_ends_where_an_unbroken_one_does(tmp_path: Path) -> None:
    whole, half, resumed = everything(), everything(), everything()
    fit(whole, epochs=4)
    fit(half, epochs=2).save_checkpoint(tmp_path / "half.ckpt")
    fit(resumed, epochs=4, ckpt_path=tmp_path / "half.ckpt")
    assert torch.equal(resumed.policy.bias, whole.policy.bias)
    assert not torch.equal(half.policy.bias, whole.policy.bias)


def test_two_processes_and_accumulation_make_the_same_updates(tmp_path: Path) -> None:
    [one] = run(everything(16), tmp_path / "one", 4)
    assert_same(run(everything(8), tmp_path / "pieces", 4, accumulate_grad_batches=2), one)
    assert_same(run(everything(8, sample_batch=3), tmp_path / "two", 2, devices=2), one)


def test_processes_that_divide_a_prompts_images_hold_and_compare_all_of_them(tmp_path: Path) -> None:
    [one] = run(everything(8), tmp_path / "one", 1)
    assert_same(run(everything(4), tmp_path / "two", 1, devices=2, devices_per_prompt=2), one)


def test_a_prompt_without_scores_has_no_part_in_what_others_are_compared_with() -> None:
    class Sometimes(Channel):
        def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
            lost = torch.tensor([prompt == algorithm.prompts[2] for prompt in prompts])
            return super().forward(images, prompts).masked_fill(lost, math.nan)

    algorithm = everything(kl_helpers={"sometimes": Sometimes(0)}, random_steps=1)
    algorithm.on_nonfinite = "skip"
    [round_] = rolled(algorithm)
    weights, lost = round_.batch.kl_weights, round_.batch.prompt == 2
    assert weights is not None
    assert not weights[lost].any()
    assert not round_.batch.advantages[lost].any()
    assert weights[~lost].mean().item() == pytest.approx(1)
    assert round_.batch.advantages[~lost].square().mean().item() == pytest.approx(1, abs=1e-4)
