"""What images look like, in numbers that need no network: drift, diversity, convergence, distance from the base.

None of them is good or bad by itself. A policy that paints everything in one style, or every prompt the same picture,
shows it here before a judge of single images does.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

Pixels = UInt8[np.ndarray, "images height width 3"]
Features = Callable[[Pixels], Float[np.ndarray, "images features"]]
"""Numbers of an image whose Euclidean distance says how different two images look."""

_SIDE = 64  # pixels that larger images are reduced to before edges are looked at
_SHIFTED = 128  # pixels that larger images are reduced to before they are shifted
_CELLS, _EDGE_CELLS, _DIRECTIONS = 8, 4, 8
_AT_ONCE = 64  # images
_FLAT = 39  # of 255: what a faint vignette or some noise makes; one drawn object has over 100
_GREY = torch.tensor([0.299, 0.587, 0.114]).reshape(1, 3, 1, 1)


def coarse(images: Pixels) -> Float[np.ndarray, "images features"]:
    """Colours on an 8 x 8 grid beside edges by direction on a 4 x 4 grid.

    A distance of 1 is that of a black image from a white one.
    """
    return np.concatenate([_coarse(part).numpy() for part in _parts(images)]).astype(np.float64)


def appearance(images: Pixels) -> dict[str, Float[np.ndarray, " images"]]:
    """Brightness and contrast (mean and standard deviation of grey, 0 to 1), colour, sharpness, repetition.

    Colour is Hasler and Suesstrunk's colourfulness (2003), of channels in [0, 1]; sharpness the mean absolute Laplacian
    of grey; for repetition see there.
    """
    rows = [_appearance(part) for part in _parts(images)]
    return {name: torch.cat([row[name] for row in rows]).double().numpy() for name in rows[0]}


def blank(images: Pixels) -> Bool[np.ndarray, " images"]:
    """Whether there is nothing to be seen: all colours of an image lie close to each other.

    The lowest and the highest hundredth of each channel are left out, for specks.
    """
    side = images.reshape(len(images), -1, 3)
    low, high = np.quantile(side, [0.01, 0.99], axis=1)
    return (high - low).max(1) < _FLAT


def repetition(grey: Float[Tensor, "images height width"]) -> Float[Tensor, " images"]:
    """How much of an image's likeness to itself is lost when it is shifted, and comes back when it is shifted further.

    The largest off-centre peak of the autocorrelation, above what it rises from: max over shifts d, up to half of each
    side, of r(d) - min r on the straight way from 0 to d, where r < 0 counts as 0; r(d) is the correlation of the image
    with itself shifted by d, over the pixels n that overlap, cov / max(sqrt(var var'), var(image) / 2), so that faint
    overlaps count for little. The autocorrelation's peaks as a measure of periodic texture are Haralick's (1979,
    "Statistical and structural approaches to texture"); counting from what was lost is for images with long edges,
    which are like themselves all along them.

    1: it is made of equal tiles, each unlike itself when shifted. 0: nothing comes back, as in a gradient, across an
    edge, or on plain ground. An object that is there twice has 1/2 or more; noise of N pixels below about 8 / sqrt(N).
    """
    height, width = grey.shape[-2:]
    down, across = height // 2, width // 2
    size = (height + down, width + across)  # so that nothing that is shifted out comes in at the other side
    image = grey.double() - grey.double().mean((1, 2), keepdim=True)
    one, square, ones = (torch.fft.rfft2(each, s=size) for each in (image, image.square(), torch.ones_like(image[:1])))

    def correlate(still: Tensor, shifted: Tensor) -> Tensor:
        whole = torch.fft.irfft2(still.conj() * shifted, s=size)
        return torch.roll(whole, (down, across), (1, 2))[:, : 2 * down + 1, : 2 * across + 1]

    number, here, there = correlate(ones, ones), correlate(one, ones), correlate(ones, one)
    variances = (correlate(square, ones) - here.square() / number, correlate(ones, square) - there.square() / number)
    least = number * (image.square().mean((1, 2), keepdim=True) / 2 + 1e-9)
    scale = torch.maximum((variances[0].clamp(min=0) * variances[1].clamp(min=0)).sqrt(), least)
    likeness = ((correlate(one, one) - here * there / number) / scale).clamp(0, 1)
    return (likeness - _lowest_on_the_way(likeness)).amax((1, 2)).float()


def _lowest_on_the_way(likeness: Float[Tensor, "images down across"]) -> Float[Tensor, "images down across"]:
    """The smallest value between the middle and each place, ring by ring from the middle."""
    lowest, middle = likeness.clone(), tuple(side // 2 for side in likeness.shape[1:])
    rows, columns = (torch.arange(-half, half + 1) for half in middle)
    ring = torch.maximum(rows.abs()[:, None], columns.abs()[None])
    for step in range(1, int(ring.max()) + 1):
        row, column = torch.nonzero(ring == step, as_tuple=True)
        nearer = ((place - half) * (step - 1) / step for place, half in zip((row, column), middle, strict=True))
        before = [place.round().long() + half for place, half in zip(nearer, middle, strict=True)]
        lowest[:, row, column] = torch.minimum(likeness[:, row, column], lowest[:, before[0], before[1]])
    return lowest


def diversity(
    features: Float[np.ndarray, "images features"], prompt: Int[np.ndarray, " images"]
) -> Float[np.ndarray, " images"] | None:
    """Each image's mean distance to the others of its prompt; None where a prompt has but one.

    Args:
        features: of each image.
        prompt: number of each image's prompt.
    """
    if np.bincount(prompt).min() < 2:
        return None
    found = np.zeros(len(features))
    for number in np.unique(prompt):
        rows = np.flatnonzero(prompt == number)
        found[rows] = _distances(features[rows]).sum(1) / (len(rows) - 1)
    return found


def spread(features: Float[np.ndarray, "images features"], seeds: Sequence[int]) -> Float[np.ndarray, " images"] | None:
    """Each image's mean distance to the other prompts' images of its seed; None where there is one prompt."""
    seed, found = np.asarray(seeds), np.zeros(len(features))
    for number in np.unique(seed):
        rows = np.flatnonzero(seed == number)
        if len(rows) < 2:
            return None
        found[rows] = _distances(features[rows]).sum(1) / (len(rows) - 1)
    return found


def _distances(features: np.ndarray) -> np.ndarray:
    rows = torch.from_numpy(features)
    return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").numpy()


def _parts(images: np.ndarray) -> Iterator[Tensor]:
    starts = range(0, len(images), _AT_ONCE)
    return (torch.from_numpy(images[i : i + _AT_ONCE]).permute(0, 3, 1, 2).float() / 255 for i in starts)


def _coarse(images: Tensor) -> Tensor:
    if max(images.shape[-2:]) > _SIDE:
        images = F.adaptive_avg_pool2d(images, _SIDE)
    colours = F.adaptive_avg_pool2d(images, _CELLS).flatten(1) / (3 * _CELLS**2) ** 0.5
    grey = (images * _GREY).sum(1)
    down, across = (F.pad(grey.diff(dim=axis), pad) for axis, pad in ((1, (0, 0, 0, 1)), (2, (0, 1))))
    strength = (down**2 + across**2).sqrt()
    direction = (torch.atan2(down, across) / torch.pi % 1 * _DIRECTIONS).long().clamp(max=_DIRECTIONS - 1)
    by_direction = F.one_hot(direction, _DIRECTIONS).movedim(-1, 1) * strength[:, None]
    edges = F.adaptive_avg_pool2d(by_direction, _EDGE_CELLS).flatten(1)
    return torch.cat([colours, edges / _EDGE_CELLS], 1)


def _appearance(images: Tensor) -> dict[str, Tensor]:
    height, width = images.shape[-2:]
    red, green, blue = images.unbind(1)
    grey = (images * _GREY).sum(1)
    across, along = (red - green).flatten(1), ((red + green) / 2 - blue).flatten(1)
    deviation = (across.var(1, correction=0) + along.var(1, correction=0)).sqrt()
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]).reshape(1, 1, 3, 3)
    return {
        "brightness": grey.flatten(1).mean(1),
        "contrast": grey.flatten(1).std(1, correction=0),
        "colour": deviation + 0.3 * (across.mean(1) ** 2 + along.mean(1) ** 2).sqrt(),
        "sharpness": F.conv2d(grey[:, None], kernel).abs().flatten(1).mean(1),
        "repetition": repetition(F.adaptive_avg_pool2d(grey, (min(height, _SHIFTED), min(width, _SHIFTED)))),
    }
