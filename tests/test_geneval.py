"""GenEval's checks on hand-made objects, the files that say what is asked for, and scores by task."""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vp_rl.evaluation.compare import change
from vp_rl.evaluation.detectors import SceneDetector
from vp_rl.evaluation.geneval import Box, Detector, Found, Limits, check, examine, iou, keep, relations
from vp_rl.evaluation.objects import _as_one_mean, overall
from vp_rl.scenes.grammar import Scene, Thing, parse
from vp_rl.scenes.render import render
from vp_rl.visionprefer.estimates import paired
from vp_rl.visionprefer.object_prompts import RELATIONS, Clause, GenEvalPrompts, SceneObjects, Wanted, of_scene

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def at(x: float, y: float, size: float = 0.0) -> Box:
    return (x - size / 2, y - size / 2, x + size / 2, y + size / 2)


def cups(*colors: str, sure: float = 0.95) -> list[Found]:
    """In a row, each as sure as the other."""
    return [Found("cup", sure, at(20 * place, 0, 10), color) for place, color in enumerate(colors)]


# --- relations


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (-10, 0, ["left of"]),
        (10, 0, ["right of"]),
        (0, -10, ["above"]),
        (0, 10, ["below"]),
        (3, 4, ["right of", "below"]),  # 0.6 and 0.8 of the distance
        (-4, -3, ["left of", "above"]),
        (7, 24, ["below"]),  # 0.28 across
        (-24, 7, ["left of"]),
        (0, 0, []),
    ],
)
def test_a_relation_is_more_than_half_of_the_distance(x: float, y: float, expected: list[str]) -> None:
    assert relations(at(50 + x, 50 + y), at(50, 50)) == expected


@pytest.mark.parametrize(("apart", "expected"), [(4.0, []), (7.9, []), (8.1, ["right of"])])
def test_a_tenth_of_both_sizes_is_taken_off(apart: float, expected: list[str]) -> None:
    """Of two boxes of 20, 4 pixels: (8 - 4) / 8 is just half."""
    assert relations(at(apart, 0, 20), at(0, 0, 20)) == expected


def test_relations_turn_round_and_do_not_depend_on_place_or_scale() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = (at(*rng.uniform(0, 100, 2), rng.uniform(1, 40)) for _ in range(2))
        held = relations(a, b)
        assert sorted(OPPOSITE[name] for name in held) == sorted(relations(b, a))
        moved = [tuple(3.0 * side + 7.0 for side in box) for box in (a, b)]
        assert relations(*moved) == held
        assert set(held) <= set(RELATIONS)
        assert not any(OPPOSITE[name] in held for name in held)


# --- what counts


def test_overlap_in_closed_form() -> None:
    assert iou((0, 0, 2, 1), (1, 0, 3, 1)) == pytest.approx(1 / 3)
    assert iou((0, 0, 2, 2), (0, 0, 2, 2)) == 1
    assert iou((0, 0, 1, 1), (1, 0, 2, 1)) == 0
    assert iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0


def test_an_object_must_be_surer_than_the_threshold_of_its_task() -> None:
    found = [Found("cup", sure, at(20 * sure, 0)) for sure in (0.3, 0.31, 0.9, 0.91)]
    assert [each.confidence for each in keep(found, Limits(), "colors")] == [0.91, 0.9, 0.31]
    assert [each.confidence for each in keep(found, Limits(), "counting")] == [0.91]


def test_of_equally_sure_objects_the_first_that_was_found_comes_first() -> None:
    found = cups("red", "blue", "green")
    assert keep(found, Limits(), "colors") == found
    assert keep(found[::-1], Limits(), "colors") == found[::-1]


