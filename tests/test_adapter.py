"""A run's adapter: its moving average in closed form, what looks at it, and that training and resuming do not."""

from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import test_callbacks
import test_evaluation
import torch
from fakes import LinearPolicy
from test_callbacks import held_out
from test_checkpoint import Counting, ddpo, fit, kills, latest, refl
from test_parallel import two_processes
from torch import Tensor

from vp_rl.algorithms.base import PolicyTraining
from vp_rl.algorithms.refl import ReFL
from vp_rl.callbacks.adapter import RunAdapter
from vp_rl.callbacks.checkpoint import Interrupted
from vp_rl.callbacks.checkpoint_files import read
from vp_rl.evaluation.images import Evaluator


class Weights(lightning.Callback):
    """The policy's weights after each update."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_train_batch_end(self, trainer: lightning.Trainer, module: PolicyTraining, *_: Any) -> None:
        if trainer.global_step > len(self.seen):
            self.seen.append(module.policy.bias.detach().clone())


def average(updates: list[Tensor], decay: float) -> Tensor:
    """Of weights after each update, in float64."""
    found = torch.zeros_like(updates[0], dtype=torch.float64)
    for number, weights in enumerate(updates, 1):
        kept = min(decay, number / (number + 9)) if number > 1 else 0.0
        found = kept * found + (1 - kept) * weights
    return found.float()


def written(folder: Path) -> Tensor:
    return torch.load(folder / "adapter" / "bias.pt", weights_only=True)


def run(folder: Path, ema: float | None, make: Any = ddpo, **settings: Any) -> tuple[Tensor, list[Tensor]]:
    """The written adapter, and the policy's own weights after each update."""
    weights, policy = Weights(), LinearPolicy()
    fit(make(policy, Counting()), folder / "checkpoints", RunAdapter(ema), weights, default_root_dir=folder, **settings)
    assert torch.equal(policy.bias, weights.seen[-1])  # the average was taken out again
    return written(folder), weights.seen


@pytest.mark.parametrize(("ema", "accumulated"), [(0.3, 1), (0.99, 1), (0.99, 2)])
def test_the_adapter_is_the_moving_average_of_the_updates(ema: float, accumulated: int, tmp_path: Path) -> None:
    found, updates = run(tmp_path, ema, accumulate_grad_batches=accumulated)
    assert len(updates) == 24 // accumulated
    torch.testing.assert_close(found, average(updates, ema), rtol=1e-5, atol=1e-7)
    assert not torch.allclose(found, updates[-1], rtol=1e-3)


@pytest.mark.parametrize("make", [ddpo, refl])
def test_training_is_the_same_with_an_average_and_without(make: Any, tmp_path: Path) -> None:
    """DDPO's images are sampled by the policy that learns from them, so its weights would tell."""
    last, without = run(tmp_path / "without", None, make)
    _, with_average = run(tmp_path / "with", 0.9, make)
    assert torch.equal(last, without[-1])
    assert all(torch.equal(one, other) for one, other in zip(without, with_average, strict=True))


@pytest.mark.parametrize("stop", [6, 9])
@pytest.mark.parametrize("make", [ddpo, refl, partial(ddpo, inner_epochs=2)])
def test_a_stopped_and_resumed_run_has_the_average_of_an_unbroken_one(make: Any, stop: int, tmp_path: Path) -> None:
    unbroken, updates = run(tmp_path / "unbroken", 0.9, make)
    folder = tmp_path / "stopped"
    with pytest.raises(Interrupted):
        fit(make(LinearPolicy(), Counting(kills(stop))), folder, RunAdapter(0.9), default_root_dir=folder)
    before = latest(folder)
    assert 0 < read(before)["global_step"] < len(updates)
    policy = LinearPolicy()
    fit(make(policy, Counting()), folder, RunAdapter(0.9), resume=before, default_root_dir=folder)
    assert torch.equal(policy.bias, updates[-1])
    assert torch.equal(written(folder), unbroken)


def on_two_devices(rank: int, folder: Path) -> None:
    callback, weights = RunAdapter(0.9), Weights()
    fit(
        refl(LinearPolicy(), Counting()),
        folder / "checkpoints",
        callback,
        weights,
        default_root_dir=folder,
        strategy="ddp",
        devices=2,
    )
    torch.save([callback.state_dict(), weights.seen], folder / f"{rank}.pt")


def test_devices_have_one_average(tmp_path: Path) -> None:
    assert two_processes(on_two_devices, tmp_path) == [0, 0]
    (one, updates), (two, _) = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert one["updates"] == two["updates"] == len(updates)
    assert torch.equal(one["weights"][0], two["weights"][0])
    assert torch.equal(written(tmp_path), one["weights"][0])
    torch.testing.assert_close(written(tmp_path), average(updates, 0.9), rtol=1e-5, atol=1e-7)


def test_a_run_whose_end_was_lost_writes_the_average_without_training_again(tmp_path: Path) -> None:
    unbroken, _ = run(tmp_path, 0.9)
    (tmp_path / "adapter" / "bias.pt").unlink()
    last = latest(tmp_path / "checkpoints")
    resumed = tmp_path / "checkpoints"
    fit(ddpo(LinearPolicy(), Counting()), resumed, RunAdapter(0.9), resume=last, default_root_dir=tmp_path)
    assert torch.equal(written(tmp_path), unbroken)


