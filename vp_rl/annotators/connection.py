"""The connection under a chat client: every attempt waits for its turn, has a deadline, and is heard rightly."""

import asyncio
import logging
from collections.abc import Awaitable
from typing import Any

import httpx2

from vp_rl.annotators.complaints import hopeless, unreachable
from vp_rl.annotators.completion import hidden_error, retry_delay
from vp_rl.annotators.gate import Gate
from vp_rl.interfaces import Unanswered

_CONNECT_SECONDS = 10.0
_MOST_BYTES = 32 * 2**20  # of a response; ours have some thousand, and a compressed one may have no end


def quieten() -> None:
    """The client's libraries log every request at INFO: not unless somebody has set their levels."""
    for name in ("httpx2", "openai"):
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.WARNING)


class GatedClient(httpx2.AsyncClient):
    """Every attempt, the chat client's own retries included, passes the gate and has its own deadline.

    Belongs to one event loop.

    Args:
        base_url: for what is said of it.
        timeout: seconds of an attempt.
        concurrency: attempts at once.
    """

    def __init__(self, base_url: str, timeout: float, concurrency: int) -> None:
        super().__init__(
            # The deadline below covers the whole attempt; timeouts of single reads would not end a server that
            # trickles, and cost time on each.
            timeout=httpx2.Timeout(None, connect=min(timeout, _CONNECT_SECONDS)),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=concurrency),
            follow_redirects=False,  # it is a wrong address, and may lead elsewhere
        )
        self._gate, self._url, self._seconds = Gate(concurrency), base_url, timeout
        self._reached = self._stopped = False
        self._asking: set[asyncio.Task[Any]] = set()
        self._attempting: set[asyncio.Task[Any] | None] = set()

    async def until_stopped(self, posting: Awaitable[httpx2.Response]) -> httpx2.Response:
        """The response to what sends its attempts through here.

        Raises:
            Unanswered: `stop` was called before it had one.
        """
        task = asyncio.ensure_future(posting)
        self._asking.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            if not self._stopped or (current := asyncio.current_task()) is None or current.cancelling():
                raise
        finally:
            self._asking.discard(task)
        raise Unanswered("stopped before another attempt")

    def stop(self) -> None:
        """No further attempts, and no waiting for one."""
        self._stopped = True
        for task in self._asking - self._attempting:
            task.cancel()

    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        """Sends it when its turn has come.

        Raises:
            ValueError: nobody was ever at that address.
        """
        async with self._gate.slot() as slot:
            if self._stopped:
                raise Unanswered("stopped before another attempt")
            self._attempting.add(asyncio.current_task())
            try:
                async with asyncio.timeout(self._seconds):
                    response = await self._whole(request, **options)
            except TimeoutError:
                raise httpx2.ReadTimeout(f"no answer within {self._seconds} s", request=request) from None
            except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
                if self._reached:
                    raise
                problem = unreachable(self._url, f"{type(error).__name__}: {error}")
            else:
                self._reached = True
                slot.hear(response.status_code, response.headers)
                if hopeless(response.status_code, response.content):
                    response.headers["x-should-retry"] = "false"  # the chat client knows it
                return response
            finally:
                self._attempting.discard(asyncio.current_task())
        raise problem  # out here, where the error is forgotten that holds the request and so the key

    async def _whole(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        """The response with all that it has, and with the status that it should have."""
        response = await super().send(request, **{**options, "stream": True})
        content = bytearray()
        try:
            async for part in response.aiter_bytes():
                content += part
                if len(content) > _MOST_BYTES:
                    raise httpx2.DecodingError(f"more than {_MOST_BYTES >> 20} MiB", request=request)
        finally:
            await response.aclose()
        status, body = response.status_code, bytes(content)
        if status == 200 and (hidden := hidden_error(body)):
            status, body = hidden
        headers = {
            name: value
            for name, value in response.headers.items()
            if name not in ("content-encoding", "content-length", "transfer-encoding")
        }
        if status in (429, 503) and "retry-after" not in headers and (delay := retry_delay(bytes(content))):
            headers["retry-after"] = delay
        return httpx2.Response(status, headers=headers, content=body, request=request)
