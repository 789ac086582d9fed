"""Raw prompts as they stand in files and in datasets of the Hugging Face hub."""

import math
import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import pyarrow
from datasets import Dataset, load_dataset

from vp_rl.files import paths, tables


class RawPrompt(NamedTuple):
    """A prompt as its source has it."""

    text: str
    nsfw: float | None = None
    """The highest of its NSFW scores, 0 (safe) to 1; None: the source has no scores; NaN: this prompt has none."""
    name: str = ""
    """How to find it there: an id, or its line or row."""


class Columns(NamedTuple):
    """What the columns of a table are; where prompts stand alone, as the lines of a text file, there are none."""

    prompt: str = "prompt"
    nsfw: tuple[str, ...] = ()
    id: str | None = None

    def names(self) -> list[str]:
        """All of them, the prompt's first."""
        return list(dict.fromkeys([self.prompt, *self.nsfw, *([] if self.id is None else [self.id])]))


def read_file(path: str, columns: Columns) -> list[RawPrompt]:
    """The prompts of a file, in its order; its name's ending says what it is, see `tables.rows`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not what its name says, or has not those columns.
    """
    file = paths.user_path(path)
    if not file.is_file():
        raise FileNotFoundError(f"No prompt file at {path!r}: give a text file with one prompt a line, or a table.")
    names = columns.names()
    return [_raw(row, place, columns, path) for place, row in tables.rows(file, names)]


def read_hub(
    dataset: str,
    columns: Columns,
    *,
    config: str | None = None,
    files: str | Sequence[str] | None = None,
    split: str = "train",
    revision: str | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> list[RawPrompt]:
    """The prompts of what `datasets.load_dataset` finds under these names, in its order.

    Args:
        dataset: a hub name, a folder, or a format (`parquet`, `json`, `csv`, `text`) that `files` are in.
        columns: which of its columns are read.
        config, revision: of a hub repository that has several.
        files: paths, patterns or URLs; `hf://datasets/OWNER/NAME/FILE` is a single file of a hub repository.
        split: one of its own splits, as `datasets` names and cuts them: `train`, `train[:10%]`.
        limit: rows to draw at random, without repetition, where there are more.
        seed: of that draw.

    Raises:
        ValueError: it cannot be had, whatever the reason, or has not those columns.
    """
    given = paths.user_place(files) if isinstance(files, str) else files and [*map(paths.user_place, files)]
    try:
        table = load_dataset(paths.user_place(dataset), config, data_files=given, split=split, revision=revision)
    # It lets through what any of its layers raises: network, file system, parsers, and a RuntimeError of its own.
    except Exception as error:
        place = dataset if given is None else f"{dataset} ({given})"
        raise ValueError(f"The dataset {place} cannot be loaded: {error}") from error
    assert isinstance(table, Dataset)
    _check_columns(columns, table.column_names, dataset)
    rows = sample(len(table), limit, seed)
    found = table.select_columns(columns.names()).select(rows).with_format("arrow")[:]
    return _from_table(found, rows, columns, dataset)


def sample(number: int, limit: int | None, seed: int) -> Sequence[int]:
    """At most `limit` of `number` rows, in ascending order.

    Raises:
        ValueError: the limit leaves none.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1, or null for all.")
    if limit is None or limit >= number:
        return range(number)
    return sorted(random.Random(seed).sample(range(number), limit))


def _from_table(table: pyarrow.Table, rows: Sequence[int], columns: Columns, origin: str) -> list[RawPrompt]:
    names = columns.names()
    cells = zip(*(table.column(name).to_pylist() for name in names), strict=True)
    return [
        _raw(dict(zip(names, row, strict=True)), f"row {number + 1}", columns, origin)
        for number, row in zip(rows, cells, strict=True)
    ]


# --- one row


def _raw(row: object, place: str, columns: Columns, origin: str) -> RawPrompt:
    if isinstance(row, str):
        if more := [*columns.nsfw, *filter(None, [columns.id])]:
            raise ValueError(f"{origin} has prompts alone ({place}), so no column {more[0]!r}.")
        return RawPrompt(row, name=place)
    if not isinstance(row, Mapping):
        raise ValueError(f"{origin}: {place} is {type(row).__name__}; it must be an object with columns, or a text.")
    text = row[columns.prompt]
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{origin}: column {columns.prompt!r} is {type(text).__name__} in {place}, not text.")
    scores = [_score(row[name], name, place, origin) for name in columns.nsfw]
    present = [score for score in scores if not math.isnan(score)]
    return RawPrompt(
        text or "",
        max(present, default=math.nan) if scores else None,
        place if columns.id is None or row[columns.id] is None else str(row[columns.id]),
    )


def _check_columns(columns: Columns, present: Sequence[str], origin: str) -> None:
    if missing := [name for name in columns.names() if name not in present]:
        raise ValueError(f"{origin} has no column {missing[0]!r}; it has {', '.join(map(str, present)) or 'none'}.")


def _score(value: object, column: str, place: str, origin: str) -> float:
    """NaN where there is none; true and false, as some tables have it, are 1 and 0."""
    if value is None or value == "":
        return math.nan
    try:
        return float(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        raise ValueError(f"{origin}: column {column!r} is {value!r} in {place}, not a number.") from None
