"""Ratings of an exported dataset as arrays, batch by batch, without reading a picture."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow
import pyarrow.compute as compute
from jaxtyping import Int

from vp_rl.files import parquet
from vp_rl.types import ASPECTS, Split
from vp_rl.visionprefer.pairs import padded

REVERSED = "/reversed"
"""Ends the name under which an annotator's second ratings are kept, of the same images shown in reversed order."""

COLUMNS = (
    "prompt_id",
    *(f"images.list.element.{name}" for name in ("image_id", "generator", "guidance_scale", "steps")),
    *(f"annotations.list.element.{name}" for name in ("image_id", "aspect", "rating", "annotator", "position")),
)
"""All columns that `Batch` needs: none of them holds image files."""

_ASPECTS = pyarrow.array(ASPECTS)
_BATCH = 2048  # prompts


def shards(folder: Path) -> dict[str, list[Path]]:
    """The Parquet files of each split that has any, in order."""
    found: dict[str, list[Path]] = {}
    for split in get_args(Split):
        pattern = re.compile(rf"{split}-\d+-of-\d+\.parquet")
        if files := sorted(file for file in (folder / "data").glob("*.parquet") if pattern.fullmatch(file.name)):
            found[split] = files
    return found


def batches(folder: Path) -> Iterator[pyarrow.RecordBatch]:
    """All rows of all splits, with the columns that `Batch` needs; memory is that of a few thousand rows."""
    for files in shards(folder).values():
        for file in files:
            yield from parquet.batches(file, _BATCH, COLUMNS)


class Batch:
    """Some prompts with their images and ratings, as arrays with a row for each prompt.

    Rows are as long as the most images that one of the prompts has; the rest of a shorter one is padding.

    Args:
        rows: `COLUMNS`, or more.

    Raises:
        ValueError: two images share an identifier.
    """

    def __init__(self, rows: pyarrow.RecordBatch) -> None:
        images, notes = rows.column("images"), rows.column("annotations")
        self.prompt_ids: Int[np.ndarray, " prompts"] = rows.column("prompt_id").to_numpy()
        self.counts: Int[np.ndarray, " prompts"] = images.value_lengths().to_numpy().astype(np.int64)
        """Images of each prompt."""
        self._images: pyarrow.StructArray = images.flatten()
        self._notes: pyarrow.StructArray = notes.flatten()
        self._note_row = notes.value_parent_indices().to_numpy()
        self._image_row = np.repeat(np.arange(len(self.counts)), self.counts)
        self.image_ids: pyarrow.StringArray = self._images.field("image_id")
        """Of all images, prompt after prompt."""
        if len(self.image_ids.unique()) < len(self.image_ids):
            raise ValueError("Two images have one image_id: ratings cannot be told apart.")

    def annotators(self) -> dict[str, int]:
        """How many ratings each has given."""
        counted = self._notes.field("annotator").value_counts()
        return {each["values"]: each["counts"] for each in counted.to_pylist()}

    def setting(self, name: str) -> tuple[list, Int[np.ndarray, "prompts images"]]:
        """The different values of one of the images' fields, and which of them each image has.

        -1 is padding, or an image of which that is not known.
        """
        encoded = self._images.field(name).dictionary_encode()
        return encoded.dictionary.to_pylist(), padded(_whole(encoded.indices) + 1, self.counts) - 1

    def ratings(
        self, annotator: str
    ) -> tuple[Int[np.ndarray, "prompts images aspects"], Int[np.ndarray, "prompts images aspects"]]:
        """What one annotator said: ratings, 0 where there is none, and places in the call, from 0; -1 where none.

        Raises:
            ValueError: a rating is of no image of its row or of no aspect, not in 1-5, without a place, or given twice.
        """
        own = compute.call_function("equal", [self._notes.field("annotator"), pyarrow.scalar(annotator)])
        notes, row = self._notes.filter(own), self._note_row[own.to_numpy(zero_copy_only=False)]
        image, aspect = _index(notes.field("image_id"), self.image_ids), _index(notes.field("aspect"), _ASPECTS)
        rating, position = _whole(notes.field("rating")), _whole(notes.field("position"))
        wrong = (image < 0) | (aspect < 0) | (rating < 1) | (rating > 5) | (position < 0)
        wrong[~wrong] = self._image_row[image[~wrong]] != row[~wrong]
        if wrong.any():
            raise ValueError(f"{annotator} cannot have said so of an image of that row: {notes[int(wrong.argmax())]}")
        cells = np.zeros((len(self._image_row), len(ASPECTS), 2), np.int64)
        cells[image, aspect] = np.stack([rating, position + 1], 1)
        if np.count_nonzero(cells[..., 0]) < len(notes):
            raise ValueError(f"{annotator} has rated an image twice in the same aspect.")
        block = padded(cells, self.counts)
        return block[..., 0], block[..., 1] - 1


def _index(values: pyarrow.Array, among: pyarrow.Array) -> Int[np.ndarray, " values"]:
    """The place of each value in a list, -1 where it is not there."""
    return _whole(compute.call_function("index_in", [values], compute.SetLookupOptions(value_set=among)))


def _whole(values: pyarrow.Array) -> Int[np.ndarray, " values"]:
    return values.fill_null(-1).to_numpy().astype(np.int64)
