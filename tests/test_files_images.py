"""One reader of images: odd files are the same picture to every stage, or refused by every stage with a reason."""

import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from odd_images import ODD
from PIL import Image, ImageOps

from vp_rl.annotators import nsfw, transformers_vlm
from vp_rl.annotators.scene import SceneAnnotator
from vp_rl.data import human, preferences
from vp_rl.evaluation import distances, scoring
from vp_rl.evaluation.store import unpack_image
from vp_rl.files import images
from vp_rl.types import GivenImage
from vp_rl.visionprefer.generate import ImageStore
from vp_rl.visionprefer.given import take_over

FOLDER = "VP_RL_ODD_IMAGES"


def by_reference(data: bytes, place: Path) -> np.ndarray:
    (place / "reference").mkdir()
    (place / "reference" / "a.png").write_bytes(data)
    [pixels] = distances.images_in(place / "reference")
    return pixels


def by_build(data: bytes, place: Path) -> np.ndarray:
    (place / "a.jpg").write_bytes(data)
    store = ImageStore(place / "store")
    for _, reason in take_over({"1-a": GivenImage(place / "a.jpg", "unknown")}, store):
        raise ValueError(reason)
    with Image.open(io.BytesIO(store.read("1-a"))) as written:
        assert written.mode == "RGB"
        return np.asarray(written)


def by_scoring(data: bytes, place: Path) -> np.ndarray:
    pixels = scoring.decode(data)
    if isinstance(pixels, str):
        raise ValueError(pixels)
    return pixels


def by_judge(data: bytes, place: Path) -> np.ndarray:
    """The judge shows no picture; what it sees is its key to what it has said."""
    judge = SceneAnnotator()
    judge._rate("a small red circle", data, "fidelity")
    [(_, seen)] = judge._verdicts
    side = int((len(seen) / 3) ** 0.5)
    with Image.fromarray(images.pixels(data)) as expected:
        resized = np.asarray(expected.resize((side, side), Image.Resampling.BICUBIC))
    return images.pixels(data) if seen == resized.tobytes() else np.frombuffer(seen, np.uint8)


DOORS: dict[str, Callable[[bytes, Path], np.ndarray]] = {
    "itself": lambda data, _: images.pixels(data),
    "a build": by_build,
    "a reference for FID": by_reference,
    "rewards against people": by_scoring,
    "training on people's sets": lambda data, _: human.scaled(data, min(images.size(data))),
    "training on VisionPrefer": lambda data, _: preferences.decode([data])[0],
    "the scene judge": by_judge,
    "the nsfw classifier": lambda data, _: np.asarray(nsfw._opened(data, 1)),
    "a local vision-language model": lambda data, _: np.asarray(transformers_vlm._pictures([data], 10**8)[0]),
    "kept evaluations": lambda data, _: unpack_image(data),
}


@pytest.mark.parametrize("door", DOORS)
def test_every_door_sees_the_same_picture_or_gives_a_reason(door: str, tmp_path: Path) -> None:
    for number, (name, (data, expected)) in enumerate(ODD.items()):
        place = tmp_path / str(number)
        place.mkdir()
        if expected is None:
            with pytest.raises(ValueError, match=r"\w{3} .*\w{3}"):
                DOORS[door](data, place)
        else:
            np.testing.assert_array_equal(DOORS[door](data, place), expected, err_msg=name)


@pytest.mark.parametrize("name", [name for name, (_, expected) in ODD.items() if expected is not None])
def test_the_header_alone_says_how_large_a_picture_is_seen(name: str) -> None:
    data, expected = ODD[name]
    assert expected is not None
    assert images.size(data) == expected.shape[1::-1]


def test_files_without_limits_are_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_BYTES", 2**20)
    (tmp_path / "a.png").write_bytes(bytes(2**20 + 1))
    for door in (images.read, lambda file: next(distances.images_in(file.parent))):
        with pytest.raises(ValueError, match=r"a\.png' has 1 MiB, and no image file of over 1 is read"):
            door(tmp_path / "a.png")


def as_pillow_shows_it(data: bytes) -> np.ndarray | None:
    """On white, upright, in floats; None: Pillow cannot read it either."""
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        image.load()
        image = ImageOps.exif_transpose(image)
    except Exception:  # a decoder fed with garbage raises anything
        return None
    if image.mode.startswith("I"):
        grey = np.asarray(image, float)
        grey[grey == image.info.get("transparency", -1)] = 65535
        return np.repeat(grey[..., None] / 257, 3, 2)
    if image.has_transparency_data:
        seen = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
    return np.asarray(image.convert("RGB"), float)


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get(FOLDER),
    reason=f"${FOLDER} names no folder of odd images, such as Tests/images of Pillow's source",
)
def test_a_folder_of_odd_images_is_seen_as_pillow_shows_it_or_refused(tmp_path: Path) -> None:
    """By every door. Pillow's own way with 16-bit grey, all of which it takes for white, is not asked for."""
    seen = refused = 0
    files = sorted(file for file in Path(os.environ[FOLDER]).rglob("*") if file.is_file())
    for number, (file, (door, read)) in enumerate((file, item) for file in files for item in DOORS.items()):
        data, place = file.read_bytes(), tmp_path / str(number)
        place.mkdir()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pixels = read(data, place)
                expected = as_pillow_shows_it(data)
        except ValueError:
            refused += 1
            continue
        assert expected is not None, (file, door)
        if door == "training on people's sets":
            short = min(expected.shape[:2])
            top, left = (round((side - short) / 2) for side in expected.shape[:2])
            expected = expected[top : top + short, left : left + short]
        assert pixels.shape == expected.shape, (file, door)
        assert np.abs(pixels - expected).max() <= 0.5, (file, door)
        seen += 1
    print(f"{len(files)} files by {len(DOORS)} doors: {seen} seen as Pillow shows them, {refused} refused")
    assert seen > refused / 10
