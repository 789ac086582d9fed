"""Image files from outside: what passes, what is converted and to which pixels, what is refused and why."""

import io
import json
import random
import struct
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vp_rl.files import images
from vp_rl.types import GivenImage
from vp_rl.visionprefer.image_folder import ImageFolder
from vp_rl.visionprefer.pictures import check, normalise, read

WIDTH, HEIGHT = 60, 40


def picture(mode: str = "RGB") -> Image.Image:
    """Smooth, so that JPEG and WebP change it little, and unlike itself however it is turned."""
    x, y = np.meshgrid(np.linspace(0, 255, WIDTH), np.linspace(0, 255, HEIGHT))
    return Image.fromarray(np.stack([x, y, (x + y) / 4], -1).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, kind: str, **settings: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **settings)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    """Of a file that any reader must accept as it is: 8-bit RGB, nothing to turn, nothing to warn of."""
    image = Image.open(io.BytesIO(data))
    image.load()
    assert image.mode == "RGB"
    assert image.getexif().get(0x0112, 1) == 1
    assert not image.has_transparency_data
    return np.asarray(image, np.int32)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, body: bytes, depth: int = 8, color: int = 2) -> bytes:
    """A PNG made by hand; `body` is its raw data, a filter byte before each row."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(body, 9)) + chunk(b"IEND", b"")


def rotated(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


# --- what passes


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("with_exif", [False, True])
def test_a_good_file_comes_back_byte_for_byte(kind: str, with_exif: bool) -> None:
    data = encoded(picture(), kind, **({"exif": rotated(1)} if with_exif else {}))
    assert normalise(data) is data
    assert check(data) == (WIDTH, HEIGHT)


def test_normalising_twice_is_normalising_once() -> None:
    once = normalise(encoded(picture("CMYK"), "JPEG"))
    assert normalise(once) is once


# --- what is converted


@pytest.mark.parametrize(
    ("mode", "kind", "tolerance"),
    [
        ("L", "PNG", 0),
        ("1", "PNG", 0),
        ("L", "JPEG", 3),
        ("CMYK", "JPEG", 6),
        ("RGB", "BMP", 0),
        ("P", "GIF", 0),
        ("P", "PNG", 0),
        ("P", "BMP", 0),
    ],
)
def test_other_colours_become_rgb(mode: str, kind: str, tolerance: int) -> None:
    image = picture(mode)
    result = normalise(encoded(image, kind))
    assert result.startswith(b"\x89PNG")
    assert np.abs(pixels(result) - np.asarray(image.convert("RGB"), np.int32)).max() <= tolerance


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparency_is_laid_on_white(kind: str) -> None:
    image = picture("RGBA")
    alpha = np.full((HEIGHT, WIDTH), 255, np.uint8)
    alpha[:, 20:40], alpha[:, 40:] = 128, 0
    image.putalpha(Image.fromarray(alpha))
    shown = pixels(normalise(encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {}))))
    solid = np.asarray(picture(), np.float64)
    assert np.array_equal(shown[:, :20], solid[:, :20])
    assert np.abs(shown[:, 20:40] - (solid[:, 20:40] * 128 + 255 * 127) / 255).max() <= 1  # rounding
    assert (shown[:, 40:] == 255).all()


def test_a_transparent_colour_without_alpha_is_laid_on_white_too() -> None:
    image = Image.new("RGB", (WIDTH, HEIGHT), (10, 20, 30))
    image.paste((200, 0, 0), (0, 0, 20, HEIGHT))
    shown = pixels(normalise(encoded(image, "PNG", transparency=(10, 20, 30))))
    assert shown[0, 0].tolist() == [200, 0, 0]
    assert shown[0, 30].tolist() == [255, 255, 255]
    palette = image.convert("P")
    assert (pixels(normalise(encoded(palette, "PNG", transparency=palette.getpixel((30, 0)))))[0, 30] == 255).all()


def test_sixteen_bits_a_channel_become_eight() -> None:
    """Pillow's own conversion of grey turns everything above 255 to white; RGB it halves, but the file has 16 bits."""
    grey = np.linspace(0, 65535, WIDTH * HEIGHT).astype(np.uint16).reshape(HEIGHT, WIDTH)
    shown = pixels(normalise(encoded(Image.fromarray(grey), "PNG")))
    assert np.abs(shown - grey[..., None] / 257).max() <= 0.5
    rows = b"".join(b"\0" + struct.pack(">3H", 0x1234, 0x8000, 0xFFFF) * WIDTH for _ in range(HEIGHT))
    data = png(WIDTH, HEIGHT, rows, depth=16)
    result = normalise(data)
    assert result != data
    assert pixels(result)[0, 0].tolist() == [0x12, 0x80, 0xFF]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_rotation_is_applied(kind: str, orientation: int) -> None:
    """By the definition in EXIF 2.32, 4.6.4: where the stored picture's first row and first column are shown."""
    turns = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a.swapaxes(0, 1), 2),
        8: np.rot90,
    }
    data = encoded(picture(), kind, exif=rotated(orientation))
    expected = turns[orientation](np.asarray(Image.open(io.BytesIO(data)), np.int32))
    assert np.array_equal(pixels(normalise(data)), expected)
    assert check(data) == (expected.shape[1], expected.shape[0])


