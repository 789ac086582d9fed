"""Every command that README, docs, `--help`, yaml heads, docstrings and messages show runs as it stands, or why not.

Slow: the commands are run one after the other in a fresh copy of the repository, made small by nothing but settings of
size that are appended; `pytest tests/test_commands.py -m slow -rP` prints the table of what each ended with.
"""

import ast
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name != "log.md")]
_BEGINS = re.compile(
    r"(?:[A-Z_]+=\S+ )*(?:(?:\.venv/bin/)?python(?:3\.11)? (?:train\.py|scripts/\w+\.py|-m )"
    r"|make [a-z]|torchrun --|srun -|sbatch |pip install|sqlite3 ).*"
)


def commands_in(text: str) -> Iterator[str]:
    """Those of a text that begin a line, without what is said about them behind."""
    for line in re.sub(r"\\\n[\s#]*", " ", text).splitlines():
        bare = line.strip().lstrip("#$|").strip()
        if _BEGINS.fullmatch(bare):
            yield " ".join(re.split(r"\s{3,}|\s+#\s", bare)[0].split())


def commands() -> dict[str, str]:
    """All of them, with the first file that has each."""
    found: dict[str, str] = {}

    def add(texts: list[str], file: Path) -> None:
        for text in texts:
            for command in commands_in(text):
                found.setdefault(command, file.relative_to(ROOT).as_posix())

    for page in PAGES:
        tokens = MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8"))
        spans = [child.content for token in tokens for child in token.children or [] if child.type == "code_inline"]
        add([token.content for token in tokens if token.type in {"fence", "code_block"}] + spans, page)
    for file in sorted((ROOT / "conf").rglob("*.yaml")):
        add([file.read_text(encoding="utf-8")], file)
    for file in [ROOT / "train.py", *sorted((ROOT / "scripts").glob("*.py")), *sorted((ROOT / "vp_rl").rglob("*.py"))]:
        nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        add(texts + [quoted for text in texts for quoted in re.findall(r"`(python [^`]+)`", text)], file)
    add([(ROOT / "scripts" / "slurm.sh").read_text(encoding="utf-8")], ROOT / "scripts" / "slurm.sh")
    return found


COMMANDS = commands()

# --- what is appended

_RUN = (
    "trainer.max_epochs=1 data.batches_per_epoch=1 data.batch_size=2 sampler.steps=3 callbacks.held_out.small=4"
    " evaluation.limit=4 evaluation.seeds=[0] evaluation.sampler.steps=2"
    " callbacks.held_out.best=null callbacks.held_out.patience=null"  # or a short run may leave no adapter
)
DDPO, REFL = f"{_RUN} algorithm.images_per_prompt=4", _RUN
VP_SCORE = "trainer.max_epochs=1 prompts.train=16 prompts.validation=8 prompts.test=8 data.builder.images_per_prompt=3"
DATASET = "prompts.train=16 prompts.validation=4 prompts.test=6 builder.images_per_prompt=3"
IMAGES = "limit=4 seeds=[0] sampler.steps=2"
SIZES = {
    "algorithm.images_per_prompt",
    "builder.images_per_prompt",
    "data.batch_size",
    "data.batches_per_epoch",
    "data.builder.images_per_prompt",
    "hydra.sweeper.n_trials",
    "limit",
    "sampler.steps",
    "seeds",
    "trainer.max_epochs",
    "callbacks.held_out.small",
    "callbacks.held_out.best",
    "callbacks.held_out.patience",
    *(f"evaluation.{name}" for name in ("limit", "seeds", "sampler.steps")),
    *(f"prompts.{name}" for name in ("train", "validation", "test")),
}

