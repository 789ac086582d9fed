"""How well an image compresses: the classic reward that no gradient flows through (DDPO, Black et al. 2023)."""

from io import BytesIO

import torch
from PIL import Image

from vp_rl.interfaces import Reward
from vp_rl.types import Images, Scores

_QUALITY = 95


class CompressibilityReward(Reward):
    """Minus the size of the image as a JPEG file of quality 95, in kilobytes (1000 bytes); prompts are ignored.

    The numbers are those of `jpeg_compressibility` and `jpeg_incompressibility` in kvablack/ddpo-pytorch.

    Args:
        incompressible: the size itself instead: more detail is better.
    """

    differentiable = False
    elsewhere = True  # on the processor, and most of it without Python's lock

    def __init__(self, incompressible: bool = False) -> None:
        super().__init__()
        self.sign = 1 if incompressible else -1

    def forward(self, images: Images, prompts: list[str]) -> Scores:
        """Scores in float32, one for each image at its own size; not a number for an image that is not finite."""
        given = images.detach().float()
        pixels = (given * 255).round().clamp(0, 255).to(torch.uint8)
        sizes = [_kilobytes(Image.fromarray(each)) for each in pixels.permute(0, 2, 3, 1).cpu().numpy()]
        scores = self.sign * torch.tensor(sizes, dtype=torch.float32, device=images.device)
        return scores.masked_fill(~given.isfinite().flatten(1).all(1), torch.nan)  # in 8 bits it would be one colour


def _kilobytes(image: Image.Image) -> float:
    file = BytesIO()
    image.save(file, format="JPEG", quality=_QUALITY)
    return file.tell() / 1000
