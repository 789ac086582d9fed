"""What CLIP and BLIP do to an image before they look at it, with gradients."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from vp_rl.types import Images


class Colours(NamedTuple):
    """What red, green and blue in [0, 1] are standardised by: (value - mean) / std."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


OPENAI = Colours((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""OpenAI's CLIP; BLIP uses the same."""


def preprocess(
    images: Images, size: int, colours: Colours = OPENAI, halve: Callable[[float], int] = round
) -> Float[Tensor, "batch 3 side side"]:
    """Shorter side to `size` (bicubic), centre crop, normalisation: PIL's result to about 1/255, with gradients.

    Width and height are resized one after the other, clipped between, because that is where PIL clips overshoot.
    `halve` rounds half of what is cropped: torchvision, and so most published code, takes `round`, transformers takes
    `math.floor`. It makes a difference of one pixel, if 3, 7, 11, ... are too many.
    """
    images = images.float()
    height, width = images.shape[-2:]
    short = min(height, width)
    if short != size:
        height, width = size * height // short, size * width // short
        for shape in ((images.shape[-2], width), (height, width)):
            images = F.interpolate(images, size=shape, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = halve((height - size) / 2), halve((width - size) / 2)
    return _normalise(images[..., top : top + size, left : left + size], colours)


def letterbox(images: Images, size: int, colours: Colours = OPENAI) -> Float[Tensor, "batch 3 side side"]:
    """Longer side to `size` (bicubic), black bars around the shorter one, normalisation: HPS v2's, with gradients.

    That is `ResizeMaxSize` of its `hpsv2/src/open_clip/transform.py`, which resizes tensors, not PIL images: overshoot
    is not clipped. Antialiased, as torchvision does it unasked since 0.17; earlier ones did not. The published code
    does not pad an image whose longer side has the right size already, and fails on it; here it is padded.
    """
    images = images.float()
    longer = max(images.shape[-2:])
    if longer != size:
        shape = [max(1, round(length * size / longer)) for length in images.shape[-2:]]
        images = F.interpolate(images, size=shape, mode="bicubic", antialias=True)
    height, width = (size - length for length in images.shape[-2:])
    bars = (width // 2, width - width // 2, height // 2, height - height // 2)
    return _normalise(F.pad(images, bars), colours)


def _normalise(images: Images, colours: Colours) -> Images:
    mean, std = (torch.tensor(values, device=images.device).reshape(3, 1, 1) for values in colours)
    return (images - mean) / std
