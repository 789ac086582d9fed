"""Both images of a pair before the judge at once, in both orders."""

from collections.abc import Sequence

import numpy as np
import pytest
from test_evaluation import Brightness, BrightnessJudge, evaluator, shifted

from vp_rl.annotators.answers import read_ratings, write_ratings
from vp_rl.evaluation.duel import OVERALL, duels
from vp_rl.interfaces import Annotator
from vp_rl.types import ASPECTS, Answer, Aspect, Rating


class FirstIsBetter(Annotator):
    """Goes by the place alone."""

    name, version, concurrency = "first", "1", 4

    async def ask(self, prompt: str, images: Sequence[bytes], aspect: Aspect) -> Answer:
        return Answer(write_ratings([Rating(5 - place, "") for place in range(len(images))]))

    def read(self, answer: str, images: int) -> list[Rating]:
        return read_ratings(answer, images)


def test_a_judge_that_goes_by_the_place_finds_no_winner() -> None:
    it = evaluator(seeds=(0, 1))
    base, tuned = (it.evaluate(shifted(by), Brightness()) for by in (0.0, 2.0))
    for duel in duels(FirstIsBetter(), base, tuned)[0].values():
        assert (duel.win, duel.tie, duel.loss, duel.consistent) == (0, 1, 0, 0)
        assert duel.low == -duel.high < 0, "12 prompts"
        assert duel.chance == 1


def test_an_honest_judge_finds_the_better_one_whichever_way_round() -> None:
    it = evaluator(seeds=(0, 1))
    base, tuned = (it.evaluate(shifted(by), Brightness()) for by in (0.0, 2.0))
    (forth, asked), (back, _) = (duels(BrightnessJudge(), *both) for both in ((base, tuned), (tuned, base)))
    assert (asked.questions, asked.kept) == (8 * len(base.prompts), 0)
    assert forth.keys() == {*ASPECTS, OVERALL}
    share = (tuned.ratings[:, 0] > base.ratings[:, 0]).mean()
    for name, duel in forth.items():
        assert duel.consistent == 1
        assert duel.win == share > 0.5
        assert (back[name].loss, back[name].tie) == (duel.win, duel.tie)
        assert duel.win + duel.tie + duel.loss == pytest.approx(1)
    gain = np.sign(tuned.ratings[:, 0] - base.ratings[:, 0])
    assert forth[OVERALL].low <= gain.mean() <= forth[OVERALL].high
