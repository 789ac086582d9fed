"""Trains the embedded world's models from scratch; the weights that ship in the package come from here.

    python scripts/make_tiny.py vae sd            # the tiny Stable Diffusion, a real diffusers pipeline folder
    python scripts/make_tiny.py blip              # the BLIP towers that the tiny VP-Score starts from
    python scripts/make_tiny.py clip              # a CLIP, as a weaker reward
    python train.py experiment=vpscore            # VisionPrefer from tiny SD's images, and VP-Score trained on it
    python scripts/make_tiny.py vp_score --trained outputs/vpscore/DATE_TIME/vp_score     # in half precision

Every stage uses the train split of the grammar only. On two CPU cores: 10, 30, 20 and 10 minutes.
"""

import argparse
import functools
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from make_tiny_blip import train_blip
from make_tiny_clip import train_clip
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from vp_rl.rewards.vp_score import VPScore
from vp_rl.scenes.grammar import CATEGORIES, COLORS, COUNTS, RELATIONS, SHAPES, SIZES, Scene, scenes
from vp_rl.scenes.render import SIZE, render

MAX_TOKENS = 20
_NONE = len(RELATIONS)  # the class of prompts that name no relation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=["vae", "sd", "blip", "clip", "vp_score"])
    parser.add_argument("--out", type=Path, default=Path("vp_rl/scenes/weights"))
    parser.add_argument("--vae-steps", type=int, default=3000)
    parser.add_argument("--sd-steps", type=int, default=6000)
    parser.add_argument("--start", type=Path, help="sd: a folder whose denoiser and text encoder are trained further")
    parser.add_argument("--trained", type=Path, help="vp_score: the folder that training wrote")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if "vp_score" in args.stages and args.trained is None:
        parser.error("vp_score needs --trained: the folder that `python train.py experiment=vpscore` wrote")
    torch.manual_seed(args.seed)
    if "vae" in args.stages:
        train_vae(args.vae_steps, args.seed).half().save_pretrained(args.out / "sd" / "vae")
    if "sd" in args.stages:
        train_sd(load_vae(args.out), args.sd_steps, args.seed, args.out / "sd", args.start)
    if "blip" in args.stages:
        train_blip(args.out / "blip", load_vae(args.out), args.seed)
    if "clip" in args.stages:
        train_clip(
            args.out / "clip", CLIPTokenizer.from_pretrained(args.out / "sd" / "tokenizer"), MAX_TOKENS, args.seed
        )
    if "vp_score" in args.stages:
        VPScore.load(str(args.trained)).save(args.out / "vp_score", torch.float16)


def load_vae(out: Path) -> AutoencoderKL:
    """The trained VAE, which the stages after it need."""
    return AutoencoderKL.from_pretrained(out / "sd" / "vae", torch_dtype=torch.float32)


def renders(drawn: list[Scene], rng: random.Random) -> Tensor:
    """Float (B, 3, 64, 64) in [-1, 1], as a VAE reads images."""
    return as_tensor([render(scene, rng) for scene in drawn])


def as_tensor(pixels: list[np.ndarray]) -> Tensor:
    """uint8 (64, 64, 3) images to float (B, 3, 64, 64) in [-1, 1]."""
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_vae(steps: int, seed: int) -> AutoencoderKL:
    """64 px to 8 x 8 x 4 latents and back: mean squared and absolute error with a slight KL weight."""
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(8, 16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=SIZE,
    ).to(memory_format=torch.channels_last)
    pool, rng = scenes("train", 20_000, seed + 1), random.Random(seed + 1)
    optimizer = torch.optim.AdamW(vae.parameters(), 3e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    started = time.monotonic()
    for step in range(steps):
        images = renders(rng.choices(pool, k=16), rng).to(memory_format=torch.channels_last)
        latents = vae.encode(images).latent_dist
        error = vae.decode(latents.sample()).sample - images
        kl = latents.kl().mean() / latents.mean[0].numel()
        loss = error.square().mean() + 0.1 * error.abs().mean() + 1e-4 * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"vae {step + 1}: mse {error.square().mean():.5f} {time.monotonic() - started:.0f} s", flush=True)
    return vae


