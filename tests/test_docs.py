"""What README and docs say is so: commands compose, links resolve, names exist, snippets run, figures are right."""

import ast
import importlib.util
import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import yaml
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from markdown_it import MarkdownIt
from omegaconf import OmegaConf, open_dict
from test_conf import CONF, _hydra, check, composed, nodes  # noqa: F401  # the fixture applies here too

ROOT = CONF.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
RECORDS = {DOCS / "log.md"}  # dated: commands and names are as they were that day
ROOTS = {
    "train.py": "train",
    "scripts/build_visionprefer.py": "build",
    "scripts/serve_reward.py": "serve",
    "scripts/export_adapter.py": "export",
    "scripts/evaluate.py accuracy": "evaluate",
    "scripts/evaluate.py images": "evaluate_images",
    "scripts/evaluate.py objects": "evaluate_objects",
}
NOT_COMPOSED = {  # of commands, by how they begin: why
    "python scripts/label.py": "argparse, not Hydra: test_label.py runs it",
    "python scripts/evaluate.py blind": "argparse, not Hydra: test_blind.py runs it",
    "python scripts/picture.py": "argparse, not Hydra: test_picture.py runs it",
    "python scripts/bench_": "argparse, not Hydra: measurements, which `make bench` runs",
    "python scripts/memory.py": "composes what it is given by itself",
    "python scripts/wandb_dashboard.py": "argparse, not Hydra: test_dashboard.py builds what it saves",
    "python scripts/paper.py": "argparse, not Hydra",
    "python scripts/compare.py": "argparse, not Hydra",
    "python train.py experiment=ddpo_vpscore reward=NAME": "NAME is the reader's own",
    "pip ": "installs packages; that extras exist is checked below",
    "sqlite3 ": "another program's",
    "export ": "the shell's",
}
FOREIGN_MESSAGES = {  # in the symptoms of docs/troubleshooting.md, but said by others than this package
    "operator torchvision::nms does not exist",
    "unexpected keyword argument 'checkpoint'",
    "CUDA out of memory",
    "1 x cpu",
    "zsh: no matches found",
}


