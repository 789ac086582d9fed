"""What every command does around Hydra: nearest names for mistyped ones, folders that nobody else has, plain errors.

    if __name__ == "__main__":
        start(main, "train")

A command's words are composed once before Hydra does it again, in a third of a second: what is wrong with them is then
said in one line and with what may have been meant, before anything is imported or a folder is made.
"""

import difflib
import hashlib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vp_rl.evaluation.lock import free, hold
from vp_rl.evaluation.terminal import stop
from vp_rl.files.paths import at_home
from vp_rl.secrets import guard

CONF = Path(__file__).resolve().parents[1] / "conf"
NAMED_HERE = "VP_RL_FOLDER"  # environment variable: the run's folder, where the user has not named one
_NOT_OURS = ("--help", "-h", "--hydra-help", "--version", "--shell-completion", "-sc", "--info", "-i")
_OTHER_CONFIG = ("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--experimental-rerun")
_TAKES_A_WORD = {*_OTHER_CONFIG, "--package", "-p", "--cfg", "-c"}
_held: list[FileLock] = []  # until this process ends


def start(
    main: Callable[[], Any],
    config: str,
    *,
    check: Callable[[DictConfig, list[str]], None] = lambda composed, given: None,
    alone: bool = False,
) -> None:
    """Looks at the words of the command line, gives the run its folder, and leaves the rest to Hydra.

    Args:
        main: what `hydra.main` has decorated.
        config: the name of its configuration.
        check: of the composed configuration and the overrides that were given; may end the command.
        alone: whether no other process may write into the folder at the same time.
    """
    guard()
    sys.argv[1:] = at_home(sys.argv[1:])
    logging.raiseExceptions = False  # of a full disk there is one message, not one of each line of the log
    folder = None
    if _is_main_process() and not _has(sys.argv, _NOT_OURS):
        try:
            folder = prepare(config, check, alone)
        except (ValueError, OSError) as error:
            stop(error)
    try:
        main()
    finally:
        if folder is not None and (folder / "results.html").is_file():
            print(f"results of all jobs: {folder / 'results.html'}", flush=True)


def prepare(config: str, check: Callable[[DictConfig, list[str]], None], alone: bool) -> Path | None:
    """Checks `sys.argv`, and adds to it the folder that Hydra is to use.

    Returns:
        The sweep's folder, of a sweep.

    Raises:
        ValueError: something that was given is not there, or cannot be read; or the folder is another run's.
        OSError: the folder cannot be made.
    """
    words = sys.argv[1:]
    sys.argv[1:] = words = [readable(word) if given else word for word, given in _marked(words)]
    given = [word for word, is_override in _marked(words) if is_override]
    if _has(words, _OTHER_CONFIG):
        return None
    singles = [single for word in given if (single := _single(word)) is not None]
    composed = composition(config, singles)
    _check_kinds(config, composed, singles)
    _ask_for_missing(composed, words)
    if _has(words, ("--cfg", "-c")):
        return None
    check(composed, given)
    hydra = composed.hydra
    sweeps = _has(words, ("-m", "--multirun")) or str(hydra.mode).endswith("MULTIRUN")
    if not sweeps and (several := [word for word in given if _is_sweep(word)]):
        raise ValueError(f"{several[0]!r} has several values: add -m for a sweep, or put the value into inner quotes.")
    HydraConfig.instance().set_config(composed)  # `${hydra:...}` is read from there
    try:
        if sweeps:
            return _sweep_folder(hydra, given)
        _run_folder(hydra, given, alone)
    finally:
        HydraConfig.instance().cfg = None
    return None


def _run_folder(hydra: DictConfig, given: Sequence[str], alone: bool) -> None:
    """A new folder for what Hydra would name by the second; a folder that was named is held, where that is wanted."""
    os.environ.pop(NAMED_HERE, None)
    folder = Path(hydra.run.dir)
    if "${now" in _raw(hydra, "run") and not _names(given, "hydra.run.dir"):
        folder = free(folder)
        os.environ[NAMED_HERE] = os.path.abspath(
            folder
        )  # as Hydra says it; Lightning starts the other processes of a run by a command of its own
        sys.argv.append(readable(f"hydra.run.dir={folder}"))
    if alone:
        stay_alone(folder)


