"""The command line: what it refuses and how it says so, and what a run leaves behind."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
EXPERIMENTS = sorted(file.stem for file in (ROOT / "conf" / "experiment").glob("*.yaml"))
REWARD = "reward.checkpoint=tiny-blip"  # there whatever has been trained
TINY = (
    "algorithm.images_per_prompt=4",
    "data.batch_size=2",
    "sampler.steps=3",
    "evaluation.limit=6",
    "trainer=cpu",
    REWARD,
)
# Runs here are stopped by a smaller max_epochs, over which a falling rate would fall faster.
# They are too short to beat the base model, and leave their last adapter all the same.
LAST = ("callbacks.held_out.best=null", "callbacks.held_out.patience=null")
DDPO = ("experiment=ddpo_vpscore", "algorithm.decay=false", *LAST, *TINY)


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "train.py", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(*arguments: str) -> tuple[int, str]:
    """Exit status of `python train.py`, and what it says."""
    process = start(*arguments)
    text, _ = process.communicate(timeout=600)
    return process.returncode, text


def train(folder: Path, *arguments: str) -> Path:
    """A run that must succeed, in its folder."""
    code, text = run(*arguments, f"hydra.run.dir={folder}")
    assert code == 0, text
    return folder


# --- refusals

TEXT = "pyproject.toml"  # a text file
REFUSED = {
    "experiment=typo": r"^error: there is no experiment=typo, .*There are: awm_vpscore, ddpo_vpscore, ",
    "experiment=ddpo_vpscore policy.path=/nonexistent": r"^error: policy\.path='/nonexistent' is neither .*'tiny-sd'",
    f"experiment=ddpo_vpscore reward.checkpoint={TEXT}": rf"^error: reward\.checkpoint='{TEXT}' is a file; it must be",
    "experiment=ddpo_vpscore algorithm.clip_rnge=1": r"'algorithm\.clip_rnge'\. Did you mean .*clip_range\?$",
    f"experiment=ddpo_vpscore resume=/nonexistent.ckpt {REWARD}": r"^error: resume='/nonexistent\.ckpt'.* no such",
    f"callbacks.guards.on_nonfinite=ignore trainer=cpu {REWARD}": r"^error: .*callbacks\.guards\.on_nonfinite='ignore'",
    "data.batch_size=0": r"^error: data\.batch_size=0 must be a whole number from 1 to \d+\.$",
    "prompts=file prompts.path=/nonexistent": r"^error: No prompt file at '/nonexistent'",
    f"experiment=ddpo_vpscore sampler.eta=0 {REWARD}": r"^error: No sampling step .*raise sampler\.eta\.$",
    f"resume={TEXT} trainer=cpu evaluation.limit=1 {REWARD}": r"^error: .*resume='pyproject\.toml'",
    "prompts=file": r"^error: .*prompts\.path",
    f"algorithm.train_batch=0 trainer=cpu {REWARD}": r"^error: .*algorithm\.train_batch=0",
    f"algorithm=reward_model trainer=cpu {REWARD}": r"^error: .*data=preferences",
    f"evaluation.split=tset {REWARD}": r"^error: .*evaluation\.split='tset'",
    "data.batch_size=abc": r"^error: .*data\.batch_size='?abc",
    "experiment=ddpo_vpscore trainer.max_epochs=three": r"^error: trainer\.max_epochs='three' must be a number",
    "experiment=ddpo_vpscore trainer.max_epochs=0": r"^error: trainer\.max_epochs=0 trains nothing: ",
    "experiment=ddpo_vpscore trainer.max_epoch=3": r"'trainer\.max_epoch'\. Did you mean trainer\.max_epochs\?$",
    f"experiment=ddpo_vpscore resume=a/checkpoints/epoch=0001.ckpt {REWARD}": r"^error: resume='a/.*/epoch=0001\.ckpt'",
}

# Importing torch and what is built on it takes five seconds: the cases are children of one process that has done so.
_TOGETHER = """
import gc, os, runpy, sys
import lightning, vp_rl.algorithms.ddpo, vp_rl.callbacks.held_out, vp_rl.data.prompts, vp_rl.policies.sd
from hydra.core.plugins import Plugins
Plugins.instance()
gc.freeze()  # or each child would spend seconds on tidying up
folder, *cases = sys.argv[1:]
for number, case in enumerate(cases):
    if (child := os.fork()) == 0:
        output = os.open(f"{folder}/{number}.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1), os.dup2(output, 2)
        sys.argv = ["train.py", *case.split(), "name=refused", f"hydra.run.dir={folder}/{number}"]
        runpy.run_path("train.py", run_name="__main__")
        sys.exit()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    open(f"{folder}/{number}.code", "w").write(str(status))
"""


@pytest.fixture(scope="session")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Exit status of each command line, and what it says."""
    folder, cases = tmp_path_factory.mktemp("refusals"), ["--help", *REFUSED]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", _TOGETHER, str(folder), *cases], cwd=ROOT, env=environment, check=True)
    return {
        case: (int((folder / f"{number}.code").read_text()), (folder / f"{number}.txt").read_text())
        for number, case in enumerate(cases)
    }


def check_refusal(code: int, text: str, said: str) -> None:
    """One message that a user can act on."""
    assert code == 1, text
    assert "Traceback" not in text
    assert re.search(said, text, re.MULTILINE), text
    assert text.count("error:") <= 1
    assert len([line for line in text.splitlines() if line.strip()]) <= 15


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_in_one_message(refusals: dict[str, tuple[int, str]], case: str) -> None:
    check_refusal(*refusals[case], REFUSED[case])


def test_a_mistyped_experiment_is_answered_with_those_there_are(refusals: dict[str, tuple[int, str]]) -> None:
    assert set(EXPERIMENTS) <= set(re.findall(r"\w+", refusals["experiment=typo"][1]))


def test_help_says_which_experiments_there_are_and_how_to_run_them(refusals: dict[str, tuple[int, str]]) -> None:
    code, text = refusals["--help"]
    assert code == 0
    assert "Traceback" not in text
    for experiment in EXPERIMENTS:
        assert f"python train.py experiment={experiment}" in text


@pytest.mark.slow
@pytest.mark.parametrize("case", list(REFUSED)[:4])
def test_a_process_of_its_own_refuses_in_the_same_words(case: str, tmp_path: Path) -> None:
    check_refusal(*run(*case.split(), f"hydra.run.dir={tmp_path}"), REFUSED[case])


# --- runs


@pytest.mark.slow
def test_runs_that_a_shell_loop_begins_at_once_share_no_folder(tmp_path: Path) -> None:
    short = ("trainer.max_epochs=1", "data.batches_per_epoch=1", "callbacks.held_out=null")
    command = [sys.executable, str(ROOT / "train.py"), *DDPO, *short]
    both = [subprocess.Popen([*command, f"seed={seed}"], cwd=tmp_path, stdout=subprocess.DEVNULL) for seed in (0, 1)]
    assert [process.wait(timeout=600) for process in both] == [0, 0]
    folders = sorted((tmp_path / "outputs" / "ddpo_vpscore").iterdir())
    seeds = [(folder / ".hydra" / "overrides.yaml").read_text().partition("seed=")[2].strip() for folder in folders]
    assert sorted(seeds) == ["0", "1"]
    assert [epochs(folder) for folder in folders] == [[0], [0]]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "pytorch_lora_weights.safetensors")


