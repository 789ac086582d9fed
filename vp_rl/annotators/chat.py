"""One conversation turn with a chat model, through the official `openai` client: hosted, vLLM, Ollama and the like.

The client's own retries serve what passes (429, 5xx, timeouts, broken connections); `Gate` keeps it from overrunning
the server. What is left is sorted here: an `Answer`, `Unanswered`, or a ValueError that says what to change.
"""

import asyncio
import hashlib
import json
import logging
import re
from collections import OrderedDict
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import httpx2
from openai import APIError, APIStatusError, AsyncOpenAI

from vp_rl.annotators.answers import storable
from vp_rl.annotators.complaints import Server, complaint, missing_key, sort_out, unreachable
from vp_rl.annotators.gate import Gate
from vp_rl.configuration.kinds import Amount, Count, Seconds, Text, Url, Whole
from vp_rl.interfaces import Unanswered
from vp_rl.secrets import mask, read, refuse_literal, register_address
from vp_rl.types import Answer, Usage

Message = dict[str, Any]
"""As the protocol has it: `role` and `content`."""

_CONNECT_SECONDS = 10.0
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
        self._clients: dict[asyncio.AbstractEventLoop, tuple[AsyncOpenAI, AsyncGenerator[None, None]]] = {}
        self._answered: OrderedDict[str, int] = OrderedDict()

    async def ask(self, messages: Sequence[Message], response_format: Mapping[str, Any] | None = None) -> Answer:
        """What the model answers, as it came; cut off at `max_output_tokens` it is still an answer.

        Raises:
            Unanswered: all attempts failed, in a way that passes.
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
        answer = await self._post(body, headers)
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

    async def _post(self, body: bytes, headers: dict[str, str]) -> Answer:
        client = await self._client()
        try:
            # Not `chat.completions.create`: that converts and validates request and response piece by piece, which
            # costs as much as all the rest. This is the same request, with the same retries.
            response = await client.post(
                "/chat/completions", cast_to=httpx2.Response, content=body, options={"headers": headers}
            )
        except APIError as error:
            found = self._explain(error)
        else:
            found = self._read(response)
        # Raised out here, where the client's error is forgotten: it holds the request, whose headers hold the key.
        if isinstance(found, Exception):
            raise found
        return found

    def _explain(self, error: APIError) -> Answer | Unanswered | ValueError:
        if isinstance(error, APIStatusError):
            code, text = complaint(error.body)
            server = Server(self._base_url, self.model, self._key_name)
            return sort_out(error.status_code, mask(code), mask(text), server)
        cause = error.__cause__ or error
        return Unanswered(
            f"no answer from {self._base_url} in {self._retries + 1} attempts of up to {self._timeout:g} s; "
            f"the last one: {type(cause).__name__}"
        )

    def _read(self, response: httpx2.Response) -> Answer | Unanswered | ValueError:
        try:
            completion = response.json()
            choice = completion["choices"][0]
            text, refusal = choice["message"].get("content") or "", choice["message"].get("refusal") or ""
            used = completion.get("usage") or {}
            usage = self.price(int(used.get("prompt_tokens") or 0), int(used.get("completion_tokens") or 0))
        except (ValueError, LookupError, TypeError, AttributeError):
            text = mask(response.text)
            if "html" in response.headers.get("content-type", ""):
                return sort_out(404, "", text, Server(self._base_url, self.model, self._key_name))
            return Unanswered(f"what {self._base_url} sent is no chat completion: {text[:300]!r}")
        if refusal or choice.get("finish_reason") == "content_filter":
            return Answer(mask(storable(str(refusal or text or "content_filter"))), usage, refused=True)
        return Answer(mask(storable(str(text))), usage)

    async def _client(self) -> AsyncOpenAI:
        """The running event loop's own: connections do not work in another one."""
        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            _quieten()
            key = self._key()
            http_client = _GatedClient(Gate(self.concurrency), self._base_url, self._timeout, self.concurrency)
            client = AsyncOpenAI(
                api_key=key,
                base_url=self._base_url,
                max_retries=self._retries,
                timeout=http_client.timeout,
                http_client=http_client,
            )
            closing = self._close_with(loop, client)
            self._clients[loop] = client, closing
            await anext(closing)
        return self._clients[loop][0]

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


def _quieten() -> None:
    """The client's libraries log every request at INFO: not unless somebody has set their levels."""
    for name in ("httpx2", "openai"):
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.WARNING)


class _GatedClient(httpx2.AsyncClient):
    """Every attempt, the client's own retries included, passes the gate and has its own deadline."""

    def __init__(self, gate: Gate, base_url: str, timeout: float, concurrency: int) -> None:
        super().__init__(
            # The deadline below covers the whole attempt; timeouts of single reads would not end a server that
            # trickles, and cost time on each.
            timeout=httpx2.Timeout(None, connect=min(timeout, _CONNECT_SECONDS)),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=concurrency),
            follow_redirects=False,  # it is a wrong address, and may lead elsewhere
        )
        self._gate, self._url, self._seconds = gate, base_url, timeout
        self._reached = False

    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        """Sends it when its turn has come.

        Raises:
            ValueError: nobody was ever at that address.
        """
        async with self._gate.slot() as slot:
            try:
                async with asyncio.timeout(self._seconds):
                    response = await super().send(request, **options)
            except TimeoutError:
                raise httpx2.ReadTimeout(f"no answer within {self._seconds} s", request=request) from None
            except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
                if self._reached:
                    raise
                problem = unreachable(self._url, f"{type(error).__name__}: {error}")
            else:
                self._reached = True
                slot.hear(response.status_code, response.headers)
                if response.status_code == 429 and b"insufficient_quota" in response.content:
                    response.headers["x-should-retry"] = "false"  # the client knows it; waiting would be in vain
                return response
        raise problem  # out here, where the error is forgotten that holds the request and so the key
