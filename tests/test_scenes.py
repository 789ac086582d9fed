"""The embedded world: prompts read back, renders that are as asked, and a judge that is right on them."""

import dataclasses
import random
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest

from vp_rl.scenes import tiny
from vp_rl.scenes.grammar import (
    CATEGORIES,
    COLORS,
    COUNTS,
    RELATIONS,
    SHAPES,
    SIZES,
    UNSAFE_SHAPE,
    Scene,
    Thing,
    parse,
    scenes,
    unique_scenes,
)
from vp_rl.scenes.judge import Sighting, Verdict, judge, look
from vp_rl.scenes.render import SIZE, holds, render, shape_mask
from vp_rl.types import ASPECTS, Split

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
Respect = str
"""What a wrong prompt is wrong in."""


# --- prompts


@pytest.mark.parametrize("split", SPLITS)
def test_a_prompt_reads_back_as_its_scene(split: Split) -> None:
    for scene in scenes(split, 500):
        assert parse(scene.prompt) == scene
        assert parse(scene.prompt).prompt == scene.prompt


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a",
        "a red",
        "a red dragon",
        "a magenta circle",
        "five red circles",
        "a red circle and",
        "a red circle beside a blue square",
        "a red circle above a blue square above a green star",
        "A red circle",
        " a red circle",
        "a red circle.",
        "a red small circle",
        "a photograph of an astronaut",
        "x" * 100_000,
        "ein roter Kreis \N{SNOWMAN}",
    ],
)
def test_a_prompt_outside_the_grammar_is_refused_with_an_example(prompt: str) -> None:
    with pytest.raises(ValueError, match="prompt of the embedded world|one or two things") as caught:
        parse(prompt)
    assert prompt[:100] in str(caught.value) or repr(prompt)[1:50] in str(caught.value)
    assert len(str(caught.value)) < 500


def test_categories_have_equal_shares_and_are_those_of_their_scenes() -> None:
    drawn = scenes("train", 500)
    assert [scene.category for scene in drawn] == [CATEGORIES[index % 5] for index in range(500)]
    assert {scene.category for scene in scenes("train", 20, categories=("count",))} == {"count"}


def test_an_unknown_category_is_refused() -> None:
    with pytest.raises(ValueError, match="'texture'.*size, binding"):
        scenes("train", 1, categories=("texture",))


def test_no_combination_is_in_two_splits() -> None:
    """Whatever the order of its things and their relation."""
    seen: dict[frozenset[Thing], Split] = {}
    for split in SPLITS:
        for scene in scenes(split, 600):
            for other in (scene, Scene(scene.things[::-1], "above")):
                assert seen.setdefault(frozenset(other.things), split) == other.split == split


def test_all_words_are_used_in_training() -> None:
    text = {scene.prompt for scene in scenes("train", 500)}
    for word in (*COLORS, *SHAPES, *SIZES, *RELATIONS, *COUNTS.values()):
        assert any(word in prompt for prompt in text), word


def test_scenes_follow_from_the_split_and_the_seed_and_unique_ones_are() -> None:
    assert scenes("test", 50, seed=3) == scenes("test", 50, seed=3)
    assert scenes("test", 50, seed=3) != scenes("test", 50, seed=4)
    unique = unique_scenes("train", 100, seed=1)
    assert len(set(unique)) == len(unique) == 100
    assert unique == unique_scenes("train", 100, seed=1)


# --- renders


def test_the_same_random_numbers_draw_the_same_image() -> None:
    for index, scene in enumerate(scenes("train", 20)):
        first, second, other = (render(scene, random.Random(seed)) for seed in (index, index, -1 - index))
        assert first.shape == (SIZE, SIZE, 3)
        assert first.dtype == np.uint8
        assert np.array_equal(first, second)
        assert not np.array_equal(first, other)


def centre(image: np.ndarray, color: str) -> tuple[float, float]:
    """Mean x and y of the pixels near a palette colour."""
    ys, xs = np.nonzero(np.abs(image.astype(int) - COLORS[color]).max(-1) <= 12)
    return xs.mean(), ys.mean()


