"""Preference pairs and dataset card of a VisionPrefer of full size: seconds and peak memory.

    python scripts/bench_card.py                      179,000 prompts, 716,000 images, 2.9 million ratings
    python scripts/bench_card.py --prompts 5000       quickly

The set is synthetic: ratings that depend on generator and guidance, images of 1 kB, and on 1% of the prompts a second
annotator and the first one in reversed order. It is written to a temporary folder as the builder writes, 100 prompts a
row group (0.7 GB, not timed), and read from there in a process of its own, which is timed.
"""

import argparse
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
from PIL import Image

from vp_rl.types import ASPECTS, Usage
from vp_rl.visionprefer import ratings, schema
from vp_rl.visionprefer.card import About, write_card
from vp_rl.visionprefer.journal import Spent
from vp_rl.visionprefer.pairs import all_pairs
from vp_rl.visionprefer.statistics import measure

IMAGES, GROUP, SHARD = 4, 100, 20_000  # images of a prompt; prompts of a row group and of a file
RATIONALE = (
    "The left hand has six fingers, and its shadow falls the wrong way. All else is in order, down to the buttons."
)
GENERATORS = ("sd15", "sd21", "dreamlike", "sdxl")
SCALES = (3.0, 5.0, 7.5, 10.0)
FIRST, SECOND, REVERSED = "annotator", "second", "annotator" + ratings.REVERSED


def main() -> None:
    """Writes the set, has it measured, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=179_000)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # the other process
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measured(args.measure)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder, started = Path(temporary), time.monotonic()
        write(folder, args.prompts)
        size = sum(file.stat().st_size for file in (folder / "data").iterdir()) / 1e9
        print(f"{args.prompts} prompts written in {time.monotonic() - started:.0f} s: {size:.2f} GB", flush=True)
        command = [sys.executable, __file__, "--measure", temporary]
        started = time.monotonic()
        figures = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        wall = time.monotonic() - started
    print("| step | seconds |\n|---|---|")
    for step, seconds in figures["seconds"].items():
        print(f"| {step} | {seconds:.1f} |")
    print(f"| all of these, with starting Python | {wall:.1f} |")
    print(f"\n{figures['pairs']} pairs; peak memory {figures['gigabytes']:.2f} GB")


def measured(folder: Path) -> dict:
    """What the other process does."""
    seconds, started = {}, time.monotonic()
    parts = [all_pairs(ratings.Batch(rows).ratings(FIRST)[0]) for rows in ratings.batches(folder)]
    pairs = sum(len(part.prompt) for part in parts)
    seconds["read, and derive all pairs"] = time.monotonic() - started
    started = time.monotonic()
    measure(ratings.batches(folder), FIRST)
    seconds["read, and statistics alone"] = time.monotonic() - started
    started = time.monotonic()
    spent = [Spent("annotate", FIRST, "accepted", 1, Usage(1, 1, 1.0))]
    write_card(folder, About(annotator=FIRST), spent=spent)
    seconds["card, with those statistics, agreement and pictures"] = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": seconds, "pairs": pairs, "gigabytes": peak}


def write(folder: Path, prompts: int) -> None:
    """The synthetic set, a row group in memory at a time."""
    (folder / "data").mkdir()
    starts = range(0, prompts, SHARD)
    for number, start in enumerate(starts):
        file = folder / "data" / f"train-{number:05d}-of-{len(starts):05d}.parquet"
        with parquet.ParquetWriter(file, schema.FEATURES.arrow_schema) as writer:
            for first in range(start, min(start + SHARD, prompts), GROUP):
                writer.write_table(group(first, min(GROUP, prompts - first)))


def group(first: int, prompts: int) -> pyarrow.Table:
    """Some prompts with all that belongs to them."""
    rng = np.random.default_rng(first)
    generator, scale = (rng.integers(len(all_of), size=(prompts, IMAGES)) for all_of in (GENERATORS, SCALES))
    quality = 2.4 + 0.3 * generator + 0.1 * scale + rng.normal(0, 0.8, (prompts, IMAGES))
    ids = np.array([[f"{first + row}-{place:012x}" for place in range(IMAGES)] for row in range(prompts)])
    images = {
        "image_id": ids.ravel(),
        "image": pyarrow.array([{"bytes": picture(rng), "path": None} for _ in range(ids.size)]),
        "generator": np.array(GENERATORS)[generator].ravel(),
        "guidance_scale": np.array(SCALES, np.float32)[scale].ravel(),
        "seed": rng.integers(2**48, size=ids.size),
        "steps": np.full(ids.size, 25, np.int32),
        "width": np.full(ids.size, 16, np.int32),
        "height": np.full(ids.size, 16, np.int32),
    }
    numbers = np.arange(first, first + prompts)
    prompt = [f"synthetic prompt {number}" for number in numbers]
    columns = {"prompt_id": numbers, "source_prompt": prompt, "prompt": prompt, "split": ["train"] * prompts}
    nested = {"images": images, "annotations": annotations(rng, ids, quality, first // GROUP % 100 == 0)}
    kinds = schema.FEATURES.arrow_schema
    for name, fields in nested.items():
        kind = kinds.field(name).type
        rows = pyarrow.StructArray.from_arrays(
            [pyarrow.array(fields[each.name]).cast(each.type) for each in kind.value_type], fields=list(kind.value_type)
        )
        offsets = np.arange(prompts + 1, dtype=np.int32) * (len(rows) // prompts)
        columns[name] = pyarrow.ListArray.from_arrays(pyarrow.array(offsets), rows, type=kind)
    return pyarrow.table(columns, schema=kinds)


def annotations(rng: np.random.Generator, ids: np.ndarray, quality: np.ndarray, several: bool) -> dict[str, object]:
    """What is said of some prompts' images, by one annotator or by all."""
    names = (FIRST, SECOND, REVERSED) if several else (FIRST,)
    shape = (len(ids), len(names), len(ASPECTS), IMAGES)
    rating = quality[:, None, None] + rng.normal(0, 0.7, shape)
    position = np.broadcast_to(rng.random((len(ids), 1, len(ASPECTS), IMAGES)).argsort(-1), shape)
    reverse = (np.array(names) == REVERSED)[:, None, None]
    full = {
        "image_id": ids[:, None, None],
        "aspect": np.array(ASPECTS)[:, None],
        "rating": rating.round().clip(1, 5).astype(np.int32),
        "rationale": np.array(RATIONALE),
        "annotator": np.array(names)[:, None, None],
        "template_version": np.array("1"),
        "position": np.where(reverse, IMAGES - 1 - position, position).astype(np.int32),
    }
    return {name: np.broadcast_to(values, shape).ravel() for name, values in full.items()}


def picture(rng: np.random.Generator) -> bytes:
    """A PNG of 1 kB; what follows its end is noise that no decoder reads."""
    return PNG + rng.bytes(1000 - len(PNG))


def png() -> bytes:
    """A small grey square."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (120, 120, 120)).save(buffer, format="png")
    return buffer.getvalue()


PNG = png()

if __name__ == "__main__":
    main()
