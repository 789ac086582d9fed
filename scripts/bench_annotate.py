"""What asking a paid annotator costs on this side of the wire, against tests/chat_server.py in a process of its own.

    python scripts/bench_annotate.py

Three measurements, all with `--in-flight` questions at once, of four images each:

- **overhead**: the server answers at once. Milliseconds a call, by the clock and of this process's CPU, for asking and
  reading together, and for the same request sent by the bare `openai` client and by httpx2 alone. Bar: 5 ms.
- **healthy**: every answer takes `--latency` seconds. Throughput as a share of in flight / latency. Bar: 90 %.
- **hostile**: 10 % 429, 5 % 500, 5 % hang, 5 % malformed, 3 % wrong, 2 % refusals, 1 % resets; at a fifth of the
  latency. A Retry-After of 1 s, which all wait for, is most of the time there; so once more with one of 50 ms.
"""

import argparse
import asyncio
import base64
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx2
import numpy as np
from openai import AsyncOpenAI
from PIL import Image

from vp_rl.annotators.chat import Chat
from vp_rl.annotators.openai_chat import OpenAIChatAnnotator
from vp_rl.interfaces import Unanswered
from vp_rl.types import Answer

SERVER = Path(__file__).parents[1] / "tests" / "chat_server.py"
KEY_NAME, KEY = "VP_RL_BENCH_KEY", "sk-test-7f3a9c"  # the server's
RUNS = 5  # of which the median is taken: other programs, or a pause of the machine, spoil one or two
RE_ASKED = 2  # how often an unreadable answer is asked for again, as the dataset builder does
Call = Callable[[int], Awaitable[object]]


