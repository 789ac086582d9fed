"""A folder is written into by one run at a time."""

from pathlib import Path

from filelock import FileLock, Timeout

_NAME = ".lock"  # the system's own, on an open file: it ends with the process, however that ends


def lock_of(folder: Path) -> FileLock:
    """What whoever writes into a folder holds; jobs of sweeps wait for it."""
    return FileLock(folder / _NAME)


def hold(folder: Path, way_out: str, patience: float = 2.0) -> FileLock:
    """Takes the folder; until the lock is released, or this process ends.

    Args:
        folder: made if it is not there.
        way_out: what to do where somebody else is at work in it.
        patience: seconds that one is waited for who is about to end.

    Raises:
        ValueError: somebody else is at work in it.
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = lock_of(folder)
    try:
        lock.acquire(timeout=patience)
    except Timeout:
        raise ValueError(f"Another process is at work in {folder}: wait for it, or {way_out}") from None
    return lock


def is_held(folder: Path) -> bool:
    """Whether somebody is at work in it."""
    if not (folder / _NAME).exists():
        return False
    lock = lock_of(folder)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:  # a folder that is only read
        return False
    lock.release()
    return False


def free(folder: Path) -> Path:
    """Makes this folder, which is not there yet, or, where the name is taken, one with a number behind it."""
    wanted, number = folder, 1
    while True:
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if not folder.is_dir():
                raise
            number += 1
            folder = wanted.with_name(f"{wanted.name}_{number}")
        else:
            return folder
