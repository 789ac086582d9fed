"""Rows of images as one picture."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image

_GAP = 2  # pixels


def grid(rows: Sequence[UInt8[np.ndarray, "images height width 3"]]) -> Image.Image:
    """Each row's images side by side, rows below each other, on white."""
    count, height, width = max(len(row) for row in rows), *rows[0].shape[1:3]
    canvas = Image.new("RGB", (count * (width + _GAP) - _GAP, len(rows) * (height + _GAP) - _GAP), "white")
    for y, row in enumerate(rows):
        for x, pixels in enumerate(row):
            canvas.paste(Image.fromarray(pixels), (x * (width + _GAP), y * (height + _GAP)))
    return canvas
