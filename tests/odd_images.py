"""Image files as few programs write them, each with the picture that it is by its format's own definition."""

import io
import struct
import zlib
from collections.abc import Mapping

import numpy as np
from PIL import Image

SIDE = 24
Odd = tuple[bytes, np.ndarray | None]
"""A file, and its 8-bit RGB pixels; None: it is no one whole picture, or not of a kind that is read."""

_RNG = np.random.default_rng(0)
GREY = _RNG.integers(0, 256, (SIDE, SIDE))
DEEP = _RNG.integers(0, 65536, (SIDE, SIDE))
COLOUR = _RNG.integers(0, 256, (SIDE, SIDE, 3))
CLEAR = np.zeros((SIDE, SIDE), bool)
CLEAR[:, SIDE // 2 :] = True


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(values: np.ndarray, depth: int, kind: int, *chunks: bytes, signature: bytes = b"\x89PNG\r\n\x1a\n") -> bytes:
    """Made by hand: rows of values of so many bits each, without a filter; `chunks` stand before them."""
    height, width = values.shape[:2]
    flat = values.reshape(height, -1)
    if depth == 16:
        rows = [row.astype(">u2").tobytes() for row in flat]
    else:
        bits = (flat[..., None] >> np.arange(depth - 1, -1, -1)) & 1
        rows = [np.packbits(row.reshape(-1).astype(np.uint8)).tobytes() for row in bits]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return signature + header + b"".join(chunks) + data + chunk(b"IEND", b"")


def saved(image: Image.Image, kind: str, **settings: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **settings)
    return buffer.getvalue()


def three(grey: np.ndarray) -> np.ndarray:
    return np.repeat(np.rint(grey).astype(np.uint8)[..., None], 3, 2)


def on_white(colours: np.ndarray, clear: np.ndarray = CLEAR) -> np.ndarray:
    return np.where(clear[..., None], 255, colours).astype(np.uint8)


def few(depth: int) -> np.ndarray:
    """Greys of so many bits, the highest of which stands nowhere but in the right half."""
    top = 2**depth - 1
    return np.where(CLEAR, top, GREY % top)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _transparent() -> Mapping[str, Odd]:
    rgba = np.dstack([COLOUR, np.where(CLEAR, 0, 255)]).astype(np.uint8)
    palette = np.stack([np.arange(256), np.arange(256)[::-1], np.arange(256) // 2], 1)
    places = np.where(CLEAR, 9, GREY % 8)
    plte = chunk(b"PLTE", palette[:16].astype(np.uint8).tobytes())
    trns = chunk(b"tRNS", bytes([255] * 9 + [0]))
    deep = np.where(CLEAR, 40_000, np.minimum(DEEP, 39_999))
    found = {
        f"{depth}-bit grey with a transparent one": (
            png(few(depth), depth, 0, chunk(b"tRNS", struct.pack(">H", 2**depth - 1))),
            on_white(three(few(depth) * 255 / (2**depth - 1))),
        )
        for depth in (1, 2, 4, 8)
    }
    return found | {
        "alpha": (saved(Image.fromarray(rgba), "PNG"), on_white(COLOUR)),
        "alpha in WebP": (saved(Image.fromarray(rgba), "WEBP", lossless=True), on_white(COLOUR)),
        "grey with alpha": (
            saved(Image.fromarray(np.dstack([GREY, np.where(CLEAR, 0, 255)]).astype(np.uint8), "LA"), "PNG"),
            on_white(three(GREY)),
        ),
        "a palette with a transparent colour": (png(places, 8, 3, plte, trns), on_white(palette[places])),
        "16-bit grey with a transparent one": (
            png(deep, 16, 0, chunk(b"tRNS", struct.pack(">H", 40_000))),
            on_white(three(deep / 257)),
        ),
        "16-bit colours with a transparent one": (
            png(np.dstack([deep] * 3), 16, 2, chunk(b"tRNS", struct.pack(">3H", *[40_000] * 3))),
            None,
        ),
    }


def _refused() -> Mapping[str, Odd]:
    plain = Image.fromarray(COLOUR.astype(np.uint8))
    whole, other = saved(plain, "PNG"), plain.rotate(90)
    floats = Image.fromarray(GREY.astype(np.float32))
    nothing = png(np.zeros((1, 1), int), 8, 0)
    bomb = chunk(b"IHDR", struct.pack(">IIBBBBB", 99_999, 99_999, 8, 0, 0, 0, 0))[4:]
    return {
        f"an animated {kind}": (saved(plain, kind, save_all=True, append_images=[other]), None)
        for kind in ("GIF", "WEBP", "PNG")
    } | {
        "cut off": (whole[: len(whole) * 2 // 3], None),
        "cut off JPEG": ((data := saved(plain, "JPEG"))[: len(data) * 2 // 3], None),
        "empty": (b"", None),
        "of no width": (nothing.replace(nothing[16:20], bytes(4), 1), None),
        "a bomb": (nothing.replace(nothing[12:33], bomb), None),
        "LAB": (saved(plain.convert("LAB"), "TIFF"), None),
        "floating point": (saved(floats, "TIFF"), None),
        "32 bits": (saved(Image.fromarray(GREY.astype(np.int32)), "TIFF"), None),
        "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", None),
        "text": (b"no image", None),
    }


def _plain() -> Mapping[str, Odd]:
    solid = Image.fromarray(COLOUR.astype(np.uint8))
    cmyk = Image.fromarray(np.dstack([255 - COLOUR, np.zeros_like(GREY)]).astype(np.uint8), "CMYK")
    ink = saved(cmyk, "JPEG", quality=100, subsampling=0)
    return {
        "16-bit grey": (png(DEEP, 16, 0), three(DEEP / 257)),
        "16-bit colours": (png(np.dstack([DEEP] * 3), 16, 2), three(DEEP // 256)),
        **{f"{d}-bit grey": (png(GREY % 2**d, d, 0), three(GREY % 2**d * 255 / (2**d - 1))) for d in (1, 2, 4, 8)},
        "CMYK": (ink, np.asarray(Image.open(io.BytesIO(ink)).convert("RGB"))),
        "BMP": (saved(solid, "BMP"), COLOUR.astype(np.uint8)),
        "turned by EXIF": (
            saved(solid, "PNG", exif=turned(6)),
            np.rot90(COLOUR, -1).astype(np.uint8),
        ),
        "mirrored by EXIF": (saved(solid, "WEBP", lossless=True, exif=turned(2)), COLOUR[:, ::-1].astype(np.uint8)),
    }


ODD: dict[str, Odd] = {**_plain(), **_transparent(), **_refused()}
