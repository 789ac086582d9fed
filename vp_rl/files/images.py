"""Image files as they are meant to be seen: one reader, so that all stages see the same picture.

A picture is 8-bit RGB, upright as its EXIF says, transparency laid on white, sixteen bits a channel scaled to eight;
colour profiles are not applied. What is no single whole picture is refused with a reason.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image
from PIL.Image import Transpose

from vp_rl.files.pretenders import pretender

MAX_PIXELS = 50_000_000  # 150 MB as RGB, several times that while decoding; a phone's camera has 12 to 48 million
MAX_BYTES = 100 * 2**20
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # few, as every decoder is a way in; MPO comes with JPEG

Pixels = UInt8[np.ndarray, "height width 3"]

_PRETENDERS = (
    (b"<svg", "an SVG drawing: export it as PNG"),
    (b"<!doctype html", "an HTML page, often what a failed download leaves"),
    (b"<html", "an HTML page, often what a failed download leaves"),
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


def pixels(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Pixels:
    """The picture in an image file's content.

    Raises:
        ValueError: see `decoded`.
    """
    return np.asarray(rgb(data, max_pixels=max_pixels))


def rgb(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The same as an image of Pillow's, which carries nothing else of the file.

    Raises:
        ValueError: see `decoded`.
    """
    return as_seen(decoded(data, max_pixels), data)


def size(data: bytes) -> tuple[int, int]:
    """Width and height of the picture, by the file's header alone.

    Raises:
        ValueError: see `decoded`; damage behind the header is not found.
    """
    return upright_size(opened(data))


def content(file: Path) -> bytes:
    """Of an image file on disk.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it has more than `MAX_BYTES`.
    """
    if not file.is_file():
        raise FileNotFoundError(f"No image file at '{file}'.")
    length = file.stat().st_size
    if length > MAX_BYTES:
        raise ValueError(f"'{file}' has {length / 2**20:.0f} MiB, and no image file of over {MAX_BYTES >> 20} is read.")
    return file.read_bytes()


def read(file: Path) -> Pixels:
    """The picture in a file on disk; what is wrong with it is said with its name.

    Raises:
        FileNotFoundError, ValueError: see `content` and `decoded`.
    """
    data = content(file)
    try:
        return pixels(data)
    except ValueError as error:
        raise ValueError(f"'{file}': {error}") from error


# --- its steps


def decoded(data: bytes, max_pixels: int, fits: Callable[[int, int], None] = lambda width, height: None) -> Image.Image:
    """The image in memory as the file has it.

    Args:
        data: the file's content; what it is called does not matter.
        max_pixels: width times height by its header; a file of more is refused before anything is decoded.
        fits: refuses a width and height.

    Raises:
        ValueError: it is empty, no image, of another format, cut off or damaged, too large, or animated: an animation
            has no one picture that could be judged, and its first is often blank.
    """
    image = opened(data)
    width, height = image.size
    if width * height > max_pixels:
        raise ValueError(f"The image has {width} x {height} pixels, more than {max_pixels:,}: scale it down.")
    fits(width, height)
    try:
        several = image.format != "MPO" and getattr(image, "is_animated", False)  # formats without frames lack it
        if not several:
            image.load()
    except Exception as error:  # a decoder fed with garbage raises anything, struct.error and IndexError included
        raise ValueError(f"The {image.format} file is cut off or damaged: {_words(error)}") from error
    if several:
        raise ValueError(f"The {image.format} file is animated, or has several pictures: save the one that counts.")
    return image


def opened(data: bytes) -> Image.Image:
    """The image by its header.

    Raises:
        ValueError: see `decoded`.
    """
    if not data:
        raise ValueError("The file is empty (0 bytes).")
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"The image is too large, scale it down: {_words(error)}") from error
    except Exception as error:  # as above
        if data.startswith((b"\x89PNG", b"\xff\xd8", b"RIFF", b"GIF8", b"BM")):
            raise ValueError("The file begins like an image, but is cut off or damaged.") from error
        head = data[:1024].lower()
        if what := pretender(data) or next((what for mark, what in _PRETENDERS if mark in head), None):
            raise ValueError(f"The file is no image that is read here, but {what}.") from error
        raise ValueError(f"The file is no image in {', '.join(FORMATS)} format.") from error


def orientation(image: Image.Image) -> int | None:
    """EXIF's 1 (upright) to 8; None: the EXIF block cannot be read or has another, which says nothing of the picture.

    ImageOps.exif_transpose would also rewrite the EXIF block, and fail on strange ones.
    """
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # as above
        return None
    return found if isinstance(found, int) and (found == 1 or found in _TURNS) else None


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height as they are meant to be seen."""
    return (image.height, image.width) if (orientation(image) or 1) >= 5 else image.size


def depth(data: bytes) -> int:
    """Bits a channel; a PNG's header says how many, and other formats have 8."""
    return data[24] if data.startswith(b"\x89PNG") and data[12:16] == b"IHDR" else 8


def as_seen(image: Image.Image, data: bytes) -> Image.Image:
    """A decoded image as 8-bit RGB, upright, without anything else of the file.

    Raises:
        ValueError: Pillow has not kept what says which of its pixels are transparent.
    """
    found = _colours(image, depth(data))
    turn = _TURNS.get(orientation(image) or 1)
    if turn is not None:
        found = found.transpose(turn)
    found.info.clear()  # or a CMYK profile would be written into an RGB file
    return found


def _colours(image: Image.Image, bits: int) -> Image.Image:
    clear: Any = image.info.get("transparency")
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion cuts everything above 255 to white
        grey = np.asarray(image, np.float32)
        shown = Image.fromarray((grey / 257).round().astype(np.uint8)).convert("RGB")
        return shown if clear is None else _on_white(shown, grey == clear)
    if clear is not None and bits == 16 and image.mode == "RGB":
        raise ValueError(
            "The PNG file has 16 bits a channel and a colour that is transparent, which takes all 16 to find: save it "
            "with an alpha channel, or with 8 bits."
        )
    if clear is not None and bits in (2, 4) and image.mode == "L":  # Pillow has stretched the greys, but not this one
        image = image.copy()
        image.info["transparency"] = clear * 255 // (2**bits - 1)
    if not image.has_transparency_data:
        return image.convert("RGB")
    seen = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")


def _on_white(image: Image.Image, clear: Bool[np.ndarray, "height width"]) -> Image.Image:
    shown = np.array(image)
    shown[clear] = 255
    return Image.fromarray(shown)


def _words(error: Exception) -> str:
    return f"{error or type(error).__name__}"[:200]
