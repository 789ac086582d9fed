"""A base model and its adapter over guidance scales: chosen on validation, from the same noise, best against best."""

import dataclasses
import logging
from collections.abc import Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from test_callbacks import fit, metrics, summary
from test_evaluation import Bright, Brightness, BrightnessJudge, Prompts

from vp_rl.algorithms.refl import ReFL
from vp_rl.callbacks.held_out import HeldOutEvaluation
from vp_rl.evaluation.best_of import expected_best
from vp_rl.evaluation.claims import BEST, Compared
from vp_rl.evaluation.compare import Change, compare_metrics
from vp_rl.evaluation.curve_settings import CurveSettings
from vp_rl.evaluation.guidance_curve import METRICS, GuidanceCurve, Side, guidance_curves, without_curve
from vp_rl.evaluation.images import Evaluation, Evaluator
from vp_rl.evaluation.verdict import verdicts
from vp_rl.policies.flux import Flux
from vp_rl.sampler import Sampler
from vp_rl.types import Conditioning, Latents

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),  # Lightning 2.6 with torch 2.13
    pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode"),  # the reward is frozen, and it stays so
]
PLAIN = Sampler(steps=3, guidance=1.0, eta=0.0)
CURVE = CurveSettings(candidates=(1.0, 2.0, 3.0), choosing=4, prompts=5)
PROMPTS = Prompts(6)


class Steered(Bright):
    """Brightest at a guidance scale of its own, which is another one with its adapter."""

    def __init__(self, base: float = 2.0, tuned: float = 3.0) -> None:
        super().__init__()
        self.best = {False: base, True: tuned}
        self.made: list[tuple[bool, float, int]] = []

    def predict(self, latents: Latents, timestep: torch.Tensor, conditioning: Conditioning, guidance: float) -> Latents:
        self.made.append((self.on, guidance, len(latents)))
        found = super().predict(latents, timestep, conditioning, guidance)
        return found + 0.8 - 0.2 * abs(guidance - self.best[self.on])

    def images(self, *, on: bool) -> int:
        """How many have been made."""
        return sum(number for side, _, number in self.made if side == on) // PLAIN.steps


def tool(curve: CurveSettings | None = CURVE, sampler: Sampler = PLAIN, **settings: Any) -> Evaluator:
    given = {"seeds": (0, 1, 2, 3), "curve": curve} | settings
    return Evaluator(settings.pop("prompts", PROMPTS), BrightnessJudge(), sampler, **given)


def drawn(
    policy: Steered, evaluator: Evaluator, trained: float | None = None, *, rewarded: bool = True
) -> list[GuidanceCurve]:
    """Curves of the policy without and with its adapter."""

    def make(side: Side, there: Evaluator, prompts: list[str]) -> Evaluation:
        policy.on = side == "tuned"
        pixels = there.make(policy, prompts)
        return there.judge(pixels, Brightness() if rewarded else None, prompts, torch.device("cpu"))

    there: dict[Side, Evaluation | None] = {
        side: make(side, evaluator, evaluator.prompts) for side in ("base", "tuned")
    }
    policy.made = []
    return guidance_curves(evaluator, make, there, metric="mean_rating", trained=trained)


def at(policy: Bright, on: bool, sampler: Sampler, prompts: Sequence[str], seeds: Sequence[int]) -> Evaluation:
    """What a model makes, evaluated by itself."""
    policy.on = on
    return Evaluator(PROMPTS, BrightnessJudge(), sampler, seeds=seeds).evaluate(policy, Brightness(), prompts)


def test_best_against_best_and_each_scale_are_comparisons_of_the_same_prompts_and_noise() -> None:
    policy, evaluator = Steered(base=2.0, tuned=3.0), tool()
    (curve,) = drawn(policy, evaluator, trained=1.5)
    assert curve.chosen == {"base": 2.0, "tuned": 3.0}
    assert list(curve.scales) == [1.0, 1.5, 2.0, 3.0, 7.5]
    for scale, own in curve.scales.items():
        few = scale != 1.0  # the evaluation's own is there already, whole
        prompts, seeds = (evaluator.prompts[:5], (0,)) if few else (evaluator.prompts, (0, 1, 2, 3))
        sampler = dataclasses.replace(PLAIN, guidance=scale)
        base, tuned = (at(policy, on, sampler, prompts, seeds) for on in (False, True))
        expected = compare_metrics(base, tuned)
        assert own == {name: expected[name] for name in METRICS}, scale
        assert curve.images[scale] == (5 if few else 24)
    pair = (
        at(policy, on, dataclasses.replace(PLAIN, guidance=scale), evaluator.prompts, (0, 1, 2, 3))
        for on, scale in ((False, 2.0), (True, 3.0))
    )
    assert curve.best == {name: each for name, each in compare_metrics(*pair).items() if name in METRICS}
    assert curve.images[None] == 24


