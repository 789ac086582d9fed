"""Stage 3 of VisionPrefer: several images of each prompt, from a pool of generators at varied guidance and steps."""

import io
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from vp_rl.interfaces import Policy
from vp_rl.sampler import Sampler
from vp_rl.types import Images


class Recipe(NamedTuple):
    """How one image is made; it follows from the seed, the prompt and the image's number alone."""

    prompt: str
    image: int
    generator: str
    guidance_scale: float
    steps: int
    seed: int


def recipes(
    prompts: Sequence[str],
    images_per_prompt: int,
    generators: Sequence[str],
    guidance_scales: Sequence[float],
    steps: Sequence[int],
    seed: int,
) -> list[Recipe]:
    """A recipe for each image of each prompt, prompt by prompt; what other prompts there are changes none of them."""
    drawn = []
    for prompt in prompts:
        for image in range(images_per_prompt):
            rng = random.Random(f"{seed}/{image}/{prompt}")
            settings = rng.choice(generators), rng.choice(guidance_scales), rng.choice(steps)
            drawn.append(Recipe(prompt, image, *settings, rng.getrandbits(48)))
    return drawn


def generate(
    makers: Mapping[str, Callable[[], Policy]], planned: Sequence[Recipe], batch_size: int
) -> dict[Recipe, bytes]:
    """PNG bytes for each recipe. One generator in memory at a time, one setting at a time, in full batches."""
    made: dict[Recipe, bytes] = {}
    with tqdm(total=len(planned), desc="generate", unit="image", mininterval=2) as bar:
        for name, make in sorted(makers.items()):
            for images in _by_one(make, [recipe for recipe in planned if recipe.generator == name], batch_size):
                made |= images
                bar.update(len(images))
    return made


@torch.no_grad()
def _by_one(make: Callable[[], Policy], planned: Sequence[Recipe], batch_size: int) -> Iterator[dict[Recipe, bytes]]:
    """Images of one generator, batch by batch; it is let go at the end."""
    groups: dict[Sampler, list[Recipe]] = {}
    for recipe in planned:
        groups.setdefault(Sampler(recipe.steps, recipe.guidance_scale, 0.0), []).append(recipe)
    if not groups:
        return
    policy = make().to("cuda" if torch.cuda.is_available() else "cpu")
    with policy.reference():  # an untrained adapter changes nothing, and costs a third of the time
        for sampler, members in groups.items():
            for start in range(0, len(members), batch_size):
                batch = members[start : start + batch_size]
                yield dict(zip(batch, map(as_png, to_uint8(_images(policy, batch, sampler))), strict=True))


def _images(policy: Policy, batch: Sequence[Recipe], sampler: Sampler) -> Images:
    conditioning = policy.encode([recipe.prompt for recipe in batch])
    noise = [torch.Generator().manual_seed(recipe.seed) for recipe in batch]
    return policy.decode(sampler.sample(policy, conditioning, noise))


def to_uint8(images: Images) -> UInt8[np.ndarray, "batch height width 3"]:
    """Images in [0, 1] as the 8-bit pixels that files and annotators have."""
    return rearrange((images * 255).round().to(torch.uint8), "b c h w -> b h w c").cpu().numpy()


def as_png(pixels: UInt8[np.ndarray, "height width 3"]) -> bytes:
    """The image as a file that annotators are shown and datasets keep."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png")
    return buffer.getvalue()
