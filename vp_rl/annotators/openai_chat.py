"""A vision-language model behind an OpenAI-compatible server as annotator, given the guidelines that people get.

One question is a prompt, all its images and one aspect. Temperature 0 is the default: the authors of VisionPrefer
found that a lower temperature gave more accurate ratings (in their sibling work on videos).
"""

import asyncio
import base64
import hashlib
import math
from collections.abc import Sequence
from typing import Annotated, Any

from annotated_types import Interval

from vp_rl.annotators.answers import read_ratings
from vp_rl.annotators.chat import Chat
from vp_rl.annotators.shown import shown, shown_size
from vp_rl.annotators.wording import (
    count_tokens,
    rating_instructions,
    rating_question,
    response_format,
    schema_of,
)
from vp_rl.configuration.kinds import Structured, Text, Whole, one_of
from vp_rl.files import images as image_files
from vp_rl.interfaces import Annotator
from vp_rl.types import Answer, Aspect, Rating, Usage

_TEMPLATE = "1"  # how a request is put together; raised when that changes
_RATING = schema_of(rationale={"type": "string"}, rating={"type": "integer", "enum": [1, 2, 3, 4, 5]})
_SCHEMA = schema_of(ratings={"type": "array", "items": _RATING})
_TOKENS_OF_A_RATING = 90  # three sentences in JSON


