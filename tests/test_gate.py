"""How many requests may be in flight: laws of the gate, on a clock of its own."""

import asyncio
import email.utils
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

import pytest

from vp_rl.annotators.gate import LONGEST_WAIT, Gate, retry_after
from vp_rl.interfaces import Unanswered

T = TypeVar("T")


class Clock:
    """Time that passes when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)
        self.now += seconds


def with_gate(most: int, work: Callable[[Gate, Clock], Awaitable[T]]) -> T:
    async def run() -> T:
        clock = Clock()
        return await asyncio.wait_for(work(Gate(most, clock, clock.sleep), clock), 20)  # a lost turn would hang

    return asyncio.run(run())


async def responses(gate: Gate, number: int, status: int, headers: Mapping[str, str] | None = None) -> None:
    """One after the other."""
    for _ in range(number):
        async with gate.slot() as slot:
            slot.hear(status, headers or {})


async def together(gate: Gate, statuses: list[int], headers: Mapping[str, str] | None = None) -> None:
    """In flight at the same time; each is heard when all have started."""
    started = asyncio.Barrier(len(statuses))

    async def one(status: int) -> None:
        async with gate.slot() as slot:
            await started.wait()
            slot.hear(status, headers or {})

    await asyncio.gather(*map(one, statuses))


def test_at_most_so_many_are_in_flight_and_all_get_their_turn() -> None:
    async def work(gate: Gate, clock: Clock) -> tuple[int, int]:
        rng, flying, seen = random.Random(0), 0, []

        async def one() -> None:
            nonlocal flying
            async with gate.slot() as slot:
                flying += 1
                seen.append(flying)
                for _ in range(rng.randrange(4)):
                    await asyncio.sleep(0)
                slot.hear(200, {})
                flying -= 1

        await asyncio.gather(*(one() for _ in range(200)))
        return max(seen), len(seen)

    assert with_gate(7, work) == (7, 200)


def test_requests_that_were_in_flight_together_halve_it_once_and_later_ones_again() -> None:
    async def work(gate: Gate, clock: Clock) -> list[int]:
        limits = [gate.limit]
        for number in (10, 3, 1, 1, 1, 1, 1):
            await together(gate, [429] * number)
            limits.append(gate.limit)
        return limits

    assert with_gate(40, work) == [40, 20, 10, 5, 2, 1, 1, 1]


def test_after_it_was_halved_no_more_than_that_are_in_flight() -> None:
    async def work(gate: Gate, clock: Clock) -> int:
        await together(gate, [429] * 8)
        flying, most = 0, 0

        async def one() -> None:
            nonlocal flying, most
            async with gate.slot():
                flying += 1
                most = max(most, flying)
                await asyncio.sleep(0)
                flying -= 1

        await asyncio.gather(*(one() for _ in range(50)))
        return most

    assert with_gate(8, work) == 4


def test_a_round_of_successes_gives_back_a_sixteenth_of_the_most_until_all_is_given_back() -> None:
    async def work(gate: Gate, clock: Clock) -> list[int]:
        await together(gate, [429] * 64)
        limits = [gate.limit]
        for _ in range(12):
            await responses(gate, gate.limit, 200)
            limits.append(gate.limit)
        return limits

    limits = with_gate(64, work)
    assert limits[0] == 32
    assert limits[-1] == limits[-2] == 64
    gains = [after - before for before, after in zip(limits, limits[1:], strict=False) if after < 64]
    assert all(3 <= gain <= 4 for gain in gains)  # the limit grows within the round, so it is a little less than 4


def test_a_small_gate_grows_by_one_a_round() -> None:
    async def work(gate: Gate, clock: Clock) -> list[int]:
        await together(gate, [429] * 4)
        await responses(gate, 1, 200)
        return [gate.limit, *[[await responses(gate, 3, 200), gate.limit][1] for _ in range(2)]]

    assert with_gate(4, work) == [2, 3, 4]


def test_successes_that_were_sent_before_it_was_halved_do_not_count() -> None:
    async def work(gate: Gate, clock: Clock) -> int:
        await together(gate, [429, *[200] * 63])
        return gate.limit

    assert with_gate(64, work) == 32


@pytest.mark.parametrize("status", [400, 404, 500, 503])
def test_other_errors_give_nothing_back(status: int) -> None:
    async def work(gate: Gate, clock: Clock) -> int:
        await together(gate, [429] * 64)
        await responses(gate, 64, status)
        return gate.limit

    assert with_gate(64, work) == 32


def test_who_waits_is_let_in_as_it_grows() -> None:
    async def work(gate: Gate, clock: Clock) -> bool:
        await together(gate, [429, 429])  # one at a time now
        let_in = asyncio.Event()

        async def second() -> None:
            async with gate.slot():
                let_in.set()

        async with gate.slot() as slot:
            waiting = asyncio.create_task(second())
            await asyncio.sleep(0)
            assert not let_in.is_set()
            slot.hear(200, {})
            await asyncio.wait_for(let_in.wait(), 1)  # though the first one is still in flight
        await waiting
        return True

    assert with_gate(2, work)


@pytest.mark.parametrize("status", [429, 503])
def test_while_a_retry_after_runs_nothing_starts(status: int) -> None:
    async def work(gate: Gate, clock: Clock) -> list[float]:
        await responses(gate, 1, status, {"retry-after": "7"})
        await responses(gate, 1, status, {"retry-after": "3"})  # starts after the 7 s, and adds 3 s
        starts = []

        async def one() -> None:
            async with gate.slot():
                starts.append(clock.now - 1000)

        await asyncio.gather(*(one() for _ in range(5)))
        return starts

    assert all(start >= 10 for start in with_gate(8, work))


def test_a_shorter_pause_does_not_end_a_longer_one() -> None:
    async def work(gate: Gate, clock: Clock) -> float:
        gate.pause(9)
        gate.pause(2)
        async with gate.slot():
            return clock.now - 1000

    assert with_gate(8, work) == 9


@pytest.mark.parametrize(
    ("status", "limit", "waits"), [(503, 8, True), (500, 8, False), (400, 8, False), (429, 4, True)]
)
def test_only_a_429_halves_and_only_429_and_503_pause(status: int, limit: int, waits: bool) -> None:
    async def work(gate: Gate, clock: Clock) -> tuple[int, bool]:
        await responses(gate, 1, status, {"retry-after": "5"})
        async with gate.slot():
            return gate.limit, clock.now > 1000

    assert with_gate(8, work) == (limit, waits)


def test_a_429_that_names_no_time_does_not_pause() -> None:
    async def work(gate: Gate, clock: Clock) -> float:
        await responses(gate, 3, 429)
        return clock.now - 1000

    assert with_gate(8, work) == 0


def test_a_pause_that_is_too_long_to_wait_for_is_told_at_once() -> None:
    async def work(gate: Gate, clock: Clock) -> float:
        gate.pause(LONGEST_WAIT + 60)
        with pytest.raises(Unanswered, match="180 s"):
            async with gate.slot():
                pass
        waited = clock.now - 1000
        clock.now += 60
        async with gate.slot():  # what is left can be waited for
            pass
        return waited

    assert with_gate(8, work) == 0


def test_a_waiter_that_is_cancelled_takes_no_turn_with_it() -> None:
    async def work(gate: Gate, clock: Clock) -> int:
        done = 0

        async def one() -> None:
            nonlocal done
            async with gate.slot():
                await asyncio.sleep(0)
            done += 1

        rng = random.Random(0)
        tasks = [asyncio.create_task(one()) for _ in range(200)]
        for task in tasks:
            await asyncio.sleep(0)
            if rng.random() < 0.5:
                task.cancel()  # some while waiting, some when woken, some in flight
        ended = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
        assert done == sum(outcome is None for outcome in ended)
        return sum(1 for outcome in ended if outcome is not None)

    assert with_gate(1, work) > 20


def test_a_turn_given_to_a_waiter_that_is_cancelled_before_it_runs_goes_to_the_next() -> None:
    async def work(gate: Gate, clock: Clock) -> bool:
        async def one() -> None:
            async with gate.slot():
                pass

        async with gate.slot():
            first, second = asyncio.create_task(one()), asyncio.create_task(one())
            await asyncio.sleep(0)
        first.cancel()  # it was woken as the slot was left
        await asyncio.wait_for(second, 1)
        return first.cancelled() or first.cancelling() > 0

    assert with_gate(1, work)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 0),
        ({"retry-after": "7"}, 7),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after-ms": "250", "retry-after": "7"}, 0.25),
        ({"retry-after": "-3"}, 0),
        ({"retry-after": "soon"}, 0),
        ({"retry-after": "inf"}, 0),
        ({"retry-after": "nan"}, 0),
        ({"retry-after": email.utils.formatdate(time.time() - 100, usegmt=True)}, 0),
    ],
)
def test_retry_after_is_read_in_all_its_forms(headers: dict[str, str], seconds: float) -> None:
    assert retry_after(headers) == seconds


def test_retry_after_may_be_a_date() -> None:
    seconds = retry_after({"retry-after": email.utils.formatdate(time.time() + 100, usegmt=True)})
    assert 98 < seconds <= 100  # dates have whole seconds
