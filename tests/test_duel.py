"""Both images of a pair before the judge at once, in both orders."""

from collections.abc import Sequence

import numpy as np
import pytest
from test_evaluation import Brightness, BrightnessJudge, evaluator, shifted

from vp_rl.annotators.answers import read_ratings, write_ratings
from vp_rl.annotators.pairs import PairAnnotator
from vp_rl.evaluation.duel import OVERALL, duels
from vp_rl.interfaces import Annotator
from vp_rl.types import ASPECTS, Answer, Aspect, Rating
from vp_rl.waiting import wait


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


class Larger(PairAnnotator):
    """Prefers the file with more in it, and the one in the first place by `bias`."""

    name, version, concurrency = "larger", "1", 4

    def __init__(self, bias: float = 0.0) -> None:
        self.bias = bias

    async def compare(self, prompt: str, first: bytes, second: bytes, aspect: Aspect) -> float:
        if self.bias == 1 or first == second:
            return 0.5 + self.bias / 2
        return float(first > second)


def test_who_only_compares_rates_images_by_the_others_that_they_beat() -> None:
    images = [b"3", b"1", b"5", b"4", b"2"]
    assert [each.rating for each in wait(Larger().annotate("a", images, "fidelity"))] == [3, 1, 5, 4, 2]
    assert [each.rating for each in wait(Larger().annotate("a", [b"1", b"1", b"2"], "fidelity"))] == [2, 2, 5]
    assert [each.rating for each in wait(Larger(bias=1.0).annotate("a", images, "fidelity"))] == [3] * 5
    with pytest.raises(ValueError, match=r"larger compares images.*images_per_call=0"):
        wait(Larger().annotate("a", images[:1], "fidelity"))
    with pytest.raises(ValueError, match=r"compared two images of 'a' as 1\.5"):
        wait(Larger(bias=2.0).annotate("a", [b"1", b"1"], "fidelity"))
    with pytest.raises(ValueError, match="2 shares for 3 images"):
        Larger().read("[0.5, 0.5]", 3)


class Brighter(PairAnnotator):
    """By the ratings of another."""

    name, version, concurrency = "brighter", "1", 4

    async def compare(self, prompt: str, first: bytes, second: bytes, aspect: Aspect) -> float:
        one, other = (each.rating for each in await BrightnessJudge().annotate(prompt, [first, second], aspect))
        return 0.5 if one == other else float(one > other)


def test_win_rates_of_who_only_compares_are_those_of_who_rates() -> None:
    it = evaluator(seeds=(0, 1))
    base, tuned = (it.evaluate(shifted(by), Brightness()) for by in (0.0, 2.0))
    compared, rated = (duels(judge, base, tuned)[0] for judge in (Brighter(), BrightnessJudge()))
    assert compared == rated
