"""The second mode of bench_ddpo.py: how long until the held-out VP-Score has risen by half of the demo's rise.

Ours runs `experiment=ddpo_vpscore` to its end, with its own settings; half of its rise is the target. TRL then trains
on the same training prompts with as many images of each prompt, sampling steps and updates in a round, with its
per-prompt statistics on (its paper's setting) and otherwise with DDPOConfig's defaults: learning rate 3e-4, clip range
1e-4, guidance 5 in sampling and training, eta 1, LoRA of rank 4 on attention. Both are judged in this process by the
demo's own evaluator: same held-out prompts, noise, sampler and VP-Score. Only training is timed.
"""

import json
import math
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
from bench_ddpo_trl import LORA
from hydra import compose as compose_config
from hydra import initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig
from peft import LoraConfig
from trl_peer import ROOT, Peer

from vp_rl.algorithms.base import PolicyTraining
from vp_rl.evaluation.images import Evaluator
from vp_rl.interfaces import Policy, Reward
from vp_rl.policies.sd import StableDiffusion
from vp_rl.scenes import tiny

_WATCHING = ("progress", "held_out", "checkpoint")  # callbacks that do not train


@dataclass
class Curve:
    """Held-out mean VP-Score by seconds of training."""

    name: str
    seconds: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    def add(self, seconds: float, score: float) -> None:
        """One evaluation."""
        self.seconds.append(seconds)
        self.scores.append(score)
        print(f"{self.name:4} {seconds:7.1f} s  held-out VP-Score {score:+.3f}", flush=True)

    def reaches(self, target: float) -> float | None:
        """Seconds until the score first passed `target`, on straight lines between evaluations."""
        points = list(zip(self.seconds, self.scores, strict=True))
        for (before, low), (after, high) in zip(points, points[1:], strict=False):
            if high >= target:
                return before + (after - before) * max(0.0, target - low) / (high - low)
        return None


class Watch(lightning.Callback):
    """Times epochs and evaluates between them; the clock stands still meanwhile."""

    def __init__(self, evaluator: Evaluator, every: int, curve: Curve) -> None:
        self._evaluator, self._every, self._curve = evaluator, every, curve
        self._seconds = 0.0

    def on_train_epoch_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """The clock runs; before the first epoch the untrained model is evaluated."""
        assert isinstance(module, PolicyTraining)
        if trainer.current_epoch == 0:
            self._curve.add(0.0, held_out(self._evaluator, module.policy, module.reward))
        self._started = time.monotonic()

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """The clock stops."""
        assert isinstance(module, PolicyTraining)
        self._seconds += time.monotonic() - self._started
        done = trainer.current_epoch + 1
        if done % self._every == 0 or done == trainer.max_epochs:
            self._curve.add(self._seconds, held_out(self._evaluator, module.policy, module.reward))


def compare(overrides: list[str], every: int, cap: float, trl: str, threads: int) -> None:
    """Runs both and prints the ratio."""
    config = demo(overrides)
    evaluator: Evaluator = instantiate(config.evaluation)
    ours, peer = Curve("ours"), Curve("TRL")
    lightning.seed_everything(config.seed, verbose=False)
    algorithm = instantiate(config.algorithm)
    kept = [instantiate(node) for name, node in config.callbacks.items() if node and name not in _WATCHING]
    trainer = instantiate(config.trainer, callbacks=[*kept, Watch(evaluator, every, ours)], logger=False)
    data = instantiate(config.data)
    trainer.fit(algorithm, data)
    target = (ours.scores[0] + ours.scores[-1]) / 2
    if ours.scores[-1] <= ours.scores[0]:
        sys.exit("The demo did not raise the held-out VP-Score: there is no target to race for.")
    print(f"target {target:+.3f}: half of the rise from {ours.scores[0]:+.3f} to {ours.scores[-1]:+.3f}", flush=True)
    run_peer(peer_settings(config, trl, threads), evaluator, algorithm.reward, peer, target, every, cap)
    report(ours, peer, target)


def demo(overrides: list[str]) -> DictConfig:
    """The demo's composed config, without what only a run of Hydra's own can resolve."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        fixed = ["experiment=ddpo_vpscore", "trainer.default_root_dir=.", "+trainer.enable_checkpointing=false"]
        return compose_config("train", [*fixed, *overrides])


def peer_settings(config: DictConfig, trl: str, threads: int) -> dict[str, Any]:
    """The demo's batch, for TRL: images sampled 64 at a time, about the same number of updates a round."""
    each = config.algorithm.images_per_prompt
    images = each * config.data.batch_size
    states = config.data.batch_size  # one of each prompt: the demo branches
    updates = max(1, round(states / (config.algorithm.train_batch * config.trainer.accumulate_grad_batches)))
    samples = max(number for number in range(1, images // updates + 1) if images % number == 0)  # of an update
    batch = math.gcd(images, 64)
    own = {
        "sample_num_steps": config.sampler.steps,
        "sample_batch_size": batch,
        "sample_num_batches_per_epoch": images // batch,
        "train_batch_size": math.gcd(samples, batch),
        "train_gradient_accumulation_steps": samples // math.gcd(samples, batch),
        "train_num_inner_epochs": config.algorithm.inner_epochs,
        "per_prompt_stat_tracking": True,
        "per_prompt_stat_tracking_buffer_size": each,
        "per_prompt_stat_tracking_min_count": each,
    }
    return {
        "pipeline": str(tiny.resolve(config.policy.path)),
        "reward": str(tiny.resolve(config.reward.checkpoint)),
        "prompts": instantiate(config.prompts).split("train"),
        "images_per_prompt": each,
        "threads": threads,
        "seed": config.seed,
        "config": {**own, **json.loads(trl)},
    }


def run_peer(
    settings: dict[str, Any], evaluator: Evaluator, reward: Reward, curve: Curve, target: float, every: int, cap: float
) -> None:
    """Trains TRL until the target or the cap; its adapter is read into our policy to be judged."""
    print(f"TRL: {settings['config']}", flush=True)
    policy = StableDiffusion(settings["pipeline"], LoraConfig(**LORA))
    with policy.base():
        curve.add(0.0, held_out(evaluator, policy, reward))
    with tempfile.TemporaryDirectory() as folder, Peer(Path(folder) / "log", **settings) as peer:
        seconds = 0.0
        while seconds < cap and curve.scores[-1] < target:
            seconds += peer.train(every)["seconds"]
            peer.save(Path(folder) / "adapter")
            policy.load_adapter(Path(folder) / "adapter")
            curve.add(seconds, held_out(evaluator, policy, reward))


def held_out(evaluator: Evaluator, policy: Policy, reward: Reward) -> float:
    """Mean VP-Score of the demo's held-out images."""
    return float(evaluator.evaluate(policy, reward).metrics()["reward"].mean())


def report(ours: Curve, peer: Curve, target: float) -> None:
    """Seconds of both, and the ratio or a bound on it."""
    mine, theirs = ours.reaches(target), peer.reaches(target)
    assert mine is not None, "the target is half of our own rise"
    if theirs is None:
        spent, best = peer.seconds[-1], max(peer.scores)
        print(f"ours {mine:.0f} s; TRL not within {spent:.0f} s (best {best:+.3f}): at least {spent / mine:.1f}x")
    else:
        print(f"ours {mine:.0f} s, TRL {theirs:.0f} s: {theirs / mine:.1f}x")
