"""Our DDPO against TRL's DDPOTrainer on the same machine, model, batch and reward.

    python scripts/bench_ddpo.py                      images a second, the two taking turns
    python scripts/bench_ddpo.py --time-to-reward     seconds to half of the demo's rise in held-out VP-Score

Throughput: 32 images a round (4 prompts x 8), 10 steps, eta 1, guidance 5 in sampling and training, float32, LoRA of
rank 4 on attention, 4 updates a round of 80 (sample, step) pairs each. Each side works in the micro-batches that its
design has: TRL samples 8 images at a time and trains one step of 8 samples at a time; ours samples `--sample-batch`
images at a time and trains all 80 pairs of an update at once. Decoding counts as reward on both sides.

Run it on an idle machine: two processes that share cores slow each other down many times.
"""

import argparse
import logging
import os
import statistics
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import lightning
import torch
from bench_ddpo_trl import LORA, PHASES, redness
from peft import LoraConfig
from trl_peer import Peer

from vp_rl.algorithms.ddpo import DDPO
from vp_rl.data.prompts import PromptDataModule
from vp_rl.interfaces import Reward
from vp_rl.policies.sd import StableDiffusion
from vp_rl.sampler import Sampler
from vp_rl.scenes import tiny
from vp_rl.types import Images, Scores
from vp_rl.visionprefer.prompts import ScenePrompts

PROMPTS, EACH, STEPS, GUIDANCE, UPDATES = 4, 8, 10, 5.0, 4
IMAGES = PROMPTS * EACH


class Redness(Reward):
    """The same function as the peer's."""

    differentiable = True

    def forward(self, images: Images, prompts: list[str]) -> Scores:
        """Red over the other channels."""
        return redness(images)


class Stopwatch(lightning.Callback):
    """Seconds of every epoch, and the share of each phase as the algorithm logs it."""

    def __init__(self) -> None:
        self.rounds: list[dict[str, float]] = []

    def on_train_epoch_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Reads the epoch before: its metrics are complete only now."""
        self._finish(trainer)
        self._started = time.monotonic()

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Stops."""
        self.rounds.append({"seconds": time.monotonic() - self._started})

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Reads the last epoch."""
        self._finish(trainer)

    def _finish(self, trainer: lightning.Trainer) -> None:
        if self.rounds:
            metrics = trainer.callback_metrics
            self.rounds[-1] |= {phase: metrics[f"train/seconds_{phase}"].item() for phase in PHASES}


class Ours:
    """Our DDPO with the peer's hyperparameters, in this process."""

    def __init__(self, pipeline: str, sample_batch: int) -> None:
        self._algorithm = DDPO(
            StableDiffusion(pipeline, LoraConfig(**LORA)),
            Redness(),
            Sampler(steps=STEPS, guidance=GUIDANCE, eta=1.0),
            partial(torch.optim.AdamW, lr=3e-4, weight_decay=1e-4),
            images_per_prompt=EACH,
            sample_batch=sample_batch,
            train_batch=IMAGES * STEPS // UPDATES,
            weight_by_std=False,
        )

    def train(self, rounds: int) -> dict[str, float]:
        """Trains so many rounds; seconds in all and by phase."""
        stopwatch = Stopwatch()
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=rounds,
            gradient_clip_val=1.0,
            callbacks=[stopwatch],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(self._algorithm, PromptDataModule(ScenePrompts(), batch_size=PROMPTS))
        return {name: sum(each[name] for each in stopwatch.rounds) for name in stopwatch.rounds[0]}


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="tiny-sd", help="folder in diffusers' format (default: the embedded one)")
    parser.add_argument("--threads", type=int, default=2, help="of each side; they take turns")
    parser.add_argument("--turns", type=int, default=5, help="throughput: how often each side runs")
    parser.add_argument("--rounds", type=int, default=3, help="throughput: rounds in a turn")
    parser.add_argument("--sample-batch", type=int, default=IMAGES, help="throughput: images that ours samples at once")
    parser.add_argument("--time-to-reward", action="store_true")
    parser.add_argument("--every", type=int, default=4, help="time to reward: rounds between evaluations")
    parser.add_argument(
        "--cap", type=float, default=1200.0, help="time to reward: seconds of training before TRL gives up"
    )
    parser.add_argument("--trl", default="{}", help="time to reward: JSON of DDPOConfig settings for the peer")
    parser.add_argument("overrides", nargs="*", help="time to reward: Hydra overrides of the demo, like seed=1")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    for chatty in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    if os.getloadavg()[0] > 0.5:
        print(f"warning: the machine is busy (load {os.getloadavg()[0]:.1f}); figures will be off", flush=True)
    if args.time_to_reward:
        from time_to_reward import compare

        compare(args.overrides, args.every, args.cap, args.trl, args.threads)
    else:
        throughput(args)


def throughput(args: argparse.Namespace) -> None:
    """Takes turns and prints the table."""
    prompts = ScenePrompts().split("train")[:256]
    config = {
        "sample_num_steps": STEPS,
        "sample_guidance_scale": GUIDANCE,
        "sample_batch_size": EACH,
        "sample_num_batches_per_epoch": PROMPTS,
        "train_batch_size": IMAGES // UPDATES,
    }
    settings = {"reward": "redness", "prompts": prompts, "images_per_prompt": EACH, "seed": 0, "config": config}
    folder, log = str(tiny.resolve(args.pipeline)), Path(tempfile.gettempdir()) / "bench_ddpo_trl.log"
    ours = Ours(args.pipeline, args.sample_batch)
    turns: dict[str, list[dict[str, float]]] = {"ours": [], "TRL": []}
    with Peer(log, pipeline=folder, threads=args.threads, **settings) as peer:
        for turn in range(args.turns + 1):
            for name, side in (("ours", ours), ("TRL", peer)):
                measured = side.train(args.rounds if turn else 1)
                if turn:  # the first one only warms up
                    turns[name].append(measured)
                    print(
                        f"turn {turn} {name:4} {args.rounds * IMAGES / measured['seconds']:7.2f} images/s", flush=True
                    )
    report(turns, args.rounds)


def report(turns: dict[str, list[dict[str, float]]], rounds: int) -> None:
    """Medians over the turns."""
    print(f"\n| | images/s | seconds a round of {IMAGES} images | " + " | ".join(PHASES) + " |")
    print("|---|---|---|" + "---|" * len(PHASES))
    for name, measured in turns.items():
        median = {key: statistics.median(turn[key] for turn in measured) / rounds for key in measured[0]}
        phases = " | ".join(f"{median[phase]:.2f}" for phase in PHASES)
        print(f"| {name} | {IMAGES / median['seconds']:.2f} | {median['seconds']:.2f} | {phases} |")
    ratios = [trl["seconds"] / ours["seconds"] for ours, trl in zip(turns["ours"], turns["TRL"], strict=True)]
    print(f"\nratio {statistics.median(ratios):.2f} (turns from {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