def is_equal(first: Path, second: Path) -> bool:
    """Whether two runs ended with the same adapter, bit by bit."""
    one, other = adapter(first), adapter(second)
    assert one.keys() == other.keys()
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def epochs(folder: Path) -> list[int]:
    """The epochs whose training metrics are in the table, counted from 0."""
    with (folder / "metrics.csv").open() as file:
        return [int(row["epoch"]) for row in csv.DictReader(file) if row.get("train/reward") or row.get("train/loss")]


def trained(folder: Path, of: int) -> list[int]:
    """The epochs that a run of so many said it had trained, counted from 1; interrupted runs add to the same log."""
    return [int(number) for number in re.findall(rf"epoch (\d+)/{of} ", (folder / "train.log").read_text())]


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unbroken run of two epochs."""
    return train(tmp_path_factory.mktemp("whole") / "run", *DDPO, "trainer.max_epochs=2")


def check_run_folder(folder: Path) -> None:
    left = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    expected = {"report.html", "adapter/pytorch_lora_weights.safetensors", "metrics.csv", "summary.json"}
    assert expected | {"checkpoints/epoch-0002.ckpt", ".hydra/config.yaml", ".hydra/overrides.yaml"} <= left
    assert any(file.startswith("samples/") and file.endswith(".png") for file in left)
    assert epochs(folder) == [0, 1]
    assert json.loads((folder / "summary.json").read_text())["epochs"] == 2
    assert (folder / "report.html").stat().st_size > 10_000
    assert any(tensor.any() for name, tensor in adapter(folder).items() if "up" in name or "lora_B" in name)
    checkpoint = torch.load(folder / "checkpoints" / "epoch-0002.ckpt", weights_only=True)
    assert checkpoint["global_step"] >= 2
    assert all("lora" in name for name in checkpoint["state_dict"])


@pytest.mark.slow
def test_a_run_leaves_everything_that_is_taken_from_it(whole: Path) -> None:
    check_run_folder(whole)


@pytest.mark.slow
def test_a_run_by_the_rewards_gradient_leaves_the_same(tmp_path: Path) -> None:
    settings = [setting for setting in TINY if not setting.startswith("algorithm.")]
    check_run_folder(train(tmp_path / "run", "experiment=refl_vpscore", *settings, "trainer.max_epochs=2"))


@pytest.mark.slow
def test_a_sweep_leaves_one_table_with_a_row_for_each_run(tmp_path: Path) -> None:
    words = (*DDPO, "trainer.max_epochs=1", "algorithm.optimizer.lr=1e-4,3e-3")
    command = [sys.executable, str(ROOT / "train.py"), "-m", *words]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    [folder] = (tmp_path / "multirun" / "ddpo_vpscore").iterdir()
    header, rule, *rows = (folder / "results.md").read_text().splitlines()
    cells = [dict(zip(header.split(" | "), row.split(" | "), strict=True)) for row in rows]
    assert set(rule) <= set("| -")
    assert [float(row["algorithm.optimizer.lr"]) for row in cells] == [1e-4, 3e-3]
    assert all(re.fullmatch(r"[\d.]+ \([+-][\d.]+ \[[+-][\d.]+, [+-][\d.]+\]\)", row["mean_rating"]) for row in cells)
    for number in ("0", "1"):
        assert (folder / number / "report.html").is_file()
    assert not is_equal(folder / "0", folder / "1")


@pytest.mark.slow
def test_a_reward_model_is_trained_and_then_trains_a_policy(tmp_path: Path) -> None:
    folder = train(
        tmp_path / "reward",
        "experiment=vpscore",
        "trainer=cpu",
        "trainer.max_epochs=2",
        f"data.folder={tmp_path / 'visionprefer'}",
        "prompts.train=32",
        "prompts.validation=8",
        "prompts.test=8",
    )
    assert "VP-Score" in (folder / "accuracy.md").read_text()
    reward = f"reward.checkpoint={folder / 'vp_score'}"
    check_run_folder(train(tmp_path / "policy", *DDPO, reward, "trainer.max_epochs=2"))