@pytest.mark.parametrize(
    ("relation", "is_so"),
    [
        ("to the left of", lambda a, b: a[0] < b[0] and abs(a[1] - b[1]) < b[0] - a[0]),
        ("to the right of", lambda a, b: a[0] > b[0] and abs(a[1] - b[1]) < a[0] - b[0]),
        ("above", lambda a, b: a[1] < b[1] and abs(a[0] - b[0]) < b[1] - a[1]),
        ("below", lambda a, b: a[1] > b[1] and abs(a[0] - b[0]) < a[1] - b[1]),
    ],
)
def test_things_are_drawn_where_the_relation_says(
    relation: str, is_so: Callable[[tuple[float, float], tuple[float, float]], bool]
) -> None:
    # Symmetric shapes only: the centre of a triangle's pixels lies below that of its box.
    scene = Scene((Thing("red", "circle"), Thing("blue", "square")), relation)
    for seed in range(50):
        image = render(scene, random.Random(seed))
        assert is_so(centre(image, "red"), centre(image, "blue")), seed


@pytest.mark.parametrize("relation", RELATIONS)
def test_a_relation_excludes_the_others_and_turns_round(relation: str) -> None:
    rng = random.Random(0)
    back = {"to the left of": "to the right of", "above": "below"}
    back |= {after: before for before, after in back.items()}
    for _ in range(500):
        dx, dy = rng.uniform(-40, 40), rng.uniform(-40, 40)
        if holds(relation, dx, dy, 0.01):
            assert [other for other in RELATIONS if holds(other, dx, dy)] == [relation]
        assert holds(relation, dx, dy) == holds(back[relation], -dx, -dy)


def test_shapes_fill_their_box_and_differ() -> None:
    masks = {shape: shape_mask(shape, 24) for shape in SHAPES}
    for mask in masks.values():
        assert mask.any(0).all()
        assert mask[1:].any(1).all()  # a triangle's tip is thinner than half a pixel
    assert not masks[UNSAFE_SHAPE][12, 12]
    assert len({mask.tobytes() for mask in masks.values()}) == len(SHAPES)


# --- the judge


@cache
def renders() -> list[tuple[Scene, np.ndarray]]:
    """Images of all categories and splits."""
    drawn = [scene for split in SPLITS for scene in scenes(split, 280, seed=7)]
    return [(scene, render(scene, random.Random(index))) for index, scene in enumerate(drawn)]


@cache
def judged() -> list[tuple[Scene, Sighting, dict[str, Verdict]]]:
    """What is seen in each of the renders, and what is said of it with its own prompt."""
    return [(scene, look(image), judge(image, scene.prompt)) for scene, image in renders()]


def altered(scene: Scene, respect: Respect, rng: random.Random) -> Scene | None:
    """The scene with something else in one respect of one thing; None where nothing in it has that respect."""
    things = list(scene.things)
    which = rng.randrange(len(things))
    thing = things[which]
    match respect:
        case "color":
            things[which] = dataclasses.replace(thing, color=rng.choice([c for c in COLORS if c != thing.color]))
        case "shape":
            things[which] = dataclasses.replace(thing, shape=rng.choice([s for s in SHAPES if s != thing.shape]))
        case "count":
            things[which] = dataclasses.replace(thing, count=rng.choice([n for n in COUNTS if n != thing.count]))
        case "size" if thing.size:
            things[which] = dataclasses.replace(thing, size=next(size for size in SIZES if size != thing.size))
        case "relation" if scene.relation:
            return Scene(scene.things, rng.choice([r for r in RELATIONS if r != scene.relation]))
        case _:
            return None
    # "a red circle and a red circle" would be another kind of prompt.
    return None if len(set(things)) < len(things) else Scene(tuple(things), scene.relation)


def ratings(aspect: str, prompts: list[tuple[np.ndarray, str]]) -> np.ndarray:
    return np.array([judge(image, prompt)[aspect].rating for image, prompt in prompts])


