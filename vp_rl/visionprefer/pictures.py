"""Image files that come from outside: refused with a reason, or made what every other stage expects.

Files of strangers break decoders, fill memory, or are no images at all. What passes here is one whole picture, as a
PNG, JPEG or WebP of 8-bit RGB that needs no turning; it is the one that `files.images` sees in the file.
"""

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from vp_rl.files import images
from vp_rl.files.images import MAX_PIXELS

MAX_ASPECT = 20.0  # the longer side to the shorter; a wide panorama has 10
MIN_SIDE = 16

_KEPT = ("PNG", "JPEG", "WEBP")
_ONE_AT_A_TIME = threading.Lock()


def check(data: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Decodes the whole file and gives the picture's width and height in pixels, as it is meant to be seen.

    Raises:
        ValueError: see `normalise`.
    """
    with _decoded(data, max_pixels) as (image, _):
        return images.upright_size(image)


def normalise(data: bytes, *, max_pixels: int = MAX_PIXELS) -> bytes:
    """The picture as a PNG, JPEG or WebP file of 8-bit RGB; a file that is one already comes back byte for byte.

    Everything else becomes a PNG without metadata: grey, palette, CMYK, 16 bits a channel, EXIF rotation, damaged
    metadata, and transparency, which is laid on white. A photograph with more pictures behind it (MPO) is its first.

    Args:
        data: the file's content; what it is called does not matter.
        max_pixels: width times height by its header; a file of more is refused before anything is decoded.

    Raises:
        ValueError: it is no single whole picture (see `images.decoded`), or narrower or longer than `MIN_SIDE` and
            `MAX_ASPECT` allow.
    """
    with _decoded(data, max_pixels) as (image, warned):
        upright = images.orientation(image) == 1
        plain = image.mode == "RGB" and not image.has_transparency_data and images.depth(data) == 8 and upright
        if image.format in _KEPT and plain and not warned:  # or whoever reads it next would be warned too
            return data
        buffer = io.BytesIO()
        images.as_seen(image, data).save(buffer, format="png")
        return buffer.getvalue()


def read(file: Path, *, max_pixels: int = MAX_PIXELS) -> bytes:
    """`normalise` of a file on disk; what is wrong with it is said with its name.

    Raises:
        FileNotFoundError: there is none.
        ValueError: see `normalise`; or it has more than `images.MAX_BYTES`.
    """
    data = images.content(file)
    try:
        return normalise(data, max_pixels=max_pixels)
    except ValueError as error:
        raise ValueError(f"'{file}': {error}") from error


@contextmanager
def _decoded(data: bytes, max_pixels: int) -> Iterator[tuple[Image.Image, list[warnings.WarningMessage]]]:
    """The image in memory, and what Pillow found strange about it; the list grows while one goes on working with it."""
    # What Pillow warns of and matters is refused. Filters of warnings are the process's, not the thread's: hence the
    # lock.
    with _ONE_AT_A_TIME, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        yield images.decoded(data, max_pixels, _fits), warned


def _fits(width: int, height: int) -> None:
    if min(width, height) < MIN_SIDE:
        raise ValueError(f"The image has {width} x {height} pixels; a side needs {MIN_SIDE} to show anything.")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(
            f"The image has {width} x {height} pixels, and is over {MAX_ASPECT:g} times as long as wide: crop it."
        )
