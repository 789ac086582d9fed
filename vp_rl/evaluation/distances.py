"""How far apart two sets of images are as wholes: FID and CMMD on an encoder's features.

    FID    |m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)) of the features' means m and covariances S (Heusel et al. 2017, 6)
    CMMD   1000 (E k(x, x') + E k(y, y') - 2 E k(x, y)), with k(a, b) = exp(-|a - b|^2 / (2 * 10^2)) (Jayasumana et al.
           2024): the biased estimate of the squared distance, as the published code has it, which is 0 of equal sets

Published FIDs are of Inception-v3's features, published CMMDs of CLIP ViT-L/14's at 336 pixels. On any other features
the numbers tell sets apart that were encoded alike, and can be compared with no others.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from vp_rl.evaluation.compare import BASE, Rival
from vp_rl.evaluation.looks import Pixels
from vp_rl.files import images as image_files

_SIGMA, _SCALE = 10.0, 1000.0
_AT_ONCE = 64  # images; rows of the kernel are a multiple of it
_KINDS = (".png", ".jpg", ".jpeg", ".webp")

Rows = Float[Tensor, "images features"]
Others = Float[Tensor, "others features"]


@runtime_checkable
class Encoder(Protocol):
    """Whatever turns images, RGB in [0, 1], to features, as the towers of CLIP rewards do."""

    def look(self, images: Tensor) -> Tensor:
        """Of each image, in float32."""
        ...


@dataclass(frozen=True)
class Distances:
    """Of the base model's, or another adapter's, images from the adapter's, and of both from a reference."""

    encoder: str
    features: int
    images: int
    """Of each model."""
    reference: int
    """Images of the reference; 0: there is none."""
    fid: dict[str, float]
    """By the two that are compared."""
    cmmd: dict[str, float]
    """Likewise."""
    warning: str = ""
    """What a reader must know of these numbers in particular."""


def distances(
    encoder: Encoder,
    name: str,
    base: Pixels,
    tuned: Pixels,
    reference: Path | None,
    device: torch.device,
    rival: Rival = BASE,
) -> Distances:
    """FID and CMMD of `base`, which is the rival's, and `tuned`; and of both with the images in the folder `reference`.

    Raises:
        ValueError, FileNotFoundError: see `images_in`; there are not two images of each kind.
    """
    one, other = (encode(encoder, images, device) for images in (base, tuned))
    pairs = {f"{rival.short} and adapter": (one, other)}
    if reference is not None:
        given = encode(encoder, images_in(reference), device)
        pairs |= {f"reference and {rival.short}": (given, one), "reference and adapter": (given, other)}
    fewest = min(len(rows) for pair in pairs.values() for rows in pair)
    if fewest < 2:
        raise ValueError(f"FID and CMMD need two images of each kind at least, and there is {fewest}: raise limit.")
    warning = ""
    if fewest <= one.shape[1]:
        warning = (
            f"{fewest} images cannot fill a covariance of {one.shape[1]} features, whose rank is at most {fewest - 1}: "
            "these FIDs are too large, and only compare with others of as many images. CMMD needs no covariance."
        )
    return Distances(
        encoder=name,
        features=one.shape[1],
        images=len(one),
        reference=0 if reference is None else len(pairs[f"reference and {rival.short}"][0]),
        fid={name: fid(*pair) for name, pair in pairs.items()},
        cmmd={name: cmmd(*pair) for name, pair in pairs.items()},
        warning=warning,
    )


def fid(one: Rows, other: Others) -> float:
    """The Fréchet distance, in the features' units squared, of Gaussians with their means and covariances."""
    from torchmetrics.image.fid import FrechetInceptionDistance  # slow to import, and seldom wanted

    metric = FrechetInceptionDistance(_Same(one.shape[1]))
    metric.update(one.double(), real=True)
    metric.update(other.double(), real=False)
    return max(0.0, float(metric.compute()))  # rounding takes that of equal sets below 0


def cmmd(one: Rows, other: Others) -> float:
    """1000 times the squared maximum mean discrepancy, with a Gaussian kernel of sigma 10; see the module."""
    one, other = one.double(), other.double()
    return max(0.0, _SCALE * float(_kernel(one, one) + _kernel(other, other) - 2 * _kernel(one, other)))


@torch.no_grad()
def sees_whole(encoder: Encoder, device: torch.device) -> bool:
    """Whether it gives one vector for an image, as CLIP does, and not one for each of its patches, as BLIP's does."""
    return encoder.look(torch.zeros(1, 3, 64, 64, device=device)).ndim == 2


@torch.no_grad()
def encode(encoder: Encoder, images: Iterable[np.ndarray], device: torch.device) -> Rows:
    """The features of images of any sizes, of 8 bits a colour."""
    found = []
    for _, alike in groupby(images, lambda image: image.shape):
        for some in _batches(alike):
            pixels = torch.from_numpy(np.stack(some)).to(device).permute(0, 3, 1, 2).float() / 255
            found.append(encoder.look(pixels).float().cpu())
    return torch.cat(found)


def images_in(folder: Path) -> Iterator[np.ndarray]:
    """The pictures in a folder and those below it, by name, as RGB and as they are meant to be seen.

    Raises:
        FileNotFoundError: there are none.
        ValueError: one of them cannot be read.
    """
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in _KINDS)
    if not files:
        raise FileNotFoundError(f"reference='{folder}' is no folder with images ({', '.join(_KINDS)}).")
    for file in files:
        try:
            yield image_files.read(file)
        except ValueError as error:
            raise ValueError(f"reference: {error} Take it out, or put it right.") from error


class _Same(nn.Module):
    """Stands where torchmetrics wants a network: its images are features already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _kernel(one: Tensor, other: Tensor) -> Tensor:
    """Its mean over all pairs, an image with itself included: that is what makes the estimate a biased one."""
    rows = [
        torch.exp(-torch.cdist(some, other).square() / (2 * _SIGMA**2)).mean(1) for some in one.split(_AT_ONCE * 16)
    ]
    return torch.cat(rows).mean()


def _batches(images: Iterator[np.ndarray]) -> Iterator[Sequence[np.ndarray]]:
    some: list[np.ndarray] = []
    for image in images:
        some.append(image)
        if len(some) == _AT_ONCE:
            yield some
            some = []
    if some:
        yield some