@pytest.mark.parametrize("orientation", [0, 9, 5723])
def test_a_rotation_that_there_is_not_is_dropped(orientation: int) -> None:
    data = encoded(picture(), "PNG", exif=rotated(orientation))
    assert np.array_equal(pixels(normalise(data)), np.asarray(picture(), np.int32))
    assert check(data) == (WIDTH, HEIGHT)


def test_a_converted_file_carries_nothing_of_the_old_one() -> None:
    data = encoded(picture("CMYK"), "JPEG", icc_profile=b"a profile for ink", comment=b"secret", exif=rotated(3))
    result = Image.open(io.BytesIO(normalise(data)))
    assert not result.info
    assert b"secret" not in normalise(data)


def test_the_first_of_a_photographs_pictures_counts() -> None:
    data = encoded(picture(), "MPO", save_all=True, append_images=[Image.new("RGB", (WIDTH, HEIGHT))])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert np.abs(pixels(normalise(data)) - np.asarray(picture(), np.int32)).max() < 16


def test_a_whole_picture_with_damaged_metadata_is_written_anew() -> None:
    """Passed as it is, it would make everybody after warn, or fail."""
    data = encoded(picture(), "JPEG", exif=rotated(1))
    start = data.index(b"Exif\0\0") + 6
    damaged = data[: start + 8] + b"\xff\xff" + data[start + 10 :]  # 65535 entries, where there is one
    with pytest.warns(UserWarning, match="Corrupt EXIF"):
        Image.open(io.BytesIO(damaged))
    result = normalise(damaged)
    assert result.startswith(b"\x89PNG")
    assert np.array_equal(pixels(result), pixels(data))


# --- what is refused


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"no image at all", "no image in PNG, JPEG"),
        (b'\xef\xbb\xbf<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"></svg>', "SVG"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "HTML.*failed download"),
        (b"\n <HTML>Sign in</HTML>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (b"%PDF-1.7\n", "PDF"),
        (encoded(picture(), "TIFF"), "TIFF"),
        (b"\0\0\0\x1cftypavif\0\0\0\0", "AVIF"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"),
        (b"\x89PNG\r\n\x1a\n", "cut off or damaged"),
        (encoded(picture(), "GIF", save_all=True, append_images=[Image.new("RGB", (WIDTH, HEIGHT))]), "animated"),
        (encoded(picture(), "WEBP", save_all=True, append_images=[Image.new("RGB", (WIDTH, HEIGHT))]), "animated"),
        (encoded(picture(), "PNG", save_all=True, append_images=[Image.new("RGB", (WIDTH, HEIGHT))]), "animated"),
        (encoded(Image.new("RGB", (15, 40)), "PNG"), "15 x 40 pixels; a side needs 16"),
        (encoded(Image.new("RGB", (16, 321)), "PNG"), "16 x 321 pixels.*20 times as long"),
    ],
)
def test_what_is_no_single_picture_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    for function in (normalise, check):
        with pytest.raises(ValueError, match=reason):
            function(data)


