"""Image files that come from outside: refused with a reason, or made what every other stage expects.

Files of strangers break decoders, fill memory, or are no images at all. What passes here is one whole picture, as a
PNG, JPEG or WebP of 8-bit RGB that needs no turning; colour profiles are not applied.
"""

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.Image import Transpose

MAX_PIXELS = 50_000_000  # 150 MB as RGB, several times that while decoding; a phone's camera has 12 to 48 million
MAX_BYTES = 100 * 2**20
MAX_ASPECT = 20.0  # the longer side to the shorter; a wide panorama has 10
MIN_SIDE = 16

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # few, as every decoder is a way in; MPO comes with JPEG
_KEPT = ("PNG", "JPEG", "WEBP")
_PRETENDERS = (
    (b"<svg", "an SVG drawing: export it as PNG"),
    (b"<!doctype html", "an HTML page, often what a failed download leaves"),
    (b"<html", "an HTML page, often what a failed download leaves"),
    (b"version https://git-lfs", "a Git LFS pointer: run `git lfs pull`"),
    (b"%pdf", "a PDF: export its picture as PNG"),
    (b"ftypavif", "in AVIF format: save it as PNG, JPEG or WebP"),
    (b"ftyphei", "in HEIC format: save it as PNG, JPEG or WebP"),
    (b"ii*\0", "in TIFF format: save it as PNG, JPEG or WebP"),
    (b"mm\0*", "in TIFF format: save it as PNG, JPEG or WebP"),
)
_ORIENTATION = 0x0112  # EXIF's tag
_TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
_ONE_AT_A_TIME = threading.Lock()


def check(data: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Decodes the whole file and gives the picture's width and height in pixels, as it is meant to be seen.

    Raises:
        ValueError: see `normalise`.
    """
    with _decoded(data, max_pixels) as (image, _):
        return (image.height, image.width) if (_orientation(image) or 1) >= 5 else image.size


def normalise(data: bytes, *, max_pixels: int = MAX_PIXELS) -> bytes:
    """The picture as a PNG, JPEG or WebP file of 8-bit RGB; a file that is one already comes back byte for byte.

    Everything else becomes a PNG without metadata: grey, palette, CMYK, 16 bits a channel, EXIF rotation, damaged
    metadata, and transparency, which is laid on white. A photograph with more pictures behind it (MPO) is its first.

    Args:
        data: the file's content; what it is called does not matter.
        max_pixels: width times height by its header; a file of more is refused before anything is decoded.

    Raises:
        ValueError: it is empty, no image, of another format, cut off or damaged, too large, narrower or longer than
            `MIN_SIDE` and `MAX_ASPECT` allow, or animated: an animation has no one picture that could be rated, and
            its first is often blank.
    """
    with _decoded(data, max_pixels) as (image, warned):
        orientation = _orientation(image)
        eight_bits = image.format != "PNG" or (data[12:16] == b"IHDR" and data[24] == 8)
        plain = image.mode == "RGB" and not image.has_transparency_data and eight_bits and orientation == 1
        if image.format in _KEPT and plain and not warned:  # or whoever reads it next would be warned too
            return data
        pixels = _rgb(image)
        if orientation in _TURNS:
            pixels = pixels.transpose(_TURNS[orientation])
        pixels.info.clear()  # or a CMYK profile would be written into the RGB file
        buffer = io.BytesIO()
        pixels.save(buffer, format="png")
        return buffer.getvalue()


def read(file: Path, *, max_pixels: int = MAX_PIXELS) -> bytes:
    """`normalise` of a file on disk; what is wrong with it is said with its name.

    Raises:
        FileNotFoundError: there is none.
        ValueError: see `normalise`; or it has more than `MAX_BYTES`.
    """
    if not file.is_file():
        raise FileNotFoundError(f"No image file at '{file}'.")
    size = file.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"'{file}' has {size / 2**20:.0f} MiB, and no image file of over {MAX_BYTES >> 20} is read.")
    try:
        return normalise(file.read_bytes(), max_pixels=max_pixels)
    except ValueError as error:
        raise ValueError(f"'{file}': {error}") from error


@contextmanager
def _decoded(data: bytes, max_pixels: int) -> Iterator[tuple[Image.Image, list[warnings.WarningMessage]]]:
    """The image in memory, and what Pillow found strange about it; the list grows while one goes on working with it."""
    if not data:
        raise ValueError("The file is empty (0 bytes).")
    # What Pillow warns of and matters is refused below. Filters of warnings are the process's, not the thread's: hence
    # the lock.
    with _ONE_AT_A_TIME, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        image = _opened(data)
        width, height = image.size
        if width * height > max_pixels:
            raise ValueError(f"The image has {width} x {height} pixels, more than {max_pixels:,}: scale it down.")
        if min(width, height) < MIN_SIDE:
            raise ValueError(f"The image has {width} x {height} pixels; a side needs {MIN_SIDE} to show anything.")
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise ValueError(
                f"The image has {width} x {height} pixels, and is over {MAX_ASPECT:g} times as long as wide: crop it."
            )
        try:
            several = image.format != "MPO" and getattr(image, "is_animated", False)  # formats without frames lack it
            if not several:
                image.load()
        except Exception as error:  # a decoder fed with garbage raises anything, struct.error and IndexError included
            raise ValueError(f"The {image.format} file is cut off or damaged: {_words(error)}") from error
        if several:
            raise ValueError(f"The {image.format} file is animated, or has several pictures: save the one that counts.")
        yield image, warned


def _opened(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise ValueError(f"The image is too large, scale it down: {_words(error)}") from error
    except Exception as error:  # as above
        if data.startswith((b"\x89PNG", b"\xff\xd8", b"RIFF", b"GIF8", b"BM")):
            raise ValueError("The file begins like an image, but is cut off or damaged.") from error
        head = data[:1024].lower()
        for mark, what in _PRETENDERS:
            if mark in head:
                raise ValueError(f"The file is no image that is read here, but {what}.") from error
        raise ValueError(f"The file is no image in {', '.join(_FORMATS)} format.") from error


def _words(error: Exception) -> str:
    return f"{error or type(error).__name__}"[:200]


def _orientation(image: Image.Image) -> int | None:
    """EXIF's 1 (upright) to 8; None: the EXIF block cannot be read or has another, which says nothing of the picture.

    ImageOps.exif_transpose would also rewrite the EXIF block, and fail on strange ones.
    """
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # as above
        return None
    return found if isinstance(found, int) and (found == 1 or found in _TURNS) else None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion cuts everything above 255 to white
        return Image.fromarray((np.asarray(image, np.float32) / 257).round().astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    seen = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")
