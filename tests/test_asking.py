"""The judge is asked nothing twice, what it answered outlives whatever stops it, and its bill is right."""

import asyncio
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from test_evaluation import Bright, Brightness, BrightnessJudge, evaluator, shifted

from vp_rl.evaluation.asking import Asked, rate
from vp_rl.evaluation.duel import duels
from vp_rl.evaluation.store import Kept, Store
from vp_rl.types import Answer, Aspect, Usage


@pytest.fixture(autouse=True)
def _ctrl_c() -> Iterator[None]:
    """As in a terminal: what a shell starts in the background would not hear of it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Paid(BrightnessJudge):
    """Costs tokens, and sees the user press Ctrl-C after so many answers."""

    def __init__(self, answers: int = 10**6) -> None:
        self.left = answers

    async def ask(self, prompt: str, images: Sequence[bytes], aspect: Aspect) -> Answer:
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(60)
        self.left -= 1
        answer = await super().ask(prompt, images, aspect)
        return answer._replace(usage=Usage(100 * len(images), 10, 0.5))


def shown(number: int, each: int = 2) -> tuple[list[str], list[list[np.ndarray]]]:
    images = np.random.default_rng(0).integers(0, 256, (number, each, 8, 8, 3), dtype=np.uint8)
    return [f"prompt {place}" for place in range(number)], [list(some) for some in images]


def test_the_bill_counts_what_was_asked_and_what_was_known(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    prompts, images = shown(3)
    first, asked = rate(Paid(), prompts[:2], images[:2], store)
    assert asked == Asked(8, 0, Usage(8 * 200, 80, 4.0))
    again, more = rate(Paid(), prompts, images, store)
    assert more == Asked(4, 8, Usage(4 * 200, 40, 2.0))
    assert again[:2] == first
    assert asked.plus(more) == Asked(12, 8, Usage(2400, 120, 6.0))


def test_another_order_of_the_same_images_is_another_question(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    prompts, images = shown(1)
    (forth,), _ = rate(Paid(), prompts, images, store)
    (back,), asked = rate(Paid(), prompts, [images[0][::-1]], store)
    assert asked.questions == 4
    assert [each[0].rating for each in back] == [each[0].rating for each in forth[::-1]]


def test_what_was_answered_before_an_interruption_is_not_asked_again(tmp_path: Path) -> None:
    it = evaluator(seeds=(0, 1))
    base, tuned = (it.evaluate(shifted(by), Brightness()) for by in (0.0, 2.0))
    whole, pairs = duels(BrightnessJudge(), base, tuned)[0], len(base.prompts)
    store = Store(tmp_path / "store")
    with pytest.raises(KeyboardInterrupt):
        duels(Paid(answers=5 * pairs), base, tuned, store)
    after, asked = duels(Paid(), base, tuned, store)
    assert after == whole
    assert asked.questions + asked.kept == 8 * pairs
    # The first order is whole, and of the second at most four pairs, which are asked about at once, are half answered.
    assert asked.kept >= 5 * pairs - 4 * 3


def test_in_a_notebook_a_loop_is_running_already(tmp_path: Path) -> None:
    it, store = evaluator(), Store(tmp_path / "store")

    async def cell() -> tuple[object, ...]:
        base = it.evaluate(Bright(), Brightness(), kept=Kept(store, "base"))
        tuned = it.evaluate(shifted(2.0), Brightness(), kept=Kept(store, "tuned"))
        return base.ratings.tolist(), tuned.ratings.tolist(), duels(BrightnessJudge(), base, tuned, store)[0]

    base, tuned = (it.evaluate(policy, Brightness()) for policy in (Bright(), shifted(2.0)))
    expected = base.ratings.tolist(), tuned.ratings.tolist(), duels(BrightnessJudge(), base, tuned)[0]
    assert asyncio.run(cell()) == expected


def test_an_interruption_in_a_notebook_ends_the_asking(tmp_path: Path) -> None:
    store, (prompts, images) = Store(tmp_path / "store"), shown(6)

    async def cell() -> None:
        rate(Paid(answers=12), prompts, images, store)

    loop = asyncio.new_event_loop()  # as in a notebook, it has no way of its own with Ctrl-C
    with pytest.raises(KeyboardInterrupt):
        loop.run_until_complete(cell())
    loop.close()
    assert rate(Paid(), prompts, images, store)[1].kept >= 4