def relative(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of one language; "" is none."""
    tokens = MarkdownIt().parse(page.read_text(encoding="utf-8"))
    return [t.content for t in tokens if t.type in {"fence", "code_block"} and t.info.strip() == language]


def spans(page: Path) -> list[str]:
    """The inline code of a page."""
    tokens = MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8"))
    inline = [child for token in tokens for child in token.children or []]
    return [child.content for child in inline if child.type == "code_inline"]


def lines_of(block: str) -> Iterator[list[str]]:
    """The commands of a shell block as words, without comments and environment variables."""
    for line in block.replace("\\\n", " ").splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # a drawing or a formula
            continue
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words.pop(0)
        yield words


def is_command(words: list[str]) -> bool:
    first = words[0].removeprefix(".venv/bin/") if words else ""
    return first in {"python", "python3.11", "srun", "sbatch", "make", "torchrun"} or any(
        " ".join(words).startswith(known) for known in NOT_COMPOSED
    )


def commands() -> dict[str, Path]:
    """Every command of the pages, with the first page that has it."""
    found: dict[str, Path] = {}
    for page in PAGES:
        if page in RECORDS:
            continue
        texts = [*blocks(page, ""), *blocks(page, "sh"), *blocks(page, "bash")]
        texts += [span for span in spans(page) if re.match(r"(python|make|torchrun) \S", span)]
        for words in (words for text in texts for words in lines_of(text)):
            if is_command(words):
                found.setdefault(shlex.join(words), page)
    return found


COMMANDS = commands()
TO_COMPOSE = [
    line
    for line in COMMANDS
    if not line.startswith("make ") and not any(line.startswith(known) for known in NOT_COMPOSED)
]


def split(line: str) -> tuple[str, list[str]]:
    """A command's Hydra root and its overrides, as the script would hand them on; a sweep as its first job."""
    words = [word for word in shlex.split(line) if not re.match(r"--?\w", word) or "=" in word and "--" not in word]
    words = [
        word for word in words if word not in {"python", ".venv/bin/python", "srun", "sbatch", "torchrun", "...", "job"}
    ]
    script, overrides = words[0], words[1:]
    if script == "scripts/slurm.sh":  # hands its arguments on
        script, overrides = "train.py", ["trainer=slurm", *overrides]
    if script == "scripts/evaluate.py":
        script, overrides = f"{script} {overrides[0]}", _evaluate(overrides[0]).expand(overrides[1:])
    if script not in ROOTS:
        raise ValueError(f"{line!r} is of no script that is known here: compose it, or add it to NOT_COMPOSED.")
    parsed = OverridesParser.create().parse_overrides(overrides)
    single = [f"{p.key_or_group}={_first(p)}" if p.is_sweep_override() else str(p.input_line) for p in parsed]
    return ROOTS[script], single


def _first(override: Any) -> str:
    return next(iter(override.sweep_string_iterator()))


@cache
def _evaluate(command: str) -> Any:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        return importlib.import_module("evaluate" if command == "accuracy" else f"evaluate_{command}")
    finally:
        sys.path.remove(str(ROOT / "scripts"))


OWN = DOCS / "your_model.md"  # has a reward of the reader's


@pytest.fixture
def own_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configurations, with what `your_model.md` adds to them; and its module, to be imported."""
    (code,), (config,) = blocks(OWN, "python"), blocks(OWN, "yaml")
    folder = tmp_path / "conf"
    shutil.copytree(CONF, folder)
    (tmp_path / "own.py").write_text(code)
    (folder / "reward" / "vividness.yaml").write_text(config)
    spec = importlib.util.spec_from_file_location("vp_rl.rewards.vividness", tmp_path / "own.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "vp_rl.rewards.vividness", module)
    return folder


@pytest.mark.parametrize("line", [line for line in TO_COMPOSE if "vividness" not in line])
def test_a_command_composes_and_its_settings_are_parameters(line: str) -> None:
    root, overrides = split(line)
    whole(composed(*overrides, root=root))


def whole(config: Any) -> None:
    """Nothing is missing, nothing unknown, and everything that is referred to is there."""
    OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    for path, node in nodes(config):
        if node._target_ != "datetime.timedelta":  # has no signature to compare with
            check(path, node)


def test_sweeps_flags_and_variables_do_not_hide_settings() -> None:
    assert split("python train.py -m experiment=ddpo_vpscore seed=0,1 --cfg job") == (
        "train",
        ["experiment=ddpo_vpscore", "seed=0"],
    )
    assert list(lines_of("WANDB_MODE=offline python train.py a=1  # b\n")) == [["python", "train.py", "a=1"]]
    with pytest.raises(ValueError, match="NOT_COMPOSED"):
        split("python other.py a=1")


@pytest.mark.parametrize("line", ["python train.py experiment=ddpo_vpscoer", "python train.py sampler.setps=20"])
def test_a_mistyped_command_is_found(line: str) -> None:
    root, overrides = split(line)
    with pytest.raises(Exception, match="(?i)could not (find|override)"):
        composed(*overrides, root=root)


def test_targets_of_make_and_scripts_and_extras_are_there() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for line in COMMANDS:
        words = shlex.split(line)
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= set(targets), line
        for script in (word for word in words if re.fullmatch(r"(scripts/\w+|train)\.py", word)):
            source = (ROOT / script).read_text()
            flags = {word.partition("=")[0] for word in words if word.startswith("--")} - {
                "--help",
                "--cfg",
                "--resolve",
            }
            assert not [flag for flag in flags if f'"{flag}"' not in source], line
    for page in PAGES:
        for extra in re.findall(r"(?:vp_rl|-e '?\.)\[([\w,]+)\]", page.read_text()):
            assert set(extra.split(",")) <= extras.keys(), (page, extra)


# --- snippets


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_python_on_a_page_compiles(page: Path) -> None:
    for block in blocks(page, "python"):
        compile(block, relative(page), "exec")
    for block in blocks(page, "yaml"):
        assert isinstance(yaml.safe_load(block), dict)


@pytest.mark.slow
def test_five_lines_train_and_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks(DOCS / "index.md", "python")
    assert len([line for line in code.splitlines() if line and not line.startswith(("from ", "import "))]) == 5
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    quick = code.replace("max_epochs=20", "max_epochs=1, enable_progress_bar=False, enable_model_summary=False")
    exec(quick.replace("ScenePrompts()", "ScenePrompts(), batch_size=2"), found)
    assert found["images"].shape == (1, 3, 64, 64)
    assert (tmp_path / "my_lora" / "pytorch_lora_weights.safetensors").is_file()
    assert any(p.abs().max() > 0 for name, p in found["policy"].named_parameters() if "lora_B" in name)


NOTEBOOK = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text())
CELLS = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_has_no_outputs_and_compiles() -> None:
    assert not [cell for cell in NOTEBOOK["cells"] if cell.get("outputs") or cell.get("execution_count")]
    for number, cell in enumerate(CELLS):
        compile(cell, f"cell {number}", "exec")


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    """In a process of its own, as it silences libraries; made small."""
    small = {r"ROUNDS = \d+": "ROUNDS = 1", "test=16": "test=4", "batch_size=8": "batch_size=2"}
    program = "\n".join([*CELLS, "assert trainer.current_epoch == 1", "assert not torch.equal(before, after)"])
    for pattern, value in small.items():
        program, changed = re.subn(pattern, value, program)
        assert changed == 1, pattern
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / "my_lora" / "pytorch_lora_weights.safetensors").is_file()


def test_the_reward_of_ones_own_keeps_what_rewards_promise(own_reward: Path) -> None:
    reward = instantiate(OmegaConf.load(own_reward / "reward" / "vividness.yaml"))
    images = torch.rand(3, 3, 20, 30, generator=torch.Generator().manual_seed(0), requires_grad=True)
    scores = reward(images, ["a", "b", "c"])
    assert scores.shape == (3,)
    assert scores.dtype == torch.float32
    alone = torch.cat([reward(image[None], ["a"]) for image in images])
    torch.testing.assert_close(scores, alone)
    (gradient,) = torch.autograd.grad(scores[1], images)
    assert gradient[1].abs().sum() > 0
    assert not gradient[[0, 2]].any()
    grey, red = torch.full((1, 3, 4, 4), 0.5), torch.tensor([1.0, 0.0, 0.0]).reshape(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert reward(grey, ["a"]).item() == 0
    assert reward(red, ["a"]).item() == pytest.approx(0.9)


OWN_COMMANDS = [line for line in TO_COMPOSE if "vividness" in line]


@pytest.fixture
def own_config(own_reward: Path, request: pytest.FixtureRequest) -> Any:
    """What a command with the reader's reward composes to."""
    GlobalHydra.instance().clear()
    root, overrides = split(request.param)
    with initialize_config_dir(str(own_reward), version_base="1.3"):
        yield composed(*overrides, root=root)
    initialize_config_dir(str(CONF), version_base="1.3")  # for the fixture that ends after this one


@pytest.mark.parametrize("own_config", OWN_COMMANDS, indirect=True)
def test_commands_with_the_reward_of_ones_own_compose(own_config: Any) -> None:
    whole(own_config)


@pytest.mark.slow
@pytest.mark.parametrize("own_config", OWN_COMMANDS[:1], indirect=True)
def test_the_reward_of_ones_own_trains(own_config: Any) -> None:
    with open_dict(own_config):
        del own_config.algorithm.window  # a list, where beartype wants the tuple that Hydra cannot make
    algorithm = instantiate(own_config.algorithm)
    own_config.data.batch_size, own_config.data.batches_per_epoch = 2, 1
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=1, **quiet)
    trainer.fit(algorithm, instantiate(own_config.data))
    assert 0 < trainer.callback_metrics["train/reward"] < 1
    assert any(p.abs().max() > 0 for name, p in algorithm.policy.named_parameters() if "lora_B" in name)


