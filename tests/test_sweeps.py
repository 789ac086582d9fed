"""Sweeps: killed and started again they do every job once, however they are run; hopeless jobs are given up."""

import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import lightning
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from test_train import DDPO, ROOT

from scripts.command_line import named
from vp_rl.callbacks.pruning import SweepPruning
from vp_rl.evaluation.job import Job

SWEEPS = sorted(file.stem for file in (ROOT / "conf" / "sweep").glob("*.yaml"))
LAUNCHERS = {"parallel": "joblib", "slurm": "submitit", "ray_gpus": "ray"}  # and what is to be installed for each

# --- a job


def test_a_job_is_done_once(tmp_path: Path) -> None:
    with Job(tmp_path / "3", ["seed=3", "name=a"]) as job:
        assert not job.finished
        job.finish(0.25)
    with Job(tmp_path / "3", ["name=a", "resume=auto", "seed=3"]) as job:
        assert (job.finished, job.objective) == (True, 0.25)


def test_a_job_without_a_value_is_done_once_too(tmp_path: Path) -> None:
    with Job(tmp_path, []) as job:
        job.finish(None)
    with Job(tmp_path, []) as job:
        assert (job.finished, job.objective) == (True, None)


def test_a_job_that_fails_is_done_again(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), Job(tmp_path, ["seed=3"]):
        raise RuntimeError
    with Job(tmp_path, ["seed=3"]) as job:
        assert not job.finished


def test_the_result_of_another_job_is_not_taken(tmp_path: Path) -> None:
    with Job(tmp_path, ["seed=3"]) as job:
        job.finish(0.25)
    for _ in range(2):  # the first refusal must not keep the folder locked
        with pytest.raises(ValueError, match=r"had seed=3, this one has seed=4.*hydra\.sweep\.dir"):
            Job(tmp_path, ["seed=4"]).__enter__()


def test_two_processes_that_do_the_same_job_do_it_once(tmp_path: Path) -> None:
    """As when a killed sweep's workers live on: the second waits, and finds the job done."""
    found: list[bool] = []

    def second() -> None:
        with Job(tmp_path, ["seed=3"]) as job:
            found.append(job.finished)

    with Job(tmp_path, ["seed=3"]) as job:
        other = threading.Thread(target=second)
        other.start()
        time.sleep(0.2)
        assert not found
        job.finish(1.0)
    other.join(timeout=10)
    assert found == [True]


def test_the_other_processes_of_a_job_neither_wait_for_the_main_one_nor_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Job(tmp_path, []) as job:
        with monkeypatch.context() as patch:
            patch.setattr(rank_zero_only, "rank", 1)
            with Job(tmp_path, []) as other:
                other.finish(None)
        assert not (tmp_path / "job.json").exists()
        job.finish(0.25)
    with Job(tmp_path, []) as job:
        assert job.objective == 0.25


# --- a sweep, of jobs that take no time

_APP = """
import os
from pathlib import Path
import hydra
from hydra.core.hydra_config import HydraConfig
from vp_rl.evaluation.job import Job

@hydra.main(version_base="1.3", config_path=None, config_name="app")
def main(config):
    chosen, log = HydraConfig.get(), Path("log.txt")
    with Job(Path(chosen.runtime.output_dir), list(chosen.overrides.task)) as job:
        if not job.finished:
            done = log.read_text().split() if log.exists() else []
            if len(done) == int(os.environ["DIES_AT"]):
                os._exit(9)
            with log.open("a") as file:
                file.write(f"{chosen.job.num}:{config.x}\\n")
            job.finish(-(config.x - 0.3) ** 2)
        return job.objective

main()
"""
_CONFIG = """
x: 0.0
hydra:
  searchpath: [{conf}]
  job: {{chdir: false}}
  sweep: {{dir: sweep}}
"""
NUMBERS = "x=0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8"
TPE = ("x=interval(0,1)", "hydra/sweeper=tpe", "hydra.sweeper.n_trials=8", "hydra.sweeper.sampler.n_startup_trials=3")