def test_an_average_may_begin_or_end_where_a_run_is_resumed(tmp_path: Path) -> None:
    _, updates = run(tmp_path, None)
    begun = {"resume": tmp_path / "checkpoints" / "epoch-0001.ckpt", "default_root_dir": tmp_path}
    fit(ddpo(LinearPolicy(), Counting()), tmp_path / "on", RunAdapter(0.9), **begun)
    torch.testing.assert_close(written(tmp_path), average(updates[8:], 0.9), rtol=1e-5, atol=1e-7)
    last = {"resume": tmp_path / "on" / "epoch-0002.ckpt", "default_root_dir": tmp_path}
    fit(ddpo(LinearPolicy(), Counting()), tmp_path / "off", RunAdapter(), **last)
    assert torch.equal(written(tmp_path), updates[-1])


def test_an_error_leaves_the_policy_its_own_weights(tmp_path: Path) -> None:
    algorithm, callback = refl(LinearPolicy(), Counting()), RunAdapter(0.9)
    fit(algorithm, tmp_path, callback, default_root_dir=tmp_path)
    own = algorithm.policy.bias.detach().clone()

    def fails() -> None:
        with algorithm.averaged():
            assert not torch.equal(algorithm.policy.bias, own)
            with algorithm.averaged():
                assert torch.equal(algorithm.policy.bias, written(tmp_path))
            assert torch.equal(algorithm.policy.bias, written(tmp_path))
            raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        fails()
    assert torch.equal(algorithm.policy.bias, own)


class Watched(Evaluator):
    """Keeps the shifts that it was shown with the adapter on."""

    def make(self, policy: test_evaluation.Bright, *rest: Any, **settings: Any) -> Any:
        if policy.on:
            self.shown = [*getattr(self, "shown", []), policy.shift.item()]
        return super().make(policy, *rest, **settings)


@pytest.mark.parametrize("best", [None, "reward"])
def test_held_out_evaluations_see_the_average_and_the_best_one_is_one(best: str | None, tmp_path: Path) -> None:
    class Shifts(lightning.Callback):
        def __init__(self) -> None:
            self.own: list[float] = []

        def on_train_batch_end(self, trainer: lightning.Trainer, module: ReFL, *_: Any) -> None:
            self.own.append(module.policy.shift.item())

    tool = Watched(test_evaluation.Prompts(), test_evaluation.BrightnessJudge(), test_evaluation.SAMPLER)
    judge = test_callbacks.HeldOutEvaluation(tool, every=1, small=5, best=best)
    module, shifts = test_callbacks.algorithm(), Shifts()
    test_callbacks.fit(tmp_path, [RunAdapter(0.9), judge, shifts], module=module, epochs=3)
    own, each = [torch.tensor(one) for one in shifts.own], len(shifts.own) // 3
    averages = [average(own[: each * epoch], 0.9).item() for epoch in (1, 2, 3)]
    assert tool.shown == pytest.approx([*averages, averages[-1]], rel=1e-5)
    assert shifts.own[-1] > averages[-1] > averages[0] > 0  # the reward is brightness, so the last average is the best
    for folder in ("adapter", "best") if best else ("adapter",):
        found = torch.load(tmp_path / folder / "shift.pt", weights_only=True).item()
        assert found == pytest.approx(averages[-1], rel=1e-5)
    assert module.policy.shift.item() == shifts.own[-1]


def test_the_best_adapter_takes_the_place_of_the_last_one(tmp_path: Path) -> None:
    """Downhill, the first evaluation is the best; it begins above the base model."""
    module = ReFL(
        test_evaluation.shifted(0.6),
        test_evaluation.Brightness(),
        test_evaluation.SAMPLER,
        partial(torch.optim.SGD, lr=0.5, maximize=True),
        reward_weight=1.0,
    )
    test_callbacks.fit(tmp_path, [RunAdapter(), held_out(every=1, best="reward")], module=module, epochs=2)
    found = torch.load(tmp_path / "adapter" / "shift.pt", weights_only=True).item()
    assert 0.6 > found > module.policy.shift.item()


@pytest.mark.parametrize("ema", [0.0, 1.0, -0.5, 99.0])
def test_a_decay_that_is_none_is_refused(ema: float) -> None:
    with pytest.raises(ValueError, match=r"callbacks\.adapter\.ema=.* must be between 0 and 1"):
        RunAdapter(ema)


def test_only_a_policys_adapter_is_averaged() -> None:
    trainer, module = lightning.Trainer(logger=False, accelerator="cpu"), lightning.LightningModule()
    with pytest.raises(ValueError, match=r"callbacks\.adapter\.ema=0\.9 averages a policy's adapter"):
        RunAdapter(0.9).on_train_start(trainer, module)
    RunAdapter().on_train_start(trainer, module)
    RunAdapter().on_train_end(trainer, module)  # a reward model's run has none to write
