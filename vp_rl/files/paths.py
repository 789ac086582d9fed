"""Paths as people write them."""

from pathlib import Path


def user_path(given: str | Path) -> Path:
    """The path, where `~` is the user's home and `~name` another's: no shell expands it behind a `=`.

    Raises:
        ValueError: it begins with `~name`, and there is no such user.
    """
    try:
        return Path(given).expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"'{given}' begins with the home of a user that there is not: write ./{given} or ~/."
        ) from error
