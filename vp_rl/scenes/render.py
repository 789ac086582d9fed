"""Draws a scene: the ground truth that the tiny Stable Diffusion learns from and the judge is validated on."""

import math
import random

import numpy as np
from PIL import Image, ImageDraw

from vp_rl.scenes.grammar import COLORS, Scene, Thing

SIZE = 64  # pixels, height and width
_SUPERSAMPLING = 4
_GAP = 3.0  # pixels between the boxes of two objects
_MARGIN = 2.0  # pixels between a box and the border
_SIZES = {"small": (14.0, 16.5), "large": (26.0, 31.0), None: (16.0, 25.0)}
_CROWDED = (14.0, 19.0)  # three objects or more


def render(scene: Scene, rng: random.Random, only: Thing | None = None) -> np.ndarray:
    """uint8 (64, 64, 3) RGB image of the scene: position, size and background vary with `rng`.

    With `only`, the other thing's objects are left out, though they keep their place.
    """
    boxes = [(thing, box) for thing, box in _place(scene, rng) if only in (None, thing)]
    tone = rng.uniform(0.80, 1.0)
    background = tuple(int(255 * min(1.0, tone + rng.uniform(-0.03, 0.03))) for _ in range(3))
    side = SIZE * _SUPERSAMPLING
    canvas = Image.new("RGB", (side, side), background)
    draw = ImageDraw.Draw(canvas)
    for thing, (x, y, size) in boxes:
        color = tuple(max(0, min(255, channel + rng.randint(-10, 10))) for channel in COLORS[thing.color])
        _draw_shape(draw, thing.shape, x * _SUPERSAMPLING, y * _SUPERSAMPLING, size * _SUPERSAMPLING, color, background)
    return np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.BOX))


def shape_mask(shape: str, size: int) -> np.ndarray:
    """bool (size, size): the shape filling its bounding box, as the judge's template."""
    canvas = Image.new("RGB", (4 * size, 4 * size), (0, 0, 0))
    _draw_shape(ImageDraw.Draw(canvas), shape, 2 * size, 2 * size, 4 * size - 1, (255, 255, 255), (0, 0, 0))
    canvas = canvas.crop(canvas.getbbox()).resize((size, size), Image.Resampling.BOX)
    return np.asarray(canvas)[..., 0] > 127


Box = tuple[float, float, float]  # centre x, centre y, side: pixels


def _place(scene: Scene, rng: random.Random) -> list[tuple[Thing, Box]]:
    objects = [thing for thing in scene.things for _ in range(thing.count)]
    for attempt in range(10_000):
        shrink = 0.97 ** (attempt // 200)  # a crowded draw that never fits is tried a little smaller
        boxes: list[tuple[Thing, Box]] = []
        for thing in objects:
            low, high = _SIZES[thing.size] if len(objects) < 3 else _CROWDED
            side = rng.uniform(low, high) * shrink
            free = _MARGIN + side / 2
            boxes.append((thing, (rng.uniform(free, SIZE - free), rng.uniform(free, SIZE - free), side)))
        if _apart(boxes) and _related(scene, boxes):
            return boxes
    raise AssertionError(f"no layout found for {scene.prompt!r}")


def _apart(boxes: list[tuple[Thing, Box]]) -> bool:
    for i, (_, (x, y, side)) in enumerate(boxes):
        for _, (x2, y2, side2) in boxes[:i]:
            if max(abs(x - x2), abs(y - y2)) < (side + side2) / 2 + _GAP:
                return False
    return True


def _related(scene: Scene, boxes: list[tuple[Thing, Box]]) -> bool:
    if scene.relation is None:
        return True
    first, second = ([box for thing, box in boxes if thing == wanted] for wanted in scene.things)
    return all(holds(scene.relation, a[0] - b[0], a[1] - b[1], 4.0) for a in first for b in second)


def holds(relation: str, dx: float, dy: float, slack: float = 0.0) -> bool:
    """Whether an object at (dx, dy) pixels from another (y down) stands in `relation` to it.

    The offset along the relation's axis must be at least 6 px and exceed the offset across it by `slack`.
    """
    along, across = {
        "to the left of": (-dx, dy),
        "to the right of": (dx, dy),
        "above": (-dy, dx),
        "below": (dy, dx),
    }[relation]
    return along >= 6.0 and along >= abs(across) + slack


def _draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, size: float, color: tuple, background: tuple
) -> None:
    r = size / 2
    match shape:
        case "circle":
            draw.ellipse((x - r, y - r, x + r, y + r), fill=color)
        case "square":
            draw.rectangle((x - r, y - r, x + r, y + r), fill=color)
        case "triangle":
            draw.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=color)
        case "star":
            radii = [r * (1.0 if k % 2 == 0 else 0.42) for k in range(10)]
            angles = [math.pi * k / 5 - math.pi / 2 for k in range(10)]
            points = [(x + q * math.cos(a), y + q * math.sin(a)) for q, a in zip(radii, angles, strict=True)]
            draw.polygon(points, fill=color)
        case "trap":
            hole = r * 0.5
            draw.ellipse((x - r, y - r, x + r, y + r), fill=color)
            draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=background)
        case _:
            raise AssertionError(shape)
