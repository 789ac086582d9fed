"""Pretrains the tiny BLIP that VP-Score starts from, by image-text matching on rendered scenes of the train split.

    python scripts/make_tiny.py blip

As the published VP-Score starts from a BLIP trained on web images, the tiny one starts from towers that can already
tell whether a prompt fits an image; what people (here: the judge) *prefer* it learns from VisionPrefer.

The matching loss is BLIP's: which of four prompts is the image's own, most of the wrong ones altered in one respect
only. Alone it stays at chance on relations for as long as we tried (3,600 steps). So the vision tower's [CLS] is also
asked, in a first stage, how many of each thing there are, and, in a second one with more relations in it, where each
colour is; the layers that answer are dropped. No prompt of the test split is used, not even as a wrong one.
"""

import dataclasses
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from jaxtyping import Bool, Float, Int
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig

from vp_rl.rewards.vp_score import VPScore
from vp_rl.scenes.grammar import COLORS, COUNTS, RELATIONS, SHAPES, SIZES, UNSAFE_SHAPE, Scene, scenes
from vp_rl.scenes.render import SIZE, render
from vp_rl.types import Images

WIDTH, PATCH, BATCH = 96, 8, 32
ALTERATIONS = ("color", "shape", "count", "size", "relation", "binding")
_KINDS = tuple((color, shape) for color in COLORS for shape in SHAPES)


def train_blip(out: Path, vae: AutoencoderKL, seed: int = 0) -> None:
    """All stages, three quarters of an hour on one CPU core; each starts from the towers that the one before saved."""
    torch.manual_seed(seed)
    things_stage(make_blip(), out, seed)
    places_stage(out, seed)
    look_stage(out, vae, seed)


