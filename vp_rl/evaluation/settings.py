"""What a page says of the run behind it: command and configuration, without what must not be given away."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from vp_rl.secrets import mask

_SECRET = r"(?:(?:api|access|secret|private)_?key|token|secret|password|passwd|credentials?)"
_SECRET_NAME = re.compile(rf"(?i){_SECRET}$")
_SECRET_GIVEN = re.compile(rf"(?i)([\w.]*{_SECRET}['\"]?\s*[:=][ \t]*)[^\s#]+")
_HOST_NAME = re.compile(r"(?i)(?:^|_)(?:host|hostname|address|addresses|endpoint|server)s?$")
_HOST = re.compile(r"://[^\s/'\"]+")
_FOLDERS = re.compile(r"(?<![\w:/.)}~…])~?/(?:[^\s/'\",\[\]]+/)*(?=[^\s/'\"])")
_DRIVE = re.compile(r"(?<!\w)[A-Za-z]:[\\/](?:[^\\/'\"]+[\\/])*|\\\\(?:[^\\/'\"]+\\)+")
_HIDDEN = "(hidden)"


class Settings(NamedTuple):
    """A run's settings, fit to be passed on."""

    title: str
    """The experiment's name."""
    command: str
    """Repeats the run; empty where Hydra wrote nothing."""
    config: str
    """YAML."""
    policy: dict[str, Any]
    """The policy's part of the configuration."""


def read(folder: Path) -> Settings:
    """From the files that Hydra writes into a run's folder before it starts.

    Interpolations are unresolved there, so no environment variable gets into a page.
    """
    tree, given = _load(folder, "config.yaml") or {}, _load(folder, "overrides.yaml") or []
    chosen = dict(entry.split("=", 1) for entry in given if "=" in entry)
    config = yaml.safe_dump(publishable(tree), sort_keys=False, allow_unicode=True, width=110) if tree else ""
    return Settings(
        title=_value("", chosen.get("name") or chosen.get("experiment") or folder.name),
        command=command(["python", "train.py", *given]) if given else "",
        config=config,
        policy=publishable(tree.get("policy") or {}),
    )


def command(words: Sequence[str]) -> str:
    """A command line that repeats what it did, as it can be pasted: whole paths, but no credentials and no hosts.

    Without `resume`, which would go on with some other run. Paths below the folder that it was given in are relative to
    that, and the home folder is `$HOME`.
    """
    return " ".join(_quoted(word) for word in words if not re.match(r"\+{0,2}resume=", word))


def _quoted(word: str) -> str:
    name, equals, value = word.partition("=")
    if equals and _SECRET_NAME.search(name) and value not in ("", "null"):
        return shlex.quote(f"{name}={_HIDDEN}")
    if equals and _HOST_NAME.search(name.rpartition(".")[2]) and value and not value.startswith("${"):
        return shlex.quote(f"{name}=(host)")
    shown = without_secrets(word)
    here, home = f"{Path.cwd()}/", str(Path.home())
    if len(here) > 1:
        shown = re.sub(rf"(?<![\w/.~}}]){re.escape(here)}(?=[^/])", "", shown)
    parts = re.split(rf"(?<![\w/.~}}]){re.escape(home)}(?=/|$)", shown) if len(home) > 1 else [shown]
    return '"$HOME"'.join(shlex.quote(part) if part else "" for part in parts) or "''"


def override(entry: str) -> str:
    """One override of a command line, fit to be passed on."""
    name, equals, value = entry.partition("=")
    return f"{name}{equals}{_value(name.rpartition('.')[2], value)}" if equals else public(entry)


def public(text: str) -> str:
    """Without what a page must not give away: credentials, hosts, and the folders above a file."""
    return _FOLDERS.sub("…/", _DRIVE.sub("…/", without_secrets(text)))


def without_secrets(text: str) -> str:
    """Without credentials and hosts."""
    return _HOST.sub("://(host)", mask(_SECRET_GIVEN.sub(rf"\1{_HIDDEN}", text)))


def _load(folder: Path, name: str) -> Any:
    file = folder / ".hydra" / name
    return yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None


def publishable(value: Any, name: str = "") -> Any:
    """Settings, nested as they are, without credentials, hosts, and the folders above a file."""
    if isinstance(value, dict):
        return {key: publishable(item, str(key)) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [publishable(item, name) for item in value]
    return _value(name, value)


def _value(name: str, value: Any) -> Any:
    """What is seen of a setting of this name; anything but a string is harmless, unless its name is a secret's."""
    if _SECRET_NAME.search(name) and value not in (None, "", "null"):
        return _HIDDEN
    if not isinstance(value, str):
        return value
    if _HOST_NAME.search(name) and value and not value.startswith("${"):
        return "(host)"
    whole = value.strip("'\"")
    if re.match(r"~|/|\.\./|[A-Za-z]:[\\/]|\\\\", whole) and "://" not in whole:  # a path, which may have spaces in it
        return "…/" + re.split(r"[\\/]", whole.rstrip("\\/"))[-1]
    return public(value)