def train_sd(
    vae: AutoencoderKL,
    steps: int,
    seed: int,
    out: Path,
    start: Path | None = None,
    images: int = 20_000,
    batch: int = 64,
) -> None:
    """The denoiser and its text encoder, together, on cached latents; saves the whole pipeline in half precision.

    A plain recipe learns colours, shapes and counts, and leaves relations at chance (docs/log.md). What teaches them:
    velocity prediction, so that the noisiest steps, which decide the layout, draw it and do not copy the noise; more
    of those steps; half scenes, one thing in its place under a prompt that ends at the relation, at first alone; and
    probes that make the denoiser's features tell where they are and the text's tell which relation is meant.
    """
    tokenizer = make_tokenizer()
    lesson = Lesson(vae, tokenizer, scenes("train", images, seed + 2, (*CATEGORIES, "relation", "composition")), seed)
    unet, text_encoder = make_unet(), make_text_encoder(tokenizer)
    if start is not None:
        unet = UNet2DConditionModel.from_pretrained(start / "unet", torch_dtype=torch.float32).train()
        text_encoder = CLIPTextModel.from_pretrained(start / "text_encoder", dtype=torch.float32).train()
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )
    models = torch.nn.ModuleList([unet, text_encoder])
    probes = Probes(unet)
    averages = EMAModel(models.parameters(), decay=0.998)
    optimizer = torch.optim.AdamW([*models.parameters(), *probes.parameters()], 1.5e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=steps, pct_start=0.05)
    running, started = 0.0, time.monotonic()
    for step in range(steps):
        first = 0.0 if start else max(0.0, 1 - step / 1500)  # half scenes and noisy steps only, then ever fewer
        latents, prompt, meant, timestep = lesson.draw(batch, first)
        noise = torch.randn_like(latents)
        text = text_encoder(prompt)[0]
        output = unet(scheduler.add_noise(latents, noise, timestep), timestep, text).sample
        loss = (output - scheduler.get_velocity(latents, noise, timestep)).square().mean()
        end = (prompt == tokenizer.eos_token_id).int().argmax(1)
        optimizer.zero_grad()
        (loss + probes(text[torch.arange(batch), end], meant)).backward()
        torch.nn.utils.clip_grad_norm_(models.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        averages.step(models.parameters())
        running = 0.99 * running + 0.01 * loss.item() if step else loss.item()
        if step % 100 == 99:
            print(f"sd {step + 1}: loss {running:.4f} {time.monotonic() - started:.0f} s", flush=True)
        if step % 1000 == 999 or step == steps - 1:
            averages.store(models.parameters())
            averages.copy_to(models.parameters())
            _save(out, vae, text_encoder, tokenizer, unet, scheduler)
            averages.restore(models.parameters())


class Probes(torch.nn.Module):
    """Linear read-outs of where a feature is and which relation the text names; thrown away after training."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        blocks = [unet.down_blocks[0].resnets[0], unet.mid_block.resnets[0], unet.up_blocks[1].resnets[0]]  # type: ignore[union-attr]
        self.places = torch.nn.ModuleList(torch.nn.Conv2d(block.out_channels, 2, 1) for block in blocks)
        self.relation = torch.nn.Linear(unet.config["cross_attention_dim"], len(RELATIONS) + 1)
        self._features: dict[int, Tensor] = {}
        for index, block in enumerate(blocks):
            block.register_forward_hook(functools.partial(self._keep, index))

    def _keep(self, index: int, module: torch.nn.Module, inputs: tuple, output: Tensor) -> None:
        self._features[index] = output

    def forward(self, text: Tensor, relation: Tensor) -> Tensor:
        """Their loss on the last forward pass of the denoiser, weighted."""
        placed = []
        for index, read in enumerate(self.places):
            features = self._features[index]
            line = torch.linspace(-1, 1, features.shape[-1])
            grid = torch.stack(torch.meshgrid(line, line, indexing="ij"))
            placed.append((read(F.group_norm(features, 8)) - grid).square().mean())
        return 0.1 * sum(placed) + 0.1 * F.cross_entropy(self.relation(text), relation)


class Lesson:
    """Scenes and half scenes as the denoiser learns from them; sets the VAE's scaling factor."""

    def __init__(self, vae: AutoencoderKL, tokenizer: CLIPTokenizer, pool: list[Scene], seed: int) -> None:
        rng = random.Random(seed + 2)
        pixels, prompts, halves = [], [], []
        for index, scene in enumerate(pool):
            half = scene.relation is not None and rng.random() < 0.3
            first = rng.random() < 0.5
            pixels.append(render(scene, rng, scene.things[0 if first else 1] if half else None))
            cut = f"{scene.things[0]} {scene.relation}" if first else f"{scene.relation} {scene.things[-1]}"
            prompts.append(cut if half else scene.prompt)
            halves += [index] if half else []
        self.latents = scaled_latents(vae, pixels)
        self.halves = torch.tensor(halves)
        self.tokens, self.empty = _tokenize(tokenizer, prompts), _tokenize(tokenizer, [""])
        self.relation = torch.tensor([next((i for i, r in enumerate(RELATIONS) if r in p), _NONE) for p in prompts])

    def draw(self, batch: int, first: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Latents, prompts, the relations they name, and timesteps; a share `first` are half scenes at noisy steps."""
        any_row, half_row = torch.randint(len(self.latents), (batch,)), torch.randint(len(self.halves), (batch,))
        rows = torch.where(torch.rand(batch) < first, self.halves[half_row], any_row)
        noisy = torch.rand(batch) < 0.4 + 0.6 * first
        timestep = torch.where(noisy, torch.randint(700, 1000, (batch,)), torch.randint(1000, (batch,)))
        without = torch.rand(batch) < 0.1  # for classifier-free guidance
        prompt = torch.where(without[:, None], self.empty, self.tokens[rows])
        return self.latents[rows], prompt, torch.where(without, _NONE, self.relation[rows]), timestep


@torch.no_grad()
def scaled_latents(vae: AutoencoderKL, pixels: list[np.ndarray]) -> Tensor:
    """Latents of uint8 images, with a standard deviation of 1; sets the VAE's scaling factor."""
    chunks = [as_tensor(pixels[first : first + 250]) for first in range(0, len(pixels), 250)]
    latents = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in chunks])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    print(f"cached {len(pixels)} latents, scaling factor {vae.config['scaling_factor']}", flush=True)
    return latents * vae.config["scaling_factor"]