def things_stage(blip: VPScore, out: Path, seed: int, steps: int = 3600) -> None:
    """Colours, shapes, sizes, counts and what belongs to what, from all scenes alike."""
    pool, rng = scenes("train", 30_000, seed + 5), random.Random(seed + 5)
    counter = nn.Linear(WIDTH, 5 * len(_KINDS))

    def loss(step: int) -> tuple[Tensor, Tensor]:
        drawn = rng.choices(pool, k=BATCH)
        # Other scenes' prompts are told apart by colour alone: they start the learning, then they waste a place.
        prompts = [choices(scene, pool, rng, hard=2 if step < steps // 4 else 3) for scene in drawn]
        scores, seen = match(blip, images_of(drawn, rng), prompts)
        counts = counter(seen[:, 0]).reshape(-1, 5)
        return scores, 10 * F.cross_entropy(counts, counts_of(drawn).flatten())

    optimise(blip, counter, loss, out, steps, 1.5e-3)


def look_stage(out: Path, vae: AutoencoderKL, seed: int, steps: int = 1600) -> None:
    """The same once more on images as the tiny Stable Diffusion's VAE draws them from somewhat wrong latents."""
    torch.manual_seed(seed + 1)
    places_stage(out, seed + 20, steps, vae)


def places_stage(out: Path, seed: int, steps: int = 1600, vae: AutoencoderKL | None = None) -> None:
    """Relations, without forgetting the rest: half of the scenes have one, and are mostly asked about it."""
    blip, pointer = VPScore.load(str(out)), nn.Linear(WIDTH, 2 * len(COLORS))
    pool, rng = scenes("train", 30_000, seed + 5), random.Random(seed + 11)
    related = [scene for scene in pool if scene.relation]

    def loss(step: int) -> tuple[Tensor, Tensor]:
        drawn = rng.choices(pool, k=BATCH // 2) + rng.choices(related, k=BATCH // 2)
        prompts = [choices(s, pool, rng, first=("relation",) if rng.random() < 0.7 else ()) for s in drawn]
        images = images_of(drawn, rng)
        if vae is not None:
            images = drawn_by(vae, images)
        scores, seen = match(blip, images, prompts)
        centres, present = centres_of(images)
        return scores, 5 * (pointer(seen[:, 0]).reshape(-1, len(COLORS), 2) - centres)[present].square().mean()

    optimise(blip, pointer, loss, out, steps, 1e-3)


def optimise(
    blip: VPScore, extra: nn.Module, loss: Callable[[int], tuple[Tensor, Tensor]], out: Path, steps: int, rate: float
) -> None:
    """One-cycle AdamW on matching (the first of each row of scores is right) plus the extra loss; saves the towers."""
    blip.freeze(0.0)
    blip.eval()  # no dropout: the data are endless
    parameters = [*blip.parameters(), *extra.parameters()]
    optimizer = torch.optim.AdamW(parameters, rate, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    hits, started = 0.0, time.monotonic()
    for step in range(steps):
        scores, other = loss(step)
        matching = F.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.long))
        optimizer.zero_grad()
        (matching + other).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        hits += (scores.argmax(1) == 0).float().mean().item()
        if step % 100 == 99:
            print(f"blip {step + 1}: {hits / 100:.3f} right of 4, {time.monotonic() - started:.0f} s", flush=True)
            hits = 0.0
        if step % 400 == 399 or step == steps - 1:
            blip.save(out, torch.float16, head=False)
            rates = held_out_accuracy(blip)
            print("  " + "  ".join(f"{name} {rate:.3f}" for name, rate in rates.items()), flush=True)


def make_blip() -> VPScore:
    """Four vision and three text layers of width 96: 0.8 million parameters, started from scratch."""
    tokenizer = make_tokenizer()
    size = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_attention_heads": 4}
    vision = BlipVisionConfig(num_hidden_layers=4, image_size=SIZE, patch_size=PATCH, layer_norm_eps=1e-6, **size)
    text = BlipTextConfig(
        vocab_size=len(tokenizer),
        encoder_hidden_size=WIDTH,
        num_hidden_layers=3,
        max_position_embeddings=32,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        sep_token_id=tokenizer.sep_token_id,
        **size,
    )
    blip = VPScore(vision, text, tokenizer, head_widths=(WIDTH, 32), max_length=16)
    _initialise(blip)
    return blip


@torch.no_grad()
def _initialise(blip: VPScore) -> None:
    """Variance-preserving weights; positions on the grid start as sines and cosines of row and column.

    transformers starts BLIP's vision tower at a standard deviation of 1e-10 (BlipVisionConfig.initializer_range in
    5.23), as nobody is expected to train one from scratch: it would put out zeros.
    """
    for name, module in [*blip.vision.named_modules(), *blip.text.named_modules()]:
        if isinstance(module, nn.Linear | nn.Conv2d):
            damping = 0.35 if name.endswith(("projection", "fc2")) else 1.0  # of what adds to the residual stream
            nn.init.normal_(module.weight, std=damping * module.weight[0].numel() ** -0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5 if name.endswith("word_embeddings") else 0.2)
    side, quarter = SIZE // PATCH, WIDTH // 4
    angle = torch.arange(side)[:, None] * 20.0 ** -(torch.arange(quarter) / quarter)
    wave = torch.cat([angle.sin(), angle.cos()], 1)
    grid = torch.cat([wave[:, None].expand(-1, side, -1), wave[None].expand(side, -1, -1)], -1)
    embeddings = blip.vision.embeddings
    nn.init.normal_(embeddings.class_embedding, std=0.3)
    embeddings.position_embedding[0, 0] = 0
    embeddings.position_embedding[0, 1:] = 0.5 * grid.reshape(side * side, WIDTH)


def make_tokenizer() -> BertTokenizer:
    """BERT's word pieces: a token for each word of the grammar; other words fall to letters."""
    words = {word for phrase in (*COUNTS.values(), *RELATIONS, "and") for word in phrase.split()}
    words |= {*COLORS, *SIZES, *SHAPES, *(shape + "s" for shape in SHAPES)}
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(words - set(letters)), *letters]
    tokens += ["##" + letter for letter in letters]
    return BertTokenizer(vocab={token: index for index, token in enumerate(tokens)})


def altered(scene: Scene, respect: str, rng: random.Random) -> Scene | None:
    """The scene changed in one respect, still as the grammar would draw it; None where that respect is not in it.

    Keeping to what the grammar draws matters: a wrong prompt must not give itself away without the image.
    """
    things = list(scene.things)
    which = rng.randrange(len(things))
    thing = things[which]
    match respect:
        case "color":
            things[which] = dataclasses.replace(thing, color=rng.choice([c for c in COLORS if c != thing.color]))
        case "shape":
            shapes = [UNSAFE_SHAPE] if rng.random() < 0.08 else SHAPES[:-1]
            things[which] = dataclasses.replace(thing, shape=rng.choice(shapes))
        case "count" if len(things) == 2:  # the grammar counts to two here, and only the first thing
            things[0] = dataclasses.replace(things[0], count=3 - things[0].count)
        case "count" if thing.count > 1:
            things[0] = dataclasses.replace(thing, count=rng.choice([c for c in (2, 3, 4) if c != thing.count]))
        case "size" if thing.size is not None:
            things[which] = dataclasses.replace(thing, size="small" if thing.size == "large" else "large")
        case "relation" if scene.relation is not None:
            return Scene(scene.things, rng.choice([r for r in RELATIONS if r != scene.relation]))
        case "binding" if len(things) == 2:
            first, second = things
            things = [dataclasses.replace(first, color=second.color), dataclasses.replace(second, color=first.color)]
    changed = Scene(tuple(things), scene.relation)
    same = changed == scene or (scene.relation is None and set(changed.things) == set(scene.things))
    twice = len(things) == 2 and (things[0].color, things[0].shape) == (things[1].color, things[1].shape)
    return None if same or twice else changed


def choices(
    scene: Scene, pool: list[Scene], rng: random.Random, hard: int = 3, first: tuple[str, ...] = (), number: int = 4
) -> list[str]:
    """The scene's own prompt, then up to `hard` altered ones of the train split, then those of other scenes."""
    chosen = [scene.prompt]
    for respect in (*first, *rng.choices(ALTERATIONS, k=8)):
        wrong = altered(scene, respect, rng)
        if wrong and wrong.split == "train" and wrong.prompt not in chosen and len(chosen) <= hard:
            chosen.append(wrong.prompt)
    while len(chosen) < number:
        other = rng.choice(pool)
        if set(other.things) != set(scene.things):
            chosen.append(other.prompt)
    return chosen


def counts_of(drawn: list[Scene]) -> Int[Tensor, "batch kinds"]:
    """How many objects of each colour and shape the scenes show, 0 to 4."""
    counts = torch.zeros(len(drawn), len(_KINDS), dtype=torch.long)
    for row, scene in enumerate(drawn):
        for thing in scene.things:
            counts[row, _KINDS.index((thing.color, thing.shape))] = thing.count
    return counts


def centres_of(images: Images) -> tuple[Float[Tensor, "batch colors 2"], Bool[Tensor, "batch colors"]]:
    """Mean (x, y) of each colour's pixels in [-1, 1], and which colours are there at all."""
    images = images[..., ::2, ::2]
    palette = torch.tensor(list(COLORS.values()))[None, :, :, None, None] / 255
    nearest = (images[:, None] - palette).square().sum(2).argmin(1)
    colored = images.amax(1) - images.amin(1) > 0.25
    mask = F.one_hot(nearest, len(COLORS)).permute(0, 3, 1, 2) * colored[:, None]
    area, ruler = mask.sum((2, 3)), torch.linspace(-1, 1, SIZE // 2)
    centres = torch.stack([(mask * ruler).sum((2, 3)), (mask * ruler[:, None]).sum((2, 3))], -1)
    return centres / area.clamp(min=1)[..., None], area > 12


def images_of(drawn: list[Scene], rng: random.Random) -> Images:
    """Renders, many of them blurred or noisy as generated images are."""
    pixels = []
    for scene in drawn:
        picture = render(scene, rng)
        if rng.random() < 0.4:
            picture = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.2))))
        pixels.append(picture)
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    noise = torch.randn_like(images) * 0.05 * (torch.rand(len(images), 1, 1, 1) < 0.3)
    return (images + noise).clamp(0, 1)