def stay_alone(folder: Path) -> None:
    """Holds the run's folder until this process ends; one that is held already is left so.

    Raises:
        ValueError: another process is at work in it.
    """
    if not _held:
        _held.append(hold(folder, "give another hydra.run.dir."))


def _sweep_folder(hydra: DictConfig, given: Sequence[str]) -> Path:
    """Where the sweep's jobs are: named by its words, so that the same words go on; or by its preset, or the user."""
    folder = Path(hydra.sweep.dir)
    if not _names(given, "hydra.sweep.dir"):
        chosen = [word.partition("=")[2] for word in given if word.startswith("experiment=")]
        if chosen and "," in chosen[-1]:  # a sweep over experiments: Hydra itself would call it None
            folder = folder.parents[1] / re.sub(r"[^\w-]+", "_", chosen[-1]) / folder.name
        if "${now" in _raw(hydra, "sweep"):
            folder = folder.with_name(named(given))
        sys.argv.append(readable(f"hydra.sweep.dir={folder}"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def named(given: Sequence[str]) -> str:
    """A name for a sweep's folder that follows from its words: what is swept, and a few digits for all of them.

    How jobs are run, and by how much a search goes on, is left out: the same jobs go on.
    """
    lasting = sorted(word for word in given if not word.startswith(("hydra.", "hydra/", "resume=")))
    swept = [word.partition("=")[0].lstrip("+") for word in lasting if _is_sweep(word)]
    short = "_".join(name.rpartition(".")[2] for name in swept)[:60] or "jobs"
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '-', short)}-{hashlib.sha256(' '.join(lasting).encode()).hexdigest()[:8]}"


# --- words