def test_a_long_picture_at_the_limit_passes() -> None:
    data = encoded(Image.new("RGB", (16, 320)), "PNG")
    assert normalise(data) is data


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_a_file_that_was_cut_off_is_refused_or_whole_all_the_same(kind: str) -> None:
    data = encoded(picture(), kind)
    whole = pixels(normalise(data))
    refused = 0
    for length in range(0, len(data) - 1, 1 + len(data) // 200):
        try:
            rest = normalise(data[:length])
        except ValueError:
            refused += 1
        else:
            assert np.array_equal(pixels(rest), whole), length  # what was cut off held no pixels
    assert refused > 100
    with pytest.raises(ValueError, match=f"The ({kind} )?file .*is cut off or damaged"):
        normalise(data[: len(data) * 3 // 4])


@pytest.mark.parametrize("side", [8_000, 12_000, 20_000, 2**31 - 1])
def test_a_decompression_bomb_is_refused_by_its_header(side: int) -> None:
    """There are no pixels behind these headers: decoding any would say that the file is damaged."""
    with pytest.raises(ValueError, match=r"too large|more than 50,000,000"):
        normalise(png(side, side, b""))


def test_a_decompression_bomb_with_all_its_pixels_is_refused_too() -> None:
    bomb = encoded(Image.new("1", (9000, 9000)), "GIF")
    assert len(bomb) < 100_000
    with pytest.raises(ValueError, match="9000 x 9000 pixels, more than 50,000,000"):
        normalise(bomb)


def test_the_limit_of_pixels_is_the_callers() -> None:
    data = encoded(picture(), "PNG")
    assert normalise(data, max_pixels=WIDTH * HEIGHT) is data
    for function in (normalise, check):
        with pytest.raises(ValueError, match="60 x 40 pixels, more than 2,399"):
            function(data, max_pixels=WIDTH * HEIGHT - 1)


def test_text_that_unpacks_to_much_is_refused() -> None:
    image = encoded(picture(), "PNG")
    packed = zlib.compress(bytes(2**26), 9)
    assert len(packed) < 70_000
    with pytest.raises(ValueError, match="damaged"):
        normalise(image[:33] + chunk(b"zTXt", b"note\0\0" + packed) + image[33:])


def test_garbage_raises_nothing_but_value_errors_and_never_warns() -> None:
    """Whole files with a few bytes changed, put in or taken out, mostly in their headers."""
    settings = [("RGB", "PNG"), ("P", "PNG"), ("RGB", "JPEG"), ("CMYK", "JPEG"), ("RGB", "WEBP"), ("P", "GIF")]
    exif = rotated(6)
    exif[0x010E] = "described"
    whole = [encoded(picture(mode), kind, **({} if kind == "GIF" else {"exif": exif})) for mode, kind in settings]
    whole.append(encoded(picture("L"), "BMP"))
    rng, outcomes = random.Random(0), {True: 0, False: 0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3000):
            data = bytearray(rng.choice(whole))
            top = len(data) if rng.random() < 0.3 else 200
            for _ in range(rng.randint(1, 6)):
                place = rng.randrange(min(top, len(data)))
                data[place : place + rng.randint(0, 2)] = rng.randbytes(rng.randint(0, 2))
            try:
                result = normalise(bytes(data))
            except ValueError:
                outcomes[False] += 1
            else:
                pixels(result)
                outcomes[True] += 1
    assert min(outcomes.values()) > 300, outcomes


def test_threads_do_not_leave_each_others_warning_filters_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = images.opened

    def slowly(data: bytes) -> Image.Image:
        time.sleep(0.01)
        return opened(data)

    monkeypatch.setattr(images, "opened", slowly)
    before = list(warnings.filters)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(normalise, [encoded(picture(), "JPEG")] * 12))
    assert warnings.filters == before


# --- files on disk


def test_what_is_wrong_with_a_file_is_said_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "photo.jpg"
    with pytest.raises(FileNotFoundError, match=r"photo\.jpg"):
        read(file)
    file.write_bytes(encoded(picture(), "PNG"))  # the wrong extension
    assert read(file) == file.read_bytes()
    with pytest.raises(ValueError, match=r"photo\.jpg.*60 x 40"):
        read(file, max_pixels=100)
    monkeypatch.setattr(images, "MAX_BYTES", 2**20)
    file.write_bytes(bytes(2**20 + 1))
    with pytest.raises(ValueError, match=r"photo\.jpg' has 1 MiB"):
        read(file)


def folder_with(tmp_path: Path, sidecar: str, text: str | bytes) -> Path:
    (tmp_path / "sub").mkdir(exist_ok=True)
    for name in ("a.png", "b.png", "sub/c.png"):
        (tmp_path / name).write_bytes(encoded(picture(), "PNG"))
    (tmp_path / sidecar).write_bytes(text if isinstance(text, bytes) else text.encode())
    return tmp_path


def image_folder(folder: Path, sidecar: str = "metadata.jsonl") -> ImageFolder:
    return ImageFolder(str(folder), sidecar, validation=0, test=0)


def test_a_folder_has_prompts_and_their_images_in_the_sidecars_order(tmp_path: Path) -> None:
    entries = [
        {"file": "sub/c.png", "prompt": " a cat, asleep ", "generator": "sd-1.5"},
        {"file": "a.png", "prompt": "a line\u2028separator", "size": 3},
        {"file": "b.png", "prompt": "a cat, asleep", "generator": None},
    ]
    lines = "\n\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    source = image_folder(folder_with(tmp_path, "metadata.jsonl", lines))
    assert source.split("train") == ["a cat, asleep"]
    assert source.images("a cat, asleep") == [
        GivenImage(tmp_path / "sub/c.png", "sd-1.5"),
        GivenImage(tmp_path / "b.png", "unknown"),
    ]
    assert list(source.images("a dog")) == []
    assert [(each.prompt, each.reason) for each in source.dropped()] == [("a line\u2028separator", "single image")]
    assert read(source.images("a cat, asleep")[1].file) == encoded(picture(), "PNG")


def test_a_csv_sidecar_reads_as_spreadsheets_write_it(tmp_path: Path) -> None:
    text = '\ufefffile,prompt,generator\r\na.png,"a ""big"", red\nball",sdxl\r\nb.png,"a ""big"", red\nball",\r\n'
    source = image_folder(folder_with(tmp_path, "mine.CSV", text), "mine.CSV")
    assert source.split("train") == ['a "big", red\nball']
    assert [image.generator for image in source.images('a "big", red\nball')] == ["sdxl", "unknown"]


def test_prompts_are_held_out_by_number(tmp_path: Path) -> None:
    names = ["a.png", "b.png", "sub/c.png"]
    lines = "\n".join(json.dumps({"file": name, "prompt": str(number // 2)}) for number, name in enumerate(names))
    folder = folder_with(tmp_path, "metadata.jsonl", lines)
    with pytest.raises(ValueError, match="1 different prompts"):
        ImageFolder(str(folder), validation=0, test=1)


@pytest.mark.parametrize(
    ("sidecar", "text", "error", "said"),
    [
        ("metadata.jsonl", "", ValueError, "names no image"),
        ("m.csv", "", ValueError, "names no image"),
        ("m.txt", "a.png a cat", ValueError, r"\.jsonl, .*\.csv"),
        ("metadata.jsonl", '{"file": "a.png", "prompt": "x"}\n{"file": ', ValueError, "no JSON in line 2"),
        ("metadata.jsonl", '{"file": "a.png", "prompt": ' + "9" * 5000 + "}", ValueError, "no JSON in line 1"),
        ("metadata.jsonl", "[" * 100_000, ValueError, "no JSON in line 1"),
        ("metadata.jsonl", '["a.png"]', ValueError, "line 1 is list; it must be an object"),
        (
            "metadata.jsonl",
            '{"file_name": "a.png", "prompt": "x"}',
            ValueError,
            r"no column 'file'; it has file_name, .*line 1",
        ),
        ("metadata.jsonl", '{"file": "a.png", "prompt": " "}', ValueError, "line 1: no `prompt`"),
        ("metadata.jsonl", '{"file": "a.png", "prompt": 3}', ValueError, "line 1: no `prompt`"),
        (
            "metadata.jsonl",
            '{"file": "a.png", "prompt": "\\ud83d"}',
            ValueError,
            "line 1 has half a surrogate",
        ),
        ("metadata.jsonl", '{"file": "a.png", "prompt": "x", "generator": 5}', ValueError, "line 1: .*generator"),
        ("metadata.jsonl", '{"file": "d.png", "prompt": "x"}', FileNotFoundError, r"line 1: no file 'd\.png'"),
        ("metadata.jsonl", '{"file": "sub", "prompt": "x"}', FileNotFoundError, "line 1: no file 'sub'"),
        ("metadata.jsonl", '{"file": "../x.png", "prompt": "x"}', ValueError, r"line 1: .*'\.\./x\.png' is not in"),
        ("metadata.jsonl", '{"file": "/etc/hostname", "prompt": "x"}', ValueError, "line 1: .*is not in"),
        ("metadata.jsonl", '{"file": "' + "x" * 5000 + '", "prompt": "x"}', FileNotFoundError, "line 1: no file 'xxx"),
        ("metadata.jsonl", '{"file": "a\\u0000", "prompt": "x"}', FileNotFoundError, "line 1: no file"),
        ("m.csv", "file,prompt\na.png\n", ValueError, "row 1: no `prompt`"),
        ("m.csv", "file;prompt\na.png;x\n", ValueError, r"no column 'file', 'prompt'; it has file;prompt"),
        ("m.csv", "file,prompt\na.png,red, round\n", ValueError, "row 1 has more fields.*quote"),
        ("m.csv", 'file,prompt\na.png,"red\n', ValueError, "no well-formed table"),
        ("m.csv", b"file,prompt\na.png,caf\xe9\n", ValueError, "not a UTF-8"),
        ("m.csv", "file,prompt\na.png,x\n./a.png,y\n", ValueError, r"row 2: '\./a\.png' has an entry already"),
    ],
)
def test_a_sidecar_that_cannot_be_followed_is_refused(
    tmp_path: Path, sidecar: str, text: str | bytes, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        image_folder(folder_with(tmp_path, sidecar, text), sidecar)


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "outside.png").write_bytes(encoded(picture(), "PNG"))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "in.png").symlink_to(tmp_path / "outside.png")
    (tmp_path / "images" / "metadata.jsonl").write_text('{"file": "in.png", "prompt": "x"}')
    with pytest.raises(ValueError, match=r"'in\.png' is not in"):
        ImageFolder(str(tmp_path / "images"))


def test_a_folder_without_a_sidecar_says_what_to_write(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"metadata\.jsonl.*`file`, `prompt`"):
        ImageFolder(str(tmp_path))
