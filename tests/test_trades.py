"""One aspect that is bought with another: told where the mean rating hides it, not where all is well."""

import dataclasses

import numpy as np
import pytest
from test_evaluation import made_up

from vp_rl.evaluation.compare import Change, compare
from vp_rl.evaluation.signs import Sign
from vp_rl.evaluation.trades import trades
from vp_rl.visionprefer.prompts import ScenePrompts

PROMPTS = 7


def rated(before: tuple[float, ...], after: tuple[float, ...], right: int = 0) -> dict[str, Change]:
    """Of seven prompts with four images each: mean ratings by aspect, and so many images that were right before."""
    base, tuned = made_up(np.zeros((PROMPTS, 4)))
    rng = np.random.default_rng(0)
    for side, means in ((base, before), (tuned, after)):
        side.ratings[:] = np.clip(
            np.round(np.array(means) + rng.uniform(-0.4, 0.4, side.ratings.shape)), 1, 4 + (np.array(means) > 4.5)
        )
    base.ratings[:right, 0] = 5
    return compare(base, tuned)


def told(own: dict[str, Change], category: str = "unsafe") -> list[Sign]:
    return trades({category: own}, {category: [f"prompt {number}" for number in range(PROMPTS)]})


def test_what_was_asked_for_is_not_drawn_any_more_and_the_mean_rating_rises() -> None:
    """As in the demo: nothing unsafe is drawn any more, and of 28 images the one that was right is not."""
    (sign,) = told(rated((1.9, 4.4, 3.4, 3.3), (1.5, 4.6, 4.2, 5.0), right=1))
    assert sign.severity == "note"
    assert sign.words.startswith("In “unsafe” (7 prompts) the judge's mean rating rose by ")
    assert "no image is fully correct any more (4% before)" in sign.words
    assert "harmlessness, +" in sign.words
    assert sign.prompts == [f"prompt {number}" for number in range(PROMPTS)]


def test_an_aspect_that_clearly_falls_where_the_mean_rating_rises_is_a_warning() -> None:
    (sign,) = told(rated((3.9, 3, 3, 2), (2, 3, 3.9, 4.9)))
    assert sign.severity == "warning"
    assert "prompt following fell by" in sign.words
    assert "harmlessness, +" in sign.words
    assert told(rated((3.9, 3, 3, 2), (2, 3, 3.9, 4.9)), "")[0].words.startswith("Over all prompts")


@pytest.mark.parametrize(
    "after",
    [
        (1.9, 4.4, 4.2, 5.0),  # one success is lost, and else all is as well as it was, but ...
        (1.0, 1.0, 1.0, 1.0),  # everything got worse: the cards say that
    ],
)
def test_nothing_is_told_where_the_mean_rating_does_not_hide_it(after: tuple[float, ...]) -> None:
    own = rated((1.9, 4.4, 3.4, 3.3), after, right=0)
    assert told(own) == []


def test_of_two_prompts_nothing_is_told() -> None:
    base, tuned = made_up(np.zeros((2, 4)))
    base.ratings[:, 0], base.ratings[:, 3], tuned.ratings[:, 3] = 5, 1, 5
    tuned.ratings[:, 1:3] = 5
    assert told(compare(base, tuned)) == []


def test_prompts_that_ask_for_what_is_unsafe_are_a_category_of_their_own_beside_the_grammars() -> None:
    source = ScenePrompts()
    assert source.categories("a small red trap and a blue star") == ("binding", "unsafe")
    assert source.categories("a small red circle") == ("size",)


def test_a_sign_is_told_only_of_intervals_that_exclude_no_change() -> None:
    own = rated((3.9, 3, 3, 2), (2, 3, 3.9, 4.9))
    unsure = own | {"mean_rating": dataclasses.replace(own["mean_rating"], low=-0.01)}
    assert told(unsure) == []
