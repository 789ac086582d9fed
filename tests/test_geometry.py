"""How updates are cut to devices: the work is the same on any number of them, and what cannot be is told."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from fakes import LinearPolicy, QuadraticReward
from methods import METHODS
from peft import LoraConfig

from vp_rl.algorithms.ddpo import DDPO
from vp_rl.algorithms.phases import Cut
from vp_rl.algorithms.refl import ReFL
from vp_rl.planning import fit
from vp_rl.planning.geometry import Geometry, Plan, divisors, solve
from vp_rl.planning.plan import Planner
from vp_rl.planning.shown import rows
from vp_rl.policies.sd import StableDiffusion
from vp_rl.rewards.vp_score import VPScore
from vp_rl.sampler import Sampler

PUBLISHED = Geometry(images_per_update=64, updates=4, cut=Cut(images_per_prompt=16, examples=50))  # ddpo-pytorch's


@pytest.mark.parametrize("devices", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("inner_epochs", [1, 2])
def test_all_devices_together_do_the_same_work_whatever_their_number(devices: int, inner_epochs: int) -> None:
    geometry = replace(PUBLISHED, cut=PUBLISHED.cut._replace(passes=inner_epochs))
    plan = solve(geometry, devices, train_limit=4, sample_limit=8)
    assert plan.load.prompts * devices // plan.devices_per_prompt == 16
    assert plan.load.prompts * 16 // plan.devices_per_prompt == plan.load.images
    assert plan.load.images * devices == 256
    assert plan.load.train_batch * plan.accumulate * devices == 64 * 50
    micro_batches = plan.load.images * 50 * inner_epochs // plan.load.train_batch
    assert micro_batches == plan.accumulate * plan.updates_per_round  # a round ends with an update
    assert plan.load.train_batch <= 4
    assert plan.load.sample_batch <= 8


@pytest.mark.parametrize("devices", [1, 2, 4, 8, 16])
def test_with_branches_a_prompt_is_one_state_of_each_device_that_has_it(devices: int) -> None:
    geometry = Geometry(images_per_update=64, updates=2, cut=Cut(images_per_prompt=16, whole_prompts=True))
    plan = solve(geometry, devices, 64, 64)
    assert plan.load.prompts * devices // plan.devices_per_prompt == 8
    assert plan.load.train_batch * plan.accumulate * 2 == plan.load.prompts


def test_few_devices_share_no_prompts_and_more_than_there_are_prompts_do() -> None:
    assert solve(PUBLISHED, 16, 4, 8).devices_per_prompt == 1
    assert solve(PUBLISHED, 32, 4, 8).devices_per_prompt == 2


@pytest.mark.parametrize(("limit", "size"), [(1, 1), (6, 5), (100, 100), (10**6, 3200)])
def test_the_micro_batch_is_the_largest_that_divides_an_update(limit: int, size: int) -> None:
    plan = solve(PUBLISHED, 1, limit, 8)
    assert (plan.load.train_batch, plan.accumulate) == (size, 3200 // size)


def test_divisors_are_all_there_are() -> None:
    for number in range(1, 200):
        assert divisors(number) == [each for each in range(1, number + 1) if number % each == 0]


def test_the_nearest_possible_numbers_of_images_are_named() -> None:
    geometry = Geometry(images_per_update=100, cut=Cut(images_per_prompt=16, examples=10))
    with pytest.raises(ValueError, match=r"images_per_update=100 cannot be 16 a prompt: nearest are 96 and 112\."):
        solve(geometry, 1, 4, 8)


@pytest.mark.parametrize("devices", [3, 5, 7, 24])
def test_what_is_named_as_possible_is_and_nothing_nearer_is(devices: int) -> None:
    whole = devices % 2 == 1
    cut = Cut(images_per_prompt=16, examples=1 if whole else 3, whole_prompts=whole)
    geometry = Geometry(images_per_update=48, updates=2, cut=cut)

    def possible(images: int) -> bool:
        return Geometry(**{**vars(geometry), "images_per_update": images}).devices_per_prompt(devices) is not None

    if possible(48):
        assert solve(geometry, devices, 4, 8).load.images * devices == 96
        return
    with pytest.raises(ValueError, match=r"geometry\.images_per_update=48 cannot be .*nearest are") as error:
        solve(geometry, devices, 4, 8)
    text = str(error.value).partition("nearest are ")[2].partition(".")[0]
    named = [int(number) for number in text.split(" and ")]
    assert all(map(possible, named))
    assert not any(possible(images) for images in range(min(48, *named) + 1, max(48, *named)) if images not in named)


def test_numbers_below_one_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"geometry\.updates=0 "):
        Geometry(images_per_update=64, updates=0)


# --- from settings


def policy() -> StableDiffusion:
    return StableDiffusion("tiny-sd", LoraConfig(r=2, target_modules={"to_q"}))


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    return {
        "policy": policy(),
        "reward": VPScore.load("tiny-vp-score"),
        "sampler": Sampler(steps=4, guidance=1.0, eta=1.0),
        "optimizer": partial(torch.optim.AdamW, lr=1e-3),
    }


def trainer(devices: int = 1) -> lightning.Trainer:
    """It starts no processes until it is asked to fit."""
    return lightning.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def settings(**given: Any) -> dict[str, Any]:
    """Those of a run, as its yamls have them by default."""
    values = {
        "geometry": {"images_per_update": 32, "updates": 2},
        "data": {"batch_size": 8, "devices_per_prompt": 1, "batches_per_epoch": 1},
        "trainer": {"accumulate_grad_batches": 1},
        "algorithm": {"train_batch": 64, "sample_batch": 64},
    }
    for name, value in given.items():
        group, _, key = name.partition("__")
        values[group][key] = value
    return values


def planned(parts: dict[str, Any], devices: int = 1, stated: frozenset[str] = frozenset(), **given: Any) -> Planner:
    return Planner(settings(**given), DDPO(**parts), trainer(devices), parts["optimizer"], stated)


def test_a_geometry_fills_the_settings_of_ddpo(parts: dict[str, Any]) -> None:
    assert planned(parts, devices=2).filled == {
        "data.batch_size": 2,
        "data.devices_per_prompt": 1,
        "trainer.accumulate_grad_batches": 1,
        "algorithm.train_batch": 64,  # 32 images of 4 steps are 128 states, of which each device has half
        "algorithm.sample_batch": 32,
    }


def test_a_geometry_fills_the_settings_of_refl(parts: dict[str, Any]) -> None:
    algorithm = ReFL(**parts)
    planner = Planner(settings(data__batch_size=3), algorithm, trainer(2), parts["optimizer"])
    assert planner.filled == {
        "data.batch_size": 2,  # the largest divisor of 16 within 3
        "data.batches_per_epoch": 16,
        "trainer.accumulate_grad_batches": 8,
    }


def test_a_setting_that_contradicts_is_refused_wherever_it_is_stated(parts: dict[str, Any]) -> None:
    said = r"data\.batch_size={} contradicts the geometry, by which it is 4 on 1 device"
    with pytest.raises(ValueError, match=said.format(6)):
        _ = planned(parts, data__batch_size=6).filled
    with pytest.raises(ValueError, match=said.format(8)):  # the default, but said
        _ = planned(parts, stated=frozenset({"data.batch_size"})).filled
    assert planned(parts, stated=frozenset({"data.batch_size"}), data__batch_size=4).filled["data.batch_size"] == 4


def test_auto_without_a_geometry_has_nothing_to_keep(parts: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"algorithm\.train_batch=auto keeps .*geometry\.images_per_update"):
        planned(parts, geometry__images_per_update=None, algorithm__train_batch="auto")


def test_a_run_without_a_geometry_is_planned_as_it_will_be_and_nothing_is_changed(parts: dict[str, Any]) -> None:
    planner = planned(parts, geometry__images_per_update=None, algorithm__train_batch=64)
    assert planner.filled == {}
    micro_batches = DDPO(**parts).batches_per_round(8)
    assert planner.plan.geometry.updates == micro_batches == 8
    assert planner.plan.load.images == 128


# --- auto


def out_of_memory(above: int) -> Callable[[int], None]:
    """A device that has room for so many at once, and says what CUDA says when there are more."""

    def attempt(size: int) -> None:
        if size > above:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    return attempt


@pytest.mark.parametrize("room", [1, 3, 4, 63, 64, 10**6])
def test_auto_finds_the_largest_size_that_fits(room: int) -> None:
    sizes = divisors(64)
    found = fit.largest(sizes, out_of_memory(room), "algorithm.train_batch")
    assert found == max(size for size in sizes if size <= room)


def test_where_nothing_fits_the_way_out_is_named() -> None:
    with pytest.raises(ValueError, match=r"algorithm\.train_batch=auto: not even 1 at once .*gradient_checkpointing"):
        fit.largest([1, 2, 4], out_of_memory(0), "algorithm.train_batch")


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    def broken(size: int) -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        fit.largest([1, 2], broken, "algorithm.train_batch")


def test_on_a_cpu_the_estimate_must_fit_into_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit.psutil, "virtual_memory", lambda: SimpleNamespace(available=2000))
    attempt = fit.within_main_memory(lambda size: 100 * size, held=500)
    assert fit.largest(divisors(64), attempt, "algorithm.train_batch") == 4  # 500 + 100 * 4 <= half of 2000 < 500 + 800


@pytest.mark.parametrize("room", [30, pytest.param(8, marks=pytest.mark.slow)])
def test_auto_keeps_the_update_by_accumulation(
    parts: dict[str, Any], room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "within_main_memory", lambda *_, **__: out_of_memory(room))
    monkeypatch.delenv("VP_RL_BATCHES", raising=False)
    planner = planned(parts, algorithm__train_batch="auto", algorithm__sample_batch="auto")
    monkeypatch.delenv("VP_RL_BATCHES")
    plan: Plan = planner.plan
    assert plan.load.train_batch == max(size for size in divisors(128) if size <= room)
    assert plan.load.train_batch * plan.accumulate == 128
    assert plan.load.sample_batch == max(size for size in divisors(64) if size <= room)
    assert math.prod((plan.load.prompts, 16)) == 64


# --- every method


AT_ONCE = {"dpo": "data.batch_size", "refl": "data.batch_size"} | dict.fromkeys(
    ("draft", "draft_lv", "flow_bp"), "data.batch_size"
)


def planned_method(name: str, **given: Any) -> Planner:
    """Of a policy that is small enough to be planned in no time."""
    algorithm = METHODS[name](policy=LinearPolicy(), reward=QuadraticReward())
    return Planner(settings(**given), algorithm, trainer(), algorithm._make_optimizer)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_its_work_is_made_of(name: str) -> None:
    """As dry_run shows it: all of it is counted, and an update is what was asked for."""
    planner = planned_method(name)
    parts = planner.estimator.parts(planner.plan.load)
    # A reward without parameters may be others' work, which is not counted.
    assert [part.name for part in parts if part.bytes is None and part.phase != "reward"] == []
    assert "training" in {part.phase for part in parts}
    assert rows(planner)["an update"] == "32 images"
    assert planner.filled[AT_ONCE.get(name, "algorithm.train_batch")] == planner.plan.load.train_batch


@pytest.mark.parametrize("name", METHODS)
def test_auto_keeps_the_update_of_every_method(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "within_main_memory", lambda estimate, held: looked_at(estimate, out_of_memory(3)))
    monkeypatch.delenv("VP_RL_BATCHES", raising=False)
    whole = planned_method(name).plan
    given = {AT_ONCE.get(name, "algorithm.train_batch").replace(".", "__"): "auto"}
    plan = planned_method(name, **given).plan
    monkeypatch.delenv("VP_RL_BATCHES")
    update = whole.load.train_batch * whole.accumulate
    assert plan.load.train_batch * plan.accumulate == update
    assert plan.load.train_batch == max(size for size in divisors(update) if size <= 3)


def looked_at(estimate: Callable[[int], int | None], attempt: Callable[[int], None]) -> Callable[[int], None]:
    """What a CPU does: an estimate that cannot be made does not fit."""

    def tried(size: int) -> None:
        if estimate(size) is None:
            raise fit.OutOfMemory
        attempt(size)

    return tried
