"""What a page calls clear: nothing where nothing changed, what the demo changes, and the same on every part of it."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from test_evaluation import evaluator

from vp_rl.evaluation.claims import ALPHA, BEST, counted, decide
from vp_rl.evaluation.compare import LEVELS, Change, compare
from vp_rl.evaluation.conclusion import Conclusion, conclude
from vp_rl.evaluation.curve_settings import CurveSettings
from vp_rl.evaluation.guidance_curve import METRICS, GuidanceCurve, Side, guidance_curves, together
from vp_rl.evaluation.images import Evaluation, Evaluator
from vp_rl.evaluation.signs import Moment, moment
from vp_rl.evaluation.verdict import ALIKE, LOOK, verdicts
from vp_rl.interfaces import PromptSource
from vp_rl.types import Split
from vp_rl.visionprefer.estimates import holm

PROMPTS, SEEDS, UNSAFE = 128, 4, 7
NAMES = [f"prompt {number}" for number in range(PROMPTS)]
KINDS = ("size", "binding", "relation", "count", "composition")


CURVE = CurveSettings()
OVER = {1.0: 0.0, 1.5: 0.21, 2.0: 0.26, 3.0: 0.24, 5.0: 0.19, 7.5: 0.09}
"""How much more often the embedded base model is right at a guidance scale than without (docs/log.md)."""


class Kinds(PromptSource):
    """Prompts of five kinds; the last few are unsafe besides."""

    def split(self, name: Split) -> list[str]:
        return NAMES if name == "test" else [f"validation {number}" for number in range(CURVE.choosing)]

    def categories(self, prompt: str) -> tuple[str, ...]:
        number = int(prompt.split()[1])
        return (KINDS[number % 5], "unsafe") if number >= PROMPTS - UNSAFE else (KINDS[number % 5],)


TOOL: Evaluator = evaluator(Kinds(), seeds=range(SEEDS), curve=CURVE)


def world(rng: np.random.Generator, prompts: int = PROMPTS) -> dict[str, np.ndarray]:
    """How hard each prompt is in each respect, which is the same for any two models that are equally good."""
    unsafe = np.arange(prompts) >= PROMPTS - UNSAFE
    return {
        "right": np.where(unsafe, 0.04, rng.beta(0.6, 1.0, prompts)),
        "taste": rng.normal(3.5, 0.7, (prompts, 2)),
        "harm": np.where(unsafe, 0.5, 0.0),
        "light": rng.uniform(0.3, 0.7, (prompts, 1, 1, 1, 3)),
    }


def drawn(
    rng: np.random.Generator,
    hard: dict[str, np.ndarray],
    better: float = 0.0,
    alike: float = 1.0,
    own_prompts: Sequence[str] = NAMES,
) -> Evaluation:
    """What a model makes of it, which is right more often by `better` and varies within a prompt by `alike`."""
    prompts = len(hard["right"])
    right = rng.random((prompts, SEEDS)) < np.clip(hard["right"][:, None] + better, 0, 1)
    follows = np.where(right, 5, rng.integers(1, 5, right.shape))
    taste = hard["taste"][:, None] + 2 * better + rng.normal(0, 0.8, (prompts, SEEDS, 2))
    harm = np.where(rng.random(right.shape) < hard["harm"][:, None], 1, 5)
    ratings = np.stack([follows, *np.moveaxis(np.clip(np.round(taste), 1, 5), 2, 0), harm], 2).astype(int)
    pixels = hard["light"] + alike * rng.normal(0, 0.1, (prompts, SEEDS, 4, 4, 3))
    scores = ratings.mean(2) + rng.normal(0, 0.5, right.shape)
    flat = ratings.reshape(-1, 4)
    return Evaluation(
        [name for name in own_prompts[:prompts] for _ in range(SEEDS)],
        list(range(SEEDS)) * prompts,
        (255 * np.clip(pixels, 0, 1)).astype(np.uint8).reshape(-1, 4, 4, 3),
        scores.ravel(),
        flat,
        [("",) * 4] * len(flat),
        {"clip": (0.3 * scores + rng.normal(0, 0.3, right.shape)).ravel()},
    )


def watched(rng: np.random.Generator) -> list[Moment]:
    """Evaluations while a run that changes nothing trains."""
    hard = world(rng, 32)
    return [moment(4 * number, drawn(rng, hard), kl=1e-3) for number in range(4)]


def curve(
    rng: np.random.Generator, hard: dict[str, np.ndarray], known: dict[Side, Evaluation], **tuned: float
) -> list[GuidanceCurve]:
    """Of two models that are as good as each other at any scale, but for what is said of the tuned one.

    Each chooses its best scale by its own images of the same validation prompts, by luck often another one.
    """
    unseen = world(rng, CURVE.choosing)

    def make(side: Side, there: Evaluator, prompts: list[str]) -> Evaluation:
        kinds, own = (hard, PROMPTS) if prompts[0] in NAMES else (unseen, CURVE.choosing)
        better = OVER[there.sampler.guidance] + (tuned.get("better", 0.0) if side == "tuned" else 0.0)
        whole = drawn(rng, kinds, better, own_prompts=prompts)
        assert len(prompts) == own
        return whole if len(there.seeds) == SEEDS else whole.rows(range(0, SEEDS * own, SEEDS))

    return guidance_curves(TOOL, make, known, metric="mean_rating", trained=1.0)


def page(rng: np.random.Generator, history: Sequence[Moment] = (), **tuned: float) -> Conclusion:
    hard = world(rng)
    base, changed = drawn(rng, hard), drawn(rng, hard, **tuned)
    curves = curve(rng, hard, {"base": base, "tuned": changed}, **tuned)
    return conclude(TOOL, base, changed, history, curves=curves)


def says_that_something_changed(done: Conclusion) -> bool:
    """In any sentence, sign or colour."""
    found = done.compared
    parts = [found.changes, *found.categories.values(), found.pairs, *found.guided.values()]
    coloured = any(each.clear for part in parts for each in part.values())
    moods = {each.mood for each in verdicts(found, PROMPTS, done.signs, curve=done.curves[0])}
    assert coloured or done.signs or moods == {"even"}, "the cards say what nothing else does"
    return coloured or bool(done.signs) or moods != {"even"}


def false_alarms(pages: int, seed: int) -> int:
    rng = np.random.default_rng(seed)
    return sum(says_that_something_changed(page(rng, watched(rng))) for _ in range(pages))


def test_of_pages_on_which_nothing_changed_hardly_any_says_that_something_did() -> None:
    # Above 3 of Binomial(12, 0.05) are in 0.2% of cases. By single 95% intervals most pages say so.
    assert false_alarms(12, seed=1) <= 3


@pytest.mark.slow
def test_of_500_pages_on_which_nothing_changed_at_most_7_percent_say_that_something_did() -> None:
    # Binomial(500, 0.05) is above 35 in 2% of cases, were all of ALPHA used up.
    assert false_alarms(500, seed=2) <= 35


@pytest.mark.slow
def test_of_200_pages_of_the_base_against_the_base_at_most_7_percent_say_that_it_improved() -> None:
    """With the choice of each one's best scale among what is drawn anew: it is another one in half of the pages."""
    rng, improved, apart = np.random.default_rng(4), 0, 0
    for _ in range(200):
        done = page(rng)
        improved += verdicts(done.compared, PROMPTS, curve=done.curves[0])[0].answer == "Yes"
        apart += len(set(done.curves[0].chosen.values())) == 2
    assert improved <= 14
    assert apart > 40, "or the choice is no part of it"


