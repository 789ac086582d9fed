"""Images of a set that can only be read from end to end, copied to where any one is found at once.

A row of a Parquet file costs the reading of its whole row group: a hundred images and more for one. To be trained on in
random order, such a set is copied once into a file of images, one after the other, beside a table of where each begins.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow
from pyarrow.parquet import write_table
from tqdm import tqdm

from vp_rl.data.sets.base import HumanSet
from vp_rl.files import parquet


class Pack:
    """The copy; it can be sent to other processes, and used on after a fork."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "images.bin"
        columns = parquet.read(folder / "index.parquet").to_pydict()
        self._places = dict(zip(columns["name"], zip(columns["start"], columns["size"], strict=True), strict=True))
        self._open: dict[int, int] = {}  # by process

    def one(self, name: str) -> bytes:
        """An image's file."""
        start, size = self._places[name]
        if os.getpid() not in self._open:
            self._open[os.getpid()] = os.open(self._file, os.O_RDONLY)
        return os.pread(self._open[os.getpid()], size, start)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": {}}


def packed(human: HumanSet, names: Sequence[str], folder: Path) -> Path:
    """Where the copy of these images of a set is, which is made if it is absent: whole, or not at all.

    Args:
        folder: of all copies. A copy's own name changes with the set's files and with the images that are asked for.

    Raises:
        ValueError: the set has not all of them.
    """
    key = json.dumps([human.title, human.stamp(), sorted(names)])
    place = folder / hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
    if place.is_dir():
        return place
    unfinished = place.with_name(f"{place.name}.{os.getpid()}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    rows: list[tuple[str, int, int]] = []
    end = 0
    quiet = 0.5 if sys.stderr.isatty() else 30
    bar = tqdm(total=len(names), desc=f"{human.title}: copying", unit="image", dynamic_ncols=True, mininterval=quiet)
    with bar, (unfinished / "images.bin").open("wb") as file:
        for name, content in human.read(names):
            file.write(content)
            rows.append((name, end, len(content)))
            end += len(content)
            bar.update()
    if absent := set(names) - {name for name, _, _ in rows}:
        raise ValueError(f"{human.title} has judgements of {len(absent)} images that it lacks, '{min(absent)}' first.")
    columns = dict(zip(("name", "start", "size"), map(list, zip(*rows, strict=True)), strict=True))
    write_table(pyarrow.table(columns), unfinished / "index.parquet")
    try:
        os.replace(unfinished, place)
    except OSError:  # another run has made the same copy meanwhile
        if not place.is_dir():
            raise
        shutil.rmtree(unfinished)
    return place