def sweep(folder: Path, *arguments: str, dies_at: int = -1) -> list[str]:
    """Starts the sweep in its folder, for the first time or again.

    Returns:
        Number and setting of the jobs that have been done so far, in that order.
    """
    folder.mkdir(exist_ok=True)
    (folder / "app.py").write_text(_APP)
    (folder / "app.yaml").write_text(_CONFIG.format(conf=f"file://{ROOT / 'conf'}"))
    command = [sys.executable, "app.py", "--config-dir=.", "-m", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DIES_AT": str(dies_at)}
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode == 0) == (dies_at < 0), ended.stdout + ended.stderr
    return (folder / "log.txt").read_text().split()


def test_a_sweep_that_was_killed_goes_on_where_it_stopped(tmp_path: Path) -> None:
    broken = sweep(tmp_path, NUMBERS, dies_at=5)
    assert len(broken) == 5
    assert sweep(tmp_path, NUMBERS) == [f"{number}:0.{number + 1}" for number in range(8)]


@pytest.mark.slow
def test_a_sweep_of_jobs_side_by_side_goes_on_where_it_stopped(tmp_path: Path) -> None:
    pytest.importorskip("joblib")
    sweep(tmp_path, NUMBERS, "hydra/launcher=parallel", dies_at=5)
    done = sweep(tmp_path, NUMBERS, "hydra/launcher=parallel")
    assert sorted(done) == [f"{number}:0.{number + 1}" for number in range(8)]


@pytest.mark.slow
def test_a_search_that_was_killed_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """It tells what the finished jobs gave, so it asks for what an unbroken search asks for."""
    pytest.importorskip("optuna")
    sweep(tmp_path / "broken", *TPE, dies_at=5)
    broken, whole = sweep(tmp_path / "broken", *TPE), sweep(tmp_path / "whole", *TPE)
    assert broken == whole
    assert [entry.partition(":")[0] for entry in whole] == list("01234567")
    found = [abs(float(entry.partition(":")[2]) - 0.3) for entry in whole]
    assert min(found[3:]) < min(found[:3]), "it maximises"


# --- presets


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("train", overrides=["experiment=ddpo_vpscore", *overrides], return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    return config


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_says_what_is_swept_and_has_a_folder_that_it_can_go_on_in(name: str) -> None:
    if "tpe" in (ROOT / "conf" / "sweep" / f"{name}.yaml").read_text():
        pytest.importorskip("optuna")
    config = composed(f"sweep={name}")
    assert config.hydra.mode.name == "MULTIRUN"
    assert config.hydra.sweep.dir == f"multirun/ddpo_vpscore/{name}"
    for swept in config.hydra.sweeper.params:
        assert OmegaConf.select(config, swept, default="absent") != "absent", f"{swept} is no setting"
    first = (ROOT / "conf" / "sweep" / f"{name}.yaml").read_text().splitlines()[1]
    assert first == f"# python train.py experiment=ddpo_vpscore sweep={name}"


@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_launcher_preset_composes(name: str) -> None:
    pytest.importorskip(f"hydra_plugins.hydra_{LAUNCHERS[name]}_launcher")
    config = composed(f"hydra/launcher={name}")
    assert LAUNCHERS[name] in config.hydra.launcher._target_


@pytest.fixture(autouse=True)
def _hydra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)


# --- pruning

PEERS = {"0": [0.1, 0.4, 0.5], "1": [0.2, 0.5, 0.6], "2": [0.3, 0.6, 0.7]}  # the medians are 0.2, 0.5, 0.6


def table(folder: Path, values: list[float]) -> None:
    folder.mkdir(parents=True)
    rows = [[-1, 9.0], *enumerate(values)]  # the base model's value is nobody's achievement
    (folder / "metrics.csv").write_text(
        "epoch,held_out/mean_rating\n" + "".join(f"{epoch},{value}\n" for epoch, value in rows)
    )


class Evaluations(lightning.Callback):
    """Logs given values, one an epoch, when `HeldOutEvaluation` does."""

    def __init__(self, values: list[float]) -> None:
        self._values = values

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        module.log("held_out/mean_rating", self._values[trainer.current_epoch])


def epochs_trained(folder: Path, values: list[float], **settings: int) -> int:
    """How far a job with these values gets."""
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=3,
        limit_train_batches=1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Evaluations(values), SweepPruning(str(folder), **({"warmup": 2} | settings))],
    )
    trainer.fit(BoringModel())
    return trainer.current_epoch


