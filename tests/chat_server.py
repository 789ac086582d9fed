"""A chat-completions server on loopback for tests and benchmarks: deterministic answers, faults on demand.

    python tests/chat_server.py --log requests.jsonl --faults hostile --latency 0.2

prints its address as the first line and serves until it is stopped, or for `--seconds`. In tests:

    with ChatServer(tmp_path / "log.jsonl", script=["429", "ok"]) as server: ... server.url ... server.requests

The log is one JSON object a line, written in one piece before a request is answered, so neither side can lose it.
"""

import argparse
import asyncio
import base64
import json
import os
import random
import re
import socket
import struct
import sys
import threading
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from aiohttp import web

KEY = "sk-test-7f3a9c"
HOSTILE = {"429": 0.10, "500": 0.05, "hang": 0.05, "malformed": 0.05, "wrong": 0.03, "refusal": 0.02, "reset": 0.01}
UNREADABLE = ("malformed", "truncated", "out_of_range", "wrong_number", "excuse")
"""Outcomes whose answer comes and is paid for, but cannot be read."""
_ERRORS: dict[str, tuple[int, Any]] = {  # as the servers in the comments word them
    "401": (401, {"error": {"message": f"Incorrect API key provided: {KEY}.", "code": "invalid_api_key"}}),  # OpenAI
    "403": (403, {"error": {"message": "Country, region, or territory not supported", "code": "unsupported"}}),
    "403_flagged": (403, {"error": {"message": "Your input was flagged by moderation", "code": 403}}),  # OpenRouter
    "404_model": (404, {"object": "error", "message": "The model `m` does not exist.", "code": 404}),  # vLLM
    "404_pull": (404, {"error": {"message": 'model "m" not found, try pulling it first'}}),  # Ollama
    "404_code": (404, {"error": {"message": "Nothing here", "code": "model_not_found"}}),
    "404_azure": (404, {"error": {"message": "The API deployment for this resource does not exist.", "code": "x"}}),
    "404_endpoints": (404, {"error": {"message": "No endpoints found for m.", "code": 404}}),  # OpenRouter
    "400_model": (400, {"error": {"message": "m is not a valid model ID", "code": 400}}),  # OpenRouter
    "404_route": (404, {"detail": "Not Found"}),  # FastAPI
    "400_image": (
        400,
        {"error": {"message": "image_url is only supported by certain models.", "code": None}},
    ),  # OpenAI
    "400_filter": (400, {"error": {"message": "The response was filtered", "code": "content_filter"}}),  # Azure
    "400_schema": (400, {"error": {"message": "response_format json_schema is unsupported"}}),
    "400_temperature": (400, {"error": {"message": "'temperature' does not support 0 with this model"}}),  # OpenAI
    "402": (402, {"error": {"message": "Insufficient credits", "code": 402}}),  # OpenRouter
    "quota": (429, {"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}),  # OpenAI
    "429": (429, {"error": {"message": "Rate limit reached", "code": "rate_limit_exceeded"}}),
    "500": (500, {"error": {"message": "The server had an error"}}),
    "503": (503, {"error": {"message": "Overloaded"}}),
    "error_200": (200, {"error": {"message": "Upstream failed", "code": 502}}),  # OpenRouter
    "429_in_200": (200, {"error": {"message": "Upstream is busy", "metadata": {"raw": "rate-limited upstream"}}}),
    "error_in_choice": (200, {"choices": [{"error": {"code": 502, "message": "Upstream failed"}, "message": {}}]}),
}


def rating_of(prompt: str, image: bytes, aspect: str) -> int:
    """The server's taste: 1 to 5 by the image's file (or its address), prompt and aspect."""
    return 1 + zlib.crc32(f"{aspect}|{prompt}|".encode("utf-8", "replace") + image) % 5


def polished(prompt: str) -> str:
    """The server's polish: parts between commas that are for a platform rather than for the eye are left out."""
    noise = re.compile(r"\b(trending on|artstation|4k|8k|masterpiece|highly detailed|by greg)\b", re.IGNORECASE)
    return ", ".join(part.strip() for part in prompt.split(",") if not noise.search(part)) or prompt


class ChatServer:
    """Serves until left, from a thread with an event loop of its own.

    Args:
        log: where requests are noted, a JSON object a line.
        faults: probability of each outcome; the rest is answered well. See `HOSTILE`.
        script: outcomes of the first requests, before `faults` are drawn.
        seed: of the faults: request number n meets the same one whenever it comes.
        latency: seconds before an answer (not before an error).
        retry_after: seconds, in the header of a 429 and 503; None: no header.
        hang: seconds until a hanging request is dropped.
        at_most: requests; all later ones get 503, so that a client gone wild ends.
        concurrent: how many it works on at once; others get 429.
        usage: what it says of tokens, if not the truth.
    """

    def __init__(
        self,
        log: Path,
        *,
        faults: Mapping[str, float] | None = None,
        script: Sequence[str] = (),
        seed: int = 0,
        latency: float = 0.0,
        retry_after: float | None = 0.05,
        hang: float = 30.0,
        at_most: int = 1_000_000,
        concurrent: int = 1_000_000,
        port: int = 0,
        **usage: Any,
    ) -> None:
        self.faults, self.script, self.seed = dict(faults or {}), list(script), seed
        self.latency, self.retry_after, self.hang = latency, retry_after, hang
        self.at_most, self.concurrent, self.usage = at_most, concurrent, usage
        self.requests: list[dict[str, Any]] = []
        """What was logged, and under `body` and `headers` what was sent; only while there are fewer than 1000."""
        self.number = self.in_flight = 0
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._socket = socket.create_server(("127.0.0.1", port), backlog=1024)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/v1"

    async def serve(self, stop: asyncio.Event) -> None:
        """Until `stop` is set."""
        app = web.Application(client_max_size=2**28)
        app.router.add_post("/v1/chat/completions", self._handle)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        try:
            await web.SockSite(runner, self._socket, backlog=1024).start()
            await stop.wait()
        finally:
            await runner.cleanup()

    def __enter__(self) -> Self:
        """Starts the thread."""
        ready = threading.Event()

        async def main() -> None:
            self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
            ready.set()
            await self.serve(self._stop)

        self._thread = threading.Thread(target=asyncio.run, args=(main(),), daemon=True)
        self._thread.start()
        assert ready.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops it; open connections are closed."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        self.close()

    def close(self) -> None:
        """Of a server that was never entered, or is done."""
        self._socket.close()
        os.close(self._log)

    def outcomes(self) -> list[str]:
        """What became of each request, in their order."""
        return [request["outcome"] for request in self.requests]

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        number, self.number = self.number, self.number + 1
        rng = random.Random(f"{self.seed}|{number}")  # of the wrong answers
        self.in_flight += 1
        try:
            try:
                body = await request.json()
            except ConnectionError:  # the client gave up while it was sending
                return web.Response()
            question = _question(body)
            outcome = self._outcome(number, request, question["kind"])
            entry = {
                "time": time.time(),
                "number": number,
                "key": request.headers.get("Idempotency-Key"),
                "kind": question["kind"],
                "outcome": outcome,
                "prompt": question["prompt"],
                "aspect": question["aspect"],
                "retry": int(request.headers.get("x-stainless-retry-count", 0)),
                "in_flight": self.in_flight,
            }
            if outcome not in _ERRORS and outcome not in ("hang", "reset"):
                await asyncio.sleep(self.latency)
            os.write(self._log, json.dumps(entry).encode() + b"\n")  # in one piece: O_APPEND
            if len(self.requests) < 1000:
                self.requests.append({**entry, "body": body, "headers": dict(request.headers)})
            return await self._answer(request, outcome, question, rng)
        finally:
            self.in_flight -= 1

    def fault(self, number: int, kind: str) -> str:
        """What request `number` meets: always the same, for one seed."""
        rng = random.Random(f"{self.seed}|{number}|fault")
        shares = [*self.faults.values(), 1 - sum(self.faults.values())]
        outcome = rng.choices([*self.faults, "ok"], shares)[0]
        if outcome == "malformed":
            return rng.choice(["malformed", "truncated"])
        if outcome == "wrong":
            return rng.choice(["out_of_range", "wrong_number"]) if kind == "annotate" else "excuse"
        return outcome

    def _outcome(self, number: int, request: web.Request, kind: str) -> str:
        if number >= self.at_most:
            return "503"
        if request.headers.get("Authorization") != f"Bearer {KEY}":
            return "401"
        if number < len(self.script):
            return self.script[number]
        return "429" if self.in_flight > self.concurrent else self.fault(number, kind)

    async def _answer(
        self, request: web.Request, outcome: str, question: dict[str, Any], rng: random.Random
    ) -> web.StreamResponse:
        if outcome in _ERRORS:
            status, error = _ERRORS[outcome]
            waits = outcome in ("429", "503") and self.retry_after is not None
            headers = {"Retry-After": f"{self.retry_after:g}"} if waits else {}
            return web.json_response(error, status=status, headers=headers)
        if outcome == "reset":
            assert request.transport is not None
            sock = request.transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # RST instead of FIN
            request.transport.abort()
            return web.Response()
        if outcome == "hang":
            await asyncio.sleep(self.hang)
            return web.Response(status=504)
        if outcome == "trickle":  # a byte a while, as proxies do to keep a connection open
            return await self._trickle(request)
        if outcome == "html":
            return web.Response(text="<html>Welcome</html>", content_type="text/html")
        if outcome == "redirect":
            return web.Response(status=302, headers={"Location": "http://127.0.0.1:9/elsewhere"})
        return web.json_response({**_completion(outcome, question, rng), **self.usage})

    async def _trickle(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        for _ in range(round(self.hang / 0.02)):
            try:
                await response.write(b" ")
            except ConnectionError:
                break
            await asyncio.sleep(0.02)
        return response


def _question(body: dict[str, Any]) -> dict[str, Any]:
    """What is asked: `kind`, `prompt`, `aspect` and the images, as bytes or addresses."""
    content = body["messages"][-1]["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    text = "\n".join(part["text"] for part in parts if part["type"] == "text")
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    prompt = re.search(r"^<prompt>\n(.*)\n</prompt>$", text, re.MULTILINE)
    aspect = re.search(r"^Aspect: (\w+)$", text, re.MULTILINE)
    return {
        "kind": "annotate" if urls else "polish",
        "prompt": json.loads(prompt[1]) if prompt else "",
        "aspect": aspect[1] if aspect else "",
        "images": [_image(url) for url in urls],
    }


def _image(url: str) -> bytes:
    """The file in a data URL; an address stands for itself."""
    return base64.b64decode(url.partition(",")[2]) if url.startswith("data:") else url.encode()


def _completion(outcome: str, question: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": _text(outcome, question, rng)}
    finish = "length" if outcome == "truncated" else "stop"
    if outcome == "refusal":
        message |= {"content": None, "refusal": "I cannot help with that."}
    if outcome == "filtered":
        finish = "content_filter"
    if outcome == "half_pair":
        message["content"] += "\ud83d"
    used = {"prompt_tokens": 1000 + 100 * len(question["images"]), "completion_tokens": 50}
    return {
        "id": "chatcmpl-0",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": "test",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": used,
    }


def _text(outcome: str, question: dict[str, Any], rng: random.Random) -> str:
    if outcome == "excuse":
        return "I'm sorry, but I can't help with that."
    if question["kind"] == "polish":
        text = json.dumps({"prompt": polished(question["prompt"])})
    else:
        values = [rating_of(question["prompt"], image, question["aspect"]) for image in question["images"]]
        if outcome == "out_of_range":
            values[rng.randrange(len(values))] = rng.choice([0, 6, 10])
        if outcome == "wrong_number":
            values = values[:-1] if rng.random() < 0.5 else [*values, 3]
        why = f"Of {question['prompt'][:30]!r}. As its bytes would have it."
        text = json.dumps({"ratings": [{"rationale": why, "rating": value} for value in values]})
    if outcome == "truncated":
        return text[: rng.randrange(1, len(text) - 1)]
    return text.replace(":", "=", 1) if outcome == "malformed" else text


def parse_faults(text: str) -> dict[str, float]:
    """`none`, `hostile`, or `429=0.1,hang=0.05`."""
    if text in ("none", "hostile"):
        return HOSTILE if text == "hostile" else {}
    return {name: float(share) for name, share in (part.split("=") for part in text.split(","))}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--faults", type=parse_faults, default={}, help="none, hostile, or OUTCOME=SHARE,...")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds")
    parser.add_argument("--retry-after", type=float, default=1.0, help="seconds, of 429 and 503")
    parser.add_argument("--hang", type=float, default=30.0, help="seconds until a hanging request is dropped")
    parser.add_argument("--at-most", type=int, default=1_000_000, help="requests; then only 503")
    parser.add_argument("--concurrent", type=int, default=1_000_000, help="requests at once; others get 429")
    parser.add_argument("--seconds", type=float, default=3600.0, help="and then it ends")
    given = vars(parser.parse_args())
    seconds = given.pop("seconds")
    server = ChatServer(given.pop("log"), **given)
    print(server.url, flush=True)

    async def serve() -> None:
        stop = asyncio.Event()
        asyncio.get_running_loop().call_later(seconds, stop.set)
        await server.serve(stop)

    try:
        asyncio.run(serve())
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        server.close()


if __name__ == "__main__":
    main()
