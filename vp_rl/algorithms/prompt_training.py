"""Algorithms that train on prompts: an epoch's batches, and where a resumed run goes on in them."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Protocol, runtime_checkable

from vp_rl.algorithms.base import PolicyTraining
from vp_rl.types import PromptBatch


@runtime_checkable
class PromptBatches(Protocol):
    """An epoch's batches of prompts, as one of several devices gets them."""

    batch_size: int
    devices_per_prompt: int

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[PromptBatch]: ...


@runtime_checkable
class Resumable(Protocol):
    """A loader that can go on in the middle of an epoch; a plain DataLoader would give the first batches again."""

    def resumable_after(self, batches: int) -> bool:
        """Whether a run that stops after so many of an epoch's batches can go on as if it had not."""
        ...


class PromptTraining(PolicyTraining):
    """Trains on prompts: a data module of prompts gives it each epoch's, and it says what is made of them."""

    def batches(self, prompts: PromptBatches) -> Iterable[Any]:
        """What an epoch of this algorithm trains on, given the epoch's prompts: here, the prompts themselves."""
        return PromptLoader(self, prompts)


class EpochLoader(ABC):
    """An epoch's batches from where the run is in it: all of them, or those that a resumed run has not had.

    What a batch is follows from its place in the run, which Lightning restores: there is nothing else to save. That it
    could be saved tells Lightning that the loader knows how to go on.
    """

    def __init__(self, algorithm: PolicyTraining, prompts: PromptBatches) -> None:
        self._algorithm, self._prompts = algorithm, prompts

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __iter__(self) -> Iterator[Any]: ...

    def resumable_after(self, batches: int) -> bool:
        """Whether a run that stops after so many of an epoch's batches can go on as if it had not; here, always."""
        return True

    def done(self) -> int:
        """Batches of the running epoch that came before: above 0 where a resumed run asks for its first."""
        return self._algorithm.trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: B027  # Lightning looks whether it is there
        """Nothing to read."""


class PromptLoader(EpochLoader):
    """Batches of prompts."""

    def __len__(self) -> int:
        return len(self._prompts)

    def __iter__(self) -> Iterator[PromptBatch]:
        # A generator: it must not look before the first batch is asked for, when Lightning knows where it is.
        yield from islice(self._prompts, self.done(), None)
