"""What text encoders made of prompts, kept on disk, so that each prompt is encoded once and not in every run."""

import hashlib
import json
import logging
import os
import uuid
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import transformers
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vp_rl.types import Conditioning

log = logging.getLogger(__name__)

_PACK = 64  # prompts in a file that is full; smaller ones are put together when there are as many of them


class TextCache:
    """Prompts' conditioning by the tokens that the encoders read, in safetensors files of some prompts each.

    Files are named by what is in them and are never changed, so any number of processes may read and write the same
    folder. One that cannot be read is thrown away, with a warning, and its prompts are encoded anew.

    Args:
        folder: of all caches; this one's is a folder in it, named by what the encoders are.
        encoders: in their order; None for one that is left out.
        recipe: what is made of the encoders' outputs, in a word.
    """

    def __init__(self, folder: Path, encoders: Sequence[nn.Module | None], recipe: str) -> None:
        self._folder = folder.expanduser() / fingerprint(encoders, recipe, transformers.__version__)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._files: dict[Path, frozenset[str]] = {}
        self._scan()
        self._pack()

    def get(self, keys: Iterable[str]) -> dict[str, Conditioning]:
        """What is kept of those prompts, each of batch 1, in main memory."""
        wanted = set(keys)
        if wanted - frozenset().union(*self._files.values()):
            self._scan()  # other processes may have written since
        return {key: row for file in list(self._files) for key, row in self._read(file, wanted).items()}

    def put(self, rows: Mapping[str, Conditioning]) -> None:
        """Keeps them; a disk that is full is a warning."""
        tensors = {f"{key}.{name}": part.cpu().contiguous() for key, row in rows.items() for name, part in row.items()}
        sums = {key: _checksum(row) for key, row in rows.items()}
        path = self._path(rows)
        unfinished = path.with_name(f".{uuid.uuid4().hex}.tmp")
        try:
            save_file(tensors, unfinished, metadata=sums)
            os.replace(unfinished, path)
            self._files[path] = frozenset(rows)
        except (OSError, SafetensorError) as error:
            log.warning("policy.economy.text_cache: could not write %s: %s", path, error)
        finally:
            unfinished.unlink(missing_ok=True)

    def _path(self, keys: Iterable[str]) -> Path:
        return self._folder / f"{_digest(sorted(keys))}.safetensors"

    def _scan(self) -> None:
        """Looks at files that are new here."""
        for path in sorted(set(self._folder.glob("*.safetensors")) - self._files.keys()):
            try:
                with safe_open(path, framework="pt") as file:
                    self._files[path] = frozenset(file.metadata() or ())
            except FileNotFoundError:  # packed by another process
                continue
            except (OSError, SafetensorError) as error:
                self._discard(path, error)

    def _read(self, path: Path, wanted: set[str]) -> dict[str, Conditioning]:
        """Those of the wanted prompts that are in that file, and whole."""
        keys, rows = wanted & self._files[path], {}
        if not keys:
            return {}
        try:
            with safe_open(path, framework="pt") as file:
                sums = file.metadata()
                for name in file.keys():  # noqa: SIM118  # not a mapping
                    key, _, part = name.partition(".")
                    if key in keys:
                        rows.setdefault(key, {})[part] = file.get_tensor(name)
            if wrong := {key for key in keys if _checksum(rows.get(key, {})) != sums[key]}:
                raise ValueError(f"{len(wrong)} of {len(sums)} prompts are not as they were written")
        except FileNotFoundError:  # packed by another process, between its listing and now: encoded anew
            self._files.pop(path)
            return {}
        except (OSError, SafetensorError, ValueError) as error:
            self._discard(path, error)
            return {}
        return rows

    def _discard(self, path: Path, error: Exception) -> None:
        log.warning("policy.economy.text_cache: %s is spoilt (%s); its prompts are encoded anew.", path, error)
        path.unlink(missing_ok=True)
        self._files.pop(path, None)

    def _pack(self) -> None:
        """Puts small files together. Two processes that do so at once write the same file and delete the same ones."""
        loose = [path for path, keys in sorted(self._files.items()) if len(keys) < _PACK]
        if len(loose) < _PACK:
            return
        batch: dict[str, Conditioning] = {}
        begun: list[Path] = []
        for path in loose:
            batch |= self._read(path, set(self._files[path]))
            begun.append(path)
            if len(batch) >= _PACK or path is loose[-1]:
                self.put(batch)
                written = self._path(batch)
                for done in begun:  # a full disk leaves them; one that is alone is what was written
                    if written in self._files and done != written and self._files.pop(done, None) is not None:
                        done.unlink(missing_ok=True)
                batch, begun = {}, []


def key_of(tokens: Sequence[Int[Tensor, "1 _"]]) -> str:
    """The name of a prompt: of what every encoder reads of it."""
    return _digest([f"{tuple(part.shape)} {part.flatten().tolist()}" for part in tokens])


def fingerprint(encoders: Sequence[nn.Module | None], recipe: str, library: str) -> str:
    """Of their weights, of their settings but for where they came from, and of the library that runs them."""
    parts = [recipe, library]
    with ThreadPoolExecutor() as pool:
        for encoder in encoders:
            if encoder is None:
                parts.append("none")
                continue
            config = encoder.config if isinstance(encoder.config, Mapping) else encoder.config.to_dict()  # diffusers'
            settings = {name: value for name, value in config.items() if name != "_name_or_path"}
            parts += [type(encoder).__name__, json.dumps(settings, sort_keys=True, default=str)]
            names, tensors = zip(*sorted(encoder.state_dict().items()), strict=True)
            parts += [*names, *pool.map(_digest_tensor, tensors)]
    return _digest(parts)


def _digest_tensor(tensor: Tensor) -> str:
    content = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
    content.update(_bytes(tensor))
    return content.hexdigest()


def _digest(parts: Iterable[str]) -> str:
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()


def _checksum(row: Conditioning) -> str:
    total = 0
    for name in sorted(row):
        total = zlib.crc32(_bytes(row[name]), total)
    return f"{total:08x}"


def _bytes(tensor: Tensor) -> memoryview:
    """Its numbers, as they lie in memory."""
    return memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
