"""DDPO and ReFL on a linear-Gaussian policy whose optimum is known, through the real Trainer."""

from functools import partial
from pathlib import Path

import pytest
import torch
from fakes import BlackBox, LinearPolicy, QuadraticReward, Words, fit
from torch.utils.data import DataLoader

from vp_rl.algorithms.base import PolicyTraining
from vp_rl.algorithms.branch_ddpo import BranchDDPO
from vp_rl.algorithms.ddpo import DDPO
from vp_rl.algorithms.refl import ReFL
from vp_rl.data.prompts import PromptDataModule
from vp_rl.interfaces import Reward
from vp_rl.sampler import Sampler
from vp_rl.types import Images, PromptBatch, Scores

NOISY = Sampler(steps=5, guidance=1.0, eta=1.0)
TARGET = torch.tensor([0.5, -0.3, 0.2])


def ddpo(policy: LinearPolicy, reward: Reward | None = None, lr: float = 0.03, **settings: object) -> DDPO:
    defaults = {"images_per_prompt": 16, "train_batch": 64, "clip_range": 0.2}
    return DDPO(policy, reward or BlackBox(), NOISY, partial(torch.optim.Adam, lr=lr), **{**defaults, **settings})


def branch_ddpo(policy: LinearPolicy, reward: Reward | None = None, lr: float = 0.03, **settings: object) -> BranchDDPO:
    defaults = {"images_per_prompt": 16, "train_batch": 64, "clip_range": 0.2}
    optimizer = partial(torch.optim.Adam, lr=lr)
    return BranchDDPO(policy, reward or BlackBox(), NOISY, optimizer, **{**defaults, **settings})


def refl(policy: LinearPolicy, lr: float = 0.03, **settings: object) -> ReFL:
    reward = QuadraticReward(tuple(TARGET.tolist()))
    return ReFL(policy, reward, NOISY, partial(torch.optim.Adam, lr=lr), **{"target": 0.0, **settings})


def mean_image(policy: LinearPolicy) -> torch.Tensor:
    latents = NOISY.sample(policy, policy.encode(["a"] * 4096), torch.Generator().manual_seed(1))
    return latents.mean((0, 2, 3))


def test_ddpo_finds_the_optimum_of_a_linear_gaussian_policy() -> None:
    policy = LinearPolicy()
    fit(ddpo(policy), epochs=100)
    # The policy-gradient noise of 64 images a round leaves the mean within 0.05 of the target at this learning rate.
    torch.testing.assert_close(mean_image(policy), TARGET, rtol=0, atol=0.06)


def test_ddpo_with_branches_finds_the_optimum_of_a_linear_gaussian_policy() -> None:
    policy = LinearPolicy()
    fit(branch_ddpo(policy, window=(0.0, 0.8)), epochs=150)
    still = Sampler(steps=5, guidance=1.0, eta=0.0)
    latents = still.sample(policy, policy.encode(["a"] * 4096), torch.Generator().manual_seed(1))
    # A quadratic reward has its optimum at the target for any sampler of zero-mean noise.
    torch.testing.assert_close(latents.mean((0, 2, 3)), TARGET, rtol=0, atol=0.06)


def test_branches_train_one_step_of_the_window_a_round() -> None:
    algorithm, seen = branch_ddpo(LinearPolicy(), window=(0.2, 0.6), train_batch=50), []
    step = algorithm.training_step
    algorithm.training_step = lambda batch, batch_idx: (seen.append(batch), step(batch, batch_idx))[1]  # type: ignore[method-assign]
    fit(algorithm, epochs=12)
    assert [tuple(batch.examples.log_probs.shape) for batch in seen] == [(4, 16)] * 12  # a state for each prompt
    assert [len(batch.examples.step.unique()) for batch in seen] == [1] * 12
    assert set(torch.cat([batch.examples.step for batch in seen]).tolist()) == {1, 2}


@pytest.mark.parametrize("make", [ddpo, branch_ddpo, refl])
@pytest.mark.parametrize("window", [(0.5, 0.2), (-0.1, 0.5), (0.5, 1.1)])
def test_a_window_that_is_none_is_refused(make, window: tuple[float, float]) -> None:  # noqa: ANN001
    with pytest.raises(ValueError, match=r"algorithm\.window=\("):
        make(LinearPolicy(), window=window)


def test_refl_finds_the_optimum_of_a_linear_gaussian_policy() -> None:
    policy = LinearPolicy(gain=0.0)
    fit(refl(policy), epochs=150)
    torch.testing.assert_close(mean_image(policy), TARGET, rtol=0, atol=0.02)


