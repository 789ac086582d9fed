"""Prompt sets with categories, in the schema of the published files; results by category."""

from pathlib import Path

import numpy as np
import pytest
from test_evaluation import Bright, Brightness, evaluator, made_up

from vp_rl.evaluation.categories import by_category
from vp_rl.interfaces import PromptSource
from vp_rl.scenes.grammar import CATEGORIES
from vp_rl.visionprefer.benchmarks import BenchmarkPrompts
from vp_rl.visionprefer.prompts import ScenePrompts

PARTI = (
    "Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\tx\na cat\tAnimals\tBasic\t\na dog\tAnimals\tSimple\t\n"
)
DRAW_BENCH = 'Prompts,Category\nA red car.,Colors\n"A car, and a dog.",Counting\nA red car.,Conflicting\n'


def categories(source: PromptSource) -> dict[str, str | None]:
    return {prompt: source.category(prompt) for prompt in source.split("test")}


def test_parti_prompts_have_their_category(tmp_path: Path) -> None:
    (tmp_path / "p.tsv").write_text(PARTI)
    source = BenchmarkPrompts(str(tmp_path / "p.tsv"), "Prompt", "Category")
    assert source.split("test") == ["bond", "a cat", "a dog"]
    assert source.split("train") == source.split("validation") == []
    assert categories(source) == {"bond": "Abstract", "a cat": "Animals", "a dog": "Animals"}
    by_challenge = BenchmarkPrompts(str(tmp_path / "p.tsv"), "Prompt", "Challenge")
    assert by_challenge.category("a dog") == "Simple"


def test_draw_bench_counts_a_repeated_prompt_once(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text(DRAW_BENCH)
    source = BenchmarkPrompts(str(tmp_path / "d.csv"), "Prompts", "Category")
    assert categories(source) == {"A red car.": "Colors", "A car, and a dog.": "Counting"}


def test_a_folder_of_text_files_has_a_category_in_each(tmp_path: Path) -> None:
    (tmp_path / "color_val.txt").write_text("a green bench\na blue bench\n\n")
    (tmp_path / "3d_spatial_val.txt").write_text("a cat behind a dog\n")
    source = BenchmarkPrompts(str(tmp_path))
    assert categories(source) == {
        "a cat behind a dog": "3d_spatial",
        "a green bench": "color",
        "a blue bench": "color",
    }
    assert set(BenchmarkPrompts(str(tmp_path), limit=2).split("test")) < set(source.split("test"))


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no text files"):
        BenchmarkPrompts(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="No prompt file"):
        BenchmarkPrompts(str(tmp_path / "absent.csv"))
    (tmp_path / "p.tsv").write_text(PARTI)
    with pytest.raises(ValueError, match="category"):
        BenchmarkPrompts(str(tmp_path / "p.tsv"), "Prompt")


def test_scenes_have_the_grammars_categories() -> None:
    assert set(categories(ScenePrompts(20, 20, 20)).values()) == set(CATEGORIES)


def test_categories_are_compared_by_their_own_prompts() -> None:
    base, tuned = made_up(np.array([[each, each] for each in (1.0, 3.0, 2.0, -2.0, -1.0, -3.0, 9.0, 5.0)]))
    kinds = ["up"] * 3 + ["down"] * 3 + ["one"]
    own = {kind: {f"prompt {number}" for number, each in enumerate(kinds) if each == kind} for kind in set(kinds)}
    found = by_category(base, tuned, own)
    assert {name: each["reward"].difference for name, each in found.items()} == {"down": -2, "up": 2, "one": 9}
    assert not any(name.startswith("look/") for name in found["up"])
    assert by_category(base, tuned, {}) == {}


def test_one_category_of_all_prompts_is_the_whole_comparison() -> None:
    tool = evaluator(seeds=(0, 1))
    done = tool.evaluate(Bright(), Brightness())
    (all_of_it,) = by_category(done, done, {"all": tool.prompts}).values()
    assert all_of_it["mean_rating"].base == pytest.approx(done.means()["mean_rating"])
