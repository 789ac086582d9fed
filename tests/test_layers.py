"""Policies about the code itself, kept by tests: layers, imports, sizes, and what must never be committed."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(file for folder in ("vp_rl", "scripts", "tests") for file in (ROOT / folder).rglob("*.py"))
SOURCES.append(ROOT / "train.py")
MODULES = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for file in (ROOT / "vp_rl").rglob("*.py")
)
MAX_FILE, MAX_FUNCTION = 350, 60  # lines; the aim is 250 and 40
MAX_TESTS = 600  # lines of a test file: one a module, and laws of one thing belong together


def relative(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def test_the_import_contracts_hold() -> None:
    program = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    result = subprocess.run(
        [sys.executable, "-c", program, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


IMPORT_EACH = """
import importlib, importlib.metadata, json, sys

modules, packages, names = json.load(sys.stdin)
sys.modules |= dict.fromkeys(names)  # None: importing it fails, and `find_spec` finds nothing
found = importlib.metadata.Distribution.from_name

def from_name(name):
    if name.lower().replace("_", "-") in packages:
        raise importlib.metadata.PackageNotFoundError(name)
    return found(name)

importlib.metadata.Distribution.from_name = from_name
for module in modules:
    for name in [name for name in sys.modules if name.partition(".")[0] == "vp_rl"]:
        del sys.modules[name]
    try:
        importlib.import_module(module)
    except Exception as error:
        sys.exit(f"import {module}: {type(error).__name__}: {error}")
"""


def test_every_module_imports_alone_with_the_core_dependencies_only() -> None:
    """In one process, to pay for torch once: our own modules are forgotten before each import."""
    packages, names = outside_core()
    given = json.dumps([MODULES, sorted(packages), sorted(names)])
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_EACH], cwd=ROOT, input=given, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]


def outside_core() -> tuple[set[str], set[str]]:
    """Installed packages that are not in the closure of the core dependencies, and what one imports of them."""
    core: set[tuple[str, str]] = set()
    waiting = [("vp-rl", "")]
    while waiting:
        package, extra = waiting.pop()
        if (package, extra) in core:
            continue
        core.add((package, extra))
        for requirement in map(Requirement, installed_requirements(package)):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                waiting += [(canonicalize_name(requirement.name), wanted) for wanted in ("", *requirement.extras)]
    kept = {package for package, _ in core} | {"pip", "setuptools"}
    providers = {
        name: {canonicalize_name(package) for package in packages}
        for name, packages in packages_distributions().items()
    }
    packages = {str(package) for provided in providers.values() for package in provided - kept}
    return packages, {name for name, provided in providers.items() if not provided & kept}


def installed_requirements(package: str) -> list[str]:
    try:
        return requires(package) or []
    except PackageNotFoundError:  # a requirement of another platform, or an extra's that is not installed
        return []


def test_packages_of_extras_are_outside_the_core() -> None:
    packages, names = outside_core()
    assert {"pytest", "beartype", "tensorboard"} <= packages & names
    assert not names & {"torch", "lightning", "diffusers", "numpy", "tqdm", "yaml", "vp_rl"}


@pytest.mark.parametrize("file", SOURCES, ids=relative)
def test_files_and_functions_are_short(file: Path) -> None:
    text = file.read_text()
    assert len(text.splitlines()) <= (MAX_TESTS if file.is_relative_to(ROOT / "tests") else MAX_FILE)
    functions = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    long = {f.name: lines for f in functions if (lines := (f.end_lineno or 0) - f.lineno + 1) > MAX_FUNCTION}
    assert not long, f"longer than {MAX_FUNCTION} lines: {long}"


@pytest.mark.parametrize("file", SOURCES, ids=relative)
def test_checkpoints_are_loaded_as_weights_only(file: Path) -> None:
    """Unpickling a file runs whatever code is in it."""
    bad = [call.lineno for call in unsafe_loads(file.read_text())]
    assert not bad, f"torch.load without weights_only=True in lines {bad}"


def unsafe_loads(source: str) -> Iterator[ast.Call]:
    for call in ast.walk(ast.parse(source)):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "torch.load":
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            if given.get("weights_only") != "True":
                yield call


def test_an_unsafe_load_is_seen() -> None:
    assert len(list(unsafe_loads("torch.load(f)\ntorch.load(f, weights_only=False)\nx.load(f)"))) == 2
    assert not list(unsafe_loads("torch.load(f, weights_only=True)"))


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    home = re.compile(r"(?<![\w.~$}/-])/(?:home|root|work|Users|mnt)/(?!someone\b)[\w.-]+|[A-Z]:\\Users")
    found = [f"{relative(file)}: {match}" for file in text_files() for match in home.findall(file.read_text())]
    assert not found, found


def text_files() -> Iterator[Path]:
    """What is committed or about to be; everything where this is no git checkout."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    skipped = {".venv", ".bench", ".git", "outputs", "multirun", "data"}
    names = listed.stdout.splitlines() if listed.returncode == 0 else [relative(file) for file in ROOT.rglob("*")]
    for name in names:
        file = ROOT / name
        if file.is_file() and not skipped & set(Path(name).parts) and b"\0" not in file.read_bytes()[:1024]:
            yield file
