"""Coroutines for callers who may not `await`."""

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")


def wait(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """The coroutine's result, for callers of an annotator who may not `await`, as a reward's `forward`.

    Also where an event loop is running already, as in a notebook. Ctrl-C ends the coroutine, too.
    """
    try:
        running = asyncio.get_running_loop()
    except RuntimeError:
        running = None
    if running is None:
        return asyncio.run(coroutine)
    started: list[asyncio.Task[Result]] = []

    async def noted() -> Result:
        task = asyncio.current_task()
        assert task is not None
        started.append(task)
        return await coroutine

    with ThreadPoolExecutor(1) as thread:
        result = thread.submit(asyncio.run, noted())
        try:
            return result.result()
        except KeyboardInterrupt:  # nobody but the main thread hears of it
            for task in started:
                task.get_loop().call_soon_threadsafe(task.cancel)
            raise
