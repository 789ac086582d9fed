"""How much faster preference batches come from Parquet than VP-Score trains on them.

    python scripts/bench_loader.py data/visionprefer

Images a second of the loader alone, reading and decoding every image of the training split, and of training the tiny
VP-Score on the same batches in the same process (`experiment=vpscore`: forward, backward, Adam), taking turns. Bar: the
loader is at least 3 times as fast.
"""

import argparse
import statistics
import time

import torch

from vp_rl.data.preferences import PreferenceDataModule
from vp_rl.functional import ranking_loss
from vp_rl.rewards.vp_score import VPScore
from vp_rl.types import PreferenceBatch


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a VisionPrefer dataset, for instance of `make visionprefer`")
    parser.add_argument("--batches", type=int, default=8, help="that are trained on in a turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--workers", type=int, default=0)
    given = parser.parse_args()
    data = PreferenceDataModule(given.folder, batch_size=11, num_workers=given.workers)
    started = time.perf_counter()
    loader = data.train_dataloader()
    print(f"index of {len(loader.dataset)} prompts: {time.perf_counter() - started:.2f} s")
    reward = VPScore.load("tiny-blip")
    reward.freeze(0.0)
    reward.train()
    optimizer = torch.optim.Adam(reward.parameters(), lr=1e-4)
    rates: dict[str, list[float]] = {"loader": [], "training": []}
    for turn in range(given.turns):
        started, images, kept = time.perf_counter(), 0, list[PreferenceBatch]()
        for batch in loader:
            images += len(batch.images)
            if len(kept) < given.batches:
                kept.append(batch)
        rates["loader"].append(images / (time.perf_counter() - started))
        started = time.perf_counter()
        for batch in kept:
            scores = reward(batch.images, batch.prompts)
            loss = ranking_loss(scores[batch.better], scores[batch.worse])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        rates["training"].append(sum(len(batch.images) for batch in kept) / (time.perf_counter() - started))
        print(f"turn {turn}: " + ", ".join(f"{name} {values[-1]:.0f} images/s" for name, values in rates.items()))
    ratios = [a / b for a, b in zip(rates["loader"], rates["training"], strict=True)]
    print(f"ratio: median {statistics.median(ratios):.1f}, {min(ratios):.1f} to {max(ratios):.1f}")


if __name__ == "__main__":
    main()