class OpenAIChatAnnotator(Annotator):
    """Rates images by asking a chat model that sees.

    Args:
        chat: the model and its server.
        structured: `json_schema`, `json_object` or `none`: how answers are held to their form.
        detail: `high`, `low` or `auto`, for servers that look at images at several sizes.
        longest_side: an image whose longer side has more pixels is made smaller before it is sent; None: never.
            OpenAI's models look at no more than 2048.
        max_image_bytes: and one whose file has more; None: never. Servers take some 5 MB as base64, which is 3.75 MB.
        image_address: None: images are sent along. Else where the server finds them, with `{sha256}` (of the file) and
            `{extension}` (png, jpeg, webp) to be filled in, such as `https://example.org/{sha256}.{extension}`.
        guidelines: a folder with `system.md` and an `ASPECT.md` for each aspect; None: those of this package.
        image_base_tokens: for `estimate`: of an image at low detail (OpenAI: 85 for GPT-4o and 4.1, 2833 for 4o-mini).
        image_tile_tokens: and more for each tile of 512 pixels at high detail (170; 5667).

    Raises:
        ValueError: a setting that makes no sense, or missing guidelines.
    """

    elsewhere = True

    def __init__(
        self,
        chat: Chat,
        *,
        structured: Structured = "json_schema",
        detail: Annotated[str, one_of("low", "high", "auto")] = "high",
        longest_side: Annotated[int, Interval(ge=64, le=2**31 - 1)] | None = 2048,
        max_image_bytes: Annotated[int, Interval(ge=10_000, le=2**31 - 1)] | None = 3_500_000,
        image_address: Text | None = None,
        guidelines: Text | None = None,
        image_base_tokens: Whole = 85,
        image_tile_tokens: Whole = 170,
    ) -> None:
        if detail not in ("high", "low", "auto"):
            raise ValueError(f"detail={detail!r} must be high, low or auto.")
        if longest_side is not None and longest_side < 64:
            raise ValueError(
                f"longest_side={longest_side} leaves nothing to be seen: 64 or more, or null for no limit."
            )
        if max_image_bytes is not None and max_image_bytes < 10_000:
            raise ValueError(f"max_image_bytes={max_image_bytes} holds no image: 10000 or more, or null for no limit.")
        if image_address is not None and "{sha256}" not in image_address:
            raise ValueError(f"image_address={image_address!r} must have {{sha256}} in it, the image's own part.")
        # What is the same for all questions of an aspect comes first: servers cache it and ask less for it.
        self._systems, texts = rating_instructions(guidelines)
        self._system_tokens = {aspect: count_tokens(text) for aspect, text in self._systems.items()}
        self.name, self.concurrency = chat.model, chat.concurrency
        self.version = f"{_TEMPLATE}-{texts}"
        self._chat, self._detail, self._address = chat, detail, image_address
        # Images that stay where the server finds them are not ours to change.
        self._longest, self._bytes = (None, None) if image_address else (longest_side, max_image_bytes)
        self._format = response_format(structured, "ratings", _SCHEMA)
        self._image_tokens = image_base_tokens, image_tile_tokens

    def check(self) -> None:
        """Looks for the key.

        Raises:
            ValueError: it is missing or garbled.
        """
        self._chat.check()

    async def ask(self, prompt: str, images: Sequence[bytes], aspect: Aspect) -> Answer:
        """One request with all the images.

        Raises:
            Unanswered: the server did not answer, or not in time.
            Rejected: it did not take this question.
            ValueError: the server, key, model or an image is not right; says what to do.
        """
        parts = [_text(rating_question(prompt, len(images), aspect))]
        for number, image in enumerate(images, 1):
            sent = await asyncio.to_thread(self._sent, image, number) if self._is_large(image) else image
            parts += [_text(f"Image {number}:"), {"type": "image_url", "image_url": self._shown(sent)}]
        messages = [{"role": "system", "content": self._systems[aspect]}, {"role": "user", "content": parts}]
        return await self._chat.ask(messages, self._format, self.estimate(prompt, images, aspect).input_tokens)

    def read(self, answer: str, images: int) -> list[Rating]:
        """See `read_ratings`."""
        return read_ratings(answer, images)

    def estimate(self, prompt: str, images: Sequence[bytes], aspect: Aspect) -> Usage:
        """Tokens and USD, without asking, by `count_tokens` and `image_tokens`; a rating is taken for 90 tokens."""
        text = self._system_tokens[aspect] + count_tokens(rating_question(prompt, len(images), aspect))
        sizes = [shown_size(image, self._longest) for image in images]
        seen = sum(tokens_of(size, self._detail, *self._image_tokens) + 4 for size in sizes)
        output = min(10 + _TOKENS_OF_A_RATING * len(images), self._chat.max_output_tokens or math.inf)
        return self._chat.price(text + seen, int(output))

    def stop_retrying(self) -> None:
        """See `Chat.stop_retrying`."""
        self._chat.stop_retrying()

    def _is_large(self, image: bytes) -> bool:
        image_type(image)
        return len(image) > (self._bytes or math.inf) or max(image_files.size(image)) > (self._longest or math.inf)

    def _sent(self, image: bytes, number: int) -> bytes:
        try:
            return shown(image, self._longest, self._bytes)
        except ValueError as error:
            raise ValueError(f"Image {number}: {error}") from error

    def _shown(self, image: bytes) -> dict[str, str]:
        extension = image_type(image)
        if self._address is None:
            url = f"data:image/{extension};base64,{base64.b64encode(image).decode()}"
        else:
            url = self._address.replace("{sha256}", hashlib.sha256(image).hexdigest()).replace("{extension}", extension)
        return {"url": url, "detail": self._detail}


def image_type(image: bytes) -> str:
    """`png`, `jpeg` or `webp` by the first bytes of the file.

    Raises:
        ValueError: it is something else.
    """
    if image.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if image.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "webp"
    raise ValueError(f"An image is no PNG, JPEG or WebP file: it begins with {image[:12]!r}.")


def image_tokens(image: bytes, detail: str, base: int, tile: int) -> int:
    """`tokens_of` an image file."""
    return tokens_of(shown_size(image, None), detail, base, tile)


def tokens_of(size: tuple[int, int], detail: str, base: int, tile: int) -> int:
    """OpenAI's rule: fit into 2048 x 2048, scale the short side to 768, pay `base` and `tile` for each 512 x 512 begun.

    An upper bound: users report that small images are not enlarged (512 x 512 would be one tile, and here is four).
    """
    if detail == "low":
        return base
    short, long = sorted(size)
    # Two tiles by as many as 768 * long / short begins; whether it had to be made to fit before changes nothing.
    return base + tile * 2 * math.ceil(1.5 * long / short)


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}
