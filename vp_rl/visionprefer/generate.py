"""Stage 3 of VisionPrefer: several images of each prompt, from a pool of generators at varied guidance and steps."""

import hashlib
import io
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
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
from vp_rl.visionprefer.engine import Engine


class Recipe(NamedTuple):
    """How one image is made; it follows from the seed, the prompt and the image's number alone."""

    prompt: str
    image: int
    generator: str
    guidance_scale: float
    steps: int
    seed: int

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits that tell this image from any other of its prompt."""
        return hashlib.sha256(repr(tuple(self)).encode()).hexdigest()[:8]


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


class ImageStore:
    """Image files by id. What is there is whole: files are written under another name first."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def ids(self) -> set[str]:
        """Of all images that are there."""
        if not self._folder.is_dir():
            return set()
        return {file.name[:-4] for part in os.scandir(self._folder) for file in os.scandir(part) if _whole(file)}

    def read(self, image_id: str) -> bytes:
        """The image file."""
        return self._path(image_id).read_bytes()

    def write(self, image_id: str, data: bytes) -> None:
        """Keeps an image file."""
        path = self._path(image_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_bytes(data)
        os.replace(unfinished, path)

    def _path(self, image_id: str) -> Path:
        return self._folder / image_id[-2:] / f"{image_id}.png"


def _whole(file: "os.DirEntry[str]") -> bool:
    # After a power cut a renamed file can be empty: its name was on disk before its content.
    return file.name.endswith(".png") and file.stat().st_size > 0


def generate(
    makers: Mapping[str, Callable[[], Policy]],
    planned: Mapping[str, Recipe],
    store: ImageStore,
    batch_size: int,
    engine: Engine,
) -> None:
    """Makes the images (by id) that the store lacks. One generator in memory at a time, in full batches.

    Batches are cut from all that is planned, not from what is missing, so that a build that was stopped makes bit by
    bit the same images as one that was not.
    """
    there = store.ids()
    with tqdm(total=len(planned), desc="generate", unit="image", mininterval=2) as bar:
        bar.update(len(planned.keys() & there))
        for name, make in sorted(makers.items()):
            mine = [(image_id, recipe) for image_id, recipe in planned.items() if recipe.generator == name]
            tasks = [
                batch for batch in batches(mine, batch_size) if any(image_id not in there for image_id, _ in batch)
            ]
            for batch, files in engine.map(partial(ImageMaker, make), tasks):
                for (image_id, _), data in zip(batch, files, strict=True):
                    if image_id not in there:
                        store.write(image_id, data)
                        bar.update()


Batch = list[tuple[str, Recipe]]


def batches(planned: Batch, size: int) -> Iterator[Batch]:
    """Images of one generator in batches of one sampler each."""
    groups: dict[tuple[int, float], Batch] = {}
    for image_id, recipe in planned:
        groups.setdefault((recipe.steps, recipe.guidance_scale), []).append((image_id, recipe))
    for members in groups.values():
        for start in range(0, len(members), size):
            yield members[start : start + size]


class ImageMaker:
    """One generator: recipes to image files."""

    def __init__(self, make: Callable[[], Policy]) -> None:
        self._policy = make().to("cuda" if torch.cuda.is_available() else "cpu")

    @torch.no_grad()
    def __call__(self, batch: Batch) -> list[bytes]:
        """PNG files for a batch whose recipes share steps and guidance."""
        first = batch[0][1]
        sampler = Sampler(first.steps, first.guidance_scale, 0.0)
        with self._policy.base():  # an untrained adapter changes nothing, and costs a third of the time
            return list(map(as_png, to_uint8(_images(self._policy, [recipe for _, recipe in batch], sampler))))


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