def test_a_base_model_against_itself_has_not_changed_at_any_scale() -> None:
    (curve,) = drawn(Steered(base=2.0, tuned=2.0), tool())
    assert curve.chosen == {"base": 2.0, "tuned": 2.0}
    for own in curve.parts().values():
        assert {(each.difference, each.tie) for each in own.values()} == {(0.0, 1.0)}


def test_the_best_scales_are_chosen_on_validation_prompts_and_no_other() -> None:
    evaluator, seen = tool(), set[str]()

    def make(side: Side, there: Evaluator, prompts: list[str]) -> Evaluation:
        seen.update(prompts) if prompts[0].startswith("validation") else None
        best = {"base": 2.0, "tuned": 3.0}[side] if prompts[0].startswith("validation") else 1.0
        level = 5 if there.sampler.guidance == best else 2
        names = [prompt for prompt in prompts for _ in there.seeds]
        pixels = np.zeros((len(names), 4, 4, 3), np.uint8)
        return Evaluation(names, list(there.seeds) * len(prompts), pixels, None, np.full((len(names), 4), level),
                          [("",) * 4] * len(names))  # fmt: skip

    known: dict[Side, Evaluation | None] = {
        side: make(side, evaluator, evaluator.prompts) for side in ("base", "tuned")
    }
    (curve,) = guidance_curves(evaluator, make, known, metric="mean_rating", trained=None)
    assert curve.chosen == {"base": 2.0, "tuned": 3.0}, "though on the test prompts both are best at 1"
    assert seen == set(evaluator.watched[:4])
    assert curve.validation["base"] == {1.0: 2.0, 2.0: 5.0, 3.0: 2.0}


