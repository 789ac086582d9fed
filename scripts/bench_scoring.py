"""Streaming images through a reward: peak memory for more and more images, and the rate of the loader alone.

    python scripts/bench_scoring.py                       1,000 and 10,000 images of 128 x 128
    python scripts/bench_scoring.py --reward vp_score     with the embedded VP-Score instead of a mean of pixels

The images are noise in PNG files in one folder (not timed); each number of them is scored in a process of its own, so
that its peak resident memory is its own. `loader` is files to pixels, `scored` the whole way to kept scores.
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
from PIL import Image

from vp_rl.data.sets.rankings import RankingColumns, Rankings
from vp_rl.evaluation.protocols import pooled
from vp_rl.evaluation.scoring import Scorer, score_set
from vp_rl.interfaces import Reward
from vp_rl.rewards.vp_score import VPScore
from vp_rl.types import Images, Scores

IMAGES = 4  # of a prompt


class MeanPixel(Reward):
    """A reward that costs nothing."""

    differentiable = True

    def forward(self, images: Images, prompts: list[str]) -> Scores:
        """The mean of all pixels."""
        return images.mean((1, 2, 3))


def main() -> None:
    """Writes the images, has them scored, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--size", type=int, default=128, help="pixels of a side")
    parser.add_argument("--reward", choices=["mean_pixel", "vp_score"], default="mean_pixel")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)  # the other process: folder, number of prompts
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measured(Path(args.measure[0]), int(args.measure[1]), args.reward)))
        return
    print("| images | peak memory, MB | loader, images/s | scored, images/s |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        write(Path(temporary), max(args.images), args.size)
        for number in args.images:
            command = [sys.executable, __file__, "--reward", args.reward, "--measure", temporary, f"{number // IMAGES}"]
            found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            print(
                f"| {number:,} | {found['memory']:.0f} | {found['loader']:,.0f} | {found['scored']:,.0f} |", flush=True
            )


def write(folder: Path, number: int, size: int) -> None:
    """A set in the format of HPD v2."""
    rng = np.random.default_rng(0)
    rows = []
    for start in range(0, number, IMAGES):
        names = [f"{image:06d}.png" for image in range(start, start + IMAGES)]
        rows.append({"prompt": f"a red circle {start}", "images": names, "ranking": list(range(IMAGES))})
        for name in names:
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(256, size=(size, size, 3), dtype=np.uint8)).save(
                buffer, "png", compress_level=1
            )
            (folder / name).write_bytes(buffer.getvalue())
    (folder / "test.json").write_text(json.dumps(rows))


def measured(folder: Path, prompts: int, name: str) -> dict[str, float]:
    """Scores one set; memory first, since the loader alone is measured on the same images after it."""
    human = Rankings("bench", str(folder), "test.json", RankingColumns(), [pooled], limit=prompts)
    judged = human.load()
    reward = MeanPixel() if name == "mean_pixel" else VPScore.load("tiny-vp-score")
    scorer = Scorer(reward, device="cpu")
    number = prompts * IMAGES
    with tempfile.TemporaryDirectory() as kept:
        started = time.monotonic()
        score_set(scorer, human, judged, Path(kept))
        scored = number / (time.monotonic() - started)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    started = time.monotonic()
    names = [name for each in judged for name in each.images]
    count = sum(1 for _ in scorer.decoded(human.read(names)))
    assert count == number
    return {"memory": memory, "scored": scored, "loader": number / (time.monotonic() - started)}


if __name__ == "__main__":
    main()
