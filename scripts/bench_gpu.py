"""Speed and memory of DDPO on Stable Diffusion 1.5 at full size, with random weights: timing does not care.

    python scripts/bench_gpu.py                                    on a GPU: SD 1.5, 512 px, and the full-size VP-Score
    python scripts/bench_gpu.py --compile --channels-last --optimizer adamw_fused --trl
    python scripts/bench_gpu.py --tiny                             the embedded models, on the CPU (without a GPU: this)

Weights are in bfloat16 and nothing is cast, as in the experiments; --precision bf16-mixed adds autocast, as TRL has it.

Printed are images a second of sampling, of decoding and reward, and of training (an image is trained on all its steps);
then of whole rounds, with --trl once more beside TRL's trainer at the same settings, with a reward that costs nothing;
floating-point operations of the model (a recomputation is not counted) as a share of the device's published peak, or of
what a large matrix product reaches; and the peak of memory.
"""

import argparse
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import bitsandbytes
import lightning
import torch
from bench_ddpo import Redness, Stopwatch
from bench_ddpo_trl import LORA
from bench_reward import random_reward
from memory import sd15
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode
from trl_peer import ENVIRONMENT, Peer

from vp_rl.algorithms.ddpo import DDPO
from vp_rl.data.prompts import PromptDataModule
from vp_rl.interfaces import Reward
from vp_rl.policies.economy import Economy
from vp_rl.policies.sd import StableDiffusion
from vp_rl.rewards.vp_score import VPScore
from vp_rl.sampler import Sampler, log_prob_of
from vp_rl.scenes import tiny
from vp_rl.types import take
from vp_rl.visionprefer.prompts import ScenePrompts

PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
"""Published, of dense products in bfloat16, in operations a second."""
OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "adamw_fused": partial(torch.optim.AdamW, fused=True),
    "adamw_8bit": bitsandbytes.optim.AdamW8bit,
    "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,
}


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="the embedded models")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="of the frozen weights")
    parser.add_argument("--precision", default="32-true", choices=["32-true", "bf16-mixed"], help="the trainer's")
    parser.add_argument("--compile", action="store_true", help="takes minutes at the start")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--optimizer", default="adamw", choices=OPTIMIZERS)
    parser.add_argument("--steps", type=int, default=50, help="of sampling")
    parser.add_argument("--guidance", type=float, default=5.0, help="in sampling and training; 1: none")
    parser.add_argument("--prompts", type=int, default=4, help="in a round, with 8 images of each")
    parser.add_argument("--sample-batch", type=int, default=16)
    parser.add_argument("--train-batch", type=int, default=8, help="states at once")
    parser.add_argument("--rounds", type=int, default=2, help="measured, after one that warms up")
    parser.add_argument("--peak-tflops", type=float, help="of the device, where it is not known here")
    parser.add_argument("--trl", action="store_true", help="TRL, too; its environment is made if there is none")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    for chatty in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    if not torch.cuda.is_available() and not given.tiny:
        print("no GPU: the embedded models on the CPU, as with --tiny", flush=True)
        given.tiny = True
    if given.tiny:
        given.dtype, given.steps, given.prompts = "float32", min(given.steps, 5), min(given.prompts, 2)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{device_name(device)}, torch {torch.__version__}: {vars(given)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        pipeline = tiny.resolve("tiny-sd") if given.tiny else random_pipeline(Path(folder))
        run(given, str(pipeline), device)


def run(given: argparse.Namespace, pipeline: str, device: torch.device) -> None:
    """All measurements."""
    policy = StableDiffusion(
        pipeline,
        LoraConfig(**LORA),
        dtype=given.dtype,
        economy=Economy(channels_last=given.channels_last),
    ).to(device)
    reward: Reward = VPScore.load("tiny-vp-score") if given.tiny else random_reward().to(getattr(torch, given.dtype))
    reward = reward.requires_grad_(False).eval().to(device)
    sampler = Sampler(given.steps, given.guidance, 1.0)
    forward, both = operations(policy, sampler)
    if given.gradient_checkpointing:  # from here on: what it recomputes is not the model's work
        policy.unet.enable_gradient_checkpointing()
    Economy(compile=given.compile).compiled(policy.unet)
    peak = given.peak_tflops * 1e12 if given.peak_tflops else published_peak(device)
    of = "the published peak" if peak else "what a large matrix product reaches"
    peak = peak or reached_peak(device, getattr(torch, given.dtype))
    rows = parts(given, policy, reward, sampler, device)
    work = {"sampling": forward * given.steps, "training": both * given.steps}
    print(f"\n| | images/s | share of {of} ({peak / 1e12:.2f} Tflop/s) | peak memory, GiB |\n|---|---|---|---|")
    for name, (rate, memory) in rows.items():
        share = f"{100 * rate * work[name] / peak:.1f}%" if name in work else ""
        print(f"| {name} | {rate:.3f} | {share} | {memory} |", flush=True)

    def whole(name: str, rate: float, memory: str) -> None:
        print(f"| {name} | {rate:.3f} | {100 * rate * sum(work.values()) / peak:.1f}% | {memory} |", flush=True)

    whole("whole rounds", *rounds(given, policy, reward, sampler, device))
    if given.trl or (ENVIRONMENT.exists() and not given.tiny):
        ours, memory = rounds(given, policy, Redness(), sampler, device)
        whole("whole rounds, with TRL's reward", ours, memory)
        theirs = peer(given, pipeline, device)
        whole("TRL's", theirs, "")
        print(f"\nratio {ours / theirs:.2f}")


def random_pipeline(folder: Path) -> Path:
    """Stable Diffusion 1.5's sizes: 860, 123 and 84 million parameters."""
    torch.manual_seed(0)
    sd15().save_pretrained(folder)
    return folder


def operations(policy: StableDiffusion, sampler: Sampler) -> tuple[float, float]:
    """Floating-point operations of an image's sampling step, and of training on one: forward and backward."""
    conditioning, latents = policy.encode(["a red circle"]), policy.noise(1)
    step = torch.zeros(1, dtype=torch.long, device=latents.device)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        sampler.transition(policy, latents, step, conditioning)
    with FlopCounterMode(display=False) as both:
        sampler.transition(policy, latents, step, conditioning).mean.sum().backward()
    policy.zero_grad()
    return forward.get_total_flops(), both.get_total_flops()


def parts(
    given: argparse.Namespace, policy: StableDiffusion, reward: Reward, sampler: Sampler, device: torch.device
) -> dict[str, tuple[float, str]]:
    """Images a second of each part by itself, and the memory at its peak."""
    prompts = ScenePrompts().split("train")[: given.sample_batch]
    conditioning = policy.encode(prompts)
    amp = partial(torch.autocast, device.type, torch.bfloat16, enabled=given.precision == "bf16-mixed")
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = OPTIMIZERS[given.optimizer](trained, lr=3e-4)

    def sample() -> Any:
        with amp():
            return sampler.rollout(policy, conditioning)

    trajectory = sample()
    rows = torch.arange(given.train_batch, device=device) % len(prompts)
    step = torch.arange(given.train_batch, device=device) % given.steps

    @torch.no_grad()
    def score() -> None:
        with amp():
            reward(policy.decode(trajectory.latents[:, -1]), prompts)

    def train() -> None:
        with amp():
            transition = sampler.transition(policy, trajectory.latents[rows, step], step, take(conditioning, rows))
            log_prob = log_prob_of(trajectory.latents[rows, step + 1], transition)
        (log_prob - trajectory.log_probs[rows, step]).exp().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return {
        "sampling": timed(sample, len(prompts), device),
        "reward": timed(score, len(prompts), device),
        "training": timed(train, given.train_batch / given.steps, device),
    }


def timed(work: Callable[[], Any], images: float, device: torch.device, times: int = 3) -> tuple[float, str]:
    """Images a second after a first call that does not count, and the device's peak memory meanwhile."""
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.monotonic()
    for _ in range(times):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return images * times / (time.monotonic() - started), memory_peak(device)


def rounds(
    given: argparse.Namespace, policy: StableDiffusion, reward: Reward, sampler: Sampler, device: torch.device
) -> tuple[float, str]:
    """Images a second of DDPO's whole rounds under Lightning, and the memory at its peak."""
    images = 8 * given.prompts
    batches = images * given.steps // given.train_batch
    algorithm = DDPO(
        policy,
        reward,
        sampler,
        partial(OPTIMIZERS[given.optimizer], lr=3e-4, weight_decay=1e-4),
        images_per_prompt=8,
        sample_batch=given.sample_batch,
        train_batch=given.train_batch,
        weight_by_std=False,
    )
    stopwatch = Stopwatch()
    trainer = lightning.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        precision=given.precision,
        max_epochs=1 + given.rounds,
        accumulate_grad_batches=max(1, batches // 4),
        gradient_clip_val=1.0,
        callbacks=[stopwatch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.fit(algorithm, PromptDataModule(ScenePrompts(), batch_size=given.prompts, batches_per_epoch=1))
    seconds = [each["seconds"] for each in stopwatch.rounds[1:]]
    return images * len(seconds) / sum(seconds), memory_peak(device)


def peer(given: argparse.Namespace, pipeline: str, device: torch.device) -> float:
    """Images a second of TRL's trainer: the same images, steps, guidance, precision, and four updates a round."""
    images = 8 * given.prompts
    settings: dict[str, Any] = {
        "reward": "redness",
        "prompts": ScenePrompts().split("train")[:256],
        "images_per_prompt": 8,
        "threads": torch.get_num_threads(),
        "seed": 0,
        "cpu": device.type == "cpu",
        "mixed_precision": "bf16" if given.dtype == "bfloat16" else "no",
        "config": {
            "sample_num_steps": given.steps,
            "sample_guidance_scale": given.guidance,
            "sample_batch_size": min(given.sample_batch, images),
            "sample_num_batches_per_epoch": images // min(given.sample_batch, images),
            "train_batch_size": given.train_batch,
            "train_gradient_accumulation_steps": max(1, images // given.train_batch // 4),
        },
    }
    with Peer(Path(tempfile.gettempdir()) / "bench_gpu_trl.log", pipeline=pipeline, **settings) as trl:
        trl.train(1)
        return images * given.rounds / trl.train(given.rounds)["seconds"]


def device_name(device: torch.device) -> str:
    """As its maker calls it."""
    return torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def published_peak(device: torch.device) -> float | None:
    """Operations a second, where known."""
    return next((rate for name, rate in PEAKS.items() if name in device_name(device)), None)


def reached_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a product of square matrices."""
    size = 8192 if device.type == "cuda" else 1024
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 * timed(lambda: one @ other, 1, device)[0]


def memory_peak(device: torch.device) -> str:
    """In GiB, of the GPU."""
    return f"{torch.cuda.max_memory_allocated() / 2**30:.2f}" if device.type == "cuda" else "-"


if __name__ == "__main__":
    main()