class Pace(NamedTuple):
    """Of many calls."""

    calls: int
    wall: float
    """Seconds by the clock, without those that the machine stood still."""
    cpu: float
    """Seconds of this process's CPU."""
    still: float = 0.0
    """Seconds that the machine stood still, as virtual ones do now and then."""

    def __str__(self) -> str:
        """Per call."""
        return f"{1e3 * self.wall / self.calls:.2f} ms/call ({1e3 * self.cpu / self.calls:.2f} ms of CPU){self.note}"

    @property
    def note(self) -> str:
        """Of standing still, if it did."""
        return f" [the machine stood still for {self.still:.0f} s, not counted]" if self.still else ""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--calls", type=int, default=4000, help="of the first measurement; the others make fewer")
    parser.add_argument("--latency", type=float, default=1.0, help="seconds, of the second; the third has a fifth")
    parser.add_argument("--image-kb", type=int, default=4, help="size of each of the four image files")
    given = parser.parse_args()
    os.environ[KEY_NAME] = KEY
    images = [noise(given.image_kb, seed) for seed in range(4)]
    overhead(images, given.calls, given.in_flight)
    healthy(images, given.calls // 4, given.in_flight, given.latency)
    for retry_after in (1.0, 0.05):
        hostile(images, given.calls // 8, given.in_flight, given.latency / 5, retry_after)


def overhead(images: list[bytes], calls: int, in_flight: int) -> None:
    """Nobody is waited for."""
    with serving() as url:
        annotator = OpenAIChatAnnotator(Chat("bench", base_url=url, api_key_env=KEY_NAME, concurrency=in_flight))
        body = body_like(images)
        measured: dict[str, Callable[[], Coroutine[None, None, Pace]]] = {
            "ask and read:  ": lambda: pace(asking(annotator, images), calls // RUNS, in_flight),
            "openai client: ": lambda: through_openai(url, body, calls // RUNS, in_flight),
            "httpx2 alone:  ": lambda: through_httpx(url, body, calls // RUNS, in_flight),
        }
        for name, run in measured.items():
            runs = sorted((asyncio.run(run()) for _ in range(RUNS)), key=lambda each: each.wall)
            print(f"{name} {runs[RUNS // 2]}", flush=True)


def healthy(images: list[bytes], calls: int, in_flight: int, latency: float) -> None:
    """The server works on as many questions as it is given."""
    calls = max(1, calls // in_flight) * in_flight  # whole rounds: the last one would have idle places
    with serving("--latency", str(latency)) as url:
        annotator = OpenAIChatAnnotator(Chat("bench", base_url=url, api_key_env=KEY_NAME, concurrency=in_flight))
        took = asyncio.run(pace(asking(annotator, images), calls, in_flight))
    rate, best = calls / took.wall, in_flight / latency
    print(
        f"healthy:        {rate:.1f} calls/s of {best:.1f} at {latency:g} s: {rate / best:.1%}{took.note}", flush=True
    )


def hostile(images: list[bytes], calls: int, in_flight: int, latency: float, retry_after: float) -> None:
    """The server fails in all known ways; unreadable answers are asked for again."""
    found: Counter[str] = Counter()
    timeout = max(1.0, 5 * latency)
    with serving("--latency", str(latency), "--faults", "hostile", "--retry-after", str(retry_after)) as url:
        chat = Chat("bench", base_url=url, api_key_env=KEY_NAME, concurrency=in_flight, timeout=timeout)
        annotator = OpenAIChatAnnotator(chat)

        async def call(number: int) -> None:
            for _ in range(1 + RE_ASKED):
                try:
                    answer = await annotator.ask(f"prompt {number}", images, "aesthetic")
                except Unanswered:
                    found["unanswered"] += 1
                    return
                if kept := outcome(annotator, answer, len(images)):
                    found[kept] += 1
                    return
            found["unreadable"] += 1

        took = asyncio.run(pace(call, calls, in_flight))
    rate, best = calls / took.wall, in_flight / latency
    print(
        f"hostile:        {rate:.1f} questions/s of {best:.1f} at {latency:g} s, with Retry-After {retry_after:g} s: "
        f"{rate / best:.1%}; {dict(found)} with those before the clock started{took.note}"
    )


def outcome(annotator: OpenAIChatAnnotator, answer: Answer, images: int) -> str:
    """`refused`, `rated`, or nothing for an answer that cannot be read."""
    if answer.refused:
        return "refused"
    try:
        annotator.read(answer.text, images)
    except ValueError:
        return ""
    return "rated"


def asking(annotator: OpenAIChatAnnotator, images: list[bytes]) -> Call:
    """Asks and reads; every question is another one."""

    async def call(number: int) -> None:
        await annotator.annotate(f"prompt {number}", images, "aesthetic")

    return call


async def pace(call: Call, calls: int, in_flight: int) -> Pace:
    """Calls with the numbers from 0, that many at once; connections are opened before the clock starts."""
    await asyncio.gather(*(call(-1 - number) for number in range(in_flight)))
    numbers = iter(range(calls))

    async def worker() -> None:
        for number in numbers:
            await call(number)

    still: list[float] = []
    watching = asyncio.create_task(watch(still))
    wall, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(worker() for _ in range(in_flight)))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    watching.cancel()
    return Pace(calls, wall - sum(still), cpu, sum(still))


async def watch(still: list[float]) -> None:
    """Notes whenever this loop did not run for two seconds: nothing here works for as long as that."""
    last = time.perf_counter()
    while True:
        await asyncio.sleep(0.05)
        now = time.perf_counter()
        if now - last > 2:
            still.append(now - last)
        last = now


def body_like(images: list[bytes]) -> bytes:
    """A request of the annotator's size and parts."""
    urls = [f"data:image/png;base64,{base64.b64encode(image).decode()}" for image in images]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    messages = [{"role": "system", "content": "x" * 6000}, {"role": "user", "content": parts}]
    return json.dumps({"model": "bench", "messages": messages}).encode()


async def through_openai(url: str, body: bytes, calls: int, in_flight: int) -> Pace:
    """The library's part: a body that is ready, an answer that nobody reads."""
    async with AsyncOpenAI(api_key=KEY, base_url=url) as client:
        return await pace(
            lambda _: client.post("/chat/completions", cast_to=httpx2.Response, content=body), calls, in_flight
        )


async def through_httpx(url: str, body: bytes, calls: int, in_flight: int) -> Pace:
    """The transport's part of that."""
    headers = {"Authorization": f"Bearer {KEY}"}
    limits = httpx2.Limits(max_keepalive_connections=in_flight)
    async with httpx2.AsyncClient(timeout=None, limits=limits, headers=headers) as client:
        return await pace(lambda _: client.post(f"{url}/chat/completions", content=body), calls, in_flight)


@contextmanager
def serving(*options: str) -> Iterator[str]:
    """The address of a server."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(SERVER), "--log", f"{folder}/log.jsonl", "--seconds", "600", *options]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            try:
                yield process.stdout.readline().strip()
            finally:
                process.terminate()


def noise(kilobytes: int, seed: int) -> bytes:
    """A PNG file of about that size."""
    side = max(8, round((kilobytes * 1024 / 3) ** 0.5))
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


if __name__ == "__main__":
    main()
