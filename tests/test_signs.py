"""Signs of an exploited reward: said where they are there, not said of noise; intervals that keep their promise."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from test_callbacks import fit, metrics, summary
from test_evaluation import SAMPLER, Bright, Brightness, BrightnessJudge, Prompts, evaluator, made_up

from scripts.export_adapter import write as export
from scripts.run_settings import find
from vp_rl.algorithms.refl import ReFL
from vp_rl.annotators.answers import write_ratings
from vp_rl.callbacks.adapter import RunAdapter
from vp_rl.callbacks.best import BestAdapter
from vp_rl.callbacks.held_out import HeldOutEvaluation
from vp_rl.evaluation.claims import decide
from vp_rl.evaluation.compare import change, compare
from vp_rl.evaluation.images import Evaluator
from vp_rl.evaluation.signs import Moment, Sign, _since_the_best, signs
from vp_rl.evaluation.signs import summary as told
from vp_rl.interfaces import Annotator, PromptSource
from vp_rl.types import Answer, Aspect, Rating, Split

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),  # Lightning 2.6 with torch 2.13
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),  # as resuming has it
    pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode"),  # the reward is frozen, and it stays so
]


class Sole(PromptSource):
    """Prompts to test alone."""

    def split(self, name: Split) -> list[str]:
        return ["a", "b"] if name == "test" else []


LOOKS = ("brightness", "contrast", "colour", "sharpness", "repetition", "diversity", "spread")


def moments(
    kl: list[float] | None = None, prompts: int = 32, noise: float = 0.1, **curves: list[float]
) -> list[Moment]:
    """A history whose metrics have these means; a prompt's noise is mostly the same in every evaluation."""
    rng = np.random.default_rng(0)
    number = len(next(iter(curves.values())))
    all_curves = {f"look/{name}": [1.0] * number for name in LOOKS} | {"mean_rating": [3.0] * number} | curves
    all_curves = {name.replace("look_", "look/").replace("panel_", "panel/"): each for name, each in all_curves.items()}
    level = {name: rng.normal(0, noise, prompts) for name in all_curves}
    return [
        Moment(
            4 * number,
            {
                name: (each[number] + level[name] + rng.normal(0, noise / 4, prompts)).tolist()
                for name, each in all_curves.items()
            },
            None if kl is None else kl[number],
        )
        for number in range(number)
    ]


def words(found: list[Sign]) -> str:
    return " | ".join(f"{sign.severity}@{sign.epoch}: {sign.words}" for sign in found)


def test_the_reward_that_rises_while_the_judge_falls_is_told_with_the_best_epoch() -> None:
    found = signs(moments(reward=[0, 0.4, 0.8, 1.2], mean_rating=[3.0, 3.3, 3.2, 2.9]), reward="VP-Score")
    (sign,) = found
    assert (sign.severity, sign.epoch) == ("warning", 4)
    assert "VP-Score went +0.8" in sign.words
    assert "judge's mean rating went -0.4" in sign.words
    assert "the best by it is epoch 4" in sign.words


def test_a_falling_panel_is_told_by_its_name() -> None:
    found = signs(moments(reward=[0, 1, 2], panel_pick=[0.5, 0.4, 0.1]))
    assert "pick went -0.4" in words(found)
    assert "the untrained model is the best by it" in words(found)


@pytest.mark.parametrize(
    "curves",
    [
        {"reward": [0, 1, 2], "mean_rating": [3, 3.5, 4]},  # both rise
        {"reward": [0, -1, -2], "mean_rating": [3, 2.5, 2]},  # both fall: not the reward's exploitation
        {"reward": [0, 1, 2], "mean_rating": [3, 3, 3]},
        {"reward": [0.0]},
    ],
)
def test_nothing_is_said_of_a_healthy_run(curves: dict[str, list[float]]) -> None:
    assert signs(moments(**curves)) == []


def test_noise_alone_is_hardly_ever_a_warning() -> None:
    rng, told_of = np.random.default_rng(3), 0
    for _ in range(100):
        history = []
        for epoch in range(6):  # the reward rises for sure; judge and two of a panel do nothing
            values = {f"look/{name}": rng.normal(1, 0.05, 32).tolist() for name in LOOKS}
            values |= {name: rng.normal(3, 0.5, 32).tolist() for name in ("mean_rating", "panel/a", "panel/b")}
            history.append(Moment(epoch, values | {"reward": rng.normal(epoch, 0.1, 32).tolist()}))
        told_of += bool(signs(history))
    # Half of 1% for all three together, of which one side counts: above 3 of Binomial(100, 0.005) are once in 500. The
    # best of five evaluations against the last, with no care for how it was chosen, is told of in about 12.
    assert told_of <= 3


