"""What the tests of the paid annotator share: four images, a chat on a server of the tests, and one question."""

import asyncio
import io
from typing import Any

import pytest
from chat_server import KEY
from PIL import Image

from vp_rl.annotators.chat import Chat
from vp_rl.annotators.openai_chat import OpenAIChatAnnotator
from vp_rl.types import Answer, Aspect

KEY_NAME = "VP_RL_TEST_KEY"


def prepare(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key, retries that do not wait long, and no proxy between us and loopback."""
    monkeypatch.setenv(KEY_NAME, KEY)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)  # seconds; half a second in earnest
    for name in ("HTTP_PROXY", "ALL_PROXY", "http_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def picture(kind: str = "png", shade: int = 0) -> bytes:
    """A small image file."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (shade, 100, 200)).save(file, kind)
    return file.getvalue()


IMAGES = [picture(shade=40 * number) for number in range(4)]


def chat(url: str, **settings: Any) -> Chat:
    """With the tests' key, and few retries."""
    return Chat("m", **{"base_url": url, "api_key_env": KEY_NAME, "timeout": 20.0, "retries": 2, **settings})


def ask(chat: Chat, prompt: str = "a cat", aspect: Aspect = "aesthetic", **settings: Any) -> Answer:
    """One question in an event loop of its own; `settings` are the annotator's."""
    return asyncio.run(OpenAIChatAnnotator(chat, **settings).ask(prompt, IMAGES, aspect))