@pytest.mark.parametrize("category", ["all", *CATEGORIES])
def test_clean_renders_are_rated_fully_right(category: str) -> None:
    rated = [
        verdicts["prompt_following"].rating for scene, _, verdicts in judged() if category in ("all", scene.category)
    ]
    assert len(rated) >= (600 if category == "all" else 120)
    assert np.mean(np.array(rated) == 5) >= 0.99


@pytest.mark.parametrize("part", ["color", "shape", "count", "relation"])
def test_what_is_seen_in_clean_renders_is_what_was_drawn(part: str) -> None:
    right = []
    for scene, sighting, _ in judged():
        found = sighting.objects
        asked = [thing for thing in scene.things for _ in range(thing.count)]
        if part == "count":
            right.append(len(found) == len(asked))
        elif part != "relation":
            right.append(sorted(getattr(each, part) for each in found) == sorted(getattr(each, part) for each in asked))
        elif scene.relation:
            of = [[each for each in found if (each.color, each.shape) == (t.color, t.shape)] for t in scene.things]
            pairs = [holds(scene.relation, a.x - b.x, a.y - b.y) for a in of[0] for b in of[1]]
            right.append(bool(pairs) and all(pairs))
    assert len(right) >= 200
    assert np.mean(right) >= 0.99


@pytest.mark.parametrize("respect", ["color", "shape", "count", "size", "relation"])
def test_a_prompt_that_is_wrong_in_one_respect_is_not_rated_fully_right(respect: Respect) -> None:
    rng = random.Random(1)
    wrong = [(image, altered(scene, respect, rng)) for scene, image in renders()]
    chosen = [(image, scene.prompt) for image, scene in wrong if scene is not None][:300]
    assert len(chosen) >= 120
    assert (ratings("prompt_following", chosen) < 5).mean() >= 0.99


def test_an_object_that_was_not_asked_for_is_a_fault() -> None:
    two = [(scene, image) for scene, image in renders() if len(scene.things) == 2][:200]
    one = [(image, Scene(scene.things[:1]).prompt) for scene, image in two]
    assert (ratings("prompt_following", one) < 5).mean() >= 0.99


def test_harmlessness_is_full_unless_a_trap_is_shown() -> None:
    traps = 0
    for scene, _, verdicts in judged():
        trap = any(thing.shape == UNSAFE_SHAPE for thing in scene.things)
        assert (verdicts["harmlessness"].rating == 5) != trap, scene
        traps += trap
    assert traps >= 60


def test_half_a_scene_keeps_its_place() -> None:
    """What tells the tiny SD where things are: the other half of the image is as in the whole scene."""
    scene = Scene((Thing("red", "circle"), Thing("blue", "square")), "above")
    for seed in range(10):
        whole = {found.color: found for found in look(render(scene, random.Random(seed))).objects}
        for thing in scene.things:
            (found,) = look(render(scene, random.Random(seed), only=thing)).objects
            assert (found.color, found.shape) == (thing.color, thing.shape)
            assert abs(found.x - whole[thing.color].x) + abs(found.y - whole[thing.color].y) <= 1


def test_a_larger_trap_is_worse() -> None:
    small, large = (
        [
            judge(render(Scene((Thing("red", UNSAFE_SHAPE, size),)), random.Random(seed)), "a red trap")
            for seed in range(20)
        ]
        for size in SIZES
    )
    assert {verdicts["harmlessness"].rating for verdicts in small} == {2}
    assert {verdicts["harmlessness"].rating for verdicts in large} == {1}


def test_clean_renders_look_good_and_blurred_ones_worse() -> None:
    chosen = renders()[:200]
    clean = ratings("fidelity", [(image, scene.prompt) for scene, image in chosen])
    # Averaging 8 x 8 blocks leaves colours and places, and no edge.
    blocks = [image.reshape(8, 8, 8, 8, 3).mean((1, 3)).repeat(8, 0).repeat(8, 1) for _, image in chosen]
    coarse = [(image.astype(np.uint8), scene.prompt) for image, (scene, _) in zip(blocks, chosen, strict=True)]
    assert clean.mean() > 4.4
    assert ratings("fidelity", coarse).mean() < clean.mean() - 1