def test_the_comparison_with_the_best_is_as_just_as_one_with_the_base() -> None:
    rng, gains = np.random.default_rng(0), []
    for _ in range(200):
        history = [Moment(epoch, {"mean_rating": rng.normal(size=16).tolist()}) for epoch in range(9)]
        gains.append(_since_the_best(history, "mean_rating", "mean_rating")[0])
    # A gain is a mean of 16 differences of two normal values: its standard deviation is sqrt(2 / 16). The best of eight
    # means is 1.42 of their standard deviations too good.
    assert abs(np.mean(gains)) < 4 * (2 / 16 / 200) ** 0.5 < 1.42 / 16**0.5 / 2


def test_more_repetition_is_a_note_and_less_is_none() -> None:
    curves = {"reward": [0, 0], "noise": 0.02}
    (sign,) = signs(moments(look_repetition=[0.1, 0.35], **curves))
    assert (sign.severity, sign.epoch) == ("note", 4)
    assert "35%" in sign.words
    assert "10% of the base" in sign.words
    assert signs(moments(look_repetition=[0.35, 0.1], **curves)) == []
    assert signs(moments(look_repetition=[0.1, 0.15], **curves)) == [], "too little"


def test_images_that_become_alike_are_told_since_when() -> None:
    found = signs(moments(reward=[0, 0, 0, 0], look_diversity=[1, 0.9, 0.6, 0.4], noise=0.02))
    assert words(found).startswith("warning@8: Images of one prompt have become alike")
    assert "60% below" in words(found)
    found = signs(moments(reward=[0, 0, 0, 0], look_spread=[1, 0.6, 0.5, 0.5], noise=0.02))
    assert words(found).startswith("warning@4: Images of different prompts have become alike")


def test_drift_in_colour_is_a_note() -> None:
    assert words(signs(moments(reward=[0, 0], look_colour=[1, 1.5], noise=0.02))).startswith(
        "note@4: Images changed in colour"
    )


@pytest.mark.parametrize(
    ("kl", "said"),
    [
        ([0.0, 0.01, 0.7], "warning@8: The KL"),
        ([0.0, 0.01, float("nan")], "warning@8: The KL"),
        ([0.0, 0.001, 0.02], "note@8: The KL to the base model jumped"),
        ([0.0, 0.01, 0.02], ""),
    ],
)
def test_a_kl_that_explodes_is_told(kl: list[float], said: str) -> None:
    assert words(signs(moments(kl, reward=[0, 0, 0])))[: len(said) or None] == said


def test_the_final_comparison_is_looked_at_too() -> None:
    base, tuned = made_up(np.full((20, 2), 0.5))
    tuned.ratings[:] = 2
    (sign,) = (each for each in signs([], decide(compare(base, tuned)).changes) if each.severity == "warning")
    assert sign.epoch is None
    assert "likely over-optimised" in sign.words
    assert signs([], decide(compare(base, base)).changes) == []
    assert signs([], compare(base, tuned)) == [], "nothing of it has been decided"


def test_the_history_is_told_with_intervals() -> None:
    rows = told(moments(reward=[0, 1], kl=[0.0, 0.5]))
    assert [row["epoch"] for row in rows] == [0, 4]
    assert rows[1]["kl"] == 0.5
    assert rows[1]["reward"]["low"] < 1 < rows[1]["reward"]["high"]
    assert rows[0]["reward"]["difference"] == rows[0]["reward"]["high"] == 0


class DarkJudge(Annotator):
    """5 for black to 1 for white: brightness, which is trained for here, is nothing that it wants."""

    name, version, concurrency = "dark", "1", 4

    def __init__(self) -> None:
        self._other = BrightnessJudge()

    async def ask(self, prompt: str, images: list[bytes], aspect: Aspect) -> Answer:  # type: ignore[override]
        bright = await self._other.annotate(prompt, images, aspect)
        return Answer(write_ratings([Rating(6 - each.rating, each.rationale) for each in bright]))

    def read(self, answer: str, images: int) -> list[Rating]:
        return self._other.read(answer, images)


def watching(**settings: object) -> HeldOutEvaluation:
    """A judge who likes it dark."""
    tool = Evaluator(Prompts(), DarkJudge(), SAMPLER, seeds=(0, 1))
    return HeldOutEvaluation(tool, every=1, small=12, **settings)  # type: ignore[arg-type]


