"""Images on their way to a server: within its limits, looking the same, and files that fit are sent as they are."""

import asyncio
import base64
import io
from pathlib import Path

import numpy as np
import pytest
from chat_server import ChatServer
from chatting import chat, picture, prepare
from PIL import Image, ImageChops

from vp_rl.annotators.openai_chat import OpenAIChatAnnotator
from vp_rl.annotators.shown import shown, shown_size


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(monkeypatch)


def photo(width: int, height: int, kind: str = "jpeg", noise: int = 40) -> bytes:
    """Smooth, with noise that no format compresses away."""
    ramp = Image.linear_gradient("L").resize((width, height))
    noisy = [ImageChops.add(ramp, Image.effect_noise((width, height), noise), 2) for _ in range(3)]
    buffer = io.BytesIO()
    Image.merge("RGB", noisy).save(buffer, kind)
    return buffer.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_a_file_within_the_limits_is_sent_byte_for_byte(kind: str) -> None:
    image = photo(300, 200, kind)
    assert shown(image, 300, len(image)) is image
    assert shown(image, None, None) is image


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
@pytest.mark.parametrize(("side", "most"), [(256, None), (None, 30_000), (256, 20_000), (100, 3_000)])
def test_what_is_sent_keeps_both_limits_and_looks_the_same(kind: str, side: int | None, most: int | None) -> None:
    image = photo(600, 400, kind)
    sent = shown(image, side, most)
    found = opened(sent)
    assert max(found.size) <= (side or 600)
    assert len(sent) <= (most or len(image))
    assert found.width / found.height == pytest.approx(1.5, abs=0.03)
    small = [
        np.asarray(opened(each).convert("RGB").resize((12, 8), Image.Resampling.BOX), float) for each in (sent, image)
    ]
    assert np.abs(small[0] - small[1]).mean() < 6


def test_a_phones_photo_stays_a_jpeg_and_is_no_larger_than_it_was() -> None:
    image = photo(1000, 750, noise=10)  # a quarter of one, with a quarter of the limits
    sent = shown(image, 512, 220_000)
    assert opened(sent).format == "JPEG"
    assert opened(sent).size == shown_size(image, 512) == (512, 384)
    assert len(sent) <= len(image)
    as_png = photo(500, 375, "png", noise=10)  # what a conversion makes of one
    assert len(as_png) > 220_000 > len(shown(as_png, 512, 220_000))
    assert opened(shown(as_png, 512, 220_000)).size == (500, 375)


def test_the_annotator_sends_what_is_within_its_limits_and_estimates_that(tmp_path: Path) -> None:
    images = [photo(600, 401), picture()]
    with ChatServer(tmp_path / "log.jsonl") as server:
        annotator = OpenAIChatAnnotator(chat(server.url), longest_side=128, max_image_bytes=10_000)
        asyncio.run(annotator.ask("a cat", images, "fidelity"))
        asyncio.run(
            OpenAIChatAnnotator(chat(server.url), image_address="https://a.b/{sha256}").ask("a", images, "fidelity")
        )
    small, addresses = (
        [p for p in r["body"]["messages"][1]["content"] if p["type"] == "image_url"] for r in server.requests
    )
    first, second = (base64.b64decode(part["image_url"]["url"].partition(",")[2]) for part in small)
    assert (opened(first).format, opened(first).size, second) == ("JPEG", (128, 86), images[1])
    assert all(part["image_url"]["url"].startswith("https://a.b/") for part in addresses)
    sent, whole = (annotator.estimate("a cat", each, "fidelity") for each in ([first, second], images))
    assert sent == whole


@pytest.mark.parametrize(("setting", "value"), [("longest_side", 0), ("max_image_bytes", 100)])
def test_a_limit_that_leaves_nothing_to_see_is_refused(setting: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{setting}={value}"):
        OpenAIChatAnnotator(chat("http://localhost:1/v1"), **{setting: value})