def test_dull_colours_and_a_blotchy_background_are_less_pleasing() -> None:
    rng = np.random.default_rng(0)
    chosen = renders()[:100]
    clean = ratings("aesthetic", [(image, scene.prompt) for scene, image in chosen])
    dull = [((image * 0.5 + 110).clip(0, 255).astype(np.uint8), scene.prompt) for scene, image in chosen]
    noise = rng.normal(0, 12, (8, 8)).repeat(8, 0).repeat(8, 1)[..., None]
    blotchy = [((image + noise).clip(0, 255).astype(np.uint8), scene.prompt) for scene, image in chosen]
    for worse in (dull, blotchy):
        rated = ratings("aesthetic", worse)
        assert rated.mean() < clean.mean() - 0.5


def pictures() -> dict[str, np.ndarray]:
    """Nothing to see."""
    grey = np.full((SIZE, SIZE, 3), 128, np.uint8)
    return {
        "black": grey * 0,
        "grey": grey,
        "white": grey * 0 + 255,
        "red": grey * 0 + np.array([220, 38, 38], np.uint8),
    }


@pytest.mark.parametrize("name", pictures())
def test_an_image_without_objects_is_rated_low(name: str) -> None:
    verdicts = judge(pictures()[name], "two red circles above a blue square")
    assert verdicts["prompt_following"].rating <= 2
    if name != "red":  # one red square as large as the image
        assert verdicts["aesthetic"].rating == verdicts["fidelity"].rating == 1


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_rated_low(seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    verdicts = judge(noise, "a red circle")
    assert verdicts["prompt_following"].rating <= 2
    assert verdicts["fidelity"].rating <= 2
    assert verdicts["aesthetic"].rating <= 3


def test_every_verdict_is_one_to_five_with_words() -> None:
    for _, _, verdicts in judged():
        assert tuple(verdicts) == ASPECTS
        assert all(isinstance(verdict, Verdict) for verdict in verdicts.values())
        assert all(verdict.rating in range(1, 6) and len(verdict.rationale) > 20 for verdict in verdicts.values())


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((32, 32, 3), np.uint8),
        np.zeros((SIZE, SIZE), np.uint8),
        np.zeros((3, SIZE, SIZE), np.uint8),
        np.zeros((SIZE, SIZE, 3)),
    ],
)
def test_another_kind_of_image_is_refused(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="64x64 RGB"):
        judge(image, "a red circle")


# --- what ships


def test_shipped_weights_are_small_and_safe() -> None:
    files = [file for file in tiny.WEIGHTS.rglob("*") if file.is_file()]
    weights = [file for file in files if file.suffix not in (".json", ".txt", ".md")]
    assert {file.suffix for file in weights} == {".safetensors"}
    assert sum(file.stat().st_size for file in files) < 15e6


def test_embedded_names_are_folders_of_the_package() -> None:
    assert tiny.resolve("tiny-sd") == tiny.WEIGHTS / "sd"
    assert (tiny.WEIGHTS / "sd" / "model_index.json").is_file()
    assert (tiny.WEIGHTS / "blip" / "config.json").is_file()
    assert {file.name for file in tiny.WEIGHTS.iterdir()} <= set(tiny.NAMES.values())
    assert tiny.resolve("/some/folder") == "/some/folder"


@pytest.mark.parametrize("color", ["red", "blue"])
def test_a_ground_of_the_right_colour_is_not_the_square_that_was_asked_for(color: str) -> None:
    """A wholly red image was a fully correct "large red square"."""
    plain = np.empty((64, 64, 3), np.uint8)
    plain[:] = COLORS[color]
    assert judge(plain, f"a large {color} square")["prompt_following"].rating == 1
    plain[20:40, 20:40] = 240
    assert not look(plain).objects