def exploited(folder: Path, *callbacks: lightning.Callback, epochs: int = 6, **settings: Any) -> lightning.Trainer:
    """Trains for brightness."""
    module = ReFL(Bright(), Brightness(), SAMPLER, partial(torch.optim.SGD, lr=1.0), reward_weight=1.0)
    logger = CSVLogger(folder, name="", version="")
    return fit(folder, list(callbacks), epochs=epochs, module=module, logger=logger, **settings)


def test_training_against_a_hackable_reward_is_found_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "vp_rl")
    exploited(tmp_path, watching())
    said = [each.getMessage() for each in caplog.records if "over-optimised" in each.getMessage()]
    assert len(said) == 1, "once a run"
    assert "the trained reward (Brightness) went +" in said[0]
    assert "the untrained model is the best by it" in said[0]
    rows = [float(row["held_out/signs"]) for row in metrics(tmp_path) if row.get("held_out/signs")]
    assert rows[0] == 0 or rows[-1] > 0
    assert rows[-1] >= 1
    found = summary(tmp_path)["signs"]
    assert any("On the final prompts" in each["words"] and each["severity"] == "warning" for each in found)
    page = (tmp_path / "report.html").read_text()
    assert "likely over-optimised" in page


def test_training_stops_when_the_judge_has_not_been_better_for_a_while(tmp_path: Path) -> None:
    trainer = exploited(tmp_path, watching(best="mean_rating", patience=2), epochs=20)
    found = summary(tmp_path)
    assert trainer.current_epoch == found["best"]["epoch"] + 2 < 20
    # What is kept is the best by the judge, not the last, which is brighter.
    kept = torch.load(tmp_path / "below_base" / "shift.pt", weights_only=True)
    last = trainer.lightning_module.policy.shift  # type: ignore[union-attr]
    assert 0 < kept.item() < last.item()


def test_where_no_epoch_beats_the_base_there_is_no_adapter_and_everybody_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    exploited(tmp_path, RunAdapter(), watching(best="mean_rating"), epochs=2)
    best, said = summary(tmp_path)["best"], "On validation no epoch beats the base model by mean of the four"
    first, *others = (row["mean_rating"]["mean"] for row in summary(tmp_path)["history"])
    assert best["base"] == pytest.approx(first)
    assert best["base"] > best["value"] == pytest.approx(max(others))
    assert best["beats_base"] is False
    assert not (tmp_path / "adapter").exists()
    assert not (tmp_path / "best").exists()
    assert (tmp_path / "below_base" / "shift.pt").is_file()
    printed = capsys.readouterr().out
    assert said in printed
    last = printed.strip().splitlines()[-1]
    assert last.startswith("Adapter: none, since on validation no epoch beats the base model")
    assert last.endswith(f"The best trained one: {tmp_path / 'below_base'}")
    page = (tmp_path / "report.html").read_text()
    assert said in page
    assert "load_lora_weights(&#34;below_base&#34;)" in page
    assert "hf upload" not in page
    why = (
        f"no epoch beats the base model .{best['value']:.2f} at best, base {best['base']:.2f}, by mean_rating.* rename"
    )
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "config.yaml").write_text("policy: {path: tiny-sd}")
    for given in (tmp_path, tmp_path / "adapter"):
        with pytest.raises(FileNotFoundError, match=why):
            find(given)
    with pytest.raises(FileNotFoundError, match=why):
        export(tmp_path, "kohya", tmp_path / "exported")
    assert find(tmp_path / "below_base")[0] == tmp_path / "below_base"
    (tmp_path / "below_base").rename(tmp_path / "adapter")
    assert find(tmp_path)[0] == tmp_path / "adapter"


def test_the_best_is_called_so_once_it_beats_the_base(tmp_path: Path) -> None:
    best, policy = BestAdapter("reward", patience=None), Bright()
    best.base = 0.5
    for epoch, (value, name) in enumerate([(0.4, "below_base"), (0.5, "below_base"), (0.6, "best")], 1):
        assert best.see(value, epoch, policy)
        best.save(tmp_path, policy)
        assert [folder.name for folder in tmp_path.iterdir()] == [name]
        assert best.beats_base == (name == "best")


