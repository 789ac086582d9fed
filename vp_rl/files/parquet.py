"""Parquet files: pyarrow's readers, whose errors here name the file and are all of one kind."""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet

from vp_rl.files.pretenders import pretender


def names(file: Path) -> list[str]:
    """Of its columns.

    Raises:
        FileNotFoundError, ValueError: see `read`.
    """
    with whole(file):
        return list(parquet.read_schema(file).names)


def metadata(file: Path) -> parquet.FileMetaData:
    """What its footer says.

    Raises:
        FileNotFoundError, ValueError: see `read`.
    """
    with whole(file):
        return parquet.read_metadata(file)


def read(file: Path, columns: Collection[str] | None = None) -> pyarrow.Table:
    """The whole table, or some of its columns.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no whole Parquet file, or has one of the columns twice.
    """
    _check_single(file, columns)
    with whole(file):
        return parquet.ParquetFile(file).read(None if columns is None else list(columns))


def row_group(file: Path, group: int, columns: Sequence[str] | None = None) -> pyarrow.Table:
    """One of its row groups.

    Raises:
        FileNotFoundError, ValueError: see `read`.
    """
    with whole(file):
        return parquet.ParquetFile(file).read_row_group(group, None if columns is None else list(columns))


def batches(file: Path, rows: int, columns: Sequence[str] | None = None) -> Iterator[pyarrow.RecordBatch]:
    """The table in batches of at most so many rows.

    Raises:
        FileNotFoundError, ValueError: see `read`.
    """
    _check_single(file, columns)
    with whole(file):
        yield from parquet.ParquetFile(file).iter_batches(rows, columns=None if columns is None else list(columns))


def values(file: Path, table: pyarrow.Table | pyarrow.RecordBatch) -> list[dict[str, Any]]:
    """Rows that were read from the file, as Python's values; it is only here that text must be UTF-8.

    Raises:
        ValueError: some text is not.
    """
    with whole(file):
        return table.to_pylist()


@contextmanager
def whole(file: Path) -> Iterator[None]:
    """Whatever pyarrow raises in here is said of the file."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # it raises all of them for damage
        what = pretender(_head(file))
        raise ValueError(f"{file} is no whole Parquet file: {f'it is {what}' if what else error}") from error


def _check_single(file: Path, columns: Collection[str] | None) -> None:
    counted = Counter(names(file))
    for name in counted if columns is None else columns:
        if counted[name] > 1:
            raise ValueError(f"{file} has {counted[name]} columns {name!r}: rename all but one.")


def _head(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            return opened.read(1024)
    except OSError:
        return b""
