"""Images as servers take them: a phone's photo is made smaller before it is sent, and stays a JPEG."""

import io
from functools import lru_cache

from PIL import Image

from vp_rl.files import images as image_files

_QUALITIES = (95, 90, 80)  # of a JPEG, before it is made smaller still
_SHRINK = 0.8


def shown_size(image: bytes, longest_side: int | None) -> tuple[int, int]:
    """Width and height in pixels with which an image is sent."""
    width, height = image_files.size(image)  # reads the header only
    scale = min(1.0, (longest_side or width + height) / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


@lru_cache(maxsize=64)  # an image is asked about in every aspect
def shown(image: bytes, longest_side: int | None, most_bytes: int | None) -> bytes:
    """The file itself where it is within the limits; else the picture, smaller, in the same format where that will do.

    Args:
        image: a PNG, JPEG or WebP file.
        longest_side: in pixels; None: no limit.
        most_bytes: of the file; None: no limit. A PNG that has more becomes a JPEG.

    Raises:
        ValueError: it cannot be decoded.
    """
    most = most_bytes or len(image)
    size = shown_size(image, longest_side)
    if size == image_files.size(image) and len(image) <= most:
        return image
    with Image.open(io.BytesIO(image)) as opened:
        kind = opened.format or "PNG"
    picture = image_files.rgb(image)
    while True:
        fitting = picture if size == picture.size else picture.resize(size, Image.Resampling.LANCZOS)
        if kind == "PNG" and len(data := _saved(fitting, "PNG")) <= most:
            return data
        for quality in _QUALITIES:
            if len(data := _saved(fitting, "WEBP" if kind == "WEBP" else "JPEG", quality)) <= most:
                return data
        if max(size) == 1:
            return data
        size = max(1, int(size[0] * _SHRINK)), max(1, int(size[1] * _SHRINK))


def _saved(picture: Image.Image, kind: str, quality: int = 95) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind.lower(), quality=quality)
    return buffer.getvalue()
