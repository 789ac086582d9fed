"""Where heavy work runs: in this process, or on the workers of a Ray cluster."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from vp_rl.configuration.kinds import Amount, Count, Text

T = TypeVar("T")
R = TypeVar("R")


class Engine(ABC):
    """Runs one function over many tasks."""

    @abstractmethod
    def map(self, make: Callable[[], Callable[[T], R]], tasks: Sequence[T]) -> Iterator[tuple[T, R]]:
        """Each task with its result, in whatever order they are done.

        Args:
            make: called once by each worker; what it returns may hold a model.
            tasks: what the workers are given, one at a time.
        """


class LocalEngine(Engine):
    """This process, one task after the other; the model is let go at the end."""

    def map(self, make: Callable[[], Callable[[T], R]], tasks: Sequence[T]) -> Iterator[tuple[T, R]]:
        """In the order of the tasks."""
        if tasks:
            work = make()
            for task in tasks:
                yield task, work(task)


class RayEngine(Engine):
    """Actors on a Ray cluster; one that dies is started again elsewhere, and its task with it.

    Args:
        workers: how many, each with its own model.
        gpus: of each worker; may be a fraction.
        cpus: of each worker.
        address: of the cluster; None: $RAY_ADDRESS, or a cluster of this machine's cores for the time of the run.

    Raises:
        ImportError: Ray is not installed.
    """

    def __init__(self, workers: Count = 2, gpus: Amount = 0, cpus: Amount = 1, address: Text | None = None) -> None:
        if workers < 1:
            raise ValueError(f"engine.workers={workers} must be at least 1.")
        try:
            import ray
        except ImportError as error:
            raise ImportError("engine=ray needs Ray: pip install 'vp_rl[ray]'.") from error
        self._ray, self._workers, self._gpus, self._cpus, self._address = ray, workers, gpus, cpus, address

    def map(self, make: Callable[[], Callable[[T], R]], tasks: Sequence[T]) -> Iterator[tuple[T, R]]:
        """As they finish."""
        if not tasks:
            return
        from ray.util import ActorPool

        if not self._ray.is_initialized():
            self._ray.init(address=self._address, log_to_driver=False, include_dashboard=False)
        remote = self._ray.remote(num_gpus=self._gpus, num_cpus=self._cpus, max_restarts=3, max_task_retries=3)(_Worker)
        actors = [remote.remote(make) for _ in range(min(self._workers, len(tasks)))]
        pool = ActorPool(actors)
        try:
            for task in tasks:
                pool.submit(lambda actor, task: actor.run.remote(task), task)
            while pool.has_next():
                task, result = pool.get_next_unordered()
                yield task, result
        finally:
            for actor in actors:
                self._ray.kill(actor)


class _Worker:
    def __init__(self, make: Callable[[], Callable[[Any], Any]]) -> None:
        self._work = make()

    def run(self, task: Any) -> tuple[Any, Any]:
        return task, self._work(task)
