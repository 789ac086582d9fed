"""Checkpoints: whole or not there, found again, and worth exactly the run that was stopped."""

import csv
import os
import resource
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from fakes import LinearPolicy, QuadraticReward, Words
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.loggers import CSVLogger

from train import _is_finished
from vp_rl.algorithms.base import PolicyTraining
from vp_rl.algorithms.ddpo import DDPO
from vp_rl.algorithms.refl import ReFL
from vp_rl.callbacks.checkpoint import Interrupted, RunCheckpoints
from vp_rl.callbacks.checkpoint_files import AtomicCheckpointIO, differences, newest, read
from vp_rl.data.prompts import PromptDataModule
from vp_rl.interfaces import Reward
from vp_rl.sampler import Sampler
from vp_rl.types import Images, Latents, Scores

NOISY = Sampler(steps=3, guidance=1.0, eta=1.0)
EPOCHS, BATCHES = 3, 4  # of a run here


class Counting(Reward):
    """Likes other images for each prompt, and each time it is asked, of which it keeps count; calls `when` before."""

    differentiable = True

    def __init__(self, when: Callable[[int], None] = lambda call: None) -> None:
        super().__init__()
        self.when, self.calls = when, 0

    def forward(self, images: Images, prompts: list[str]) -> Scores:
        self.calls += 1
        self.when(self.calls)
        liked = 0.2 * self.calls + torch.tensor([float(prompt.split()[-1]) for prompt in prompts])
        return QuadraticReward()(images, prompts) + liked * images.mean((1, 2, 3))

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": self.calls}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]


class Counted(LinearPolicy):
    """Calls `when` before each forward pass that is trained through."""

    def __init__(self, when: Callable[[int], None] = lambda call: None) -> None:
        super().__init__()
        self.when, self.calls = when, 0

    def predict(self, latents: Latents, *rest: Any) -> Latents:
        if torch.is_grad_enabled():
            self.calls += 1
            self.when(self.calls)
        return super().predict(latents, *rest)


def ddpo(policy: LinearPolicy, reward: Reward, **settings: Any) -> DDPO:
    settings = {"images_per_prompt": 4, "train_batch": 24, "clip_range": 0.2} | settings
    return DDPO(policy, reward, NOISY, partial(torch.optim.Adam, lr=0.05), **settings)


def refl(policy: LinearPolicy, reward: Reward) -> ReFL:
    return ReFL(policy, reward, NOISY, partial(torch.optim.Adam, lr=0.05), target=0.0)


def fit(
    algorithm: PolicyTraining, folder: Path, *callbacks: lightning.Callback, resume: Path | None = None, **settings: Any
) -> lightning.Trainer:
    """Three epochs of four batches of prompts, with the real Trainer."""
    checkpoints = {name: settings.pop(name) for name in ("every_n_epochs", "keep", "grace") if name in settings}
    callbacks = (*callbacks, RunCheckpoints(str(folder), **checkpoints))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(callbacks=list(callbacks), **({"max_epochs": EPOCHS} | quiet | settings))
    data = PromptDataModule(Words(), batch_size=4, batches_per_epoch=BATCHES)
    trainer.fit(algorithm, data, ckpt_path=resume, weights_only=True)
    return trainer


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def latest(folder: Path) -> Path:
    """The checkpoint that a resumed run goes on from."""
    found = newest(folder)
    assert found is not None
    return found[0]


def kills(number: int, signum: signal.Signals = signal.SIGTERM) -> Callable[[int], None]:
    """Sends this process a signal at that call."""

    def when(call: int) -> None:
        if call == number:
            os.kill(os.getpid(), signum)

    return when


# --- files


def written(folder: Path, epochs: int = 1) -> Path:
    """A run's checkpoint."""
    fit(refl(LinearPolicy(), QuadraticReward()), folder, max_epochs=epochs)
    return folder / f"epoch-{epochs:04d}.ckpt"


