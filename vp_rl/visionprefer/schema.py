"""VisionPrefer on disk: Parquet shards, one row a prompt, images inside; `datasets.load_dataset(folder)` reads them."""

import bisect
import functools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, get_args

import pyarrow
from datasets import Features, Image, List, Value
from pyarrow.parquet import ParquetWriter

from vp_rl.files import parquet
from vp_rl.types import Split

VERSION = 2
FEATURES = Features(
    {
        "prompt_id": Value("int64"),
        "source_prompt": Value("string"),
        "prompt": Value("string"),
        "split": Value("string"),
        "images": List(
            {
                "image_id": Value("string"),
                "image": Image(),
                "generator": Value("string"),
                "guidance_scale": Value("float32"),
                "seed": Value("int64"),
                "steps": Value("int32"),
                "width": Value("int32"),
                "height": Value("int32"),
            }
        ),
        "annotations": List(
            {
                "image_id": Value("string"),
                "aspect": Value("string"),
                "rating": Value("int32"),
                "rationale": Value("string"),
                "annotator": Value("string"),
                "template_version": Value("string"),
                "position": Value("int32"),
            }
        ),
    }
)
SPLITS: tuple[Split, ...] = get_args(Split)
_ROW_GROUP = 100  # prompts, or fewer
_GROUP_BYTES = 4 * 2**20  # of images, after which a row group ends: reading one row reads its whole group
_HELD = 64  # row groups in memory while rows are read in any order
_SHARD = 512 * 2**20  # bytes of images after which a new file is begun

Row = dict[str, Any]
"""One prompt with its images ({"image": {"bytes": PNG}, ...}) and annotations, as in `FEATURES`."""


class Writer:
    """Writes a whole dataset, row by row, or nothing: a crash leaves no folder that looks whole.

    Used in a `with` statement; rows may be of any split in any order, and only the latest few are in memory.

    Args:
        folder: made at the end, when all is written.
        annotator: whose ratings are the dataset's own; other annotators' are second opinions.

    Raises:
        FileExistsError: the folder has something in it.
    """

    def __init__(self, folder: Path, annotator: str) -> None:
        check_vacant(folder)
        self.unfinished = folder.with_name(folder.name + ".unfinished")
        self._folder, self._annotator = folder, annotator
        self._shards = {split: _Shards(self.unfinished / "data", split) for split in SPLITS}

    def __enter__(self) -> "Writer":
        shutil.rmtree(self.unfinished, ignore_errors=True)
        (self.unfinished / "data").mkdir(parents=True)
        return self

    def add(self, split: Split, row: Row) -> None:
        """One more row."""
        self._shards[split].add(row)

    def finish_rows(self) -> list[Path]:
        """The shards, whole and under their final names, in order; what is written about them can read them."""
        return [file for shards in self._shards.values() for file in shards.finish()]

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if kind is None:
            about = {"version": VERSION, "annotator": self._annotator}
            (self.unfinished / "schema.json").write_text(json.dumps(about) + "\n")
            os.replace(self.unfinished, self._folder)


class _Shards:
    """One split's files."""

    def __init__(self, folder: Path, split: Split) -> None:
        self._folder, self._split = folder, split
        self._rows: list[Row] = []
        self._files: list[Path] = []
        self._writer: ParquetWriter | None = None
        self._bytes = self._waiting = 0

    def add(self, row: Row) -> None:
        self._rows.append(row)
        size = sum(len(image["image"]["bytes"]) for image in row["images"])
        self._bytes, self._waiting = self._bytes + size, self._waiting + size
        if len(self._rows) == _ROW_GROUP or self._waiting > _GROUP_BYTES:
            self._flush()
        if self._bytes > _SHARD:
            self._close()

    def finish(self) -> list[Path]:
        if self._rows or not self._files:  # a split without rows has a file without rows
            self._flush()
        self._close()
        number = len(self._files)
        named = [self._folder / f"{self._split}-{i:05d}-of-{number:05d}.parquet" for i in range(number)]
        for file, name in zip(self._files, named, strict=True):
            os.replace(file, name)
        return named

    def _flush(self) -> None:
        # The arrow schema carries the features, so that `datasets` decodes images without being told.
        if self._writer is None:
            self._files.append(self._folder / f"{self._split}-{len(self._files):05d}")
            self._writer = ParquetWriter(self._files[-1], FEATURES.arrow_schema)
        self._writer.write_table(pyarrow.Table.from_pylist(self._rows, schema=FEATURES.arrow_schema))
        self._rows, self._waiting = [], 0

    def _close(self) -> None:
        if self._rows:
            self._flush()
        if self._writer is not None:
            self._writer.close()
        self._writer, self._bytes = None, 0


def check_vacant(folder: Path) -> None:
    """Refuses a place that something else is in, before the costly work for it begins.

    Raises:
        FileExistsError: the folder has something in it, or is a file.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise FileExistsError(
            f"'{folder}' is not empty, so no dataset is written there: move it away or choose another."
        )


def exists(folder: Path) -> bool:
    """Whether a finished dataset is there."""
    return (folder / "schema.json").is_file()


def about(folder: Path) -> dict[str, Any]:
    """What `schema.json` says: the version, and the annotator whose ratings are the dataset's own.

    Raises:
        FileNotFoundError: there is no VisionPrefer dataset.
        ValueError: the dataset is of another schema version.
    """
    if not exists(folder):
        raise FileNotFoundError(f"No VisionPrefer dataset in '{folder}': it has no schema.json.")
    found = json.loads((folder / "schema.json").read_text())
    if found.get("version") != VERSION:
        raise ValueError(
            f"'{folder}' has VisionPrefer schema version {found.get('version')}, this program reads {VERSION}: "
            "move it away and build it anew (what is in the build's work folder is used again)."
        )
    return found


def shards(folder: Path, split: Split) -> list[Path]:
    """A split's files, in order.

    Raises:
        FileNotFoundError, ValueError: see `about`; there is no such split.
    """
    about(folder)
    files = sorted((folder / "data").glob(f"{split}-*-of-*.parquet"))
    if not files:
        raise FileNotFoundError(
            f"The VisionPrefer dataset in '{folder}' has no {split} split (data/{split}-*.parquet)."
        )
    return files


def read(folder: Path, split: Split) -> Iterator[Row]:
    """The rows of one split, a few in memory at a time.

    Raises:
        FileNotFoundError, ValueError: see `shards`.
    """
    files = shards(folder, split)
    return (row for file in files for batch in parquet.batches(file, _ROW_GROUP) for row in parquet.values(file, batch))


class Rows(Sequence[Row]):
    """The rows of one split, read in any order; the row groups read last stay in memory.

    Raises:
        FileNotFoundError, ValueError: see `shards`.
    """

    def __init__(self, folder: Path, split: Split) -> None:
        self._groups: list[tuple[Path, int]] = []
        self._ends: list[int] = []
        end = 0
        for file in shards(folder, split):
            about_file = parquet.metadata(file)
            for group in range(about_file.num_row_groups):
                end += about_file.row_group(group).num_rows
                self._groups.append((file, group))
                self._ends.append(end)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Row:
        place = bisect.bisect_right(self._ends, index)
        first = self._ends[place - 1] if place else 0
        return _read_group(*self._groups[place]).slice(index - first, 1).to_pylist()[0]


@functools.lru_cache(_HELD)
def _read_group(file: Path, group: int) -> pyarrow.Table:
    return parquet.row_group(file, group)