@pytest.mark.parametrize("make", [ddpo, branch_ddpo])
@pytest.mark.parametrize("inner_epochs", [1, 2])
def test_the_ratio_is_one_on_policy(make, inner_epochs: int) -> None:  # noqa: ANN001
    trainer = fit(make(LinearPolicy(), lr=0.0, inner_epochs=inner_epochs, train_batch=50))
    assert trainer.callback_metrics["train/ratio"].item() == pytest.approx(1.0, abs=1e-6)
    assert trainer.callback_metrics["train/clip_fraction"].item() == 0
    assert trainer.callback_metrics["train/kl"].item() == pytest.approx(0.0, abs=1e-9)


def test_the_ratio_leaves_one_within_a_round() -> None:
    trainer = fit(ddpo(LinearPolicy(), lr=0.1, inner_epochs=2))
    assert trainer.callback_metrics["train/ratio"].item() != pytest.approx(1.0, abs=1e-4)


def test_every_step_of_every_sample_is_trained_once() -> None:
    algorithm, seen = ddpo(LinearPolicy(), train_batch=50, min_std=0.05), []
    step = algorithm.training_step
    algorithm.training_step = lambda batch, batch_idx: (seen.append(batch), step(batch, batch_idx))[1]  # type: ignore[method-assign]
    fit(algorithm)
    pairs = torch.cat([torch.stack([batch.examples.step, batch.prompt], 1) for batch in seen])
    counts = torch.bincount(pairs[:, 0], minlength=5)
    stds = NOISY.rollout(algorithm.policy, algorithm.policy.encode(["a"])).stds
    assert counts.tolist() == [64 if std > 0.05 else 0 for std in stds.tolist()]
    assert 0 < sum(count == 0 for count in counts.tolist()) < 5


def test_timestep_fraction_trains_that_share_of_steps() -> None:
    algorithm, seen = ddpo(LinearPolicy(), timestep_fraction=0.4), []
    step = algorithm.training_step
    algorithm.training_step = lambda batch, batch_idx: (seen.append(len(batch.examples.step)), step(batch, batch_idx))[
        1
    ]  # type: ignore[method-assign]
    fit(algorithm)
    assert sum(seen) == 4 * 16 * 2