def test_what_is_there_is_not_made_again_and_the_rest_is_what_was_asked_for() -> None:
    policy, sampler = Steered(base=2.0, tuned=3.0), dataclasses.replace(PLAIN, guidance=2.0)
    curves = drawn(policy, tool(CurveSettings((1.0, 2.0), (2.0, 3.0), 4, 5), sampler))
    assert list(curves[0].scales) == [1.0, 2.0, 3.0], "each model's best is among them"
    made = {(on, scale): 0 for on in (False, True) for scale in (1.0, 2.0, 3.0)}
    for on, scale, number in policy.made:
        made[on, scale] += number
    made = {key: number // PLAIN.steps for key, number in made.items()}
    # 4 to choose by; of the base at 2 all is there; the adapter's best at 3 has 6 x 4; else 5 prompts of one seed.
    base, tuned = {1.0: 5, 2.0: 4, 3.0: 4 + 5}, {1.0: 5, 2.0: 4, 3.0: 4 + 24}
    assert made == {(on, scale): own[scale] for on, own in ((False, base), (True, tuned)) for scale in own}
    most = CurveSettings((1.0, 2.0), (2.0, 3.0), 4, 5).most_images(prompts=6, watched=6, seeds=4)
    assert sum(made.values()) <= most == 2 * (2 * 4 + 6 * 4 + 4 * 5)


def test_other_rewards_of_the_evaluation_are_left_out() -> None:
    """They cost what scoring costs, and nothing is said of them."""
    (curve,) = drawn(Steered(base=1.0, tuned=3.0), tool(panel={"dark": Brightness()}))
    assert curve.chosen == {"base": 1.0, "tuned": 3.0}, "so of one model all is there, and of the other nothing"
    assert set(curve.best) == set(METRICS)


def test_a_curve_is_drawn_for_each_amount_of_noise() -> None:
    first, second = drawn(Steered(), tool(dataclasses.replace(CURVE, etas=(0.0, 1.0))))
    assert (first.sampler.eta, second.sampler.eta) == (0.0, 1.0)
    assert first.best != second.best
    assert not first.parts().keys() & second.parts().keys()
    assert BEST in first.parts()


def test_processes_without_the_main_ones_findings_make_their_share_of_the_same_images() -> None:
    evaluator, seen = tool(), list[tuple[Side, float, int]]()

    def make(side: Side, there: Evaluator, prompts: list[str]) -> None:
        seen.append((side, there.sampler.guidance, len(prompts)))

    main = Steered(base=2.0, tuned=3.0)
    (curve,) = drawn(main, evaluator)
    told = iter(curve.chosen.values())
    found = guidance_curves(
        evaluator, make, {"base": None, "tuned": None}, metric="mean_rating", trained=None, agree=lambda _: next(told)
    )
    assert found == []
    images = sum(number * (4 if number == 6 else 1) for _, _, number in seen)
    assert images == main.images(on=True) + main.images(on=False)


@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_the_expected_best_is_the_mean_over_all_choices(number: int) -> None:
    rng = np.random.default_rng(0)
    values, scores = rng.normal(size=(7, 5)), rng.normal(size=(7, 5))
    chosen = [list(each) for each in combinations(range(5), number)]
    brute = np.mean([[v[c][s[c].argmax()] for c in chosen] for v, s in zip(values, scores, strict=True)], axis=1)
    np.testing.assert_allclose(expected_best(values, scores, number), brute, rtol=1e-12)


def test_best_of_n_is_the_base_at_its_best_against_one_image_of_the_adapter() -> None:
    policy, evaluator = Steered(base=2.0, tuned=3.0), tool()
    (curve,) = drawn(policy, evaluator)
    assert list(curve.best_of) == [2, 4]
    base, tuned = (
        at(policy, on, dataclasses.replace(PLAIN, guidance=scale), evaluator.prompts, (0, 1, 2, 3))
        for on, scale in ((False, 2.0), (True, 3.0))
    )
    assert base.scores is not None
    four = curve.best_of[4]["reward"]
    assert four.base == pytest.approx(base.scores.reshape(-1, 4).max(1).mean())
    assert four.tuned == pytest.approx(curve.best["reward"].tuned)
    assert tuned.scores is not None
    assert curve.best["reward"].base < curve.best_of[2]["reward"].base < four.base
    assert not any(own in curve.parts().values() for own in curve.best_of.values()), "several are better, by no merit"
    (single,) = drawn(policy, tool(seeds=(0,)))
    assert single.best_of == {}


def test_without_a_reward_there_is_no_best_of_n() -> None:
    (curve,) = drawn(Steered(), tool(), rewarded=False)
    assert curve.best_of == {}
    assert "reward" not in curve.best


def test_models_without_guidance_and_prompts_without_a_choice_have_no_curve() -> None:
    policy = Steered()
    assert without_curve(tool(), policy) is None
    assert without_curve(tool(curve=None), policy) == ""
    assert "would be chosen by prompts" in (without_curve(tool(watch="test"), policy) or "")
    policy.guided = False
    assert "distilled" in (without_curve(tool(), policy) or "")
    assert not Flux.guided


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"scales": (0.5,)}, "scales has 0.5"),
        ({"candidates": ()}, "candidates is empty"),
        ({"choosing": 0}, "choosing=0"),
    ],
)
def test_curves_that_cannot_be_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        CurveSettings(**settings)


# --- what is said of it

EVEN = Change(3.0, 3.0, 0.0, -0.1, 0.1, 0.3, 0.4, 0.3)
UP = dataclasses.replace(EVEN, difference=0.5, low=0.4, high=0.6, clear=True)
DOWN = dataclasses.replace(EVEN, difference=-0.5, low=-0.6, high=-0.4, clear=True)


def made_up(best: Change, **scales: Change) -> GuidanceCurve:
    """Of changes that are clear already."""
    own = {
        float(name.strip("_").replace("_", ".")): {"mean_rating": each, "correct": EVEN}
        for name, each in scales.items()
    }
    return GuidanceCurve(
        sampler=PLAIN,
        metric="mean_rating",
        split="validation",
        choosing=64,
        chosen={"base": 2.0, "tuned": 1.5},
        validation={"base": {}, "tuned": {}},
        best={"mean_rating": best, "correct": EVEN},
        scales=own,
        best_of={2: {"mean_rating": UP, "correct": UP}, 4: {"mean_rating": UP, "correct": UP}},
        images=dict.fromkeys([None, *own], 128),
    )


