"""`~` is the user's home wherever a path is given."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from odd_images import ODD

from vp_rl.annotators.wording import read_guidelines
from vp_rl.callbacks.checkpoint import RunCheckpoints
from vp_rl.data.human import HumanDataModule
from vp_rl.data.preferences import PreferenceDataModule
from vp_rl.data.sets.rankings import RankingColumns, Rankings
from vp_rl.files.paths import at_home, user_path, user_place
from vp_rl.types import ASPECTS
from vp_rl.visionprefer.benchmarks import BenchmarkPrompts
from vp_rl.visionprefer.clean import Cleaner
from vp_rl.visionprefer.image_folder import ImageFolder
from vp_rl.visionprefer.object_prompts import GenEvalPrompts
from vp_rl.visionprefer.prompts import FilePrompts, HubPrompts


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    (tmp_path / "geneval.jsonl").write_text(
        '{"tag": "counting", "prompt": "p", "include": [{"class": "cup", "count": 1}]}'
    )
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "metadata.jsonl").write_text(
        "\n".join(json.dumps({"file": f"{name}.png", "prompt": "a cat"}) for name in "ab")
    )
    for name in "ab":
        (tmp_path / "set" / f"{name}.png").write_bytes(ODD["8-bit grey"][0])
    (tmp_path / "set" / "test.json").write_text('[{"prompt": "p", "images": ["a.png", "b.png"], "ranking": [1, 2]}]')
    for aspect in ASPECTS:
        (tmp_path / "set" / f"{aspect}.md").write_text("look")
    return tmp_path


DOORS: dict[str, Callable[[], Any]] = {
    "prompts": lambda: FilePrompts("~/prompts.txt", validation=0, test=0),
    "a hub's files": lambda: HubPrompts("text", files="~/prompts.txt", column="text", validation=0, test=0),
    "several of them": lambda: HubPrompts("text", files=["~/prompts.txt"], column="text", validation=0, test=0),
    "a table of categories": lambda: BenchmarkPrompts("~/set/metadata.jsonl", category_column="file"),
    "a folder of categories": lambda: BenchmarkPrompts("~"),
    "objects": lambda: GenEvalPrompts("~/geneval.jsonl"),
    "images": lambda: ImageFolder("~/set", validation=0, test=0),
    "their sidecar": lambda: ImageFolder("~/set", "~/set/metadata.jsonl", validation=0, test=0),
    "words": lambda: Cleaner(unsafe_words="~/prompts.txt"),
    "guidelines": lambda: read_guidelines(ASPECTS, "~/set"),
    "people's rankings": lambda: Rankings("r", "~/set", "test.json", RankingColumns(), []).load(),
    "their images": lambda: Rankings("r", "~/set", "test.json", RankingColumns(), [], images="~/set").load(),
}


@pytest.mark.parametrize("door", DOORS)
def test_every_door_knows_the_home(door: str, home: Path) -> None:
    DOORS[door]()


def test_folders_that_are_yet_to_be_made_are_at_home(home: Path) -> None:
    assert PreferenceDataModule("~/new")._folder == home / "new"
    assert RunCheckpoints("~/new")._folder == home / "new"
    human = Rankings("r", "~/set", "test.json", RankingColumns(), [])
    assert HumanDataModule({"set": human}, {}, {}, cache="~/new")._cache == home / "new"


def test_another_users_home_and_one_that_is_not(home: Path) -> None:
    assert user_path("~root/x") == Path("~root/x").expanduser()
    assert user_path("a/~/b") == Path("a/~/b")
    with pytest.raises(ValueError, match="'~nobody-like-this/x' begins with the home of a user that there is not"):
        user_path("~nobody-like-this/x")
    assert user_place("owner/name") == "owner/name"
    assert user_place("~/model") == str(home / "model")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("folder=~/out", "folder=HOME/out"),
        ("folder=~", "folder=HOME"),
        ("hydra.run.dir='~/a b'", "hydra.run.dir='HOME/a b'"),
        ("files=[~/a,~/b, c]", "files=[HOME/a,HOME/b, c]"),
        ("+set={folder: ~/a}", "+set={folder: HOME/a}"),
        ("~data.columns.aspects", "~data.columns.aspects"),  # deletes
        ("~data.columns=x", "~data.columns=x"),
        ("prompt='about ~ 3'", "prompt='about ~ 3'"),
        ("folder=out~/x", "folder=out~/x"),
        ("folder=~~", "folder=~~"),
        ("--help", "--help"),
    ],
)
def test_a_commands_values_begin_at_home_where_no_shell_says_so(given: str, meant: str, home: Path) -> None:
    assert at_home([given]) == [re.sub("HOME", str(home), meant)]
