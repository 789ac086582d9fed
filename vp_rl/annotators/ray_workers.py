"""Any annotator that computes for itself, on several workers of a Ray cluster at once."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from vp_rl.configuration.kinds import Amount, Count, Text
from vp_rl.interfaces import Annotator
from vp_rl.types import Answer, Aspect, Rating, Usage


class RayAnnotator(Annotator):
    """Asks the workers in turn; each has an annotator of its own. Its name and answers are that annotator's.

    A worker that dies is started again, elsewhere if need be, and its questions with it. Workers stay until the process
    ends. Annotators that ask a server need none of this: they wait for it, and nothing is computed here.

    Args:
        annotator: makes the annotator; called once here, for its name and to read answers, and once by each worker.
        workers: how many.
        gpus: of each worker; may be a fraction.
        cpus: of each worker.
        address: of the cluster; None: $RAY_ADDRESS, or a cluster of this machine's cores for the time of the run.

    Raises:
        ImportError: Ray is not installed.
    """

    def __init__(
        self,
        annotator: Callable[[], Annotator],
        workers: Count = 2,
        gpus: Amount = 0,
        cpus: Amount = 1,
        address: Text | None = None,
    ) -> None:
        if workers < 1:
            raise ValueError(f"annotator.workers={workers} must be at least 1.")
        try:
            import ray
        except ImportError as error:
            raise ImportError("annotator=ray needs Ray: pip install 'vp_rl[ray]'.") from error
        self._ray, self._make, self._address = ray, annotator, address
        self._options = {"num_gpus": gpus, "num_cpus": cpus, "max_restarts": 3, "max_task_retries": 3}
        self._here, self._number = annotator(), workers
        self.name, self.version = self._here.name, self._here.version
        self.concurrency = workers * self._here.concurrency
        self._workers: list[Any] = []
        self._turn = itertools.count()

    def check(self) -> None:
        """See `Annotator.check`."""
        self._here.check()

    async def ask(self, prompt: str, images: Sequence[bytes], aspect: Aspect) -> Answer:
        """One worker's answer.

        Raises:
            Unanswered, ValueError: as that annotator does.
        """
        if not self._workers:
            if not self._ray.is_initialized():
                self._ray.init(address=self._address, log_to_driver=False, include_dashboard=False)
            options = {**self._options, "max_concurrency": self._here.concurrency}
            remote = self._ray.remote(**options)(_Worker)
            self._workers = [remote.remote(self._make) for _ in range(self._number)]
        worker = self._workers[next(self._turn) % self._number]
        return await worker.ask.remote(prompt, list(images), aspect)

    def read(self, answer: str, images: int) -> list[Rating]:
        """As that annotator reads it."""
        return self._here.read(answer, images)

    def estimate(self, prompt: str, images: Sequence[bytes], aspect: Aspect) -> Usage:
        """As that annotator estimates it."""
        return self._here.estimate(prompt, images, aspect)


class _Worker:
    """With a coroutine as its method it is an asynchronous actor: questions that come together can be one batch."""

    def __init__(self, make: Callable[[], Annotator]) -> None:
        self._annotator = make()

    async def ask(self, prompt: str, images: list[bytes], aspect: Aspect) -> Answer:
        return await self._annotator.ask(prompt, images, aspect)