# --- links and names


@cache
def anchors(page: Path) -> set[str]:
    """Of its headings, as mkdocs and GitHub name them."""
    tokens = MarkdownIt().parse(page.read_text(encoding="utf-8"))
    heads = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", head).strip().lower()) for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_resolve(page: Path) -> None:
    tokens = MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8"))
    inline = [child for token in tokens for child in token.children or []]
    targets = [str(child.attrs.get("href") or child.attrs.get("src") or "") for child in inline if child.attrs]
    for target in targets:
        if not target or "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert page.parent != DOCS or file.is_relative_to(DOCS), f"{target} leaves the pages that mkdocs builds"
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", [page for page in PAGES if page not in RECORDS], ids=relative)
def test_files_and_names_in_code_spans_are_there(page: Path) -> None:
    for span in spans(page):
        path, _, name = span.partition(":")
        if re.search(r"NAME|FOLDER|OWNER|DATE|[<>{}()\s=…]", span) or "." not in path and "/" not in path:
            continue
        if path.startswith(("vp_rl/", "conf/", "scripts/", "tests/", "docs/", "examples/", ".ci/")):
            assert list(ROOT.glob(path.rstrip("/"))), span
        elif path.endswith(".py"):
            assert (ROOT / path).is_file() or [*(ROOT / "vp_rl").rglob(path), *(ROOT / "scripts").glob(path)], span
        else:
            continue
        if name:
            assert name in names(ROOT / path), span


