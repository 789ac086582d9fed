"""The peer's side of bench_ddpo.py: TRL's DDPOTrainer, driven line by line. It runs in an environment of its own.

Each line on standard input is a JSON object and is answered by one on standard output:

    {"pipeline": folder, "reward": ..., "prompts": [...], ...}    first: the settings (see `build`)
    {"rounds": 3}                                                 trains; answers with seconds by phase
    {"save": folder}                                              writes the adapter in diffusers' format

TRL itself is left as it is: what it does is timed from outside, by wrapping the trainer's own methods.
"""

import importlib
import json
import os
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import wraps
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PHASES = ("sampling", "reward", "training")
LORA = {
    "r": 4,
    "lora_alpha": 4,
    "init_lora_weights": "gaussian",
    "target_modules": ["to_k", "to_q", "to_v", "to_out.0"],
}
"""What TRL's trainer adds to the U-Net; it is fixed in its source."""


def redness(images: Tensor) -> Tensor:
    """A reward that costs next to nothing: the red channel's mean over the others'. Images are in [0, 1]."""
    images = images.float()  # in half precision, TRL's trainer cannot hand the scores to numpy
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def main() -> None:
    """Answers commands until standard input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what the libraries print must not mix with the answers
    trainer: Any = None
    seconds: dict[str, float] = defaultdict(float)
    step = epoch = 0
    for line in sys.stdin:
        command, answer = json.loads(line), {}
        if trainer is None:
            trainer = build(command)
            watch(trainer, seconds)
        elif "save" in command:
            save(trainer, Path(command["save"]))
        else:
            seconds.clear()
            started = time.monotonic()
            for _ in range(command["rounds"]):
                step = trainer.step(epoch, step)
                epoch += 1
            answer = {"seconds": time.monotonic() - started, **{phase: seconds[phase] for phase in PHASES}}
        print(json.dumps(answer), file=answers, flush=True)


def build(settings: dict[str, Any]) -> Any:
    """TRL's trainer on a local pipeline.

    Args:
        settings: `pipeline` (folder), `reward` ("redness", or a VP-Score's folder), `prompts`, `images_per_prompt`,
            `threads`, `seed`, `cpu` (true unless given), `mixed_precision` (none unless given), and `config`: what
            differs from DDPOConfig's defaults.
    """
    from accelerate import PartialState
    from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

    warnings.simplefilter("ignore")
    torch.set_num_threads(settings["threads"])
    # Folders written by transformers 5 hold tokenizer.json alone, which only the fast classes of version 4 read.
    # The module is looked up after TRL's import, which replaces it in sys.modules.
    transformers = importlib.import_module("transformers")
    transformers.CLIPTokenizer = transformers.CLIPTokenizerFast
    transformers.BertTokenizer = transformers.BertTokenizerFast
    # Before the pipeline, whose missing LoRA file is logged through accelerate.
    PartialState(cpu=settings.get("cpu", True))
    pipeline = DefaultDDPOStableDiffusionPipeline(settings["pipeline"], pretrained_model_revision=None, use_lora=True)
    precision = settings.get("mixed_precision", "no")
    config = DDPOConfig(mixed_precision=precision, save_freq=10**9, seed=settings["seed"], **settings["config"])
    prompts = repeated(settings["prompts"], settings["images_per_prompt"])
    trainer = DDPOTrainer(config, load_reward(settings["reward"]), lambda: (next(prompts), {}), pipeline)
    pipeline.set_progress_bar_config(disable=True)
    return trainer


def repeated(prompts: list[str], times: int) -> Iterator[str]:
    """Each prompt so many times in a row, for ever: TRL asks for one prompt an image."""
    return (prompt for prompt in cycle(prompts) for _ in range(times))


def load_reward(name: str) -> Callable[[Tensor, tuple[str, ...], Any], tuple[Tensor, dict]]:
    """A reward function as TRL calls it; VP-Score is the very class that the other side uses."""
    if name == "redness":
        return lambda images, prompts, _: (redness(images), {})
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from vp_rl.rewards.vp_score import VPScore

    score = VPScore.load(name).eval()

    @torch.no_grad()
    def reward(images: Tensor, prompts: tuple[str, ...], _: Any) -> tuple[Tensor, dict]:
        return score(images.float(), list(prompts)), {}

    return reward


def watch(trainer: Any, seconds: dict[str, float]) -> None:
    """Adds up the time spent in each phase. Decoding counts as reward, as on the other side, not as sampling."""

    def timed(owner: Any, name: str, phase: str, minus: str | None = None) -> None:
        method = getattr(owner, name)

        @wraps(method)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            started, before = time.monotonic(), seconds[minus] if minus else 0.0
            result = method(*args, **kwargs)
            inside = seconds[minus] - before if minus else 0.0
            seconds[phase] += time.monotonic() - started - inside
            return result

        setattr(owner, name, wrapper)

    timed(trainer.sd_pipeline.vae, "decode", "reward")
    timed(trainer, "_generate_samples", "sampling", minus="reward")
    timed(trainer, "compute_rewards", "reward")
    timed(trainer, "_train_batched_samples", "training")


def save(trainer: Any, folder: Path) -> None:
    """Writes the adapter as TRL's own checkpoints hold it."""
    folder.mkdir(parents=True, exist_ok=True)
    trainer.sd_pipeline.save_checkpoint([trainer.sd_pipeline.unet], [], str(folder))


if __name__ == "__main__":
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TRL_EXPERIMENTAL_SILENCE="1")
    main()