def _marked(words: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Each word, and whether it is an override."""
    before = ""
    for word in words:
        yield word, not word.startswith("-") and before not in _TAKES_A_WORD
        before = word


def readable(word: str) -> str:
    """An override as Hydra can read it: what it cannot, such as a path with an `=`, a blank or brackets, in quotes.

    Raises:
        ValueError: there is no way to read it.
    """
    if _parsed(word) is not None:
        return word
    key, equals, value = word.partition("=")
    quoted = f"{key}={QuotedString(value, Quote.single).with_quotes()}"
    if equals and value and value[0] not in "[{('\"" and _parsed(quoted) is not None:
        return quoted
    if not equals:
        raise ValueError(f"{word!r} is no setting: they are given as NAME=VALUE.")
    raise ValueError(f"{word!r} cannot be read: is a bracket or a quotation mark missing?")


def _parsed(word: str) -> Any:
    try:
        return OverridesParser.create().parse_overrides([word])[0]
    except HydraException:
        return None


def _is_sweep(word: str) -> bool:
    found = _parsed(word)
    return found is not None and found.is_sweep_override()


def _single(word: str) -> str | None:
    """A setting with the first of its values; None where a sweep does not say which they are."""
    parsed = _parsed(word)
    if parsed is None or not parsed.is_sweep_override():
        return word
    try:
        return f"{word.partition('=')[0]}={next(iter(parsed.sweep_string_iterator()))}"
    except Exception:  # an interval, or a glob
        return None


def _names(given: Iterable[str], key: str) -> bool:
    return any(word.lstrip("+").startswith(f"{key}=") for word in given)


def _has(words: Sequence[str], flags: Sequence[str]) -> bool:
    return any(word.partition("=")[0] in flags for word in words if word.startswith("-"))


def _raw(hydra: DictConfig, mode: str) -> str:
    node: Any = OmegaConf.to_container(hydra[mode], resolve=False)
    return str(node["dir"])


def _is_main_process() -> bool:
    """Not one of several that Lightning, torchrun or SLURM have started for one run: those share a folder."""
    several = int(os.environ.get("SLURM_NTASKS", "1") or 1) > 1 and "SLURM_PROCID" in os.environ
    return "LOCAL_RANK" not in os.environ and not several


# --- what is not there


def composition(config: str, given: list[str]) -> DictConfig:
    """The configuration that these overrides make.

    Raises:
        ValueError: they make none; says what may have been meant.
    """
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose(config, given, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_said(error, config, given)) from error


def _said(error: Exception, config: str, given: list[str]) -> str:
    text = str(error).partition("\nConfig search path")[0]
    if found := re.search(r"Could not find '(.+)/(.+?)'\s+Available options in '.+?':\s+(.+)", text, re.DOTALL):
        group, name, options = found[1], found[2], found[3].split()
        there = f"there is no {group}={name}, that is, no conf/{group}/{name}.yaml."
        return f"{there}{_meant(nearest(name, options), group)} There are: {', '.join(options)}."
    if found := re.search(r"Could not (?:override|delete from config\.) '(.+?)'", text):
        known = list(_known(config, [word for word in given if _key(word) != found[1]]))
        meant = _meant(nearest(found[1], known))
        return f"there is no setting {found[1]!r}.{meant or ' --help lists all of them.'}"
    if found := re.search(r"config group '(.+?)' does not exist", text):
        groups = sorted(each.relative_to(CONF).as_posix() for each in CONF.rglob("*") if each.is_dir())
        return f"there is no group {found[1]!r}.{_meant(nearest(found[1], groups))}"
    return " ".join(text.split())


def _check_kinds(config: str, composed: DictConfig, given: list[str]) -> None:
    """Raises ValueError where words stand for what is a number, or true or false, in the configuration."""
    suspects = [name for word in given if isinstance(_value(composed, name := _key(word)), str)]
    if not suspects:
        return
    before = composition(config, [word for word in given if _key(word) not in suspects or (CONF / _key(word)).is_dir()])
    for name in suspects:
        value, default = _value(composed, name), _value(before, name)
        if isinstance(default, int | float) and value != "auto":
            wanted = "true or false" if isinstance(default, bool) else "a number"
            raise ValueError(f"{name}={value!r} must be {wanted}, as {default} is.")


def _value(composed: DictConfig, name: str) -> Any:
    """A setting as it is written, without what it refers to."""
    node: Any = OmegaConf.to_container(composed, resolve=False)
    for part in name.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return None if isinstance(node, str) and "${" in node else node


def _key(word: str) -> str:
    return word.lstrip("~+").partition("=")[0].partition("@")[0]


def _meant(names: Sequence[str], group: str = "") -> str:
    shown = [f"{group}={name}" if group else name for name in names]
    return f" Did you mean {' or '.join(shown)}?" if shown else ""


def nearest(name: str, known: Sequence[str]) -> list[str]:
    """Those that may have been meant: with the same last part, or a few letters away."""
    end = name.rpartition(".")[2]
    same = sorted((each for each in known if each.endswith(f".{end}")), key=lambda each: (each.count("."), each))
    close = difflib.get_close_matches(name, known, 3, 0.8)
    if close or same:
        return list(dict.fromkeys([*close, *same]))[:3] if "." in name else list(dict.fromkeys([*same, *close]))[:3]
    ends = {each.rpartition(".")[2] for each in known}
    return [each for near in difflib.get_close_matches(end, ends, 1, 0.8) for each in nearest(f".{near}", known)][:3]


def _known(config: str, given: list[str]) -> Iterator[str]:
    """Every setting and group there is, where these overrides can be composed."""
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            whole = compose(config, given, return_hydra_config=True)
    except HydraException:  # one that is wrong too
        groups = [word for word in given if re.fullmatch(r"[\w/@]+=\w+", word) and (CONF / _key(word)).is_dir()]
        if groups == given:
            return
        yield from _known(config, groups)
        return
    yield from whole.hydra.runtime.choices
    tree: Any = OmegaConf.to_container(whole, resolve=False)
    tree.pop("hydra")
    yield from _flat(tree)


def _flat(tree: Any, prefix: str = "") -> Iterator[str]:
    for key, value in tree.items() if isinstance(tree, dict) else ():
        if not str(key).startswith("_"):
            yield f"{prefix}{key}"
            yield from _flat(value, f"{prefix}{key}.")


def _ask_for_missing(composed: DictConfig, words: Sequence[str]) -> None:
    """Ends with the help's examples where a setting has to be given."""
    missing = [str(name) for name in composed if OmegaConf.is_missing(composed, name)]
    if not missing:
        return
    tree: Any = OmegaConf.to_container(composed.hydra.help, resolve=False)
    examples = re.split(r"\n[^\n]*(?:Groups \(|Everything below|\$)", tree["template"])[0].rstrip()
    needed = ", ".join(f"{name}=..." for name in missing)
    sys.stderr.write(f"{examples}\n\nerror: {needed} must be given; --help has all that can be.\n")
    sys.exit(2)
