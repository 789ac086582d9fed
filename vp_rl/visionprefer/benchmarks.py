"""Prompt sets that models are compared on, by category: PartiPrompts, DrawBench, T2I-CompBench and the like."""

import re
from pathlib import Path

from vp_rl.configuration.kinds import Count, Seed, Text
from vp_rl.files import paths
from vp_rl.interfaces import PromptSource
from vp_rl.types import Split
from vp_rl.visionprefer.raw import Columns, RawPrompt, read_file, sample

_ENDING = re.compile(r"_(train|val|test)$")  # T2I-CompBench's files are color_val.txt, shape_val.txt, ...


class BenchmarkPrompts(PromptSource):
    """All of them are the test split: nothing is trained on, and nothing is left out of what others report on.

    Args:
        path: a table with a column of prompts and one of categories; or a folder of text files with one prompt a line,
            each file a category.
        column, category_column: of a table.
        limit: prompts to draw at random where there are more. None: all.
        seed: of that draw.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it cannot be read, or has no prompt.
    """

    def __init__(
        self,
        path: Text,
        column: Text = "prompt",
        category_column: Text = "category",
        limit: Count | None = None,
        seed: Seed = 0,
    ) -> None:
        if (folder := paths.user_path(path)).is_dir():
            read = {_ENDING.sub("", file.stem): read_file(str(file), Columns()) for file in _texts(folder)}
            rows = [RawPrompt(each.text, name=name) for name, prompts in read.items() for each in prompts]
        else:
            rows = read_file(path, Columns(column, id=category_column))
        found: dict[str, str] = {}
        for row in rows:
            if row.text.strip():
                found.setdefault(row.text.strip(), row.name)  # a prompt that is there twice counts once
        if not found:
            raise ValueError(f"prompts.path={path!r} has no prompts.")
        drawn = sample(len(found), limit, seed)
        self._category = {prompt: name for place, (prompt, name) in enumerate(found.items()) if place in drawn}

    def split(self, name: Split) -> list[str]:
        """All prompts, in the file's order, for `test`; none for the others."""
        return list(self._category) if name == "test" else []

    def category(self, prompt: str) -> str | None:
        """By the column, or the file's name."""
        return self._category.get(prompt)


def _texts(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise FileNotFoundError(f"prompts.path='{folder}' has no text files: each is a category, one prompt a line.")
    return files