def _save(out: Path, vae, text_encoder, tokenizer, unet, scheduler) -> None:  # noqa: ANN001
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(out)
    pipeline.to(torch.float32)
    for file in out.glob("*/config.json"):  # diffusers notes the folder that a model was loaded from
        config = {key: value for key, value in json.loads(file.read_text()).items() if key != "_name_or_path"}
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _tokenize(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    return tokenizer(
        prompts, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    ).input_ids


def make_unet() -> UNet2DConditionModel:
    """About a million parameters; cross-attention where the latents are 8 x 8 and in the middle."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(48, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=4,  # the number of heads, whatever diffusers calls it: 12 or 16 channels each
        norm_num_groups=8,
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """CLIP's text tower with three layers of 64."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def make_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-pair encoding with merges that make each word of the grammar one token; others fall to bytes."""
    words = {word for phrase in (*COUNTS.values(), *RELATIONS, "and") for word in phrase.split()}
    words |= {*COLORS, *SIZES, *SHAPES, *(shape + "s" for shape in SHAPES)}
    alphabet = sorted(chr(code) for code in _byte_characters())
    merges: list[tuple[str, str]] = []
    for word in sorted(words):
        pieces = _byte_pair_encode([*word[:-1], word[-1] + "</w>"], merges)
        while len(pieces) > 1:  # a merge added last is tried last, so it cannot break the words before
            merges.append((pieces[0], pieces[1]))
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    tokens = [*alphabet, *(character + "</w>" for character in alphabet), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)
    assert all(len(tokenizer(word).input_ids) == 3 for word in words), "a word of the grammar is not one token"
    return tokenizer


def _byte_pair_encode(pieces: list[str], merges: list[tuple[str, str]]) -> list[str]:
    while True:
        pairs = [pair for pair in zip(pieces, pieces[1:], strict=False) if pair in merges]
        if not pairs:
            return pieces
        pair = min(pairs, key=merges.index)
        best = next(i for i in range(len(pieces) - 1) if (pieces[i], pieces[i + 1]) == pair)
        pieces = [*pieces[:best], "".join(pair), *pieces[best + 2 :]]


def _byte_characters() -> list[int]:
    """The printable stand-ins that byte-level encodings use for the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return printable + [256 + index for index in range(256 - len(printable))]


if __name__ == "__main__":
    main()