_RUNS = "outputs/ddpo_vpscore/DATE"
_PICTURE = "python scripts/picture.py outputs/refl_vpscore/{0} outputs/ddpo_vpscore/{0} --names ReFL DDPO".format
RUN = {  # in this order, as later ones need what earlier ones leave: what is appended
    "python train.py --help": "",
    "python train.py experiment=ddpo_vpscore": DDPO,
    "python train.py experiment=refl_vpscore": REFL,
    "python train.py experiment=vpscore": VP_SCORE,
    "python train.py experiment=draft_vpscore": f"{REFL} sampler.steps=4",  # it differentiates four
    "python train.py experiment=flow_bp_vpscore": f"{REFL} sampler.steps=4",
    "python train.py experiment=nft_vpscore": DDPO,
    "python train.py experiment=awm_vpscore": DDPO,
    "python train.py experiment=online_dpo_vpscore": DDPO,
    "python train.py experiment=dpo_visionprefer": f"{VP_SCORE} evaluation.limit=4 evaluation.seeds=[0] "
    "evaluation.sampler.steps=2",
    **{
        f"python train.py experiment=ddpo_vpscore policy.start=outputs/refl_vpscore/DATE{more}": DDPO
        for more in ("", " policy.reference=start")
    },
    "python train.py experiment=ddpo_vpscore logger=wandb": DDPO,
    "python train.py experiment=ddpo_vpscore dry_run=true": "data.batches_per_epoch=1 data.batch_size=2",
    "python train.py experiment=ddpo_vpscore resume=auto": DDPO,
    "python train.py experiment=ddpo_vpscore trainer.max_epochs=200 algorithm.clip_range=1e-3 logger=wandb": DDPO,
    "python train.py -m experiment=ddpo_vpscore algorithm.optimizer.lr=1e-4,3e-4 trainer.max_epochs=10": DDPO,
    "python train.py -m experiment=ddpo_vpscore algorithm.optimizer.lr=1e-4,3e-4": DDPO,
    "python train.py -m experiment=ddpo_vpscore algorithm.optimizer.lr=3e-4,6e-4,1.2e-3 "
    "hydra.sweep.dir=multirun/rates": DDPO,
    "python train.py experiment=ddpo_vpscore sweep=lr": DDPO,
    "python train.py experiment=ddpo_vpscore sweep=seeds": DDPO,
    "python train.py experiment=ddpo_vpscore sweep=search": f"{DDPO} hydra.sweeper.n_trials=3",
    "python train.py experiment=ddpo_vpscore sweep=lr hydra/launcher=parallel hydra.launcher.n_jobs=4": DDPO,
    "python train.py experiment=refl_vpscore reward=vividness": REFL,
    "python train.py experiment=ddpo_vpscore reward=weighted "
    "~reward.rewards.compressibility ~reward.weights.compressibility "
    "+reward@reward.rewards.vivid=vividness +reward.weights.vivid=0.3": DDPO,
    "python train.py experiment=refl_vpscore reward=vividness +reward@evaluation.panel.vp_score=vp_score": REFL,
    "python train.py experiment=ddpo_vpscore_sd15 --cfg job": "",
    **{
        f"python scripts/evaluate.py images adapter={_RUNS}{date}{more}": IMAGES
        for date, more in (("_TIME", ""), ("", ""), ("_TIME", " blind.pairs=60"))
    },
    f"python scripts/evaluate.py images adapter={_RUNS}_TIME against=outputs/refl_vpscore/DATE_TIME": IMAGES,
    f"python scripts/evaluate.py images adapter={_RUNS} against=outputs/refl_vpscore/DATE": IMAGES,
    f"python scripts/evaluate.py objects adapter={_RUNS}_TIME": "seeds=[0] sampler.steps=2 prompts.test=8",
    f"python scripts/evaluate.py objects adapter={_RUNS}": "seeds=[0] sampler.steps=2 prompts.test=8",
    f"{_PICTURE('DATE_TIME')} --judge": "",
    f"{_PICTURE('DATE_TIME')} --every 10 --judge": "",
    f"{_PICTURE('DATE')} --every 10 --judge": "",
    f"python scripts/export_adapter.py run={_RUNS}_TIME to=kohya folder=my_lora": "",
    f"python scripts/export_adapter.py run={_RUNS}": "",
    f"python scripts/export_adapter.py run={_RUNS} to=kohya": "",
    f"python scripts/export_adapter.py run={_RUNS} to=merged folder=my_model": "",
    "python scripts/build_visionprefer.py prompts.train=500": DATASET,
    "python scripts/build_visionprefer.py prompts.train=500 folder=data/mine": DATASET,
    "python scripts/evaluate.py accuracy reward=vp_score data=visionprefer": "",
    "python scripts/paper.py --list": "",
    "python scripts/compare.py --list": "",
    "python scripts/wandb_dashboard.py --entity=me --project=vp_rl --dry-run": "",
    **{
        f"python scripts/{name} --help": ""
        for name in ("build_visionprefer.py", "export_adapter.py", "serve_reward.py")
    },
    **{f"python scripts/evaluate.py {kind} --help": "" for kind in ("accuracy", "images", "objects")},
}
SERVED = {  # they serve until they are stopped: what they say when they are ready
    "python scripts/serve_reward.py reward=vp_score port=8000": "serving vp_score",
    "python scripts/label.py data/visionprefer": "http://",
}
ENDS = {"python scripts/label.py data/visionprefer --agreement": (1, "Nobody has voted yet")}
WITH_SERVER = {"python train.py experiment=ddpo_vpscore reward=remote reward.url=http://127.0.0.1:8000": DDPO}
_HUB = "weights or data sets from the hub; test_docs.py composes it, and the parts have tests with stand-ins"
LISTED = {  # by how they begin, or a pattern: why they cannot be run here
    r"make \w+": "installs packages first; what it runs is in this table, or a test run, a benchmark, the site's build",
    r"pip install|python3\.11 -m venv|\.venv/bin/pip": "installs packages",
    r"sqlite3 ": "another program's",
    r"sbatch |srun |torchrun ": "SLURM, or several machines",
    r".*hydra/launcher=slurm": "SLURM; test_sweeps.py composes it",
    r"\S*python train\.py (\.\.\.|experiment=)$": "a pattern, no command",
    r".*_(sd15|sdxl|sd3)\b": _HUB,
    r".*experiment=vpscore_large": _HUB,
    r".*policy=sd15": _HUB,
    r".*(image_reward|pick_score|hpd_v2)": _HUB,
    r".*stable_diffusion": _HUB,
    r".* reward=NAME$|.*serve_reward\.py$": "NAME is the reader's own",
    r"python scripts/build_visionprefer\.py \.\.\.": "the dots are the reader's own",
    r".*that-machine": "another machine's address; 127.0.0.1 is in this table",
    r"python scripts/label\.py FOLDER$": "FOLDER is the reader's own; data/visionprefer is in this table",
    r".*evaluate\.py blind": "files that people saved; test_blind.py runs it",
    r".*adapter=RUN ": "RUN is the reader's own; the same with DATE is in this table",
    r"python scripts/evaluate\.py (images|objects)$": "needs adapter=..., and says so: test_command_line.py",
    r"python scripts/(bench_\w+|time_to_reward|memory)\.py": "a measurement; `make bench`, test_memory.py",
    r"python scripts/make_tiny\w*\.py": "trains the embedded models: hours",
    r"python scripts/(paper|compare)\.py( --seeds 0)?$": "an hour; their tests compose the jobs",
    r"python scripts/wandb_dashboard\.py --entity=me --project=vp_rl$": "an account of W&B; with --dry-run it is here",
}