@pytest.mark.parametrize(("max_overlap", "left"), [(0.3, 1), (1 / 3, 1), (0.34, 2), (1.0, 2)])
def test_one_object_in_two_boxes_is_one(max_overlap: float, left: int) -> None:
    """The boxes overlap by a third, which is too much where a third is the limit."""
    found = [Found("cup", 0.5, (1, 0, 3, 1)), Found("cup", 0.8, (0, 0, 2, 1)), Found("dog", 0.4, (0, 0, 2, 1))]
    kept = keep(found, Limits(max_overlap=max_overlap), "colors")
    assert [each.name for each in kept] == ["cup"] * left + ["dog"]
    assert kept[0].confidence == 0.8


def test_the_same_box_twice_is_two_where_overlap_does_not_matter() -> None:
    assert len(keep([Found("cup", 0.9, at(0, 0, 5))] * 2, Limits(max_overlap=1.0), "colors")) == 2


def test_what_went_for_its_overlap_takes_nobodys_place_and_hides_nobody() -> None:
    """b overlaps with a and c with b, but c not with a: only b goes."""
    a, b, c = (Found("cup", sure, (x, 0, x + 3, 1)) for sure, x in ((0.9, 0), (0.8, 2), (0.7, 4)))
    assert keep([a, b, c], Limits(max_overlap=0.1, max_objects=2), "colors") == [a, c]
    assert keep([a, b, c], Limits(max_objects=2), "colors") == [a, b]


# --- checks


def counting(number: int) -> Wanted:
    return Wanted("counting", (Clause("cup", number),), (Clause("cup", number + 1),))


@pytest.mark.parametrize(
    ("there", "correct", "reason"),
    [(0, False, "cup: found none, asked for 3"), (2, False, "cup: found 2, asked for 3"), (3, True, "all is as asked"),
     (4, False, "cup: found 4, asked for fewer than 4")],
)  # fmt: skip
def test_counts_are_exact(there: int, correct: bool, reason: str) -> None:
    assert check(cups(*["red"] * there), counting(3)) == (correct, reason)


def test_without_an_upper_bound_more_is_right_too() -> None:
    assert check(cups("red", "red"), Wanted("single_object", (Clause("cup"),))).correct


def test_other_classes_neither_help_nor_harm() -> None:
    dogs = [Found("dog", 0.9, at(0, 0, 5))] * 5
    assert not check(dogs, counting(2)).correct
    assert check([*dogs, *cups("", "")], counting(2)).correct


def test_only_the_surest_objects_colours_count() -> None:
    wanted = Wanted("colors", (Clause("cup", 1, "red"),))
    assert check(cups("red", "blue"), wanted).correct
    assert check(cups("blue", "red"), wanted) == (False, "cup: 0 of 1 red, but 1 blue")
    three = Wanted("colors", (Clause("cup", 3, "red"),))
    assert check(cups("red", "blue", "blue"), three).reason == "cup: 1 of 3 red, but 2 blue"
    assert check(cups("red", "red", "red", "blue"), three).correct


def test_each_object_has_its_own_colour() -> None:
    wanted = Wanted("color_attr", (Clause("cup", 1, "red"), Clause("dog", 1, "blue")))
    dog = Found("dog", 0.9, at(50, 0, 5), "blue")
    assert check([*cups("red"), dog], wanted).correct
    swapped = check([*cups("blue"), dog._replace(color="red")], wanted)
    assert swapped.reason == "cup: 0 of 1 red, but 1 blue; dog: 0 of 1 blue, but 1 red"


@pytest.mark.parametrize(
    ("relation", "x", "y"), [("left of", -9, 0), ("right of", 9, 0), ("above", 0, -9), ("below", 0, 9)]
)
def test_positions_in_all_four_directions(relation: str, x: float, y: float) -> None:
    wanted = Wanted("position", (Clause("dog"), Clause("cup", position=(relation, 0))))
    dog = Found("dog", 0.9, at(0, 0, 4))
    assert check([Found("cup", 0.9, at(x, y, 4)), dog], wanted).correct
    other_side = check([Found("cup", 0.9, at(-x, -y, 4)), dog], wanted)
    assert other_side == (False, f"cup: {OPPOSITE[relation]} the dog, asked for {relation}")
    same_place = check([Found("cup", 0.9, at(0, 0, 4)), dog], wanted)
    assert same_place.reason == f"cup: at the same place as the dog, asked for {relation}"


