"""Pairs of images of which people chose one: with the images in files (HPD v3) or in the table (Pick-a-Pic)."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vp_rl.configuration.kinds import Count, Text, Texts
from vp_rl.data.sets.base import HumanSet, Judged, Protocol, pair
from vp_rl.data.sets.files import Hub, Placed, Row, fetch, name_of, rows, stamp, without_nulls
from vp_rl.data.sets.table import TableSet
from vp_rl.files import parquet
from vp_rl.files.paths import user_path

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

    def optional(self) -> set[str]:
        """`votes`, if there are any."""
        return set() if self.votes is None else {self.votes}


class FilePairs(TableSet[PairColumns]):
    """A row for each pair; `limit` is of pairs."""

    def _parse(self, file: Path) -> list[Judged]:
        found = rows(file, self._columns.names(), self._columns.optional())
        judged, self.note = _judged_all(found, self._columns, self._limit)
        return judged


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
        self._folder, self._columns, self._hub, self._limit = user_path(folder), columns, hub, limit
        self._contents = contents
        self._patterns = {False: files} | ({} if tuning_files is None else {True: tuning_files})

    def load(self) -> list[Judged]:
        """See `HumanSet`."""
        judged: list[Judged] = []
        notes: list[str] = []
        for tuning, pattern in self._patterns.items():
            fetch(self._folder, pattern, self._hub)
            own: list[Placed] = []
            for file in sorted(self._folder.glob(pattern)):
                if absent := set(self._contents) - set(parquet.names(file)):
                    raise ValueError(f"'{file}' has no column {', '.join(sorted(absent))}: name it in `contents`.")
                own += rows(file, self._columns.names(), self._columns.optional())
            found, note = _judged_all(own, self._columns, self._limit)
            judged += [each._replace(tuning=tuning) for each in found]
            notes += [note] if note else []
        self.note = " ".join(notes)
        return judged

    def read(self, wanted: Collection[str]) -> Iterator[tuple[str, bytes]]:
        """See `HumanSet`; the files' order."""
        left = set(wanted)
        columns = [*self._columns.images, *self._contents]
        for file in self._files():
            for batch in parquet.batches(file, _AT_ONCE, columns):
                for row in parquet.values(file, batch):
                    for column, content in zip(self._columns.images, self._contents, strict=True):
                        if (name := name_of(row[column])) in left:
                            left.remove(name)
                            yield name, _bytes(row[content])
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


def _judged_all(found: Sequence[Placed], columns: PairColumns, limit: int | None) -> tuple[list[Judged], str]:
    """The first pairs that have a verdict, and what is to be said of rows that lack something."""
    asked = [(place, row) for place, row in found if columns.judged is None or row[columns.judged]]
    kept, note = without_nulls(asked, {columns.prompt, *columns.images})
    return [_judged(row, columns, place) for place, row in kept[:limit]], note


def _judged(row: Row, columns: PairColumns, place: str) -> Judged:
    """One pair.

    Raises:
        ValueError: its label or votes say nothing.
    """
    label = 1.0 if columns.label is None else _number(row[columns.label])
    if label not in (0.0, 0.5, 1.0):
        raise ValueError(f"{columns.label}={row[columns.label or '']!r} in {place} must be 1, 0.5 or 0.")
    said = None if columns.votes is None else row.get(columns.votes)
    votes = [_number(each) for each in said] if isinstance(said, list) and said else [label, 1 - label]
    if (said and not isinstance(said, list)) or len(votes) != 2 or not sum(votes) > 0 or min(votes) < 0:
        raise ValueError(f"{columns.votes}={said!r} in {place} must be the numbers of votes for each image.")
    first, second = (name_of(row[name]) for name in columns.images)
    named = [row[name] for name in columns.generators or ()]
    generators = tuple("unknown" if name is None else name_of(name) for name in named)
    return pair(str(row[columns.prompt]), (first, second), votes[0] / sum(votes), label=label, generators=generators)


def _number(value: Any) -> float:
    """Not a number where it is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")
