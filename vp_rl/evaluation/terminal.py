"""How commands speak: errors in one line, a full disk whoever says so, and nothing of libraries' in a file."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

_FULL = ("no space left", "disk is full", "disk quota exceeded", "database or disk is full")
_FULL_CODES = {errno.ENOSPC, errno.EDQUOT}


def stop(error: BaseException, more: str = "") -> NoReturn:
    """One message for what the user can put right; HYDRA_FULL_ERROR=1 shows where it came from."""
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        raise error
    key = getattr(error, "full_key", None)  # OmegaConf has it in a line of its own
    said = f"{key}: {str(error).splitlines()[0]}" if key and key not in str(error).splitlines()[0] else error
    sys.exit(f"error: {said}{more}")


def is_full(error: BaseException | None) -> bool:
    """Whether a full disk is what it comes from, whichever library says so."""
    while error is not None:
        if getattr(error, "errno", None) in _FULL_CODES or any(words in str(error).lower() for words in _FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside it messages of the log stand above progress bars; and libraries' bars are not written into files."""
    if sys.stderr.isatty():
        from tqdm.contrib.logging import logging_redirect_tqdm

        with logging_redirect_tqdm():
            yield
        return
    from diffusers.utils import logging as diffusers
    from transformers.utils import logging as transformers

    diffusers.disable_progress_bar()
    transformers.disable_progress_bar()  # and the hub's
    yield