def test_a_resumed_run_has_the_best_adapter_of_before_in_another_folder_too(tmp_path: Path) -> None:
    whole, parts, moved = tmp_path / "whole", tmp_path / "parts", tmp_path / "moved"
    exploited(whole, watching(best="mean_rating"), epochs=4)
    half, rest = ModelCheckpoint(parts, "half"), ModelCheckpoint(moved, "rest")
    exploited(parts, watching(best="mean_rating"), half, epochs=2, enable_checkpointing=True)
    callbacks = watching(best="mean_rating"), rest
    exploited(moved, *callbacks, epochs=4, resume=parts / "half.ckpt", enable_checkpointing=True)
    for part in ("best", "held_out", "history", "signs"):
        assert summary(moved)[part] == summary(whole)[part], part
    assert summary(whole)["best"]["epoch"] <= 2, "what is to be kept is of before"
    assert torch.equal(*(torch.load(run / "below_base" / "shift.pt", weights_only=True) for run in (whole, moved)))


def test_a_run_that_had_stopped_early_stays_so_when_it_is_resumed(tmp_path: Path) -> None:
    def stopping(folder: Path, **settings: Any) -> lightning.Trainer:
        callbacks = watching(best="mean_rating", patience=1), ModelCheckpoint(folder, "end")
        return exploited(folder, *callbacks, epochs=9, enable_checkpointing=True, **settings)

    first, again = tmp_path / "first", tmp_path / "again"
    epochs = stopping(first).current_epoch
    assert stopping(again, resume=first / "end.ckpt").current_epoch == epochs < 9
    assert summary(again)["held_out"] == summary(first)["held_out"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"patience": 2}, "needs a metric"),
        ({"patience": 0, "best": "reward"}, "at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        watching(**settings)


def test_nothing_is_chosen_by_the_prompts_that_the_result_is_measured_on() -> None:
    tool = evaluator(watch="test")
    with pytest.raises(ValueError, match="another split than evaluation.split"):
        HeldOutEvaluation(tool, every=1, small=4, best="reward")
    HeldOutEvaluation(tool, every=1, small=4)
    with pytest.raises(ValueError, match="where none is"):
        HeldOutEvaluation(evaluator(Sole(), watch="validation"), every=1, small=4)


def test_what_is_no_number_is_not_the_best() -> None:
    best, policy = BestAdapter("reward", patience=1), Bright()
    assert best.see(0.5, 1, policy)
    assert not best.see(float("nan"), 2, policy)
    assert (best.epoch, best.exhausted) == (1, True)


def test_a_policy_that_is_divided_among_devices_is_refused() -> None:
    trainer = lightning.Trainer(accelerator="cpu", strategy=ModelParallelStrategy(), logger=False)
    with pytest.raises(ValueError, match="callbacks.held_out=null"):
        watching().setup(trainer, lightning.LightningModule(), "fit")


def test_evaluations_of_other_prompts_or_metrics_cannot_be_compared() -> None:
    two = Moment(0, {"reward": [0.1, 0.2]})
    assert two.is_like(Moment(1, {"reward": [0.3, 0.4]}))
    assert not two.is_like(Moment(1, {"reward": [0.3]}))
    assert not two.is_like(Moment(1, {"reward": [0.3, 0.4], "panel/clip": [0.3, 0.4]}))


def test_a_metric_that_there_is_none_of_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="panel/absent.* is none of reward, prompt_following"):
        exploited(tmp_path, watching(best="panel/absent"))


def honest(seeds: int, prompts: int = 16) -> float:
    """Share of comparisons of the base with itself, under other seeds, whose interval excludes 0."""
    tool = evaluator(Prompts(prompts), seeds=range(2 * seeds))
    pixels = tool.make(Bright(), tool.prompts).reshape(prompts, 2 * seeds, 16, 16, 3)
    light = pixels.mean((2, 3, 4)) / 255
    contrast = pixels.astype(float).std((2, 3, 4))
    rating = 1.0 + np.minimum(4, (light * 40).astype(int) % 5)  # steps, as judges rate
    prompt = np.arange(prompts).repeat(2)
    found = []
    for values in (light, contrast, rating):
        for first in range(0, 2 * seeds - 3, 4):  # two seeds a side
            sides = (values[:, first + 2 * side : first + 2 * side + 2].reshape(-1) for side in (0, 1))
            own = change(*sides, prompt)
            found.append(own.low > 0 or own.high < 0)
    return float(np.mean(found))


def test_the_base_against_itself_under_other_seeds_is_rarely_significant() -> None:
    assert honest(100) <= 0.07  # 50 comparisons of three metrics


@pytest.mark.slow
def test_of_200_comparisons_of_the_base_with_itself_at_most_7_percent_are_significant() -> None:
    assert honest(400) <= 0.07
