"""Checkpoint files: written wholly or not at all, read only if they are whole, and compared with a run's settings."""

import logging
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from vp_rl.algorithms.base import PolicyTraining

log = logging.getLogger(__name__)

_NAME = re.compile(r"epoch[-=](\d+)(?:-batch[-=](\d+))?\.ckpt")  # earlier versions had `=`, which Hydra wants quoted
_NEEDED = {"epoch", "global_step", "state_dict", "loops", "optimizer_states", "lr_schedulers"}
_LEARNED = ("algorithm", "policy", "reward", "sampler", "data", "prompts", "seed")  # what decides what is learned
_FREE = {"algorithm.save_to", "policy.economy.text_cache"}  # folders
_UPDATES = ("trainer.accumulate_grad_batches", "trainer.gradient_clip_val", "trainer.gradient_clip_algorithm")
_LENGTHS = ("trainer.max_epochs", "trainer.max_steps")
_DEALT = {  # what may change with the number of devices, as long as all of them together do the same
    "data.batch_size",
    "data.devices_per_prompt",
    "data.images_per_batch",
    "data.batches_per_epoch",
    "trainer.accumulate_grad_batches",
}
_ROUNDING = {  # what a run may go on with, though not to the same bits
    "policy.gradient_checkpointing",
    "policy.economy.text_encoders",
    "policy.economy.vae_batch",
    "policy.economy.channels_last",
    "policy.economy.compile",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.precision",
    "trainer.strategy",
}


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint wholly or not at all, whatever happens in between: kill, power cut, full disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Under a temporary name in the same folder, flushed to the disk, then renamed.

        Raises:
            OSError: it could not be written; what was there before is untouched.
        """
        if "://" in str(path):  # an object store, whose writes are whole already
            return super().save_checkpoint(checkpoint, path, storage_options)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.parent / f".{path.name}.{os.getpid()}.tmp"
        try:
            with unfinished.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except (OSError, RuntimeError) as error:  # torch's writer wraps what the file system says
            raise OSError(
                f"The checkpoint {path} could not be written ({error}). Earlier ones are intact: free some space, and "
                "start the same command with resume=auto."
            ) from error
        finally:
            unfinished.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # or a power cut could undo the renaming
        finally:
            os.close(folder)


def order(file: Path) -> tuple[int, int]:
    """How far a run was at this checkpoint: epochs, and batches of the next one; foreign names come first."""
    found = _NAME.fullmatch(file.name)
    return (int(found[1]), int(found[2] or 0)) if found else (-1, -1)


def read(path: Path) -> dict[str, Any]:
    """A checkpoint's content; its tensors are read from the file when they are used.

    Raises:
        ValueError: the file is no checkpoint, or a damaged one.
    """
    try:
        with zipfile.ZipFile(path) as file:  # what torch.save writes; torch itself does not look at the checksums
            damaged = file.testzip()
        content = None if damaged else torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, UnpicklingError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no checkpoint, or a truncated one ({error}).") from error
    if not isinstance(content, dict) or not content.keys() >= _NEEDED:
        raise ValueError(f"{path} is {'a damaged' if damaged else 'no'} checkpoint of a run.")
    return content


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint of a folder that is furthest on, with its content; what cannot be read is skipped and named."""
    files = sorted(folder.glob("*.ckpt"), key=order, reverse=True)
    for path in files:
        try:
            return path, read(path)
        except ValueError as error:
            log.warning("skipped: %s", error)
    if files:
        log.warning("none of the %d checkpoints in %s can be read", len(files), folder)
    return None


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], algorithm: type | None = None
) -> tuple[list[str], list[str]]:
    """What a checkpoint's settings and a run's differ in: what must not, and what only costs bit-identity.

    Everything else (how long, where to, how watched) may. What is learned from must stay: the optimizer would go on
    with the checkpoint's learning rate whatever the settings say, and other prompts, noise or rewards make another run.

    Args:
        before: the checkpoint's settings.
        now: the run's.
        algorithm: its class, which knows what of its own settings may change; None: none of them.

    Returns:
        Lines that name a setting and both its values.
    """
    own = algorithm if algorithm is not None and issubclass(algorithm, PolicyTraining) else PolicyTraining
    one, other = _flat(before), _flat(now)
    changed = {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}
    ties = _LENGTHS if other.get("algorithm.decay") else ()  # the rate falls over the whole run
    fixed = {name for name in changed if name.split(".")[0] in _LEARNED or name in _UPDATES or name in ties}
    # Groups are nested in each other by interpolation: a setting is named where the user sets it.
    fixed = {name for name in fixed if not any(name.endswith(f".{short}") for short in changed)}

    def lines(names: set[str]) -> list[str]:
        return [f"{name}={other.get(name)!r}, was {one.get(name)!r}" for name in sorted(names)]

    rounding = _ROUNDING | own.rounding
    if _together(one, own) == _together(other, own):
        rounding |= _DEALT | own.dealt
    return lines(fixed - rounding - _FREE), lines(changed & rounding)


def _together(settings: Mapping[str, Any], algorithm: type[PolicyTraining]) -> Any:
    """What a run is made of, however it is dealt out: the stated geometry, or what all devices do together.

    Of settings that leave the number of devices open it is the settings themselves.
    """
    if settings.get("geometry.images_per_update") is not None:
        return settings["geometry.images_per_update"], settings.get("geometry.updates")
    names = ("trainer.devices", "trainer.num_nodes", *sorted(_DEALT | algorithm.dealt))
    values = {name: settings.get(name, 1) for name in names}
    if not all(isinstance(value, int) and value > 0 for value in values.values()):
        return values
    devices = values["trainer.devices"] * values["trainer.num_nodes"]
    return algorithm.together({**settings, **values}, devices)


def _flat(settings: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(settings, Mapping) or not settings:
        return {name: settings}
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found.update(_flat(value, f"{name}.{key}".lstrip(".")))
    return found
