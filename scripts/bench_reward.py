"""VP-Score at full size against the published code's loop over images, on the same random weights.

    python scripts/bench_reward.py                    images a second, the two taking turns; their scores are compared
    python scripts/bench_reward.py --training         images a second and peak memory, with and without checkpointing

ImageReward scores one image at a time: PIL resizes it, the vision tower looks at it, the prompt is padded to 35 tokens
and read before it. Here that loop runs on transformers' BLIP, which computes what the published modules compute, step
by step. Ours gets the same PIL images, as batches of tensors.

glibc hands freed memory back to the system and has it cleared again, some hundred megabytes for each batch. With
MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ set to 4294967296 it is kept, and both sides gain.

Two cases: one prompt for 16 images (reinforcement learning), and 16 prompts for one image. Besides the time by the
clock stands the processor time of the process: on a machine that others use too, it is the fairer of the two.
"""

import argparse
import copy
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import BatchEncoding, BertTokenizer, BlipTextModel, BlipVisionModel

from vp_rl.functional import ranking_loss
from vp_rl.rewards.blip_sizes import published
from vp_rl.rewards.vp_score import VPScore
from vp_rl.types import Images, Scores

NUMBER = 16
WORDS = 30_522


class Taken(NamedTuple):
    """Seconds."""

    clock: float
    processor: float


class Loop:
    """ImageReward's `score` and `inference_rank` on the weights of `reward`, which are not copied."""

    def __init__(self, reward: VPScore) -> None:
        vision, text = reward.vision.config, reward.text.config
        with torch.device("meta"):
            self.vision, self.text = BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False)
        self.vision.load_state_dict(reward.vision.state_dict(), assign=True)
        self.text.load_state_dict(reward.text.state_dict(), assign=True)
        self.text.embeddings.position_ids = nn.Buffer(torch.arange(text.max_position_embeddings)[None])
        self.vision.eval()
        self.text.eval()
        self.head, self.tokenizer = reward.head, reward.tokenizer

    def one_prompt(self, images: list[Image.Image], prompt: str) -> Scores:
        """As `inference_rank` ranks images."""
        tokens = self._tokens(prompt)
        return self.head(torch.cat([self._read(tokens, image) for image in images]))

    def one_image(self, image: Image.Image, prompts: list[str]) -> Scores:
        """`score` for each prompt: the published code has nothing else for several."""
        return torch.cat([self.head(self._read(self._tokens(prompt), image)) for prompt in prompts])

    def _tokens(self, prompt: str) -> BatchEncoding:
        return self.tokenizer(prompt, padding="max_length", truncation=True, max_length=35, return_tensors="pt")

    def _read(self, tokens: BatchEncoding, image: Image.Image) -> Tensor:
        short = min(image.size)
        image = image.resize(tuple(224 * side // short for side in image.size), Image.Resampling.BICUBIC)
        left, top = (round((side - 224) / 2) for side in image.size)
        pixels = as_tensor([image.crop((left, top, left + 224, top + 224))])
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).reshape(3, 1, 1)
        std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).reshape(3, 1, 1)
        seen = self.vision(pixel_values=(pixels - mean) / std).last_hidden_state
        return self.text(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], encoder_hidden_states=seen
        ).last_hidden_state[:, 0]


