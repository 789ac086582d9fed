"""Every metric that is logged is explained in docs/metrics.md, and every one that is explained is logged."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest
from test_evaluation import made_up

from vp_rl.evaluation.compare import compare

ROOT = Path(__file__).parents[1]
STAGES = ("train", "val", "test")


def explained() -> set[str]:
    """The names in the first columns of the page's tables."""
    lines = (ROOT / "docs" / "metrics.md").read_text().splitlines()
    first = [line.split("|")[1] for line in lines if line.startswith("| `")]
    return {name for cell in first for name in re.findall(r"`([^`]+)`", cell)}


def in_source() -> set[str]:
    """The names that algorithms and callbacks give to what they log; a part that varies is *."""
    found: set[str] = set()
    for file in [*(ROOT / "vp_rl" / "algorithms").glob("*.py"), *(ROOT / "vp_rl" / "callbacks").glob("*.py")]:
        tree = ast.parse(file.read_text())
        inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                text = "".join(str(part.value) if isinstance(part, ast.Constant) else "*" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
                text = node.value
            else:
                continue
            if re.fullmatch(r"(train|val|test)/[a-z_/*]+", text):
                found.add(text)
            elif re.fullmatch(r"\*/(loss|accuracy)", text):
                found |= {f"{stage}{text[1:]}" for stage in STAGES}
    return found


def test_the_search_finds_what_is_logged() -> None:
    assert {"train/kl", "train/skipped", "train/images_per_second", "val/loss", "test/accuracy/*"} <= in_source()


def test_every_metric_of_training_is_explained_and_no_other() -> None:
    here = {re.sub(r"/(ASPECT|mean)$", "/*", name) for name in explained() if name.startswith(STAGES)}
    assert here == in_source()


@pytest.mark.parametrize("seeds", [1, 2])
def test_every_held_out_metric_is_explained_and_no_other(seeds: int) -> None:
    base, tuned = made_up(np.ones((3, seeds)))
    base.panel["other"] = tuned.panel["other"] = base.scores
    found = {re.sub(r"^panel/.*", "panel/NAME", name) for name in compare(base, tuned)}
    here = {name for name in explained() if "/" not in name or name.startswith(("panel/", "look/"))} - {"signs"}
    here = {name for name in here if re.fullmatch(r"[a-z_]+(/[A-Za-z_]+)?", name)}
    assert found == here - ({"look/diversity"} if seeds == 1 else set())