def said(curve: GuidanceCurve, evaluated: Change) -> tuple[str, str, str]:
    compared = Compared(
        {"mean_rating": evaluated, "correct": EVEN}, {}, {}, {k: dict(v) for k, v in curve.parts().items()}
    )
    first, second, _ = verdicts(compared, 128, curve=curve)
    return first.answer, first.sentence, second.sentence


def test_whether_it_improved_is_said_of_each_model_at_its_best_guidance() -> None:
    answer, sentence, _ = said(made_up(EVEN, _1=UP, _7_5=DOWN, _2=EVEN), evaluated=UP)
    assert answer == "Not clearly", "though it did as it was evaluated"
    assert "each model at its best guidance (base 2, trained 1.5, chosen on validation prompts)" in sentence
    assert "clearly worse at 7.5." in sentence
    answer, sentence, worse = said(made_up(UP, _1=UP, _2=EVEN), evaluated=EVEN)
    assert answer == "Yes"
    assert "clearly worse at none of 1 and 2." in sentence
    assert "No rating or reward clearly fell" in worse
    _, _, worse = said(made_up(UP, _1=UP, _7_5=DOWN), evaluated=UP)
    assert "The judge's mean rating at guidance 7.5 fell by 0.50" in worse


# --- at the end of a run


def watching(folder: Path, policy: Steered, model: str = "a", **settings: Any) -> None:
    """A run that learns brightness."""
    module = ReFL(policy, Brightness(), PLAIN, partial(torch.optim.SGD, lr=0.5), reward_weight=1.0)
    watch = HeldOutEvaluation(tool(), **({"every": 2, "small": 3} | settings))
    watch.settings = {"policy": {"path": model}, "reward": {"name": "brightness"}}
    fit(folder, [watch], epochs=2, module=module, logger=CSVLogger(folder, name="", version=""))


def test_a_run_ends_with_its_curve_in_summary_report_and_log(tmp_path: Path) -> None:
    watching(tmp_path, Steered())
    found = summary(tmp_path)["guidance_curve"]
    assert found["best"] == {"base": 2.0, "tuned": 3.0}
    assert set(found["scales"]) == {"1", "2", "3", "7.5"}
    row = next(each for each in metrics(tmp_path) if each.get("final/best/mean_rating"))
    best = found["best_against_best"]["mean_rating"]
    assert float(row["final/best/mean_rating"]) == pytest.approx(best["difference"], abs=1e-5)
    assert (float(row["final/best/base_guidance"]), float(row["final/best/tuned_guidance"])) == (2.0, 3.0)
    assert float(row["final/guidance_7.5/correct"]) == pytest.approx(found["scales"]["7.5"]["correct"]["difference"])
    assert "final/best_of_4/mean_rating" in row
    page = (tmp_path / "report.html").read_text()
    assert page.index("Over guidance scales") < page.index('<h2 id="images">')
    assert "base 2, trained 3" in page
    assert page.count("<svg") >= 2


def test_a_second_run_of_the_same_base_makes_no_image_of_it_again(tmp_path: Path) -> None:
    cache, first, second, other = str(tmp_path / "c.sqlite"), Steered(), Steered(), Steered(base=3.0)
    watching(tmp_path / "1", first, cache=cache)
    watching(tmp_path / "2", second, cache=cache)
    assert first.images(on=False) > 0 == second.images(on=False)
    assert second.images(on=True) == first.images(on=True)
    for part in ("guidance_curve", "held_out"):
        assert summary(tmp_path / "1")[part] == summary(tmp_path / "2")[part]
    watching(tmp_path / "3", other, model="b", cache=cache)
    assert other.images(on=False) > 0, "another model has images of its own"
    assert summary(tmp_path / "3")["guidance_curve"]["best"]["base"] == 3.0


def test_a_model_without_guidance_ends_without_a_curve_and_one_line_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vp_rl")
    policy = Steered()
    policy.guided = False
    watching(tmp_path, policy)
    assert "guidance_curve" not in summary(tmp_path)
    assert sum("no guidance curve" in each.getMessage() for each in caplog.records) == 1
    assert "Over guidance scales" not in (tmp_path / "report.html").read_text()