def test_accumulating_two_micro_batches_is_one_batch_of_twice_the_size() -> None:
    biases = []
    for train_batch, accumulate in [(64, 1), (32, 2), (16, 4)]:
        policy = LinearPolicy()
        fit(ddpo(policy, train_batch=train_batch), epochs=3, accumulate_grad_batches=accumulate)
        biases.append(policy.bias.detach())
    torch.testing.assert_close(biases[1], biases[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(biases[2], biases[0], rtol=1e-5, atol=1e-6)


def gradient(algorithm: PolicyTraining, data: PromptDataModule, accumulate: int) -> torch.Tensor:
    """What the one update of an epoch is of: plain gradient descent of rate 1 moves the weights by it."""
    algorithm._make_optimizer = partial(torch.optim.SGD, lr=1.0)
    assert fit(algorithm, data=data, accumulate_grad_batches=accumulate).global_step == 1
    return -algorithm.policy.bias.detach()


CUTS = [(9, 2), (6, 3), (4, 5), (16, 2), (17, 2), (6, 6), (1, 18), (5, 4), (7, 3), (5, 9)]


@pytest.mark.parametrize(("train_batch", "accumulate"), CUTS)
def test_an_update_of_ddpo_is_the_same_however_its_18_states_are_cut(train_batch: int, accumulate: int) -> None:
    """Also where the last micro-batch is short, and where there are fewer than are accumulated."""

    def update(train_batch: int, accumulate: int) -> torch.Tensor:
        settings = {"images_per_prompt": 3, "timestep_fraction": 0.5, "train_batch": train_batch}
        return gradient(ddpo(LinearPolicy(), **settings), PromptDataModule(Words(), batch_size=3), accumulate)

    whole = update(18, 1)
    assert (update(train_batch, accumulate) - whole).norm() <= 1e-6 * whole.norm()


@pytest.mark.parametrize("accumulate", [4, 6, 9])
def test_an_update_of_refl_that_an_epochs_end_cuts_short_is_as_large_as_a_whole_one(accumulate: int) -> None:
    """Of the same prompts and noise: 2 batches in pieces that would be of 4, 6 or 9."""

    def update(accumulate: int) -> torch.Tensor:
        data = PromptDataModule(Words(), batch_size=4, batches_per_epoch=2)
        return gradient(refl(LinearPolicy(gain=0.0)), data, accumulate)

    whole = update(2)
    assert (update(accumulate) - whole).norm() <= 1e-6 * whole.norm()
    assert whole.norm() > 1e-3


def test_a_large_kl_weight_holds_the_policy_at_the_reference() -> None:
    free, held = LinearPolicy(), LinearPolicy()
    fit(ddpo(free), epochs=30)
    fit(ddpo(held, kl_weight=100.0), epochs=30)
    assert held.bias.norm() < 0.1 * free.bias.norm()


@pytest.mark.parametrize("make", [ddpo, refl])
def test_the_learning_rate_falls_to_nothing_over_the_run_where_that_is_wanted(make) -> None:  # noqa: ANN001
    def last_rate(**settings: object) -> float:
        return fit(make(LinearPolicy(), lr=0.1, **settings), epochs=3).optimizers[0].param_groups[0]["lr"]

    assert last_rate() == 0.1
    assert last_rate(decay=True) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("make", [ddpo, branch_ddpo, refl])
def test_a_run_resumed_from_a_checkpoint_ends_where_an_unbroken_one_does(make, tmp_path: Path) -> None:  # noqa: ANN001
    whole = LinearPolicy()
    fit(make(whole), epochs=6)
    half = LinearPolicy()
    fit(make(half), epochs=3).save_checkpoint(tmp_path / "half.ckpt")
    resumed = LinearPolicy()
    fit(make(resumed), epochs=6, ckpt_path=tmp_path / "half.ckpt")
    assert torch.equal(resumed.bias, whole.bias)
    assert not torch.equal(half.bias, whole.bias)


def test_checkpoints_hold_the_adapter_only_and_load_safely(tmp_path: Path) -> None:
    fit(ddpo(LinearPolicy())).save_checkpoint(tmp_path / "run.ckpt")
    checkpoint = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == {"policy.bias"}


def test_a_checkpoint_of_another_policy_is_refused(tmp_path: Path) -> None:
    fit(ddpo(LinearPolicy())).save_checkpoint(tmp_path / "run.ckpt")
    other = LinearPolicy()
    other.extra = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="another policy or adapter"):
        fit(ddpo(other), ckpt_path=tmp_path / "run.ckpt")


def test_refl_refuses_a_reward_without_gradients() -> None:
    with pytest.raises(ValueError, match="BlackBox has none.*algorithm=ddpo"):
        ReFL(LinearPolicy(), BlackBox(), NOISY, torch.optim.Adam)


@pytest.mark.parametrize("make", [ddpo, partial(refl, window=(0.4, 0.8))])  # ReFL: not the step without a density
def test_the_distance_to_the_reference_is_zero_until_the_policy_moves(make) -> None:  # noqa: ANN001
    still = fit(make(LinearPolicy(), lr=0.0)).callback_metrics
    moved = fit(make(LinearPolicy(), lr=0.1), epochs=2).callback_metrics
    assert still["train/kl"].item() == pytest.approx(0, abs=1e-9)
    assert moved["train/kl"].item() > 1e-4
    assert moved["train/images_per_second"].item() > 0


def test_refl_stops_inside_its_window() -> None:
    def stops(steps: int, window: tuple[float, float]) -> list[int]:
        sampler = Sampler(steps=steps, guidance=1.0, eta=1.0)
        return list(ReFL(LinearPolicy(), QuadraticReward(), sampler, torch.optim.Adam, window=window).starts)

    assert stops(40, (0.75, 1.0)) == list(range(30, 40))
    assert stops(10, (0.2, 0.5)) == [2, 3, 4]
    assert stops(4, (1.0, 1.0)) == [3]
    assert stops(4, (0.0, 0.0)) == [0]


def test_refl_pretraining_loss_pulls_towards_its_images() -> None:
    """With no reward the bias goes where the clean images are: the prediction of x0 is gain * x_t + bias, gain 0."""
    policy = LinearPolicy(gain=0.0)
    algorithm = refl(policy, reward_weight=0.0, pretrain_weight=1.0)
    image = torch.tensor([0.1, 0.2, 0.3]).reshape(1, 3, 1, 1).expand(8, -1, -1, -1)
    algorithm.batches = lambda prompts: DataLoader(  # type: ignore[method-assign]
        [PromptBatch(batch.prompts, image, ["a"] * 8) for batch in prompts], batch_size=None
    )
    fit(algorithm, epochs=100)
    torch.testing.assert_close(policy.bias.flatten(), torch.tensor([0.1, 0.2, 0.3]), rtol=0, atol=0.02)


def test_ddpo_refuses_a_sampler_without_noise_and_groups_of_one() -> None:
    with pytest.raises(ValueError, match="raise sampler.eta"):
        DDPO(LinearPolicy(), BlackBox(), Sampler(5, 1.0, 0.0), torch.optim.Adam)
    with pytest.raises(ValueError, match="at least 2"):
        ddpo(LinearPolicy(), images_per_prompt=1)


class Broken(Reward):
    """Fails on one prompt, as a reward in half precision does."""

    differentiable = False

    def forward(self, images: Images, prompts: list[str]) -> Scores:
        return torch.tensor([float("nan") if prompt.endswith("7") else 0.0 for prompt in prompts])


def test_a_reward_that_is_not_a_number_stops_the_run_and_names_the_prompt() -> None:
    with pytest.raises(ValueError, match=r"Broken gave nan for the image of 'train prompt 7'"):
        fit(ddpo(LinearPolicy(), reward=Broken()), epochs=4)