class Ours:
    """The same by our class."""

    def __init__(self, reward: VPScore, batch: int) -> None:
        self._reward, self._batch = reward, batch

    def one_prompt(self, images: list[Image.Image], prompt: str) -> Scores:
        """In batches of images."""
        batches = as_tensor(images).split(self._batch)
        return torch.cat([self._reward(batch, [prompt] * len(batch)) for batch in batches])

    def one_image(self, image: Image.Image, prompts: list[str]) -> Scores:
        """The image is looked at once."""
        return self._reward(as_tensor([image]).expand(len(prompts), -1, -1, -1), prompts)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--turns", type=int, default=3, help="of each side in each case, or updates")
    parser.add_argument("--batch", type=int, default=8, help="images that ours scores at once")
    parser.add_argument("--size", type=int, default=512, help="of the images, in pixels")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of our towers")
    parser.add_argument("--training", action="store_true", help="measure training instead")
    parser.add_argument("--step", choices=["plain", "checkpointed"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.step:
        train(args.step == "checkpointed", args.turns)
    elif args.training:
        for way in ("plain", "checkpointed"):  # a process each, as peaks are of a process
            subprocess.run([sys.executable, __file__, "--step", way, "--threads", str(args.threads)], check=True)
    else:
        speed(args.turns, args.batch, args.size, getattr(torch, args.dtype))


@torch.inference_mode()
def speed(turns: int, batch: int, size: int, dtype: torch.dtype) -> None:
    """Both sides in turns; the ratio is of each turn's pair, so that a slow moment of the machine hits both."""
    reward = random_reward()
    own = reward if dtype == torch.float32 else copy.deepcopy(reward).to(dtype)
    sides: tuple[Loop, Ours] = Loop(reward), Ours(own, batch)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(NUMBER)]
    prompts = [" ".join(f"word{rng.integers(WORDS - 10)}" for _ in range(8 + row)) for row in range(NUMBER)]  # 10 to 25
    cases: dict[str, Callable[[Loop | Ours], Scores]] = {
        f"1 prompt x {NUMBER} images": lambda side: side.one_prompt(images, prompts[NUMBER // 2]),
        f"{NUMBER} prompts x 1 image": lambda side: side.one_image(images[0], prompts),
    }
    for case, work in cases.items():
        taken: list[list[Taken]] = [[], []]
        scores = [Tensor(), Tensor()]
        for turn in range(turns):
            for index in (0, 1) if turn % 2 == 0 else (1, 0):
                started = Taken(time.perf_counter(), time.process_time())
                scores[index] = work(sides[index])
                ended = Taken(time.perf_counter(), time.process_time())
                taken[index].append(Taken(ended.clock - started.clock, ended.processor - started.processor))
        # In float32 they differ by PIL's rounding to 8 bit alone.
        apart, spread = (scores[0] - scores[1]).abs().max(), scores[0].std()
        print(f"{case}, {turns} turns; scores differ by at most {apart:.4f}, their standard deviation is {spread:.4f}")
        for what, loop, ours in zip(Taken._fields, *(zip(*side, strict=True) for side in taken), strict=True):
            ratios = sorted(theirs / own for theirs, own in zip(loop, ours, strict=True))
            rates = [NUMBER / statistics.median(each) for each in (loop, ours)]
            print(
                f"  by {what + ':':<10} loop {rates[0]:6.2f}/s, ours {rates[1]:6.2f}/s, ratio "
                f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
                flush=True,
            )


def train(checkpointed: bool, updates: int, pairs: int = 2) -> None:
    """Updates by the published recipe (70% frozen, Adam) on random images; prints their rate and the peak memory."""
    reward = random_reward(checkpointed)
    reward.freeze(0.7)
    reward.train()
    optimizer = torch.optim.Adam([p for p in reward.parameters() if p.requires_grad], 1e-5)
    images, prompts = torch.rand(2 * pairs, 3, 224, 224), ["word1 word2 word3"] * 2 * pairs
    before, started = peak(), Taken(time.perf_counter(), time.process_time())
    for _ in range(updates):
        better, worse = reward(images, prompts).chunk(2)
        optimizer.zero_grad()
        ranking_loss(better, worse).backward()
        optimizer.step()
    clock, processor = time.perf_counter() - started.clock, time.process_time() - started.processor
    seen = updates * len(images)
    way = "with gradient checkpointing" if checkpointed else "without"
    print(
        f"{way}: {updates} updates on {pairs} pairs of images, {seen / clock:.3f} images/s by the clock, "
        f"{seen / processor:.3f} by the processor; peak {peak():.2f} GiB, of which weights {before:.2f}",
        flush=True,
    )


def random_reward(checkpointed: bool = False) -> VPScore:
    """The published sizes, weights that keep their input's variance."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{number}" for number in range(WORDS - 5))]
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(words)})
    reward = VPScore(*published(), tokenizer, gradient_checkpointing=checkpointed).requires_grad_(False).eval()
    for name, parameter in reward.named_parameters():
        if name.startswith(("vision.", "text.")) and parameter.ndim > 1:
            parameter.normal_(std=0.02 if "embedding" in name else parameter[0].numel() ** -0.5)
    return reward


def as_tensor(images: list[Image.Image]) -> Images:
    """RGB in [0, 1]."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 255


def peak() -> float:
    """The most memory that this process has had so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
