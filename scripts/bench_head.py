"""How many steps VP-Score needs to leave the start: the published initialisation of its head against ours.

    python scripts/bench_head.py data/visionprefer

Both train the whole tiny VP-Score from tiny BLIP on the same batches with the same Adam. Printed is the first step at
which the ranking loss, averaged over the last 10 batches, is below `--below`; ln 2 = 0.693 is that of a coin.
"""

import argparse
import itertools
from collections import deque
from collections.abc import Iterator

import torch
from torch import nn

from vp_rl.data.preferences import PreferenceDataModule
from vp_rl.functional import ranking_loss
from vp_rl.rewards.vp_score import VPScore
from vp_rl.types import PreferenceBatch

_LAST = 10


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a VisionPrefer dataset, for instance of `make visionprefer`")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--steps", type=int, default=400, help="at most")
    parser.add_argument("--below", type=float, default=0.6)
    given = parser.parse_args()
    for seed in range(given.seeds):
        found = {name: steps(given, seed, name == "published") for name in ("published", "ours")}
        print(f"seed {seed}: " + ", ".join(f"{name} {number}" for name, number in found.items()), flush=True)


def steps(given: argparse.Namespace, seed: int, published: bool) -> str:
    """The step at which the loss has fallen, and the loss there."""
    torch.manual_seed(seed)
    reward = VPScore.load("tiny-blip")  # which has no head: it is drawn here
    reward.freeze(0.0)
    if published:
        for layer in reward.head.layers:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=1 / (reward.text.config.hidden_size + 1))
    reward.train()
    optimizer = torch.optim.Adam(reward.parameters(), lr=given.lr)
    losses: deque[float] = deque(maxlen=_LAST)
    data = PreferenceDataModule(given.folder, batch_size=11, seed=seed)
    for step, batch in enumerate(itertools.islice(endless(data), given.steps)):
        scores = reward(batch.images, batch.prompts)
        loss = ranking_loss(scores[batch.better], scores[batch.worse])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if len(losses) == _LAST and sum(losses) / _LAST < given.below:
            return f"{step + 1} steps"
    return f"not in {given.steps} (loss {sum(losses) / _LAST:.3f})"


def endless(data: PreferenceDataModule) -> Iterator[PreferenceBatch]:
    """Training batches, epoch after epoch."""
    loader = data.train_dataloader()
    for epoch in itertools.count():
        loader.sampler.set_epoch(epoch)
        yield from loader


if __name__ == "__main__":
    main()