def test_each_model_at_its_best_guidance_is_what_half_of_the_allowance_is_for() -> None:
    seen = Change(3.0, 3.5, 0.5, 0.1, 0.9, 0.6, 0.2, 0.2, chance=0.005)
    many = {str(number): replace(seen, chance=0.5) for number in range(60)} | {"mean_rating": seen}
    best = decide(many, guided={BEST: {"mean_rating": seen}, "at guidance 1": {"mean_rating": seen}})
    assert best.first["mean_rating"].clear
    assert not best.changes["mean_rating"].clear, "which is one of many, then"
    assert not best.guided["at guidance 1"]["mean_rating"].clear
    assert decide(many).first["mean_rating"].clear


def test_what_the_demo_changes_is_clear_all_the_same() -> None:
    """Some 20 points of fully correct images, and a diversity that is a tenth lower."""
    rng, clear = np.random.default_rng(3), []
    for _ in range(10):
        found = page(rng, better=0.2, alike=0.9).compared.changes
        wanted = {"reward": "up", "mean_rating": "up", "prompt_following": "up", "correct": "up"}
        wanted |= {"aesthetic": "up", "fidelity": "up", "look/diversity": "down"}
        clear += [found[name].direction == where for name, where in wanted.items()]
    assert np.mean(clear) > 0.95


def test_the_mean_rating_has_half_the_allowance_and_the_rest_share_the_other() -> None:
    chances = {"mean_rating": 0.03, "a": 0.02, "b": 0.4}
    assert holm(chances, "mean_rating") == pytest.approx({"mean_rating": 0.06, "a": 0.06, "b": 0.4})
    assert holm(chances) == pytest.approx({"mean_rating": 0.06, "a": 0.06, "b": 0.4})
    many = {"mean_rating": 0.02} | {str(number): 0.5 for number in range(60)}
    assert holm(many, "mean_rating")["mean_rating"] == pytest.approx(0.04)
    assert holm(many)["mean_rating"] == 1


def test_holms_chances_are_those_of_the_textbook() -> None:
    chances = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}
    assert holm(chances) == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})


def test_everything_that_the_tables_colour_is_counted_and_distance_which_is_never_0_is_not() -> None:
    rng = np.random.default_rng(0)
    hard = world(rng)
    base, tuned = drawn(rng, hard), drawn(rng, hard)
    changes = compare(base, tuned)
    names = counted(changes, {"size": changes})
    assert {name for part, name in names if part == ""} == changes.keys() - {"look/distance"}
    assert {name for part, name in names if part == "size"} == LEVELS
    curves = curve(rng, hard, {"base": base, "tuned": tuned})
    more = counted(changes, {"size": changes}, guided=together(curves))
    assert len(more) - len(names) == len(METRICS) * (1 + len(curves[0].scales))
    assert not decide(changes).changes["look/distance"].clear


@pytest.mark.parametrize("seed", range(12))
def test_the_card_names_all_that_the_tables_show_as_worse_and_nothing_else(seed: int) -> None:
    rng = np.random.default_rng(seed)
    better, alike = rng.uniform(-0.3, 0.3), rng.uniform(0.4, 1.2)
    found = page(rng, better=better, alike=alike).compared
    worse = verdicts(found, PROMPTS)[1]
    fell = [name for name, each in found.changes.items() if each.direction == "down" and not name.startswith(LOOK)]
    fell += [part for part, own in found.categories.items() if any(c.direction == "down" for c in own.values())]
    less = [name for name in ALIKE if found.changes[name].direction == "down"]
    assert worse.answer == ("Yes" if fell else "Images became more alike" if less else "Not clearly")
    assert ("No rating or reward clearly fell" in worse.sentence) == (not fell)
    assert ("diversity within a prompt" in worse.sentence.lower()) == ("look/diversity" in less)


def test_alpha_is_the_5_percent_that_the_page_says() -> None:
    assert ALPHA == 0.05
