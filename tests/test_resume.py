"""Whole runs that are killed, stopped and resumed: what they end with is what an unbroken one ends with, bit by bit."""

import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from test_train import DDPO, ROOT, TINY, epochs, is_equal, run, start, train, trained

from vp_rl.callbacks.checkpoint_files import newest, read

pytestmark = pytest.mark.slow

EPOCHS = 6
SHORT = (
    f"trainer.max_epochs={EPOCHS}",
    "data.batches_per_epoch=2",
    "evaluation.seeds=[0]",
    "evaluation.sampler.steps=2",
    "callbacks.checkpoint.keep=10",
    "callbacks.held_out.best=null",  # the result is the last adapter: it shows whatever went wrong on the way
    "callbacks.held_out.patience=null",
)
ALONE = tuple(name for name in TINY if "images_per_prompt" not in name)  # each image for itself
REFL = ("experiment=refl_vpscore", "algorithm.decay=false", *ALONE)
_pairs = tempfile.TemporaryDirectory(prefix="pairs-")  # a set that the first run builds
PAIRS = (
    f"data.folder={_pairs.name}/set",
    "data.builder.images_per_prompt=3",
    "prompts.train=16",
    "prompts.validation=8",
    "prompts.test=8",
)
RUNS = {
    "ddpo": (*DDPO, *SHORT),
    "refl": (*REFL, *SHORT, "data.batch_size=4"),
    "draft": ("experiment=draft_vpscore", "algorithm.decay=false", *ALONE, *SHORT, "algorithm.last_steps=2"),
    "flow_bp": ("experiment=flow_bp_vpscore", "algorithm.decay=false", *ALONE, *SHORT, "algorithm.active_steps=2"),
    "nft": ("experiment=nft_vpscore", "algorithm.decay=false", *TINY, *SHORT, "algorithm.train_batch=6"),
    "awm": ("experiment=awm_vpscore", "algorithm.decay=false", *TINY, *SHORT, "algorithm.train_batch=6"),
    "dpo": (
        *("experiment=dpo_visionprefer", "algorithm.decay=false", *ALONE, *PAIRS),
        *(name for name in SHORT if "batches_per_epoch" not in name),
    ),
}
KILLED = [(kind, seed) for kind in RUNS for seed in (range(6) if kind in ("ddpo", "refl") else (0, 5))]


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run of that kind that nobody disturbed; each is made once."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = train(tmp_path_factory.mktemp(kind) / "run", *RUNS[kind])
        return made[kind]

    return make


def checkpoint(folder: Path, number: int) -> Path:
    return folder / "checkpoints" / f"epoch-{number:04d}.ckpt"


def seconds_an_epoch(folder: Path) -> float:
    first, last = (checkpoint(folder, number).stat().st_mtime for number in (1, EPOCHS))
    return (last - first) / (EPOCHS - 1)


def stop(folder: Path, kind: str, signum: signal.Signals, when: Callable[[], bool], after: float = 0.0) -> int:
    """Starts a run, sends it a signal some time after `when` is true, and gives its exit code."""
    process = start(*RUNS[kind], f"hydra.run.dir={folder}")
    deadline = time.monotonic() + 300
    while not when() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.0005)
    time.sleep(after)
    process.send_signal(signum)
    process.communicate(timeout=300)
    return process.returncode


def has_begun(folder: Path) -> bool:
    log = folder / "train.log"
    return log.is_file() and "self-test" in log.read_text()


@pytest.mark.parametrize(("kind", "seed"), KILLED)
def test_a_run_killed_at_any_moment_ends_as_an_unbroken_one(
    kind: str, seed: int, unbroken: Callable[[str], Path], tmp_path: Path
) -> None:
    """In sampling, scoring or backward, as it happens; the last one of each kind while a checkpoint is written."""
    whole, folder, chance = unbroken(kind), tmp_path / "killed", random.Random(f"{kind}{seed}")
    number, after = chance.randrange(EPOCHS - 1), chance.random() * seconds_an_epoch(whole)
    number = max(number, kind == "dpo")  # it has no self-test by which its beginning is known

    def is_reached() -> bool:
        if seed == 5:
            return any((folder / "checkpoints").glob(".epoch-000[2-5]*.tmp"))
        return checkpoint(folder, number).exists() if number else has_begun(folder)

    code = stop(folder, kind, signal.SIGKILL, is_reached, after if seed < 5 else 0.0)
    assert code == -signal.SIGKILL
    assert not (folder / "summary.json").exists()
    before = newest(folder / "checkpoints")
    train(folder, *RUNS[kind], "resume=auto")
    assert is_equal(folder, whole)
    if before is not None:  # it did not begin anew
        assert trained(folder, EPOCHS).count(1) <= 1
        assert f"going on from {before[0]}" in (folder / "train.log").read_text()


