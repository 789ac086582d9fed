"""What CLIP and BLIP do to an image before they look at it, with gradients."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from vp_rl.types import Images

_MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI's CLIP; BLIP uses the same
_STD = (0.26862954, 0.26130258, 0.27577711)


def preprocess(images: Images, size: int) -> Float[Tensor, "batch 3 side side"]:
    """Shorter side to `size` (bicubic), centre crop, CLIP's normalisation: PIL's result to about 1/255, with gradients.

    Width and height are resized one after the other, clipped between, because that is where PIL clips overshoot.
    """
    images = images.float()
    height, width = images.shape[-2:]
    short = min(height, width)
    if short != size:
        height, width = size * height // short, size * width // short
        for shape in ((images.shape[-2], width), (height, width)):
            images = F.interpolate(images, size=shape, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = round((height - size) / 2), round((width - size) / 2)
    images = images[..., top : top + size, left : left + size]
    mean, std = (torch.tensor(values, device=images.device).reshape(3, 1, 1) for values in (_MEAN, _STD))
    return (images - mean) / std
