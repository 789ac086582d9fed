"""Tables of people's own, whatever they are written in: CSV, TSV, JSON, JSON lines, Parquet, and lists of texts.

A row is an object with columns, or a text where the file has texts alone. Nothing is guessed: text is UTF-8, and a
column that is read is there once. Nulls come as None, and numbers as numbers where the format has any.
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vp_rl.files import parquet
from vp_rl.files.pretenders import pretender

Placed = tuple[str, Any]
"""Where a row stands, as `line 3`, and the row."""

Objects = Iterator[tuple[str, dict[str, Any]]]
"""The same where every row is an object."""

_LONGEST = 2**31 - 1  # characters of a CSV field; Python's own limit is 131,072, and images are longer
_UTF_32 = (b"\xff\xfe\0\0", b"\0\0\xfe\xff")
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


class NoColumn(ValueError):
    """A column is wanted that a table has not."""


def text(file: Path) -> str:
    """The content of a UTF-8 file, without the mark that Excel puts before it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is in another encoding, or no text at all.
    """
    content = file.read_bytes()
    if what := pretender(content):
        raise ValueError(f"{file} is {what}.")
    if content.startswith((*_UTF_32, *_UTF_16)):
        kind = "UTF-32" if content.startswith(_UTF_32) else "UTF-16"
        raise ValueError(f"{file} is not a UTF-8 text file, but {kind} (Excel's 'Unicode text'): save it as UTF-8.")
    try:
        found = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not a UTF-8 text file (byte {error.start}): save it as one.") from error
    if "\0" in found:  # every other byte of English in UTF-16 is one
        raise ValueError(
            f"{file} is not a UTF-8 text file: character {found.index(chr(0)) + 1} is a null. If it is UTF-16 without "
            "a mark, save it as UTF-8."
        )
    return found


def lines(file: Path) -> Iterator[tuple[str, str]]:
    """The lines of a text file that are not blank, with their places.

    Not `str.splitlines`, which also cuts at U+2028, U+0085 and others that a prompt may have.

    Raises:
        FileNotFoundError, ValueError: see `text`.
    """
    for number, line in enumerate(text(file).replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1):
        if line.strip():
            yield f"line {number}", line


def rows(file: Path, columns: Sequence[str] = (), optional: Sequence[str] = ()) -> Iterator[Placed]:
    """The rows of a table, in its order.

    The name's ending says what it is: `.csv` or `.tsv` with a header; `.jsonl` (or `.ndjson`) with an object or a text
    a line; `.json` with a list of either; `.parquet`; and anything else is a text file with a text a line, whose blank
    lines are layout.

    Args:
        file: of which there is at least the name.
        columns: that each object must have; it may have others.
        optional: columns that are read as well where they are there. Of a Parquet file no others are read.

    Raises:
        FileNotFoundError: there is no such file.
        NoColumn: a column is missing.
        ValueError: the file is not what its name says, or has one of these columns twice; says in which row.
    """
    read = _READERS.get(file.suffix.lower())
    for place, row in lines(file) if read is None else read(file, columns, optional):
        if isinstance(row, Mapping):
            _check_columns(columns, row, str(file), place)
        yield place, row


def objects(file: Path, columns: Sequence[str] = (), optional: Sequence[str] = ()) -> Objects:
    """`rows` of a table without texts that stand alone; what is read of them can be written again.

    Raises:
        FileNotFoundError, ValueError: see `rows`; or a row is no object, or has half a surrogate pair.
    """
    for place, row in rows(file, columns, optional):
        if not isinstance(row, dict):
            raise ValueError(f"{file}: {place} is {type(row).__name__}; it must be an object with columns.")
        for name in (*columns, *optional):
            check_writable(row.get(name), f"{file}: column {name!r} in {place}")
        yield place, row


def check_writable(value: object, what: str) -> None:
    """JSON may bring half a character, which no file can hold: better said where it comes from.

    Raises:
        ValueError: a text has one, also if it is in a list.
    """
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, str) and any("\ud800" <= character <= "\udfff" for character in each):
            raise ValueError(f"{what} has half a surrogate pair, which no file can hold: {each[:80]!r}.")


# --- formats: each yields the place of a row, and the row


def _csv(file: Path, columns: Sequence[str], optional: Sequence[str]) -> Iterator[Placed]:
    content = text(file)
    try:
        found = _separated(content, "excel", strict=True)
    except csv.Error as error:
        raise ValueError(
            f"{file} is no well-formed table ({error}): put fields in quotes, and double the quotes in them."
        ) from error
    return _fitting(file, found, {*columns, *optional})


def _tsv(file: Path, columns: Sequence[str], optional: Sequence[str]) -> Iterator[Placed]:
    content = text(file)
    try:
        found = _separated(content, "excel-tab", strict=True)
    except csv.Error:  # PartiPrompts is such a file: quotes in it are nothing but quotes
        found = _separated(content, "excel-tab", quoting=csv.QUOTE_NONE)
    return _fitting(file, found, {*columns, *optional})


def _separated(content: str, dialect: str, **settings: Any) -> list[list[str]]:
    csv.field_size_limit(_LONGEST)
    return list(csv.reader(io.StringIO(content, newline=""), dialect, **settings))


def _fitting(file: Path, found: list[list[str]], wanted: set[str]) -> Iterator[Placed]:
    header, *body = [fields for fields in found if fields] or [[]]
    twice = [name for name, number in Counter(header).items() if number > 1 and name in wanted]
    if twice:
        raise ValueError(f"{file} has {header.count(twice[0])} columns {twice[0]!r}: rename all but one.")
    for number, fields in enumerate(body, 1):
        if len(fields) > len(header):
            raise ValueError(
                f"{file}: row {number} has more fields than the header: put fields with a separator in quotes."
            )
        yield f"row {number}", dict(zip(header, [*fields, *[None] * (len(header) - len(fields))], strict=True))


def _json(file: Path, columns: Sequence[str], optional: Sequence[str]) -> Iterator[Placed]:
    content = text(file)
    try:
        found = json.loads(content, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a plain ValueError
        more = "; with one object a line, its name must end in .jsonl" if "Extra data" in str(error) else ""
        raise ValueError(f"{file} is no JSON ({error}){more}.") from error
    if not isinstance(found, list):
        raise ValueError(f"{file} holds no list: it must be a list of objects or of texts.")
    for number, row in enumerate(found, 1):
        yield f"row {number}", row


def _json_lines(file: Path, columns: Sequence[str], optional: Sequence[str]) -> Iterator[Placed]:
    for place, line in lines(file):
        try:
            row = json.loads(line, object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} has no JSON in {place}: {error}") from error
        yield place, row


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, number in Counter(name for name, _ in pairs).items() if number > 1)
        raise ValueError(f"an object has {twice!r} twice")
    return found


def _parquet(file: Path, columns: Sequence[str], optional: Sequence[str]) -> Iterator[Placed]:
    present = parquet.names(file)
    _check_columns(columns, dict.fromkeys(present), str(file), "")
    wanted = list(dict.fromkeys([*columns, *(name for name in optional if name in present)]))
    for number, row in enumerate(parquet.values(file, parquet.read(file, wanted)), 1):
        yield f"row {number}", row


_READERS: dict[str, Callable[[Path, Sequence[str], Sequence[str]], Iterable[Placed]]] = {
    ".csv": _csv,
    ".tsv": _tsv,
    ".json": _json,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".parquet": _parquet,
}


def _check_columns(columns: Sequence[str], row: Mapping[str, Any], file: str, place: str) -> None:
    if missing := [name for name in columns if name not in row]:
        where = f" ({place})" if place.startswith("line") else ""
        raise NoColumn(
            f"{file} has no column {', '.join(map(repr, missing))}; it has {', '.join(map(str, row)) or 'none'}{where}."
        )