@pytest.mark.parametrize(
    ("values", "settings", "expected"),
    [
        ([0.1, 0.45, 0.9], {}, 2),  # below the median after two epochs
        ([0.1, 0.5, 0.6], {}, 3),  # at the median
        ([0.55, 0.1, 0.7], {}, 3),  # its best value counts
        ([0.1, 0.45, 0.9], {"warmup": 3}, 3),  # and is above then
        ([0.1, 0.45, 0.9], {"least": 4}, 3),  # too few to compare with
    ],
)
@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec")
def test_a_job_below_the_median_is_given_up(
    values: list[float], settings: dict[str, int], expected: int, tmp_path: Path
) -> None:
    for name, peer in PEERS.items():
        table(tmp_path / name, peer)
    assert epochs_trained(tmp_path / "3", values, **settings) == expected


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec")
def test_a_job_is_compared_with_those_that_got_as_far(tmp_path: Path) -> None:
    """Two good ones have only begun; a table that is being written is passed over."""
    for name, peer in PEERS.items():
        table(tmp_path / name, peer[:1] if name != "0" else peer)
    table(tmp_path / "4", [])
    (tmp_path / "4" / "metrics.csv").write_text("epoch,held_out/mean_rating\n1,0.")
    with (tmp_path / "4" / "metrics.csv").open("a") as file:
        file.write("9e-")
    assert epochs_trained(tmp_path / "3", [0.1, 0.35, 0.9], least=2) == 3
    assert epochs_trained(tmp_path / "3", [0.1, 0.35, 0.9], least=1) == 2


def test_a_job_that_was_given_up_is_not_trained_on_when_it_is_resumed(tmp_path: Path) -> None:
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    for given_up in (False, True):
        pruning = SweepPruning(str(tmp_path))
        pruning.load_state_dict({"best": 0.1, "given_up": given_up})
        pruning.on_train_start(trainer, BoringModel())
        assert trainer.should_stop == given_up


def test_pruning_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="warmup=0"):
        SweepPruning("", warmup=0)


# --- the real thing


def results(folder: Path) -> dict[str, tuple[int, str]]:
    """What the finished jobs have left: when it was written, and what."""
    files = [folder / job.parent.name / "summary.json" for job in folder.glob("*/job.json")]
    return {file.parent.name: (file.stat().st_mtime_ns, file.read_text()) for file in files}


@pytest.mark.slow
def test_a_sweep_of_eight_killed_at_random_has_eight_results_and_none_done_twice(tmp_path: Path) -> None:
    draw = random.Random(6)
    short = ("trainer.max_epochs=1", "data.batches_per_epoch=1", "evaluation.limit=4", "evaluation.seeds=[0]")
    small = ("callbacks.held_out.small=4", "evaluation.sampler.steps=2")
    words = [*DDPO, *short, *small, "seed=range(8)"]  # no folder: the same words go on
    folder, command = (
        tmp_path / "multirun" / "ddpo_vpscore" / named(words),
        [sys.executable, str(ROOT / "train.py"), "-m"],
    )
    command += words
    until, kills, first, log = 1, 0, {}, tmp_path / "log.txt"
    while until < 8:
        with log.open("a") as output:
            process = subprocess.Popen(command, cwd=tmp_path, stdout=output, stderr=subprocess.STDOUT)
            while process.poll() is None and len(results(folder)) < until:
                time.sleep(0.05)
            assert process.poll() is None, log.read_text()
            time.sleep(draw.uniform(0, 3))  # anywhere in the next job, or the one after
            process.send_signal(signal.SIGKILL)
            process.wait()
        kills, first = kills + 1, {**results(folder), **first}
        until = len(first) + draw.randint(1, 4)
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.splitlines()[-1] == f"results of all jobs: {(folder / 'results.html').relative_to(tmp_path)}"
    assert "nothing to go on from" not in ended.stdout, "nobody has asked for resume=auto"
    after = results(folder)
    assert kills >= 2
    assert set(after) == {str(number) for number in range(8)}
    assert {name: after[name] for name in first} == first
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["seed"] for row in rows] == [str(number) for number in range(8)]
    assert all(re.fullmatch(r"[\d.]+", row["mean_rating"]) for row in rows)
    for name in after:
        final = json.loads(after[name][1])["held_out"]["mean_rating"]["difference"]
        assert json.loads((folder / name / "job.json").read_text())["objective"] == pytest.approx(final, abs=1e-6)