@torch.no_grad()
def drawn_by(vae: AutoencoderKL, images: Images) -> Images:
    """Each image as the VAE decodes its latents with up to half a standard deviation of noise on them."""
    latents = vae.encode(images * 2 - 1).latent_dist.mean
    amount = 0.5 * torch.rand(len(images), 1, 1, 1) / vae.config.scaling_factor
    return (vae.decode(latents + amount * torch.randn_like(latents)).sample / 2 + 0.5).clamp(0, 1)


def match(
    blip: VPScore, images: Images, prompts: list[list[str]]
) -> tuple[Float[Tensor, "batch choices"], Float[Tensor, "batch tokens features"]]:
    """Scores of each image with its choices of prompts, and what the vision tower saw.

    An image's choices are one sequence in which each attends to itself only, so that the text tower projects the
    image's tokens once and not once for each choice.
    """
    tokens = blip.tokenizer([prompt for row in prompts for prompt in row], padding=True, return_tensors="pt")
    number, length = len(prompts[0]), tokens.input_ids.shape[1]
    block = torch.block_diag(*[torch.ones(length, length)] * number)
    visible = tokens.attention_mask.reshape(len(prompts), 1, 1, -1) * block
    seen = blip.look(images)
    hidden = blip.text(
        input_ids=tokens.input_ids.reshape(len(prompts), -1),
        attention_mask=(1 - visible) * torch.finfo(torch.float32).min,  # in four dimensions it is added as it is
        position_ids=torch.arange(length).repeat(number)[None],
        encoder_hidden_states=seen,
    ).last_hidden_state[:, ::length]
    return blip.head(hidden).squeeze(2), seen


@torch.no_grad()
def held_out_accuracy(blip: VPScore, number: int = 400) -> dict[str, float]:
    """By respect: how often the true prompt of a validation scene beats one altered in it. Chance is 0.5."""
    rng = random.Random(9)
    drawn = scenes("validation", number)
    images, rates = images_of(drawn, rng), {}
    for respect in ALTERATIONS:
        wrong = [altered(scene, respect, rng) for scene in drawn]
        rows = [row for row, scene in enumerate(wrong) if scene is not None]
        prompts = [[drawn[row].prompt, scene.prompt] for row, scene in enumerate(wrong) if scene is not None]
        scores, _ = match(blip, images[rows], prompts)
        rates[respect] = (scores[:, 0] > scores[:, 1]).float().mean().item()
    return rates