def test_a_position_needs_what_it_refers_to_to_be_right() -> None:
    wanted = Wanted("position", (Clause("dog", 1, "red"), Clause("cup", position=("left of", 0))))
    cup = Found("cup", 0.9, at(-9, 0, 4))
    missing = check([cup], wanted)
    assert missing.reason == "dog: found none, asked for 1; cup: there is no dog as asked that it could be left of"
    blue = check([cup, Found("dog", 0.9, at(0, 0, 4), "blue")], wanted)
    assert blue.reason == "dog: 0 of 1 red, but 1 blue; cup: there is no dog as asked that it could be left of"
    assert check([cup, Found("dog", 0.9, at(0, 0, 4), "red")], wanted).correct


def test_every_object_stands_so_to_every_other() -> None:
    wanted = Wanted("position", (Clause("dog"), Clause("cup", 2, position=("left of", 0))))
    dog = Found("dog", 0.9, at(0, 0, 4))
    left, right = Found("cup", 0.9, at(-9, 0, 4)), Found("cup", 0.9, at(9, 0, 4))
    assert check([left, left, dog], wanted).correct
    assert not check([left, right, dog], wanted).correct


class Cups(Detector):
    """Sees five cups and a dog, and remembers which colours it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.limits, self.asked = Limits(), list[Found]()

    def check(self, names: Sequence[str], colors: Sequence[str]) -> None:
        """Everything is fine."""

    def find(self, image: np.ndarray, names: Sequence[str]) -> list[Found]:
        sure = [Found("cup", 0.5 + 0.1 * place, at(20 * place, 0, 5)) for place in range(5)]
        return [*sure, Found("dog", 0.9, at(0, 50, 5)), Found("cat", 0.9, at(50, 50, 5))]

    def colors(self, image: np.ndarray, found: Sequence[Found]) -> list[str]:
        self.asked += found
        return ["red"] * len(found)


def test_colours_are_looked_for_only_where_they_matter() -> None:
    image, detector = np.zeros((8, 8, 3), np.uint8), Cups()
    names = ("cup", "dog", "cat")
    seen = examine(detector, image, Wanted("color_attr", (Clause("cup", 2, "red"), Clause("dog"))), names)
    assert [round(each.confidence, 1) for each in detector.asked] == [0.9, 0.8]
    assert [each.color for each in seen if each.name == "cup"] == ["red", "red", "", "", ""]
    assert {each.name for each in seen} == {"cup", "dog"}
    detector.asked.clear()
    examine(detector, image, Wanted("colors", (Clause("cup", 6, "red"),)), names)  # too few: the colour decides nothing
    examine(detector, image, Wanted("single_object", (Clause("cup"),)), names)
    assert not detector.asked


# --- the embedded world


def test_what_the_renderer_draws_is_right_and_what_contradicts_it_is_wrong() -> None:
    """Objects lie half of both sizes and 3 pixels apart along the relation: 0.8 / sqrt(2) of the distance are left."""
    rng, detector, source = random.Random(0), SceneDetector(), SceneObjects(24)
    for prompt in source.split("test"):
        scene, wanted = parse(prompt), source.wanted(prompt)
        seen = examine(detector, render(scene, rng), wanted, source.vocabulary())
        assert check(seen, wanted).correct, prompt
        if scene.relation is not None:
            turned = of_scene(Scene(scene.things[::-1], scene.relation))
            assert not check(seen, turned).correct, prompt
        recoloured = [each._replace(color="grey") for each in seen]
        assert not check(recoloured, wanted).correct, prompt


def test_scenes_in_genevals_terms() -> None:
    assert of_scene(parse("a large red circle")) == Wanted("colors", (Clause("circle", 1, "red"),))
    three = Wanted("counting", (Clause("star", 3, "blue"),), (Clause("star", 4),))
    assert of_scene(parse("three blue stars")) == three
    clauses = (Clause("square", 1, "blue"), Clause("circle", 1, "red", ("left of", 0)))
    assert of_scene(parse("a red circle to the left of a blue square")) == Wanted("position", clauses)
    assert of_scene(parse("a red circle and a blue square")).task == "color_attr"
    for prompt in ("a red circle and a blue circle", "two red circles and a blue square"):
        with pytest.raises(ValueError, match="no task of GenEval's"):
            of_scene(parse(prompt))
    assert of_scene(Scene((Thing("red", "star"), Thing("blue", "trap")))).names == ("star", "trap")


def test_scene_prompts_are_the_test_splits_and_their_task_is_their_category() -> None:
    source = SceneObjects(16, seed=1)
    prompts = source.split("test")
    assert len(set(prompts)) == 16
    assert source.split("train") == []
    assert {parse(prompt).split for prompt in prompts} == {"test"}
    assert {source.category(prompt) for prompt in prompts} == {"colors", "counting", "position", "color_attr"}


# --- metadata

LINE: dict[str, Any] = {
    "tag": "position",
    "include": [{"class": "dog", "count": 1}, {"class": "cup", "count": 2, "color": "red", "position": ["above", 0]}],
    "exclude": [{"class": "cup", "count": 3}],
    "prompt": "a photo of two red cups above a dog",
}


def written(folder: Path, *lines: str) -> str:
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder / "metadata.jsonl")


def test_a_line_is_read_whole(tmp_path: Path) -> None:
    other = json.dumps({"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a bench"})
    source = GenEvalPrompts(written(tmp_path, json.dumps(LINE), "", other, other))
    clauses = (Clause("dog"), Clause("cup", 2, "red", ("above", 0)))
    assert source.wanted(LINE["prompt"]) == Wanted("position", clauses, (Clause("cup", 3),))
    assert source.split("test") == [LINE["prompt"], "a bench"]
    assert source.split("train") == []
    assert source.category("a bench") == "single_object"
    assert source.vocabulary() == ("dog", "cup", "bench")
    few = GenEvalPrompts(written(tmp_path, json.dumps(LINE), other), limit=1)
    assert len(few.split("test")) == 1
    assert few.vocabulary() == source.vocabulary(), "what a detector tells apart does not depend on the draw"


def test_columns_may_be_called_otherwise(tmp_path: Path) -> None:
    line = {"task": LINE["tag"], "text": LINE["prompt"], "include": LINE["include"]}
    source = GenEvalPrompts(written(tmp_path, json.dumps(line)), column="text", category_column="task")
    assert source.category(LINE["prompt"]) == "position"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"tag": "texture"}, "tag='texture' is no task: choose from single_object"),
        ({"prompt": " "}, "no text in column 'prompt'"),
        ({"include": []}, "include is empty"),
        ({"include": {"class": "dog", "count": 1}}, "include is dict, not a list"),
        ({"include": ["dog"]}, r"include\[0\] has no class"),
        ({"include": [{"class": "dog"}]}, "count=None must be a whole number"),
        ({"include": [{"class": "dog", "count": 0}]}, "count=0 must be"),
        ({"include": [{"class": "dog", "count": True}]}, "count=True must be"),
        ({"include": [{"class": "dog", "count": 1, "size": "big"}]}, "size, which no check looks at"),
        ({"include": [{"class": "dog", "count": 1, "color": 3}]}, "color=3"),
        ({"include": [{"class": "dog", "count": 1}] * 2}, "a class twice"),
        ({"include": [{"class": "dog", "count": 1, "position": ["above", 0]}]}, "points to no earlier clause"),
        ({"include": [{"class": "dog", "count": 1, "position": ["near", 0]}]}, "must be .one of left of"),
        ({"exclude": [{"class": "cup", "count": 1, "color": "red"}]}, "color, which no check looks at"),
    ],
)  # fmt: skip
def test_a_damaged_line_is_named(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    path = written(tmp_path, json.dumps(LINE), json.dumps(LINE | {"prompt": "another"} | changed))
    with pytest.raises(ValueError, match=f"line 2: .*{said}"):
        GenEvalPrompts(path)


def test_files_that_are_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no JSON in line 1"):
        GenEvalPrompts(written(tmp_path, '{"tag": "coun'))
    with pytest.raises(ValueError, match="line 1 is int; it must be an object"):
        GenEvalPrompts(written(tmp_path, "3"))
    with pytest.raises(ValueError, match="line 2: .*asked for something else"):
        GenEvalPrompts(written(tmp_path, json.dumps(LINE), json.dumps(LINE | {"exclude": []})))
    with pytest.raises(ValueError, match="has no prompts"):
        GenEvalPrompts(written(tmp_path, ""))
    with pytest.raises(FileNotFoundError, match=r"evaluation_metadata\.jsonl"):
        GenEvalPrompts(str(tmp_path / "none"))


# --- scores


def test_overall_is_the_mean_of_tasks_however_many_prompts_each_has() -> None:
    """Task 0: three prompts, one of which is won; task 1: one prompt of two images, one lost."""
    before = np.array([0.0, 1.0, 0.0, 1.0, 1.0])
    after = np.array([1.0, 1.0, 0.0, 0.0, 1.0])
    result = overall(before, after, np.array([0, 1, 2, 3, 3]), np.array([0, 0, 0, 1, 1]))
    assert result.base == pytest.approx((1 / 3 + 1) / 2)
    assert result.tuned == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert result.difference == pytest.approx((1 / 3 - 1 / 2) / 2)
    assert (result.win, result.loss) == pytest.approx(((1 / 3) / 2, (1 / 2) / 2))
    assert np.isnan([result.low, result.high]).all(), "the second task has one prompt"
    assert result.chance == 1


def test_of_one_task_overall_is_that_task() -> None:
    rng = np.random.default_rng(0)
    before, after = rng.integers(0, 2, (2, 40)).astype(float)
    prompt = np.repeat(np.arange(20), 2)
    assert overall(before, after, prompt, np.zeros(40, int)) == pytest.approx(change(before, after, prompt), abs=1e-12)


def test_overalls_interval_is_that_of_a_mean_of_independent_means() -> None:
    rng = np.random.default_rng(0)
    values, task = rng.normal(size=60) + 5 * np.repeat([0, 1, 2], [10, 20, 30]), np.repeat([0, 1, 2], [10, 20, 30])
    one = _as_one_mean(values, task)
    groups = [values[task == each] for each in range(3)]
    assert one.mean() == pytest.approx(np.mean([group.mean() for group in groups]))
    error = math.sqrt(sum(group.var(ddof=1) / len(group) for group in groups)) / 3
    assert one.std(ddof=1) / math.sqrt(60) == pytest.approx(error)
    low, high = paired(one - one.mean())  # about 0, as a difference is
    assert (high - low) / 2 == pytest.approx(2.0 * error, rel=0.05)  # Student's 97.5% quantile for 59 is 2.001


def test_the_same_model_twice_has_no_interval_that_excludes_nothing() -> None:
    values = np.random.default_rng(0).integers(0, 2, 30).astype(float)
    same = overall(values, values, np.arange(30), np.repeat([0, 1], 15))
    assert (same.difference, same.tie, same.chance) == (0, 1, 1)
    assert same.low == pytest.approx(-(1 - 0.025 ** (1 / 30)))  # what 30 prompts may have missed
    assert same.high == -same.low
