"""Online DPO: laws of its pairs, on policies whose optimum is known."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import test_parallel
import torch
from fakes import BlackBox, LinearPolicy, fit
from test_methods import STILL, TARGET, adam, mean_image
from test_parallel import QUIET
from torch import Tensor

from vp_rl.algorithms.dpo import DiffusionDPO
from vp_rl.algorithms.online_dpo import Offered, OnlineDPO
from vp_rl.algorithms.rounds import Batch
from vp_rl.data.prompts import EpochPrompts, Stream
from vp_rl.functional import diffusion_dpo_loss
from vp_rl.interfaces import Reward
from vp_rl.types import Images, Scores


def online(policy: LinearPolicy, reward: Reward | None = None, lr: float = 0.03, **settings: Any) -> OnlineDPO:
    return OnlineDPO(policy, reward or BlackBox(), STILL, adam(lr), **{"beta": 1.0} | settings)


def batch_of(scores: Tensor, algorithm: OnlineDPO) -> Batch:
    """Made-up prompts whose images have these scores."""
    generator = torch.Generator().manual_seed(0)
    shape = (*scores.shape, 3, 1, 1)
    noise = torch.randn(len(scores), 3, 1, 1, generator=generator)
    offered = Offered(torch.randn(shape, generator=generator), noise, torch.linspace(50, 900, len(scores)).round())
    return Batch(offered, algorithm.advantages(scores), torch.arange(len(scores)))


def loss_of(algorithm: OnlineDPO, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    return algorithm.loss(batch, {"text": torch.zeros(len(batch.prompt), 1)})


SCORES = torch.tensor([[0.3, 0.1, 0.9], [5.0, 7.0, 6.0]])


def test_it_is_log_two_at_the_start_and_dpos_loss_of_the_best_against_the_worst() -> None:
    policy = LinearPolicy()
    algorithm = online(policy, beta=3.0, bound=None)
    batch = batch_of(SCORES, algorithm)
    assert loss_of(algorithm, batch)[0].item() == pytest.approx(math.log(2), rel=1e-6)
    policy.bias.data = torch.tensor([0.3, -0.2, 0.5]).reshape(3, 1, 1)
    x0, noise, timestep = batch.examples
    pairs = torch.stack([x0[0, 2], x0[0, 1], x0[1, 1], x0[1, 0]])
    offline = DiffusionDPO(policy, adam(), beta=3.0, bound=None)
    twice = [0, 0, 1, 1]
    conditioning = {"text": torch.zeros(4, 1)}
    expected, values = offline.loss(
        pairs, noise[twice], timestep[twice], conditioning, torch.tensor([0, 2]), torch.tensor([1, 3])
    )
    loss, found = loss_of(algorithm, batch)
    torch.testing.assert_close(loss, expected)
    for name in ("train/winner_error", "train/loser_error", "train/accuracy"):
        torch.testing.assert_close(found[name], values[name])
    by_hand = diffusion_dpo_loss(found["train/winner_error"], found["train/loser_error"], 3.0)
    torch.testing.assert_close(loss, by_hand.mean())


@pytest.mark.parametrize("bound", [None, 0.9])
def test_prompts_whose_scores_are_equal_give_no_pair(bound: float | None) -> None:
    policy = LinearPolicy()
    policy.bias.data.fill_(0.2)
    algorithm = online(policy, bound=bound)
    level = torch.full((1, 3), 20.3456)  # of which rounding would make advantages
    [nothing] = torch.autograd.grad(loss_of(algorithm, batch_of(level, algorithm))[0], policy.bias)
    assert torch.equal(nothing, torch.zeros(3, 1, 1))
    both = batch_of(torch.cat([SCORES[:1], level]), algorithm)
    alone = both.take(torch.tensor([0]))
    loss, values = loss_of(algorithm, both)
    own, _ = loss_of(algorithm, alone)
    torch.testing.assert_close(loss, (own + math.log(2)) / 2)
    assert values["train/winner_error"][1] == values["train/accuracy"][1] == 0
    gradients = [torch.autograd.grad(each, policy.bias)[0] for each in (loss, own)]
    torch.testing.assert_close(gradients[0], gradients[1] / 2)


def test_more_images_than_standard_deviations_still_have_one_best() -> None:
    """Of n images one alone may lie sqrt(n - 1) deviations above the others, beyond any usual clip."""
    algorithm = online(LinearPolicy())
    scores = torch.zeros(1, 99)
    scores[0, 40], scores[0, 41] = 99.0, 98.0
    assert algorithm.advantages(scores).argmax().item() == 40
    assert algorithm.advantages(scores).max() > 5


class Scaled(Reward):
    """The same order of images on another scale."""

    differentiable = False

    def forward(self, images: Images, prompts: list[str]) -> Scores:
        return BlackBox()(images, prompts).exp() * 1e3 - 7


def test_only_the_order_of_scores_counts() -> None:
    found = []
    for reward in (BlackBox(), Scaled()):
        policy = LinearPolicy()
        fit(online(policy, reward), epochs=3)
        found.append(policy.bias.detach())
    assert torch.equal(*found)
    assert found[0].norm() > 0.01


def test_the_optimum_of_a_linear_policy_is_found() -> None:
    policy = LinearPolicy()
    fit(online(policy, beta=0.1, images_per_prompt=16), epochs=120)
    # As for DDPO: what 64 images a round leave of the mean's noise at this learning rate.
    torch.testing.assert_close(mean_image(policy), TARGET, rtol=0, atol=0.06)


def test_beta_pulls_to_the_reference() -> None:
    weak, strong = LinearPolicy(), LinearPolicy()
    moved = fit(online(weak, beta=0.1), epochs=30).callback_metrics["train/kl"]
    stayed = fit(online(strong, beta=1000.0), epochs=30).callback_metrics["train/kl"]
    assert strong.bias.norm() < 0.75 * weak.bias.norm()
    assert stayed < 0.5 * moved


def test_a_resumed_run_ends_where_an_unbroken_one_does(tmp_path: Path) -> None:
    whole, half, resumed = (LinearPolicy() for _ in range(3))
    fit(online(whole), epochs=6)
    fit(online(half), epochs=3).save_checkpoint(tmp_path / "half.ckpt")
    fit(online(resumed), epochs=6, ckpt_path=tmp_path / "half.ckpt")
    assert torch.equal(resumed.bias, whole.bias)
    assert not torch.equal(half.bias, whole.bias)


def test_two_processes_and_accumulation_make_its_updates(tmp_path: Path) -> None:
    def make(batch: int, **settings: Any) -> OnlineDPO:
        policy, reward = test_parallel.Mixing(), test_parallel.Liked()
        optimizer = partial(torch.optim.SGD, lr=0.01)
        settings = {"images_per_prompt": 4, "beta": 1.0, "noise_levels": 2} | settings
        return OnlineDPO(policy, reward, STILL, optimizer, train_batch=batch, **settings)

    [one] = test_parallel.run(make(4), tmp_path / "one", 4)
    test_parallel.assert_same(test_parallel.run(make(2), tmp_path / "pieces", 4, accumulate_grad_batches=2), one)
    test_parallel.assert_same(test_parallel.run(make(2, sample_batch=3), tmp_path / "two", 2, devices=2), one)


def test_devices_that_divide_a_prompts_images_are_refused() -> None:
    prompts = EpochPrompts(lightning.Trainer(**QUIET), ["a"] * 16, [], Stream(16, 1, "0", 0, 1), None, (0, 2), 1)
    with pytest.raises(ValueError, match=r"data\.devices_per_prompt=2 divides them: set it to 1"):
        online(LinearPolicy()).batches(prompts)
