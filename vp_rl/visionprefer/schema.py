"""VisionPrefer on disk: Parquet, one row a prompt, images inside; readable by `datasets.load_dataset(folder)`."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
from datasets import Features, Image, List, Value

from vp_rl.types import Split

VERSION = 1
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
            }
        ),
    }
)
_ROW_GROUP = 100  # prompts: with images inside, larger groups make reading a few rows slow

Row = dict[str, Any]
"""One prompt with its images ({"image": {"bytes": PNG}, ...}) and annotations, as in `FEATURES`."""


def write(rows: dict[Split, list[Row]], folder: Path, card: str) -> None:
    """Writes all splits and the dataset card, or nothing: a crash leaves no folder that looks whole.

    Raises:
        FileExistsError: the folder has something in it.
    """
    check_vacant(folder)
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    (unfinished / "data").mkdir(parents=True)
    for split, split_rows in rows.items():
        _write_split(split_rows, unfinished / "data" / f"{split}.parquet")
    (unfinished / "schema.json").write_text(json.dumps({"version": VERSION}) + "\n")
    (unfinished / "README.md").write_text(card, encoding="utf-8")
    os.replace(unfinished, folder)


def _write_split(rows: list[Row], file: Path) -> None:
    # The arrow schema carries the features, so that `datasets` decodes images without being told.
    with parquet.ParquetWriter(file, FEATURES.arrow_schema) as writer:
        for start in range(0, len(rows), _ROW_GROUP):
            group = rows[start : start + _ROW_GROUP]
            writer.write_table(pyarrow.Table.from_pylist(group, schema=FEATURES.arrow_schema))


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


def read(folder: Path, split: Split) -> list[Row]:
    """The rows of one split.

    Raises:
        FileNotFoundError: there is no VisionPrefer dataset, or not that split.
        ValueError: the dataset is of another schema version.
    """
    if not exists(folder):
        raise FileNotFoundError(f"No VisionPrefer dataset in '{folder}': it has no schema.json.")
    version = json.loads((folder / "schema.json").read_text()).get("version")
    if version != VERSION:
        raise ValueError(
            f"'{folder}' has VisionPrefer schema version {version}, this program reads {VERSION}: rebuild it."
        )
    file = folder / "data" / f"{split}.parquet"
    if not file.is_file():
        raise FileNotFoundError(f"The VisionPrefer dataset in '{folder}' has no {split} split ({file.name}).")
    return parquet.read_table(file).to_pylist()
