"""Pairs of images of which people chose one: with the images in files (HPD v3) or in the table (Pick-a-Pic)."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as parquet

from vp_rl.configuration.kinds import Count, Text, Texts
from vp_rl.data.sets.base import HumanSet, Judged, Protocol, pair
from vp_rl.data.sets.files import Hub, Row, fetch, rows, stamp
from vp_rl.data.sets.table import TableSet

_AT_ONCE = 16  # rows of a table with images inside: tens of MB


class PairColumns(NamedTuple):
    """What the columns of a table of pairs are; `first` and `second` each have two images' columns."""

    prompt: Text = "prompt"
    images: Texts = ("path1", "path2")
    """The files' names, or what identifies the images where they are in the table."""
    label: Text | None = None
    """1: the first is preferred, 0: the second, 0.5: a tie. None: it is always the first."""
    votes: Text | None = None
    """A list of two numbers: how many people chose the first, and the second; may be empty or absent in a row."""
    generators: Texts | None = None
    judged: Text | None = None
    """Whether there is a verdict: rows without are left out. None: there always is."""

    def names(self) -> set[str]:
        """All of them but `votes`, which not every row must have."""
        optional = [name for name in (self.label, self.judged) if name is not None]
        return {self.prompt, *self.images, *optional, *(self.generators or ())}


class FilePairs(TableSet[PairColumns]):
    """A row for each pair; `limit` is of pairs."""

    def _parse(self, file: Path) -> list[Judged]:
        found = rows(file, self._columns.names())
        return list(islice(_judged_all(found, self._columns, "Pair", file), self._limit))


class ParquetPairs(HumanSet):
    """Parquet files of pairs with the images inside, read row by row.

    Args:
        title: see `HumanSet`.
        folder: of the set; downloaded there if the files are absent.
        files: a pattern of the files in the folder.
        columns: of the table; `images` are those of the images' ids.
        contents: the columns of the images themselves.
        protocols: see `HumanSet`.
        tuning_files: a pattern of files whose pairs are only for a protocol to choose a setting on.
        hub: where the set can be downloaded.
        limit: only the first so many pairs, of each of the two.
    """

    any_order = False

    def __init__(
        self,
        title: Text,
        folder: Text,
        files: Text,
        columns: PairColumns,
        contents: Texts,
        protocols: Sequence[Protocol],
        tuning_files: Text | None = None,
        hub: Hub | None = None,
        limit: Count | None = None,
    ) -> None:
        self.title, self.protocols = title, list(protocols)
        self._folder, self._columns, self._hub, self._limit = Path(folder), columns, hub, limit
        self._contents = contents
        self._patterns = {False: files} | ({} if tuning_files is None else {True: tuning_files})

    def load(self) -> list[Judged]:
        """See `HumanSet`."""
        judged = []
        for tuning, pattern in self._patterns.items():
            fetch(self._folder, pattern, self._hub)
            own = []
            for file in sorted(self._folder.glob(pattern)):
                present = set(parquet.read_schema(file).names)
                if absent := set(self._contents) - present:
                    raise ValueError(f"'{file}' has no column {', '.join(sorted(absent))}: name it in `contents`.")
                names = self._columns.names() | ({self._columns.votes or ""} & present)
                found = _judged_all(rows(file, names), self._columns, "Row", file)
                own += [each._replace(tuning=tuning) for each in found]
            judged += own[: self._limit]
        return judged

    def read(self, wanted: Collection[str]) -> Iterator[tuple[str, bytes]]:
        """See `HumanSet`; the files' order."""
        left = set(wanted)
        columns = [*self._columns.images, *self._contents]
        for file in self._files():
            for batch in parquet.ParquetFile(file).iter_batches(_AT_ONCE, columns=columns):
                for row in batch.to_pylist():
                    for name, content in zip(self._columns.images, self._contents, strict=True):
                        if row[name] in left:
                            left.remove(row[name])
                            yield row[name], _bytes(row[content])
                if not left:
                    return

    def stamp(self) -> str:
        """See `HumanSet`."""
        return stamp(*self._files())

    def _files(self) -> list[Path]:
        return [file for pattern in self._patterns.values() for file in sorted(self._folder.glob(pattern))]


def _bytes(content: Any) -> bytes:
    """An image's file, whether the column is binary or of `datasets`' image type; empty where there is none."""
    return (content.get("bytes") if isinstance(content, Mapping) else content) or b""


def _judged_all(found: Sequence[Row], columns: PairColumns, what: str, file: Path) -> Iterator[Judged]:
    """The pairs of a file that have a verdict."""
    for number, row in enumerate(found, start=1):
        if columns.judged is None or row[columns.judged]:
            yield _judged(row, columns, f"{what} {number} of '{file}'")


def _judged(row: Row, columns: PairColumns, place: str) -> Judged:
    """One pair.

    Raises:
        ValueError: its label or votes say nothing.
    """
    label = 1.0 if columns.label is None else row[columns.label]
    if label not in (0.0, 0.5, 1.0):
        raise ValueError(f"{place} has {columns.label}={label!r}, which must be 1, 0.5 or 0.")
    votes = (None if columns.votes is None else row.get(columns.votes)) or (label, 1 - label)
    if len(votes) != 2 or not sum(votes) > 0:
        raise ValueError(f"{place} has {columns.votes}={votes!r}, which must be the numbers of votes for each image.")
    first, second = (str(row[name]) for name in columns.images)
    generators = () if columns.generators is None else tuple(str(row[name]) for name in columns.generators)
    share = float(votes[0]) / float(sum(votes))
    return pair(str(row[columns.prompt]), (first, second), share, label=float(label), generators=generators)