def places(command: str) -> list[str]:
    """Where a command is dealt with."""
    known = {**RUN, **SERVED, **ENDS, **WITH_SERVER}
    if command in known:
        return [command]
    return [pattern for pattern in LISTED if re.match(pattern, command)][:1]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_is_shown_is_run_or_says_why_not(command: str) -> None:
    assert places(command), f"{COMMANDS[command]} has it: add it to RUN with what makes it small, or to LISTED"


def test_what_is_run_or_listed_is_still_shown_somewhere() -> None:
    assert not [command for command in {**RUN, **SERVED, **ENDS, **WITH_SERVER} if command not in COMMANDS]
    assert not [pattern for pattern in LISTED if not any(places(command) == [pattern] for command in COMMANDS)]


def test_commands_are_made_small_by_their_sizes_alone() -> None:
    for appended in {*RUN.values(), *WITH_SERVER.values()}:
        assert {word.partition("=")[0] for word in appended.split()} <= SIZES


# --- the table


class Copy:
    """The repository as somebody gets it, and what its commands have left there."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rows = folder, ["| command | exit code | seconds | last line |", "|---|---|---|---|"]
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
        )
        for name in listed.stdout.splitlines():
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, folder / name)
        page = MarkdownIt().parse((ROOT / "docs" / "your_model.md").read_text(encoding="utf-8"))
        code, config = (next(t.content for t in page if t.info.strip() == kind) for kind in ("python", "yaml"))
        (folder / "vp_rl" / "rewards" / "vividness.py").write_text(code)  # what the page tells its reader to add
        (folder / "conf" / "reward" / "vividness.yaml").write_text(config)

    def start(self, command: str, appended: str = "") -> subprocess.Popen[str]:
        words = [*shlex.split(self.dated(command)), *appended.split()]
        assert words[0] == "python"
        environment = {**os.environ, "PYTHONPATH": str(self.folder), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
        return subprocess.Popen(
            [sys.executable, *words[1:]],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def dated(self, command: str) -> str:
        """With the newest run that has ended in place of DATE."""

        def newest(found: re.Match[str]) -> str:
            ended = sorted(file.parent for file in (self.folder / found[1]).glob("*/summary.json"))
            return str(ended[-1].relative_to(self.folder)) if ended else found[0]

        return re.sub(r"(outputs/\w+)/DATE(?:_TIME)?", newest, command)

    def note(self, command: str, code: int | str, seconds: float, text: str) -> None:
        last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
        self.rows.append(f"| `{command.replace('|', chr(92) + '|')}` | {code} | {seconds:.0f} | {last.strip()[:160]} |")

    def run(self, command: str, appended: str = "") -> tuple[int, str]:
        started = time.monotonic()
        process = self.start(command, appended)
        text, _ = process.communicate(timeout=1800)
        self.note(command, process.returncode, time.monotonic() - started, text)
        return process.returncode, text


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Copy]:
    folder = tmp_path_factory.mktemp("commands")
    made = Copy(folder / "vp_rl")
    yield made
    made.rows += [
        f"| `{command}` | not run | | {LISTED[places(command)[0]]} |"
        for command in COMMANDS
        if places(command)[0] in LISTED
    ]
    (folder / "commands.md").write_text("\n".join(made.rows) + "\n")
    print(*made.rows, f"\n{folder / 'commands.md'}", sep="\n")


def ended_well(code: int, text: str) -> None:
    assert code == 0, text[-3000:]
    assert "Traceback" not in text
    assert "Loading weights" not in text, "a library's progress bar in a file"


@pytest.mark.slow
@pytest.mark.parametrize("command", RUN)
def test_a_command_runs_as_it_stands(copy: Copy, command: str) -> None:
    shutil.rmtree(copy.folder / "multirun", ignore_errors=True)  # or it would go on where one before it ended
    code, text = copy.run(command, RUN[command])
    ended_well(code, text)
    if "sweep=" in command or " -m " in command:
        assert text.splitlines()[-1].startswith("results of all jobs: multirun/"), text[-300:]
        assert Path(copy.folder / text.split()[-1]).is_file()


@pytest.mark.slow
@pytest.mark.parametrize("command", ENDS)
def test_a_command_that_needs_more_says_what(copy: Copy, command: str) -> None:
    code, text = copy.run(command)
    assert code == ENDS[command][0], text
    assert ENDS[command][1] in text


@pytest.mark.slow
@pytest.mark.parametrize("command", SERVED)
def test_a_server_serves_until_it_is_stopped(copy: Copy, command: str) -> None:
    started, said = time.monotonic(), ""
    process = copy.start(command)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            said += line
            if SERVED[command] in line:
                break
        assert SERVED[command] in said, said
        for client, appended in WITH_SERVER.items():
            if "serve_reward" in command:
                ended_well(*copy.run(client, appended))
    finally:
        process.send_signal(signal.SIGINT)
        more, _ = process.communicate(timeout=60)
        copy.note(command, process.returncode, time.monotonic() - started, said + more)
    assert "Traceback" not in said + more
