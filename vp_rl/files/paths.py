"""Paths as people write them."""

import re
from collections.abc import Iterable
from pathlib import Path

_HOME = re.compile(r"""(^|[\[,:{=]\s*)(['"]?)~(?=/|['"\],}]|$)""")  # where a value begins


def user_path(given: str | Path) -> Path:
    """The path, where `~` is the user's home and `~name` another's: no shell expands it behind a `=`.

    Raises:
        ValueError: it begins with `~name`, and there is no such user.
    """
    try:
        return Path(given).expanduser()
    except RuntimeError as error:
        raise ValueError(f"'{given}' begins with the home of a user that there is not: write './{given}'.") from error


def user_place(given: str) -> str:
    """The same of what may be another thing than a path, as a hub's name or an address is.

    Raises:
        ValueError: see `user_path`.
    """
    return str(user_path(given)) if given.startswith("~") else given


def at_home(arguments: Iterable[str]) -> list[str]:
    """A command's arguments, where `~` begins a value: what is in `key=~/place` no shell expands.

    `~key` by itself is Hydra's way to delete, and stays.
    """
    return [_expanded(argument) for argument in arguments]


def _expanded(argument: str) -> str:
    name, is_setting, value = argument.partition("=")
    if not is_setting:
        return argument
    return f"{name}={_HOME.sub(lambda found: found[1] + found[2] + str(Path.home()), value)}"
