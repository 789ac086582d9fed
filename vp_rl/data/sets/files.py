"""A set's folder: downloaded if it is absent, its tables, and its images as files or in archives."""

import hashlib
import math
import os
import tarfile
import zipfile
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import snapshot_download

from vp_rl.configuration.kinds import Text, Texts
from vp_rl.files import tables

Row = dict[str, Any]

Placed = tuple[str, Row]
"""Where a row stands, in words, and the row."""


class Hub(NamedTuple):
    """Where a set can be downloaded from."""

    repository: Text
    """Of the Hugging Face hub: OWNER/NAME."""
    files: Texts
    """What is needed of it: names, or patterns such as `data/test-*`. A `.tar.gz` among it is unpacked."""
    revision: Text | None = None


def fetch(folder: Path, needed: str, hub: Hub | None) -> None:
    """Sees to it that `needed` is in the folder.

    Args:
        needed: a file's name, or a pattern that one matches.
        hub: where to download the set from if it is not there; None: nowhere.

    Raises:
        FileNotFoundError: it is not there, and not on the hub.
        ValueError: it cannot be downloaded.
    """
    if any(folder.glob(needed)):
        return
    if hub is None:
        raise FileNotFoundError(f"There is no {needed} in '{folder}': give the set's folder, or where to download it.")
    try:
        snapshot_download(
            hub.repository,
            repo_type="dataset",
            revision=hub.revision,
            allow_patterns=list(hub.files),
            local_dir=folder,
        )
    except Exception as error:  # network, file system, and what the hub's client makes of them
        raise ValueError(
            f"There is no {needed} in '{folder}', and {hub.repository} cannot be downloaded from the hub: {error}"
        ) from error
    for archive in sorted(folder.glob("*.tar.gz")):
        try:
            with tarfile.open(archive) as packed:
                packed.extractall(folder, filter="data")
        except (tarfile.TarError, EOFError, zlib.error) as error:
            raise ValueError(f"'{archive}' is cut off or damaged ({error}): remove it, and start again.") from error
    if not any(folder.glob(needed)):
        raise FileNotFoundError(f"{hub.repository} was downloaded to '{folder}', but there is no {needed} in it.")


def rows(file: Path, columns: Collection[str], optional: Collection[str] = ()) -> list[Placed]:
    """The rows of a table that fits in memory, each with its place; see `tables.rows`.

    Raises:
        ValueError: it cannot be read, or lacks a column.
    """
    try:
        return [(f"{place} of '{file}'", row) for place, row in tables.objects(file, sorted(columns), sorted(optional))]
    except tables.NoColumn as error:
        raise ValueError(f"{error} Name the right ones in `columns`.") from error


def without_nulls(found: Sequence[Placed], columns: Collection[str]) -> tuple[list[Placed], str]:
    """The rows that have a value in each of these columns, and what is to be said of the others; empty: there are none.

    A null that names an image, a prompt or a group would be taken for one of the name 'None'.
    """
    kept = [(place, row) for place, row in found if not any(_is_null(row[column]) for column in columns)]
    if len(kept) == len(found):
        return kept, ""
    there = {id(row) for _, row in kept}
    first, row = next((place, row) for place, row in found if id(row) not in there)
    column = next(column for column in sorted(columns) if _is_null(row[column]))
    gone = len(found) - len(kept)
    return kept, f"{gone} of {len(found)} rows are left out, which lack a value: `{column}` in {first}, to begin with."


def name_of(value: object) -> str:
    """An id of any type as the name that stands for it; 1 and 1.0, as a column of whole numbers with nulls has it, are
    one."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def _is_null(value: object) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_is_null, value))
    return value is None or (isinstance(value, float) and math.isnan(value))


class Pictures:
    """Image files by name: below a folder, or in a zip archive that stands in place of one of its subfolders.

    An archive's members are found by their whole name or by its last part, since people pack both ways. It can be sent
    to other processes, and used on after a fork: each process opens the archives for itself.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._archives: dict[tuple[int, Path], zipfile.ZipFile] = {}
        self._members: dict[Path, dict[str, str]] = {}

    def missing(self, names: Collection[str]) -> list[str]:
        """Those that are in none of the places."""
        return [name for name in names if self._place(name) is None]

    def read(self, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
        """Name and content of each, one at a time."""
        for name in names:
            place = self._place(name)
            if place is None:
                raise FileNotFoundError(f"No image '{name}' in '{self._folder}'.")
            archive, member = place
            if archive is None:
                yield name, (self._folder / name).read_bytes()
            else:
                with _whole(archive):
                    content = self._opened(archive).read(member)
                yield name, content

    def stamp(self, names: Collection[str]) -> str:
        """Changes when one of the files is replaced, or the archive that it is in; a look at each, not into it."""
        places = dict.fromkeys(self._place(name) for name in names)
        files = dict.fromkeys(self._folder / place[1] if place[0] is None else place[0] for place in places if place)
        return hashlib.blake2b(stamp(*files).encode(), digest_size=6).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_archives": {}}

    def _opened(self, archive: Path) -> zipfile.ZipFile:
        key = os.getpid(), archive  # a forked process shares its parent's place in an open file
        if key not in self._archives:
            self._archives[key] = zipfile.ZipFile(archive)
        return self._archives[key]

    def _place(self, name: str) -> tuple[Path | None, str] | None:
        if (self._folder / name).is_file():
            return None, name
        parts = Path(name).parts
        for depth in range(len(parts) - 1, -1, -1):  # of images/test/test_1/a.webp: images/test/test_1.zip, first
            above = self._folder.joinpath(*parts[:depth])
            archive = above.with_name(above.name + ".zip")
            members = self._index(archive)
            for wanted in ("/".join(parts[depth:]), parts[-1]):
                if wanted in members:
                    return archive, members[wanted]
        return None

    def _index(self, archive: Path) -> dict[str, str]:
        if archive not in self._members:
            names: list[str] = []
            if archive.is_file():
                with _whole(archive):
                    names = self._opened(archive).namelist()
            self._members[archive] = {Path(name).name: name for name in names} | {name: name for name in names}
        return self._members[archive]


@contextmanager
def _whole(archive: Path) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:  # or encrypted
        raise ValueError(f"'{archive}' is no zip archive that can be read ({error}): download it again.") from error


def require(pictures: Pictures, names: Collection[str], what: str) -> None:
    """Refuses a set whose images are not all there, before anything costly is done.

    Raises:
        FileNotFoundError: some are missing; names the first of them.
    """
    if missing := pictures.missing(names):
        raise FileNotFoundError(
            f"{len(missing)} of {len(names)} images of {what} are missing, '{missing[0]}' first: download them all, "
            "or say in `images` where they are."
        )


def stamp(*files: Path) -> str:
    """Names, sizes and times of change."""
    return "|".join(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)