@pytest.mark.parametrize("kind", RUNS)
def test_a_scheduler_that_ends_a_run_gets_a_checkpoint_in_time_and_an_exit_code_it_knows(
    kind: str, unbroken: Callable[[str], Path], tmp_path: Path
) -> None:
    whole, folder = unbroken(kind), tmp_path / "stopped"
    started = time.monotonic()
    half = seconds_an_epoch(whole) / 2
    code = stop(folder, kind, signal.SIGTERM, lambda: checkpoint(folder, 2).exists(), half)
    assert time.monotonic() - started < 300
    assert code == 128 + signal.SIGTERM
    log = (folder / "train.log").read_text()
    assert "stopped by SIGTERM; resume=auto goes on from" in log
    assert "Traceback" not in log
    train(folder, *RUNS[kind], "resume=auto")
    assert is_equal(folder, whole)
    assert epochs(folder) == list(range(EPOCHS))


def judge(folder: Path) -> dict[str, int]:
    """What the held-out judge was asked, and what it had answered before."""
    return json.loads((folder / "summary.json").read_text())["judge"]["images by themselves"]


def test_a_run_stopped_in_its_last_evaluation_still_gets_its_report(
    unbroken: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(unbroken("refl"), folder)
    for left in ("summary.json", "report.html", "adapter/pytorch_lora_weights.safetensors"):
        (folder / left).unlink()
    train(folder, *RUNS["refl"], "resume=auto")
    assert is_equal(folder, unbroken("refl"))
    assert (folder / "summary.json").read_text().count(f'"epochs": {EPOCHS}') == 1
    assert (folder / "report.html").stat().st_size > 10_000
    before, after = judge(unbroken("refl")), judge(folder)
    assert before["kept"] == 0
    assert after["kept"] > 0
    assert after["questions"] < before["questions"], "what was asked until the last checkpoint, and nothing since"


def test_a_run_goes_on_in_another_folder_with_its_metrics(unbroken: Callable[[str], Path], tmp_path: Path) -> None:
    """From a checkpoint that is named; with more epochs, which is no other run; the metrics of before come along."""
    whole = unbroken("refl")
    folder = train(tmp_path / "on", *RUNS["refl"], f"trainer.max_epochs={EPOCHS + 1}", f"resume={whole}")
    assert epochs(folder) == list(range(EPOCHS + 1))
    assert trained(folder, EPOCHS + 1) == [EPOCHS + 1]
    assert not is_equal(folder, whole)
    assert judge(folder)["kept"] > 0, "the answers of before come along, too"


def test_a_run_with_other_settings_is_refused_by_their_names(unbroken: Callable[[str], Path], tmp_path: Path) -> None:
    whole = unbroken("refl")
    code, text = run(*RUNS["refl"], "sampler.steps=4", "seed=1", f"resume={whole}", f"hydra.run.dir={tmp_path}")
    assert code == 1
    assert "sampler.steps=4, was 3" in text
    assert "seed=1, was 0" in text
    assert "policy" not in text
    assert "Traceback" not in text


def test_a_new_run_does_not_spoil_the_folder_of_another(unbroken: Callable[[str], Path]) -> None:
    code, text = run(*RUNS["refl"], f"hydra.run.dir={unbroken('refl')}")
    assert code == 1
    assert "resume=auto" in text
    assert read(checkpoint(unbroken("refl"), EPOCHS))


def test_auto_without_a_folder_goes_on_with_the_newest_unfinished_run(
    unbroken: Callable[[str], Path], tmp_path: Path
) -> None:
    """As a job that a scheduler starts again and again with one and the same command."""
    stopped = tmp_path / "outputs" / "refl_vpscore" / "2026-01-01_00-00-00"
    shutil.copytree(unbroken("refl"), stopped)
    for number in range(4, EPOCHS + 1):
        checkpoint(stopped, number).unlink()
    command = [sys.executable, str(ROOT / "train.py"), *RUNS["refl"], "resume=auto"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    [folder] = [run for run in stopped.parent.iterdir() if run != stopped]
    assert f"going on from {checkpoint(stopped, 3)}" in (folder / "train.log").read_text()
    assert is_equal(folder, unbroken("refl"))