@cache
def names(file: Path) -> set[str]:
    """Functions and classes of a module, and `Class.method`."""
    tree, kinds = ast.parse(file.read_text()), ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    top = [node for node in tree.body if isinstance(node, kinds)]
    inner = {f"{node.name}.{each.name}" for node in top for each in node.body if isinstance(each, kinds)}
    return {node.name for node in top} | inner


@cache
def settings() -> set[str]:
    """Every dotted setting that a yaml has, by where it is in a run; and what the Trainer takes."""
    found = {f"trainer.{name}" for name in inspect.signature(lightning.Trainer).parameters}
    for file in CONF.rglob("*.yaml"):
        group = [] if file.parent.name in {"conf", "experiment", "sweep"} else file.relative_to(CONF).parts[:-1]
        prefix = {"optimizer": "algorithm.optimizer", "human": f"data.{file.stem}"}.get(
            ".".join(group), ".".join(group)
        )
        found |= set(flat(yaml.safe_load(file.read_text()) or {}, prefix))
    return found


def flat(value: Any, prefix: str) -> Iterator[str]:
    yield prefix
    for key, item in value.items() if isinstance(value, dict) else ():
        yield from flat(item, f"{prefix}.{key}".lstrip("."))


_GROUPS = "algorithm|data|trainer|policy|reward|sampler|evaluation|callbacks|geometry|prompts|annotator|builder|engine"


@pytest.mark.parametrize("page", [page for page in PAGES if page not in RECORDS], ids=relative)
def test_settings_in_code_spans_are_there(page: Path) -> None:
    for span in spans(page):
        for word in span.split():
            found = re.fullmatch(rf"[~+]?((?:{_GROUPS})\.[a-z0-9_.]+)(?:=.*)?", word)
            if found is not None and not found[1].endswith((".py", ".md", ".jsonl", ".sqlite")):
                assert found[1] in settings(), span


# --- figures and messages


@cache
def said() -> list[str]:
    """Every piece of text in the package and the scripts, between what is filled in."""
    files = [*(ROOT / "vp_rl").rglob("*.py"), *(ROOT / "scripts").glob("*.py"), ROOT / "train.py"]
    trees = [ast.parse(file.read_text()) for file in files]
    return [
        n.value for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)
    ]


def test_messages_of_the_troubleshooting_page_are_the_programs() -> None:
    messages = []
    for line in (DOCS / "troubleshooting.md").read_text().splitlines():
        if line.startswith("| ") and not line.startswith("| symptom"):
            messages += [span for span in re.findall(r"`([^`]+)`", line.split("|")[1]) if " " in span]
    assert len(messages) > 30
    for message in messages:
        if message in FOREIGN_MESSAGES:
            continue
        for piece in filter(None, (piece.strip() for piece in message.split("…"))):
            assert any(piece in text for text in said()), (message, piece)