def test_the_last_ones_are_kept_and_hold_all_that_a_run_needs(tmp_path: Path) -> None:
    fit(refl(LinearPolicy(), QuadraticReward()), tmp_path, keep=2)
    assert names(tmp_path) == ["epoch-0002.ckpt", "epoch-0003.ckpt"]
    content = read(tmp_path / "epoch-0003.ckpt")
    assert set(content["state_dict"]) == {"policy.bias"}
    assert set(content["optimizer_states"][0]["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
    assert content["run"] == {"settings": {}, "devices": 1, "stopped": False}


def test_epochs_between_checkpoints_are_a_setting_and_the_last_epoch_has_one(tmp_path: Path) -> None:
    fit(refl(LinearPolicy(), QuadraticReward()), tmp_path, every_n_epochs=2)
    assert names(tmp_path) == ["epoch-0002.ckpt", "epoch-0003.ckpt"]


@pytest.mark.parametrize("settings", [{"keep": 0}, {"every_n_epochs": 0}, {"grace": 0.0}])
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"callbacks\.checkpoint\..*{next(iter(settings))}"):
        RunCheckpoints("folder", **settings)


def test_a_full_disk_leaves_the_older_checkpoint_as_it_was(tmp_path: Path) -> None:
    path, writer = tmp_path / "epoch-0001.ckpt", AtomicCheckpointIO()
    writer.save_checkpoint({"state": torch.ones(3)}, path)
    before, (soft, hard) = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the kernel then refuses to write, as a full disk does
    try:
        with pytest.raises(OSError, match=r"epoch-0001\.ckpt could not be written \(.*\)\. Earlier ones are intact"):
            writer.save_checkpoint({"state": torch.ones(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert names(tmp_path) == ["epoch-0001.ckpt"]


def test_a_checkpoint_has_its_name_only_when_all_of_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (order.append("fsync"), fsync(number)))
    monkeypatch.setattr(os, "replace", lambda old, new: (order.append(Path(new).name), replace(old, new)))
    AtomicCheckpointIO().save_checkpoint({"a": 1}, tmp_path / "a.ckpt")
    assert order == ["fsync", "a.ckpt", "fsync"]  # the file, the name, the folder


def test_a_run_removes_what_a_killed_one_left_half_written(tmp_path: Path) -> None:
    (tmp_path / ".epoch-0001.ckpt.123.tmp").write_bytes(b"half")
    written(tmp_path)
    assert names(tmp_path) == ["epoch-0001.ckpt"]


def test_whoever_chose_how_checkpoints_are_written_keeps_it(tmp_path: Path) -> None:
    class Own(TorchCheckpointIO):
        pass

    for chosen, expected in (([Own()], Own), ([], AtomicCheckpointIO)):
        trainer = fit(refl(LinearPolicy(), QuadraticReward()), tmp_path, max_epochs=1, plugins=chosen)
        assert type(trainer.strategy.checkpoint_io) is expected


def test_damaged_and_foreign_files_are_skipped_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = written(tmp_path)
    content = bytearray(good.read_bytes())
    (tmp_path / "epoch-0005.ckpt").write_bytes(content[: len(content) // 2])
    content[len(content) // 3] ^= 1  # one bit, which torch would read
    (tmp_path / "epoch-0004.ckpt").write_bytes(content)
    torch.save({"state_dict": {}}, tmp_path / "epoch-0003.ckpt")
    (tmp_path / "epoch-0002.ckpt").write_text("not a checkpoint")
    caplog.clear()
    found = newest(tmp_path)
    assert found is not None
    assert found[0] == good
    assert all(any(f"epoch-000{number}.ckpt" in said for said in caplog.messages) for number in (2, 3, 4, 5))
    assert len(caplog.messages) == 4


def test_a_folder_without_a_checkpoint_has_no_newest_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert newest(tmp_path / "absent") is None
    (tmp_path / "epoch-0001.ckpt").write_bytes(b"")
    assert newest(tmp_path) is None
    assert "none of the 1 checkpoints" in caplog.messages[-1]


def test_the_newest_checkpoint_is_the_one_furthest_on(tmp_path: Path) -> None:
    content = written(tmp_path / "run").read_bytes()
    for name in ("last", "epoch-0010", "epoch-0009-batch-0011", "epoch-0010-batch-0002", "epoch-0002"):
        (tmp_path / f"{name}.ckpt").write_bytes(content)
    assert latest(tmp_path).name == "epoch-0010-batch-0002.ckpt"


# --- settings

SETTINGS = {
    "seed": 0,
    "sampler": {"steps": 10},
    "policy": {"path": "tiny-sd", "lora": {"r": 16}, "gradient_checkpointing": False},
    "algorithm": {"policy": {"lora": {"r": 16}}, "optimizer": {"lr": 1e-3}, "decay": False, "seed": 0},
    "trainer": {"max_epochs": 2, "devices": 1, "precision": "32-true", "gradient_clip_val": 1.0},
    "logger": {"csv": {"save_dir": "a"}},
    "evaluation": {"limit": 128},
}


def changed(name: str, value: Any) -> dict[str, Any]:
    def put(node: dict[str, Any], keys: list[str]) -> dict[str, Any]:
        return node | {keys[0]: put(node.get(keys[0], {}), keys[1:]) if keys[1:] else value}

    return put(SETTINGS, name.split("."))


@pytest.mark.parametrize("name", ["trainer.max_epochs", "logger.csv.save_dir", "evaluation.limit", "callbacks.note"])
def test_how_long_and_how_watched_a_run_is_may_change(name: str) -> None:
    assert differences(SETTINGS, changed(name, 7), DDPO) == ([], [])


@pytest.mark.parametrize("name", ["trainer.devices", "trainer.precision", "policy.gradient_checkpointing"])
def test_what_only_rounds_otherwise_may_change_with_a_word(name: str) -> None:
    fixed, rounding = differences(SETTINGS, changed(name, 7), DDPO)
    assert fixed == []
    assert len(rounding) == 1
    assert rounding[0].startswith(f"{name}=7, was ")


@pytest.mark.parametrize(
    "name",
    ["seed", "sampler.steps", "algorithm.optimizer.lr", "trainer.gradient_clip_val", "policy.path", "reward.new"],
)
def test_what_is_learned_must_stay_and_is_named_with_both_values(name: str) -> None:
    fixed, _ = differences(SETTINGS, changed(name, 7), DDPO)
    assert len(fixed) == 1
    assert fixed[0].startswith(f"{name}=7, was ")


DEALT = SETTINGS | {
    "algorithm": SETTINGS["algorithm"] | {"train_batch": 8},
    "data": {"batch_size": 8, "devices_per_prompt": 1, "images_per_batch": 16, "batches_per_epoch": 10},
    "trainer": SETTINGS["trainer"] | {"num_nodes": 1, "accumulate_grad_batches": 1},
    "geometry": {"images_per_update": None, "updates": 1},
}


def dealt(base: dict[str, Any] = DEALT, **now: Any) -> list[str]:
    """The names of what must not change, of a run on other devices."""
    other = {group: dict(settings) if isinstance(settings, dict) else settings for group, settings in base.items()}
    for name, value in now.items():
        group, _, key = name.partition("__")
        other[group][key] = value
    return [line.partition("=")[0] for line in differences(base, other, DDPO)[0]]


def test_what_devices_do_may_change_with_their_number_if_all_together_do_the_same() -> None:
    halves = {"data__batch_size": 4, "data__images_per_batch": 8, "algorithm__train_batch": 4}
    assert dealt(**halves, trainer__devices=2) == []
    assert dealt(**halves, trainer__num_nodes=2) == []
    assert dealt(algorithm__train_batch=4, trainer__accumulate_grad_batches=2) == []
    assert dealt(**halves) == ["algorithm.train_batch", "data.batch_size", "data.images_per_batch"]
    assert dealt(data__batch_size=4, trainer__devices=2) == ["data.batch_size"]  # other updates
    assert dealt(data__batch_size=4, trainer__devices="auto") == ["data.batch_size"]
    assert dealt(data__devices_per_prompt=2) == ["data.devices_per_prompt"]


def test_a_run_whose_geometry_is_stated_may_be_dealt_out_otherwise() -> None:
    stated = DEALT | {"geometry": {"images_per_update": 128, "updates": 1}}
    now = {"data__batch_size": 4, "algorithm__train_batch": 3, "trainer__devices": "auto"}
    assert dealt(stated, **now) == []
    assert "data.batch_size" in dealt(stated, **now, geometry__updates=2)


def test_a_setting_that_is_interpolated_into_others_is_named_once_where_it_is_set() -> None:
    now = changed("policy.lora.r", 4)
    now["algorithm"] = now["algorithm"] | {"policy": {"lora": {"r": 4}}}
    assert differences(SETTINGS, now, DDPO)[0] == ["policy.lora.r=4, was 16"]


def test_a_falling_learning_rate_ties_a_run_to_its_length() -> None:
    before, now = (changed("trainer.max_epochs", epochs) for epochs in (2, 4))
    for settings in (before, now):
        settings["algorithm"] = settings["algorithm"] | {"decay": True}
    assert differences(before, now, DDPO)[0] == ["trainer.max_epochs=4, was 2"]


# --- signals: where a run is stopped, and that it loses nothing


def unbroken(make: Callable[..., PolicyTraining], folder: Path) -> torch.Tensor:
    policy = LinearPolicy()
    fit(make(policy, Counting()), folder)
    return policy.bias.detach()


def resumed(make: Callable[..., PolicyTraining], folder: Path) -> torch.Tensor:
    policy = LinearPolicy()
    found = newest(folder)
    fit(make(policy, Counting()), folder, resume=found[0] if found else None)
    return policy.bias.detach()


two_passes = partial(ddpo, inner_epochs=2)


@pytest.mark.parametrize(
    ("make", "stop", "last"),
    [
        (ddpo, 6, "epoch-0001-batch-0002.ckpt"),  # the round is broken off: the one before is the second epoch's first
        (ddpo, 5, "epoch-0001.ckpt"),  # before the second epoch's first round is done
        (two_passes, 7, "epoch-0001-batch-0008.ckpt"),
        (refl, 6, "epoch-0001-batch-0002.ckpt"),  # the update is finished
        (refl, 8, "epoch-0002.ckpt"),  # and the epoch, if it is the last one
    ],
)
def test_a_run_stopped_while_images_are_scored_keeps_all_its_updates(
    make: Callable[..., PolicyTraining], stop: int, last: str, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted) as stopped:
        fit(make(LinearPolicy(), Counting(kills(stop))), tmp_path / "run")
    assert stopped.value.code == 128 + signal.SIGTERM
    assert latest(tmp_path / "run").name == last
    assert torch.equal(resumed(make, tmp_path / "run"), unbroken(make, tmp_path / "whole"))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_run_stopped_in_an_update_finishes_its_round(signum: signal.Signals, tmp_path: Path) -> None:
    with pytest.raises(Interrupted) as stopped:
        fit(two_passes(Counted(kills(9, signum)), Counting()), tmp_path / "run")  # third round: updates 9 to 12
    assert stopped.value.code == 128 + signum
    assert names(tmp_path / "run") == ["epoch-0000-batch-0012.ckpt"]
    assert torch.equal(resumed(two_passes, tmp_path / "run"), unbroken(two_passes, tmp_path / "whole"))


def test_a_signal_is_not_passed_on_to_a_run_that_is_over(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGUSR1, signal.SIG_DFL)  # which would end the process
    try:
        fit(refl(LinearPolicy(), Counting()), tmp_path / "first")  # jobs of a sweep follow each other in one process
        with pytest.raises(Interrupted) as stopped:
            fit(two_passes(Counted(kills(9, signal.SIGUSR1)), Counting()), tmp_path / "second")
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert stopped.value.code == 128 + signal.SIGUSR1
    assert names(tmp_path / "second") == ["epoch-0000-batch-0012.ckpt"]


def test_accumulated_gradients_are_not_lost(tmp_path: Path) -> None:
    def accumulating(policy: LinearPolicy, reward: Reward, folder: Path, resume: Path | None = None) -> None:
        fit(ddpo(policy, reward, train_batch=12), folder, resume=resume, accumulate_grad_batches=2)

    whole, second = LinearPolicy(), LinearPolicy()
    with pytest.raises(Interrupted):
        # A round is 3 micro-batches, an update 2: the run can be stopped after 6 of an epoch's 12.
        accumulating(LinearPolicy(), Counting(kills(2)), tmp_path / "run")
    assert names(tmp_path / "run") == ["epoch-0000-batch-0006.ckpt"]
    accumulating(second, Counting(), tmp_path / "run", latest(tmp_path / "run"))
    accumulating(whole, Counting(), tmp_path / "whole")
    assert torch.equal(second.bias, whole.bias)


def test_a_run_stopped_before_it_has_learned_anything_leaves_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Interrupted):
        fit(ddpo(LinearPolicy(), Counting(kills(1))), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert "stopped by SIGTERM; there was nothing to keep yet" in caplog.messages


def test_a_run_that_does_not_get_there_in_time_goes_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def stuck(call: int) -> None:
        kills(5)(call)
        if call == 5:
            time.sleep(30)

    started = time.monotonic()
    with pytest.raises(Interrupted) as stopped:
        fit(two_passes(Counted(stuck), Counting()), tmp_path / "run", grace=0.1)
    assert time.monotonic() - started < 20
    assert stopped.value.code == 128 + signal.SIGTERM
    assert not (tmp_path / "run").exists()
    assert any("callbacks.checkpoint.grace=0.1" in said for said in caplog.messages)


def test_who_presses_control_c_twice_does_not_want_to_wait(tmp_path: Path) -> None:
    def twice(call: int) -> None:
        if call == 5:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    policy = Counted(twice)
    with pytest.raises(Interrupted) as stopped:
        fit(two_passes(policy, Counting()), tmp_path / "run")
    assert stopped.value.code == 130
    assert policy.calls == 5
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("algorithm", "last"),
    [
        (lambda: refl(Counted(kills(2, signal.SIGUSR1)), Counting()), "epoch-0000-batch-0002.ckpt"),  # in an update
        (lambda: ddpo(LinearPolicy(), Counting(kills(6, signal.SIGUSR1))), "epoch-0001-batch-0002.ckpt"),  # in a round
    ],
)
def test_a_handler_that_requeues_the_job_is_called_when_the_checkpoint_is_there(
    algorithm: Callable[[], PolicyTraining], last: str, tmp_path: Path
) -> None:
    found = []
    before = signal.signal(signal.SIGUSR1, lambda *_: found.append(latest(tmp_path).name))  # as Lightning's under SLURM
    try:
        with pytest.raises(Interrupted):
            fit(algorithm(), tmp_path)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert found == [last]


def test_signals_do_after_a_run_what_they_did_before(tmp_path: Path) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda signum, _: heard.append(signum))
    try:
        written(tmp_path)
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]


# --- resumed runs


class Watch(lightning.Callback):
    """What was called, with the trainer's epoch."""

    def __init__(self, takes: float = 0.0) -> None:
        self.calls: list[tuple[str, int]] = []
        self.takes = takes  # seconds at the end

    def on_train_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        self.calls.append(("start", trainer.current_epoch))

    def on_train_epoch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        self.calls.append(("epoch", trainer.current_epoch))

    def on_train_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        self.calls.append(("end", trainer.current_epoch))
        time.sleep(self.takes)


class Stop(lightning.Callback):
    """Has seen enough after two epochs."""

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch == 1


def test_a_run_that_stopped_before_its_last_epoch_is_finished_once_it_is_evaluated(tmp_path: Path) -> None:
    fit(refl(LinearPolicy(), QuadraticReward()), tmp_path / "checkpoints", Stop())
    watched: dict[str, Any] = {"trainer": {"max_epochs": EPOCHS}, "callbacks": {"held_out": {"every": 1}}}
    begun, stopped = ((path := tmp_path / "checkpoints" / f"epoch-000{n}.ckpt", read(path)) for n in (1, 2))
    assert not _is_finished(*stopped, watched)
    assert _is_finished(*stopped, watched | {"callbacks": {"held_out": None}})
    (tmp_path / "summary.json").write_text("{}")
    assert _is_finished(*stopped, watched)
    assert not _is_finished(*begun, watched)


def test_a_run_killed_after_its_last_epoch_is_finished(tmp_path: Path) -> None:
    path, watch = written(tmp_path, EPOCHS), Watch()
    policy = LinearPolicy()
    fit(refl(policy, QuadraticReward()), tmp_path, watch, resume=path)
    assert watch.calls == [("start", EPOCHS), ("end", EPOCHS)]
    assert policy.bias.any()


def test_a_run_stopped_in_its_last_epoch_leaves_the_last_evaluation_to_the_resumed_one(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(Interrupted) as stopped:
        fit(refl(LinearPolicy(), Counting(kills(EPOCHS * BATCHES))), tmp_path, Watch(takes=30))
    assert time.monotonic() - started < 20
    assert stopped.value.code == 128 + signal.SIGTERM
    assert latest(tmp_path).name == f"epoch-{EPOCHS:04d}.ckpt"


def test_a_run_stopped_at_an_epochs_end_has_logged_that_epoch(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    with pytest.raises(Interrupted):
        fit(refl(LinearPolicy(), Counting(kills(2 * BATCHES))), tmp_path / "run", logger=logger, log_every_n_steps=1)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file) if row["train/reward"]] == ["0", "1"]


def test_a_run_resumed_within_an_epoch_opens_it_for_everybody(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        fit(refl(LinearPolicy(), Counting(kills(6))), tmp_path)
    watch = Watch()
    fit(refl(LinearPolicy(), Counting()), tmp_path, watch, resume=latest(tmp_path))
    assert watch.calls == [("start", 1), ("epoch", 1), ("epoch", 2), ("end", 3)]


def test_another_number_of_devices_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written(tmp_path)
    content = torch.load(path, weights_only=True)
    content["run"]["devices"] = 8
    torch.save(content, path)
    fit(refl(LinearPolicy(), QuadraticReward()), tmp_path, resume=path, max_epochs=2)
    assert any("was on 8 devices and goes on with 1" in said for said in caplog.messages)
