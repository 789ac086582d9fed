"""One conversation turn with a chat model, through the official `openai` client: hosted, vLLM, Ollama and the like.

The client's own retries serve what passes (429, 5xx, timeouts, broken connections); `Gate` keeps it from overrunning
the server. What is left is sorted here: an `Answer`, `Unanswered`, or a ValueError that says what to change.
"""

import asyncio
import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import httpx2
from openai import APIError, APIStatusError, AsyncOpenAI

from vp_rl.annotators.complaints import Server, complaint, missing_key, sort_out
from vp_rl.annotators.completion import completion, read_body
from vp_rl.annotators.connection import GatedClient, quieten
from vp_rl.annotators.wording import count_tokens
from vp_rl.configuration.kinds import Amount, Count, Seconds, Text, Url, Whole
from vp_rl.interfaces import Unanswered
from vp_rl.secrets import mask, read, refuse_literal, register_address
from vp_rl.text import storable
from vp_rl.types import Answer, Usage

Message = dict[str, Any]
"""As the protocol has it: `role` and `content`."""

_REMEMBERED = 4096  # answered questions; whoever asks one again does so at once


class Chat:
    """Asks a chat model. The key is read from the environment when it is needed, and kept nowhere here.

    Args:
        model: as the server calls it.
        base_url: of an OpenAI-compatible API, mostly ending in `/v1`.
        api_key_env: the *name* of the environment variable that holds the key; None: the server wants none.
        concurrency: how many requests may be in flight; fewer are, for a while, when the server says 429.
        timeout: seconds until an attempt is given up.
        retries: further attempts after 429, 5xx, a timeout or a broken connection.
        temperature: 0 or more; None: the model's own (reasoning models refuse another).
        max_output_tokens: an answer is cut off there; None: the model's own limit.
        seed: for servers that know one; None: not sent.
        usd_per_million_input: price of a million input tokens in USD; 0: unknown, and costs are reported as 0.
        usd_per_million_output: likewise.
        extra_body: further fields of the request, such as `reasoning_effort` or vLLM's `guided_decoding_backend`.

    Raises:
        ValueError: a setting that makes no sense.
    """

    def __init__(
        self,
        model: Text,
        *,
        base_url: Url = "https://api.openai.com/v1",
        api_key_env: Text | None = "OPENAI_API_KEY",
        concurrency: Count = 16,
        timeout: Seconds = 120.0,
        retries: Whole = 6,
        temperature: Amount | None = 0.0,
        max_output_tokens: Count | None = 1024,
        seed: int | None = None,
        usd_per_million_input: Amount = 0.0,
        usd_per_million_output: Amount = 0.0,
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        _at_least(1, concurrency=concurrency, max_output_tokens=max_output_tokens)
        _at_least(0, retries=retries, temperature=temperature, timeout=timeout)
        _at_least(0, usd_per_million_input=usd_per_million_input, usd_per_million_output=usd_per_million_output)
        if not re.fullmatch(r"https?://[^\s@?#]+", base_url):
            register_address(base_url)
            raise ValueError(
                f"chat.base_url={mask(base_url)!r} must be an http(s) address like "
                f"http://localhost:8000/v1, without a key or password in it (chat.api_key_env is for that)."
            )
        refuse_literal("chat.api_key_env", api_key_env)
        self.model, self.concurrency, self.max_output_tokens = model, concurrency, max_output_tokens
        self._base_url, self._key_name = base_url, api_key_env
        self._timeout, self._retries = timeout, retries
        self._prices = usd_per_million_input / 1e6, usd_per_million_output / 1e6
        settings = {"temperature": temperature, "max_completion_tokens": max_output_tokens, "seed": seed}
        sent = {name: value for name, value in settings.items() if value is not None}
        self._fixed = {"model": model, **sent, **(extra_body or {})}
        self._clients: dict[asyncio.AbstractEventLoop, tuple[AsyncOpenAI, GatedClient, AsyncGenerator[None, None]]] = {}
        self._answered: OrderedDict[str, int] = OrderedDict()

    async def ask(
        self, messages: Sequence[Message], response_format: Mapping[str, Any] | None = None, input_tokens: int = 0
    ) -> Answer:
        """What the model answers, as it came; cut off at `max_output_tokens` it is still an answer.

        Args:
            messages: the conversation.
            response_format: as the protocol has it.
            input_tokens: about how many that are: they count where the server does not tell.

        Raises:
            Unanswered: all attempts failed, in a way that passes.
            Rejected: the server did not take this question; whether it takes others is not known.
            ValueError: no question will be answered: says why, and what to change.
        """
        request = {**self._fixed, "messages": messages}
        if response_format is not None:
            request["response_format"] = response_format
        body = json.dumps(request, separators=(",", ":")).encode()
        digest = hashlib.sha256(body).hexdigest()
        times = self._answered.get(digest, 0)
        # The same request has the same key until it is answered: a server that knows the header then answers once,
        # whatever happens on the way. Asked again after that, another answer is wanted.
        headers = {"Idempotency-Key": digest if times == 0 else f"{digest}-{times}"}
        answer = await self._post(body, headers, input_tokens)
        self._answered[digest] = times + 1
        self._answered.move_to_end(digest)
        if len(self._answered) > _REMEMBERED:
            self._answered.popitem(last=False)
        return answer

    def check(self) -> None:
        """Looks for the key.

        Raises:
            ValueError: it is missing or garbled.
        """
        self._key()

    def price(self, input_tokens: int, output_tokens: int) -> Usage:
        """Those tokens with their cost."""
        usd = input_tokens * self._prices[0] + output_tokens * self._prices[1]
        return Usage(input_tokens, output_tokens, usd)

    def stop_retrying(self) -> None:
        """Who waits for another attempt is `Unanswered` now; attempts that are under way go on."""
        for _, gated, _ in self._clients.values():
            gated.stop()

    async def _post(self, body: bytes, headers: dict[str, str], input_tokens: int) -> Answer:
        client, gated = await self._client()
        # Not `chat.completions.create`: that converts and validates request and response piece by piece, which costs as
        # much as all the rest. This is the same request, with the same retries.
        posting = client.post("/chat/completions", cast_to=httpx2.Response, content=body, options={"headers": headers})
        try:
            response = await gated.until_stopped(posting)
        except APIError as error:
            found = self._explain(error)
        else:
            found = self._read(response, input_tokens)
        # Raised out here, where the client's error is forgotten: it holds the request, whose headers hold the key.
        if isinstance(found, Exception):
            raise found
        return found

    def _explain(self, error: APIError) -> Answer | Unanswered | ValueError:
        if isinstance(error, APIStatusError):
            code, text = complaint(error.body)
            code, text = storable(mask(code)), storable(mask(text))
            return sort_out(error.status_code, code, text, self._server())
        cause = error.__cause__ or error
        return Unanswered(
            f"no answer from {self._base_url} in {self._retries + 1} attempts of up to {self._timeout:g} s; "
            f"the last one: {type(cause).__name__}"
        )

    def _read(self, response: httpx2.Response, input_tokens: int) -> Answer | Unanswered | ValueError:
        try:
            found = completion(read_body(response.content, response.text))
        except ValueError as error:
            text = storable(mask(response.text[:2000]))
            if "html" in response.headers.get("content-type", ""):
                return sort_out(404, "", text, self._server())
            return Unanswered(f"what {self._base_url} sent is no chat completion ({error}): {text[:300]!r}")
        text, thought = mask(found.text), mask(found.thought)
        told = found.output_tokens
        if told is None:  # not told, so counted; what was thought in silence cannot be
            told = self.max_output_tokens if found.cut else None
            told = told or count_tokens(text + thought + found.refusal)
        usage = self.price(found.input_tokens or input_tokens, told)
        if found.refusal:
            return Answer(storable(mask(found.refusal)), usage, refused=True)
        if not text and thought and not found.cut:
            text = f"<think>{thought}</think>"  # some servers take all of an answer for thought
        return Answer(storable(text), usage, hint=self._why_unreadable(found.cut, bool(text or thought)))

    def _why_unreadable(self, cut: bool, any_text: bool) -> str:
        """Where it is."""
        if cut:
            most = self.max_output_tokens or "the server's limit"
            return (
                f"cut off at max_output_tokens={most}, which also counts what a model thinks: raise "
                "annotator.chat.max_output_tokens (of prompts: polish.chat.max_output_tokens), or have it think less "
                "(chat.extra_body={reasoning_effort: low})"
            )
        return "" if any_text else "it is empty: try another chat.model, or structured=none"

    def _server(self) -> Server:
        return Server(self._base_url, self.model, self._key_name)

    async def _client(self) -> tuple[AsyncOpenAI, GatedClient]:
        """The running event loop's own: connections do not work in another one."""
        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            quieten()
            key = self._key()
            http_client = GatedClient(self._base_url, self._timeout, self.concurrency)
            client = AsyncOpenAI(
                api_key=key,
                base_url=self._base_url,
                max_retries=self._retries,
                timeout=http_client.timeout,
                http_client=http_client,
            )
            closing = self._close_with(loop, client)
            self._clients[loop] = client, http_client, closing
            await anext(closing)
        return self._clients[loop][:2]

    async def _close_with(self, loop: asyncio.AbstractEventLoop, client: AsyncOpenAI) -> AsyncGenerator[None, None]:
        """Stands at its `yield` until `asyncio.run` ends, which closes all asynchronous generators of its loop.

        So nobody has to close anything, and no connection is left open.
        """
        try:
            yield
        finally:
            del self._clients[loop]
            await client.close()

    def _key(self) -> str:
        if self._key_name is None:
            return "none"  # the client insists on one
        key = read(self._key_name)
        if not key:
            raise missing_key(self._key_name)
        return key


def _at_least(least: float, **settings: float | None) -> None:
    for name, value in settings.items():
        if value is not None and not value >= least:
            raise ValueError(f"chat.{name}={value} must be {least} or more.")
