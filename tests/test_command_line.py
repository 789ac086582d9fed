"""What happens to a command's words before Hydra reads them, to its folder, and to what it says."""

import errno
import os
import pty
import re
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from safetensors import SafetensorError
from test_checkpoint import written

import train
from scripts import command_line
from scripts.command_line import CONF, NAMED_HERE, named, nearest, prepare, readable
from vp_rl.callbacks.checkpoint_files import order
from vp_rl.evaluation.lock import free, hold, is_held
from vp_rl.evaluation.terminal import is_full, quiet_libraries

EXPERIMENTS = sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))
SWEEPS = sorted(file.stem for file in (CONF / "sweep").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    monkeypatch.setattr(command_line, "_held", [])
    for name in (NAMED_HERE, "LOCAL_RANK", "HYDRA_FULL_ERROR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path | None]:
    """The folder of a sweep; or of a run, in the last word that Hydra then gets."""

    def prepare_words(*words: str, config: str = "train", alone: bool = False) -> Path | None:
        monkeypatch.setattr(sys, "argv", [f"{config}.py", *words])
        check = train._needs_experiment if config == "train" else lambda composed, given: None
        return prepare(config, check, alone)

    return prepare_words


# --- words


@pytest.mark.parametrize(
    "name", ["a/epoch=0001.ckpt", "a b/c", "a(1)", "it's", "ü/ñ", "a\\b=c", "a:b", "lr=3e-4/0", "'x=y"]
)
def test_a_path_is_read_as_it_is_whatever_is_in_it(name: str) -> None:
    [parsed] = OverridesParser.create().parse_overrides([readable(f"resume={name}")]) if name[0] != "'" else [None]
    if parsed is None:  # an opening quote may be the user's own, so it is not guessed at
        with pytest.raises(ValueError, match="cannot be read"):
            readable(f"resume={name}")
    else:
        assert str(parsed.value()) == name


def test_what_hydra_reads_is_left_as_it_is() -> None:
    for word in ("seed=0", "a=[1,2]", "x='a=b'", "~reward.checkpoint", "+reward@panel.a=a", "lr=1e-4,3e-4", "a=null"):
        assert readable(word) == word


def test_a_word_that_is_no_setting_is_said_to_be_none() -> None:
    with pytest.raises(ValueError, match=r"'ddpo_vpscore' is no setting: .*NAME=VALUE"):
        readable("ddpo_vpscore")


@pytest.mark.parametrize(
    ("config", "word", "said"),
    [
        ("train", "trainer.max_epoch=3", r"'trainer\.max_epoch'\. Did you mean trainer\.max_epochs\?$"),
        ("train", "max_epochs=3", r"Did you mean trainer\.max_epochs\?$"),
        ("train", "lr=1", r"Did you mean algorithm\.optimizer\.lr\?$"),
        ("train", "rewad=vp_score", r"Did you mean reward\?$"),
        ("train", "algorithm.optimizer.lrr=1e-4,3e-4", r"Did you mean algorithm\.optimizer\.lr or"),
        ("train", "~reward.chekpoint", r"Did you mean reward\.checkpoint\?$"),
        (
            "train",
            "reward=vpscore",
            r"there is no reward=vpscore, .*Did you mean reward=vp_score\? There are: aesthetic, ",
        ),
        ("train", "experiment=ddpo_vpscroe", r"Did you mean experiment=ddpo_vpscore"),
        ("train", "sweep=seed", r"Did you mean sweep=seeds\?"),
        ("train", "trainer.max_epochs=three", r"^trainer\.max_epochs='three' must be a number, as 20 is\.$"),
        ("train", "algorithm.decay=ture", r"^algorithm\.decay='ture' must be true or false"),
        ("train", "seed=0,1", r"^'seed=0,1' has several values: add -m"),
        ("build", "prompts.trian=3", r"Did you mean prompts\.train\?$"),
        ("build", "annotater=scene", r"Did you mean annotator\?$"),
        ("serve", "reward.checkpont=x", r"Did you mean reward\.checkpoint\?$"),
        ("serve", "port=abc", r"^port='abc' must be a number"),
        ("evaluate", "batchsize=3", r"Did you mean batch_size\?$"),
        ("evaluate_images", "limt=3", r"Did you mean limit\?$"),
        ("evaluate_objects", "detector=owl", r"There are: owlv2, scene"),
        ("export", "too=kohya", r"Did you mean to\?$"),
    ],
)
def test_what_is_mistyped_is_answered_with_what_may_have_been_meant(
    config: str, word: str, said: str, prepared: Callable[..., Path | None], tmp_path: Path
) -> None:
    words = ["experiment=ddpo_vpscore", word] if config == "train" and not word.startswith("experiment") else [word]
    with pytest.raises(ValueError, match=said) as error:
        prepared(*words, config=config)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir()), "a folder was made"


def test_nearest_names_are_sought_by_letters_and_by_last_parts() -> None:
    known = ["trainer", "trainer.max_epochs", "evaluation.limit", "prompts.limit", "a.b.limit"]
    assert nearest("trainer.max_epoch", known) == ["trainer.max_epochs"]
    assert nearest("limit", known) == ["evaluation.limit", "prompts.limit", "a.b.limit"]
    assert nearest("max_epoch", known) == ["trainer.max_epochs"]
    assert nearest("nothing.like_it", known) == []


@pytest.mark.parametrize("words", [(), ("seed=1",), ("-m", "seed=0,1"), ("dry_run=true",)])
def test_without_an_experiment_they_are_shown_and_nothing_is_begun(
    words: tuple[str, ...], prepared: Callable[..., Path | None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        prepared(*words)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert all(f"python train.py experiment={name} " in said for name in EXPERIMENTS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("config", "needed"), [("evaluate_images", "adapter"), ("evaluate_objects", "adapter"), ("export", "run")]
)
def test_a_command_that_lacks_its_one_needed_setting_shows_examples(
    config: str, needed: str, prepared: Callable[..., Path | None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        prepared(config=config)
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.splitlines()[-1].startswith(f"error: {needed}=... must be given")
    assert f"python scripts/{'export_adapter' if config == 'export' else 'evaluate'}.py" in said
    assert "$" not in said


# --- folders


def sweep_dir(*words: str) -> str:
    """As a sweeper reads it, when there is no job yet that `${hydra:...}` could ask."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", list(words), return_hydra_config=True).hydra.sweep.dir


@pytest.mark.parametrize(
    "words",
    [
        "",
        "experiment=ddpo_vpscore",
        "hydra/launcher=parallel",
        "experiment=vpscore sweep=lr hydra/launcher=slurm",
        *(f"sweep={name}" for name in SWEEPS),
    ],
)
def test_a_sweep_has_a_folder_before_it_has_a_job(words: str) -> None:
    for chosen, plugin in (("parallel", "joblib"), ("slurm", "submitit"), ("search", "optuna")):
        if chosen in words:
            pytest.importorskip(plugin)
    assert sweep_dir(*words.split()).startswith("multirun/")


def test_a_sweep_goes_on_in_the_same_folder_by_the_same_words_and_by_no_others(
    prepared: Callable[..., Path | None],
) -> None:
    words = ("-m", "experiment=ddpo_vpscore", "algorithm.optimizer.lr=1e-4,3e-4", "trainer.max_epochs=10")
    folder = prepared(*words)
    assert folder is not None
    assert re.fullmatch(r"multirun/ddpo_vpscore/lr-[0-9a-f]{8}", str(folder))
    assert prepared(*words, "resume=auto", "hydra/launcher=parallel") == folder
    assert prepared(*words, "seed=1") != folder


def test_a_sweeps_folder_is_the_presets_or_the_users(prepared: Callable[..., Path | None]) -> None:
    assert prepared("experiment=ddpo_vpscore", "sweep=lr") == Path("multirun/ddpo_vpscore/lr")
    assert sys.argv[-1] == "hydra.sweep.dir=multirun/ddpo_vpscore/lr"
    assert prepared("-m", "experiment=ddpo_vpscore", "seed=0,1", "hydra.sweep.dir=mine") == Path("mine")
    both = prepared("-m", "experiment=ddpo_vpscore,refl_vpscore", "seed=0")
    assert both is not None
    assert both.parent == Path("multirun/ddpo_vpscore_refl_vpscore")


def test_names_of_sweeps_can_be_folders() -> None:
    for word in ("reward.checkpoint=/a/b,/c/d", "+reward@x.y=a,b", "x=" + ",".join(map(str, range(999)))):
        assert re.fullmatch(r"[\w-]{9,80}", named([word]))


def test_two_runs_that_begin_in_the_same_second_have_a_folder_each(prepared: Callable[..., Path | None]) -> None:
    folders = []
    for seed in range(3):
        prepared("experiment=ddpo_vpscore", f"seed={seed}")
        folders.append(os.environ[NAMED_HERE])
        assert Path(sys.argv[-1].removeprefix("hydra.run.dir=")).absolute() == Path(folders[-1])
    assert len(set(folders)) == 3


def test_a_name_that_is_taken_gets_a_number_however_many_want_it(tmp_path: Path) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(free(tmp_path / "runs" / "12-00-00"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    numbered = (f"12-00-00_{number}" for number in range(2, 9))
    assert sorted(folder.name for folder in found) == sorted(["12-00-00", *numbered])


def test_a_folder_that_a_run_is_at_work_in_is_refused_to_another_until_it_ends(
    prepared: Callable[..., Path | None], tmp_path: Path
) -> None:
    words = ("experiment=ddpo_vpscore", f"hydra.run.dir={tmp_path / 'same'}")
    prepared(*words, alone=True)
    [own] = command_line._held
    command_line._held.clear()  # as in another process
    with pytest.raises(ValueError, match=r"Another process is at work in .*same: .*hydra\.run\.dir"):
        prepared(*words, alone=True)
    command_line._held.append(own)
    command_line._held.pop().release()
    prepared(*words, alone=True)
    command_line.stay_alone(tmp_path / "same")  # as a run does that did not come by `start`: it has it already


_HOLDS = """
import sys, time
from pathlib import Path
from vp_rl.evaluation.lock import hold
lock = hold(Path(sys.argv[1]), "")
print("held", flush=True)
time.sleep(60)
"""


def test_a_killed_runs_folder_is_free_again(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", _HOLDS, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        assert is_held(tmp_path)
        process.kill()
        process.wait()
    assert not is_held(tmp_path)


def test_the_other_processes_of_a_run_get_the_folder_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning starts them with its `hydra.run.dir`, which the first one holds: they must not ask for it."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(sys, "argv", ["train.py", "experiment=ddpo_vpscore", "hydra.run.dir=taken"])
    lock = hold(Path("taken"), "")
    called = []
    command_line.start(lambda: called.append(list(sys.argv)), "train", alone=True)
    assert called == [["train.py", "experiment=ddpo_vpscore", "hydra.run.dir=taken"]]
    lock.release()


def test_a_run_that_is_alive_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"seed": 0, "trainer": {"max_epochs": 3}, "callbacks": {"held_out": {}}}
    for name in ("2026-01-01", "2026-01-02"):
        path = written(tmp_path / name / "checkpoints")
    newer = path.parents[1]

    def read(folder: Path) -> tuple[Path, dict] | None:
        files = sorted(folder.glob("*.ckpt"), key=order)
        return (files[-1], {"run": {"settings": settings}}) if files else None

    monkeypatch.setattr("vp_rl.callbacks.checkpoint_files.newest", read)

    def found() -> Path:
        beside = train._beside(tmp_path / "new", settings)
        assert beside is not None
        return beside[0].parents[1]

    assert found() == newer
    lock = hold(newer, "")
    assert found() == newer.with_name("2026-01-01")
    lock.release()
    assert found() == newer


def test_a_folder_that_cannot_be_made_is_one_line(
    prepared: Callable[..., Path | None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "outputs").write_text("a file")
    monkeypatch.setattr(sys, "argv", ["train.py", "experiment=ddpo_vpscore"])
    with pytest.raises(SystemExit, match=r"^error: .*outputs/ddpo_vpscore") as ended:
        command_line.start(lambda: None, "train", alone=True)
    assert "\n" not in str(ended.value.code)


# --- a full disk


def chained(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        sqlite3.OperationalError("database or disk is full"),
        chained(RuntimeError("could not be written"), OSError(errno.ENOSPC, "x")),
    ],
)
def test_a_full_disk_is_known_whoever_says_so(error: BaseException) -> None:
    assert is_full(error)
    assert not is_full(ValueError("lr must be positive"))
    assert not is_full(OSError(errno.EACCES, "Permission denied"))


def test_a_full_disk_names_what_is_safe_and_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "_is_job", lambda: False)
    (tmp_path / "checkpoints").mkdir()
    for number in (1, 2):
        (tmp_path / "checkpoints" / f"epoch-000{number}.ckpt").touch()
    with pytest.raises(SystemExit) as ended:
        train._stop(SafetensorError("I/O error: No space left on device"), tmp_path)
    said = str(ended.value.code)
    assert f"{tmp_path / 'checkpoints' / 'epoch-0002.ckpt'} is safe" in said
    assert f"resume={tmp_path}" in said
    with pytest.raises(SystemExit) as ended:
        train._stop(ValueError("no"), tmp_path)
    assert ended.value.code == "error: no"


# --- what is said


def test_bars_of_libraries_are_not_written_into_files(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.utils import logging as diffusers
    from transformers.utils import logging as transformers

    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    for library in (diffusers, transformers):
        library.enable_progress_bar()
    with quiet_libraries():
        assert not transformers.is_progress_bar_enabled()
        assert not diffusers.is_progress_bar_enabled()


_BAR = """
import logging, sys, time
from tqdm import tqdm
from vp_rl.evaluation.terminal import quiet_libraries
logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.INFO)
with quiet_libraries(), tqdm(total=10, mininterval=0, ncols=60, nrows=20) as bar:
    bar.update()
    logging.info("a message of the log")
    bar.update()
"""


def test_on_a_terminal_a_message_never_stands_behind_a_progress_bar() -> None:
    main, other = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(CONF.parent), "COLUMNS": "80"}
    process = subprocess.Popen([sys.executable, "-c", _BAR], stdout=other, stderr=other, env=environment)
    os.close(other)
    shown = b""
    try:
        while chunk := os.read(main, 4096):
            shown += chunk
    except OSError:  # the other end is closed
        pass
    assert process.wait() == 0, shown
    before = re.split(rb"[\r\n]", shown.partition(b"a message of the log")[0])
    assert b"it/s" in shown, "there was a bar"
    assert not before[-1].strip(), before[-2:]
