"""A chat server whose every answer is drawn from a grammar: status x headers x body x finish_reason x usage.

    python tests/random_server.py LOG SEED

prints its address and serves until it is killed. What attempt n at a question meets follows from the seed, the question
and n. The log has a JSON object a line for each request: time, prompt, and whether what was sent can be read.
"""

import asyncio
import gzip
import json
import os
import random
import re
import socket
import sys
import threading
from pathlib import Path
from typing import Any, Self

from aiohttp import web

GOOD = 0.45  # of all requests are answered in a way that can be read
USAGES: list[Any] = [
    {"prompt_tokens": 1000, "completion_tokens": 100},
    None,
    {},
    "N/A",
    [],
    {"prompt_tokens": "N/A", "completion_tokens": None},
    {"prompt_tokens": 10**20, "completion_tokens": -1},
    {"prompt_tokens": 12.5},
    {"prompt_tokens": float("nan"), "completion_tokens": float("inf")},
]
HEADERS: list[dict[str, str]] = [
    {},
    {},
    {"Retry-After": "0.01"},
    {"Retry-After": "soon, please"},
    {"Retry-After": "Mon, 99 Foo 99999 99:99:99 GMT"},
    {"retry-after-ms": "5"},
    {"x-should-retry": "true"},
]
STATUSES = [400, 403, 408, 409, 413, 422, 425, 429, 451, 500, 502, 503, 504, 529]
FATAL = [401, 402, 404, 301]
MESSAGES = [
    "image exceeds 5 MB maximum",
    "maximum context length is 4096 tokens",
    "filtered \ud83d",
    "Rate limit reached",
    "Overloaded",
    "Failed to load image",
    "something \0 new",
    "temperature is unsupported",
    "",
]
CODES: list[Any] = [None, "content_filter", "context_length_exceeded", 400, 429, "x\udc00", ["list"]]


def good(rng: random.Random, images: int) -> Any:
    """A message's content that can be read."""
    ratings = {"ratings": [{"rationale": "It is fine \U0001f600.", "rating": rng.randint(1, 5)} for _ in range(images)]}
    text = json.dumps(ratings)
    forms: list[Any] = [
        text,
        f"<think>hm {{what}}? [...]</think>\n{text}",
        f"Here {{they}} are:\n```json\n{text}\n```",
        f"{text}\n{text}",
        text.replace("}]}", "},]}"),
        repr(ratings),
        re.sub(r'"rating": (\d)', r'"rating": "\1"', text),
        json.dumps(ratings["ratings"]),
        [{"type": "text", "text": text}],
        text.replace("fine", "\\ud83d \\u0000"),
    ]
    return rng.choice(forms)


def bad(rng: random.Random, images: int) -> Any:
    """One that cannot."""
    text = json.dumps({"ratings": [{"rationale": "Fine.", "rating": 3}] * images})
    return rng.choice(
        [
            "",
            None,
            "I cannot.",
            "\ud83d\0",
            "[" * 3000,
            text[:20],
            text.replace("3", "3.5"),
            text.replace("3", '"3/5"'),
            {},
            7,
        ]
    )


def drawn(rng: random.Random, images: int) -> tuple[int, dict[str, str], Any, bool]:
    """Status, headers and body of an answer, and whether it can be read; status 0: the connection is reset."""
    usage = {"usage": rng.choice(USAGES)} if rng.random() < 0.9 else {}
    if rng.random() < GOOD:
        message = {"role": "assistant", "content": good(rng, images), **rng.choice([{}, {"refusal": ""}])}
        choice = {"message": message, "finish_reason": rng.choice(["stop", "length", None, "odd"])}
        return 200, {}, {"choices": [choice], **usage, **rng.choice([{}, {"error": None}])}, True
    kind = rng.random()
    if kind < 0.3:
        message = {"content": bad(rng, images), **rng.choice([{}, {"refusal": "no"}, {"reasoning_content": "hm {"}])}
        choice = {"message": message, "finish_reason": rng.choice(["stop", "length", "content_filter", 3])}
        return 200, {}, {"choices": [rng.choice([choice, {}, {"finish_reason": "SAFETY"}])], **usage}, False
    if kind < 0.4:
        return (
            200,
            {},
            rng.choice([[1, 2], "text", None, {}, {"choices": None}, {"choices": [3]}, b"{", b"\xff\xfe"]),
            False,
        )
    if kind < 0.45:
        return 0, {}, None, False
    error = {"error": {"message": rng.choice(MESSAGES), "code": rng.choice(CODES)}}
    body = rng.choice([error, [error], error["error"], "<html>oops</html>", b"", {"detail": [error]}])
    if kind < 0.5:
        return 200, {}, error, False
    status = rng.choice(FATAL if kind > 0.995 else STATUSES)
    return status, rng.choice(HEADERS), body, False


class RandomServer:
    """Serves until left, from a thread with an event loop of its own."""

    def __init__(self, log: Path, seed: int) -> None:
        self._seed, self._asked = seed, dict[str, int]()
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/v1"

    async def serve(self) -> None:
        """Until it is cancelled."""
        app = web.Application(client_max_size=2**28)
        app.router.add_post("/v1/chat/completions", self._handle)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        try:
            await web.SockSite(runner, self._socket, backlog=1024).start()
            await asyncio.Event().wait()
        finally:
            await runner.cleanup()

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(self.serve())
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._task)
        except asyncio.CancelledError:
            self._loop.close()

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(10)
        os.close(self._log)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        parts = body["messages"][-1]["content"]
        prompt = json.loads(re.search(r"<prompt>\n(.*)\n</prompt>", parts[0]["text"])[1])
        attempt = self._asked[prompt] = self._asked.get(prompt, 0) + 1
        rng = random.Random(f"{self._seed}|{prompt}|{attempt}")
        status, headers, answer, readable = drawn(rng, sum(part["type"] == "image_url" for part in parts))
        await asyncio.sleep(rng.random() / 100)
        os.write(self._log, json.dumps({"prompt": prompt, "readable": readable, "status": status}).encode() + b"\n")
        if status == 0:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        if rng.random() < 0.1:
            data, headers = gzip.compress(data), {**headers, "Content-Encoding": "gzip"}
        return web.Response(body=data, status=status, headers=headers, content_type="application/json")


if __name__ == "__main__":
    server = RandomServer(Path(sys.argv[1]), int(sys.argv[2]))
    print(server.url, flush=True)
    asyncio.run(server.serve())
