"""Checkpoints that others wrote: where they lie, and the tensors in them."""

import pickle
from collections.abc import Collection
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


def read(
    init: str, file: str, revision: str | None, setting: str, inside: str, mapped: bool = False
) -> dict[str, Tensor]:
    """The tensors of a checkpoint, as they are called in it.

    Args:
        init: a file, a folder, or the hub name of a repository.
        file: the checkpoint's name in a folder or repository. Safetensors, or a pickle with nothing but tensors in it
            (`.pt`, `.pth`, `.bin`).
        revision: of a hub repository.
        setting: what gave `init`, for messages.
        inside: the key of a dictionary in the file that is taken instead of the whole, where there is one.
        mapped: a pickle is mapped into memory instead of read, which the format before PyTorch 1.6 does not allow.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint, or could run code when it is read.
    """
    path = _find(init, file, revision, setting)
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{setting}={init!r}: {path.name} is no checkpoint, or holds more than tensors, so that reading it could "
            f"run code of whoever made it. Convert it to safetensors where you trust it. ({line(error)})"
        ) from error
    except (SafetensorError, RuntimeError, ValueError, EOFError, OSError) as error:
        raise ValueError(f"{setting}={init!r}: {path.name} is damaged or no checkpoint: {line(error)}") from error
    if isinstance(state, dict) and isinstance(state.get(inside), dict):
        state = state[inside]
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{setting}={init!r}: {path.name} is not a dictionary of tensors by name.")
    return state


def _find(init: str, file: str, revision: str | None, setting: str) -> Path:
    path = Path(init).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / file).is_file():
            there = ", ".join(sorted(each.name for each in path.iterdir())[:8]) or "nothing"
            raise FileNotFoundError(f"{setting}={init!r} has no {file}, but {there}. Name the file by reward.file.")
        return path / file
    try:
        return Path(hf_hub_download(init, file, revision=revision))
    except (EntryNotFoundError, OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{setting}={init!r} is neither a file, nor a folder, nor a hub name like 'owner/model' with "
            f"reward.file={file!r} that could be fetched: {line(error)}"
        ) from error


def first(names: Collection[str]) -> str:
    """Three of them, and how many more there are."""
    return ", ".join(list(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error) or repr(error)).splitlines()[0]