def test_figures_of_the_cost_page_are_the_estimators() -> None:
    from vp_rl.annotators.chat import Chat
    from vp_rl.annotators.openai_chat import OpenAIChatAnnotator
    from vp_rl.annotators.wording import count_tokens, rating_instructions
    from vp_rl.types import ASPECTS
    from vp_rl.visionprefer.generate import as_png

    page = (DOCS / "cost.md").read_text()
    told = {aspect: count_tokens(text) for aspect, text in rating_instructions(None)[0].items()}
    for aspect, tokens in told.items():
        assert f"{tokens:,} {aspect.replace('_', ' ')}" in page
    assert f"{sum(told.values()):,} together" in page
    assert f"questions * ({sum(told.values())} + 4 * (17 + " in page, "the calculator's"
    image = as_png(torch.zeros(512, 512, 3, dtype=torch.uint8).numpy())
    for detail, shown, tokens, answer in (("high", 4, 18_623, 1480), ("low", 4, 7743, 1480), ("high", 1, 37_580, 1600)):
        annotator = OpenAIChatAnnotator(Chat("any"), detail=detail)
        asked = [annotator.estimate("x" * 64, [image] * shown, aspect) for aspect in ASPECTS]
        calls = 4 // shown
        assert sum(usage.input_tokens for usage in asked) * calls == pytest.approx(tokens, rel=1e-3)  # the quoting's
        assert sum(usage.output_tokens for usage in asked) * calls == answer
        assert f"{tokens:,}" in page
    for prompts, title in ((1e3, "1,000"), (1e4, "10,000"), (179e3, "179,000")):
        row = next(line for line in page.splitlines() if line.startswith(f"| {title} |"))
        dollars = prompts * (18_623 * 2 + 1480 * 8) / 1e6
        assert row.rstrip(" |").endswith(f"= {dollars:,.2f}"), row
        assert f"{prompts * 4:,.0f} | {prompts * 18_623 / 1e6:,.7g} M" in row.replace(",0 M", " M"), row


def test_the_judges_calls_on_the_cost_page_are_the_experiments() -> None:
    from vp_rl.evaluation.curve_settings import CurveSettings

    for experiment in ("ddpo_vpscore_sd15", "refl_vpscore_sd15"):
        config = composed(f"experiment={experiment}")
        every, epochs = config.callbacks.held_out.every, config.trainer.max_epochs
        limit, small = config.evaluation.limit, config.callbacks.held_out.small
        given = {name: value for name, value in config.evaluation.curve.items() if name != "_target_"}
        curve = CurveSettings(**given).most_images(limit, limit, len(config.evaluation.seeds))
        calls = 4 * (2 * limit + small * (1 + -(-epochs // every)) + curve)
        row = next(
            line
            for line in (DOCS / "cost.md").read_text().splitlines()
            if line.startswith(f"| `experiment={experiment}")
        )
        assert f"| {limit} | {small} |" in row
        assert f"| {curve} |" in row
        assert row.endswith(f"= {calls:,} |")


def test_figures_of_the_scaling_page_are_the_geometrys() -> None:
    from vp_rl.algorithms.phases import Cut
    from vp_rl.planning.geometry import Geometry, solve

    page = (DOCS / "scaling.md").read_text()
    published = {"cut": Cut(images_per_prompt=16, examples=50)}
    for devices in (1, 4, 8, 16, 64):
        plan = solve(Geometry(images_per_update=64, updates=4, **published), devices, 4, 8)
        load = plan.load
        states = load.train_batch * plan.accumulate
        row = f"| {devices} | {load.prompts} | {plan.devices_per_prompt} | {load.images} | {states:,} |"
        assert f"{row} {load.train_batch} x {plan.accumulate} |" in page
    with pytest.raises(ValueError, match="nearest are 128"):
        solve(Geometry(images_per_update=64, updates=4, **published), 256, 4, 8)
    for devices, images, updates in ((256, 128, 2), (1000, 500, 4), (1024, 512, 4)):
        plan = solve(Geometry(images_per_update=images, updates=updates, **published), devices, 4, 8)
        whole_round = plan.geometry.images_per_round
        row = f"| {devices:,} | {images} | {updates} | {whole_round:,} | {whole_round // 16} | {plan.load.images} |"
        assert row in page
    blocks = ((5, 320), (5, 640), (6, 1280))
    assert f"{sum(number * (14 * 4 * width + 1536 * 4) for number, width in blocks):,} numbers" in page


# --- the site


def test_the_menu_has_every_page() -> None:
    pages = [next(iter(entry.values())) for entry in yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]]
    assert sorted(pages) == sorted(page.name for page in DOCS.glob("*.md"))


@pytest.mark.slow
def test_the_site_builds_without_a_warning_or_an_address_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(r"<(?:script|img|iframe)[^>]+src=\"?(https?:[^\"\s>]+)", page.read_text())
        loaded += re.findall(
            r"<link[^>]+rel=\"?(?:stylesheet|preconnect)[^>]+href=\"?(https?:[^\"\s>]+)", page.read_text()
        )
        assert not loaded, page
