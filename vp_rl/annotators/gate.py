"""How many requests may be in flight at once: additive increase, multiplicative decrease (as in TCP, RFC 5681).

A server that answers 429 is sent half as much from then on, and nothing at all until its Retry-After has run; every
round of successes (as many as may be in flight) gives back a sixteenth of the most that are allowed.
"""

import asyncio
import email.utils
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from vp_rl.interfaces import Unanswered

LONGEST_WAIT = 120.0  # seconds; the openai client does not wait longer either, but gives up
_SHARE_A_ROUND = 1 / 16


@dataclass(slots=True)
class Slot:
    """One request in flight. Whoever holds it says what came of the request."""

    gate: "Gate"
    number: int

    def hear(self, status: int, headers: Mapping[str, str]) -> None:
        """Takes in a response's status and headers."""
        if status == 429:
            self.gate.halve(self.number)
        elif status < 400:
            self.gate.grow(self.number)
        if status in (429, 503, 529):
            self.gate.pause(retry_after(headers))


class Gate:
    """Lets up to `most` requests through at once, and fewer while the server is overrun.

    Belongs to one event loop.

    Args:
        most: at least 1.
        clock: seconds, from any origin.
        sleep: waits for that many of them.
    """

    def __init__(
        self,
        most: int,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self._most, self._clock, self._sleep = most, clock, sleep
        self._limit: float = most
        self._in_flight = 0
        self._started = 0  # requests so far
        self._halved = 0  # requests that were started before the limit was last halved
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._closed_until = -math.inf

    @property
    def limit(self) -> int:
        """How many may be in flight now: 1 to `most`."""
        return int(self._limit)

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[Slot]:
        """Waits for its turn; inside it, a request may be in flight.

        Raises:
            Unanswered: the server asked for a wait of more than `LONGEST_WAIT` seconds.
        """
        try:
            await self._turn()
        except BaseException:
            self._wake()  # this one may have been woken, and had its turn, when it was cancelled
            raise
        self._in_flight += 1
        self._started += 1
        try:
            yield Slot(self, self._started)
        finally:
            self._in_flight -= 1
            self._wake()

    def halve(self, number: int) -> None:
        """Request `number` was one too many. Those in flight with it were sent at the same limit: it is halved once."""
        if number > self._halved:
            self._limit = max(1.0, self._limit / 2)
            self._halved = self._started

    def grow(self, number: int) -> None:
        """Request `number` succeeded. One that was sent before the limit was halved says nothing about the new one."""
        if number > self._halved:
            self._limit = min(self._most, self._limit + max(1.0, self._most * _SHARE_A_ROUND) / self._limit)
            self._wake()

    def pause(self, seconds: float) -> None:
        """Starts nothing for that long; a pause that ends later goes on."""
        self._closed_until = max(self._closed_until, self._clock() + seconds)

    async def _turn(self) -> None:
        while True:
            while (wait := self._closed_until - self._clock()) > 0:
                if wait > LONGEST_WAIT:
                    raise Unanswered(f"the server asks for a pause of {wait:.0f} s more: go on later")
                await self._sleep(wait)
            if self._in_flight < self.limit:
                return
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            await turn

    def _wake(self) -> None:
        """As many as there is room for; who finds none after all waits again."""
        room = self.limit - self._in_flight
        while room > 0 and self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # else its owner was cancelled
                turn.set_result(None)
                room -= 1


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that a response asks to wait: `retry-after-ms`, or `retry-after` in seconds or as a date; 0 for none."""
    for header, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(header, "")) * unit
        except ValueError:
            continue
        return max(0.0, seconds) if math.isfinite(seconds) else 0.0
    try:
        return max(0.0, email.utils.parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time())
    except (KeyError, ValueError, TypeError, OverflowError, OSError):  # a year that no clock has
        return 0.0
