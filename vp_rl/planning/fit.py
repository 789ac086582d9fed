"""The largest micro-batches that fit, and how long they take: found by doing the work on the device."""

import time
from collections.abc import Callable, Sequence

import psutil
import torch
from accelerate.utils import find_executable_batch_size

from vp_rl.algorithms.phases import Phase
from vp_rl.planning.geometry import Plan
from vp_rl.planning.work import Work

MOST = 256
"""What `auto` begins with: larger micro-batches are hardly faster."""
_SPARE = 0.05  # of a GPU's memory: for fragments, and what other libraries take
_SHARE = 0.5  # of the free main memory: a machine that swaps is slower than any micro-batch


def largest(sizes: Sequence[int], attempt: Callable[[int], object], setting: str) -> int:
    """The largest of some sizes with which `attempt` does not run out of memory.

    Raises:
        ValueError: not even the smallest does; names the setting.
    """
    left = iter(sorted(sizes, reverse=True))

    def smaller() -> int:
        return next(left, 0)

    def tried(size: int) -> int:
        attempt(size)
        return size

    try:
        return find_executable_batch_size(tried, starting_batch_size=next(left), reduce_batch_size_fn=smaller)()
    except RuntimeError as error:
        if "reached zero" not in str(error):
            raise
    raise ValueError(
        f"{setting}=auto: not even {min(sizes)} at once fits into the memory. Try policy.gradient_checkpointing=true, "
        "frozen weights in half precision (policy.dtype), or what policy.economy offers."
    )


class OutOfMemory(RuntimeError):
    """What a GPU would say, in its words."""

    def __init__(self) -> None:
        super().__init__("The estimate is out of memory.")


def within_main_memory(estimate: Callable[[int], int | None], held: int) -> Callable[[int], None]:
    """An attempt for CPUs, where memory that is short is swapped and nothing fails: by an estimate in bytes.

    `held` bytes are needed beside it.
    """
    room = int(_SHARE * psutil.virtual_memory().available)

    def attempt(size: int) -> None:
        needed = estimate(size)
        if needed is None or needed + held > room:
            raise OutOfMemory

    return attempt


def on_gpu(run: Callable[[int], object], device: torch.device, held: int) -> Callable[[int], None]:
    """An attempt that does the work, twice: then beside gradients. `held` bytes are kept for what comes later."""
    held += int(_SPARE * torch.cuda.get_device_properties(device).total_memory)

    def attempt(size: int) -> None:
        ballast = torch.empty(held, dtype=torch.uint8, device=device)
        for _ in range(2):
            run(size)
        del ballast

    return attempt


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of the second of two runs: the first one warms up."""
    for _ in range(2):
        started = time.monotonic()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return time.monotonic() - started


def seconds_per_round(work: Work, plan: Plan, device: torch.device) -> float:
    """Of one device's round, or epoch where there are no rounds, from one of each of its pieces."""

    def taken(phase: Phase) -> float:
        prepared = work.prepare(phase, phase.rows)
        return phase.calls * seconds(lambda: work.do(phase, prepared), device)

    return sum(taken(phase) for phase in work.phases(plan.load))
