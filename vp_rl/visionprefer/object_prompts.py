"""Prompts that say what must be in the image, so that an object detector can check it: GenEval's, and scenes."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vp_rl.configuration.kinds import Count, Seed, Text
from vp_rl.files import paths, tables
from vp_rl.interfaces import PromptSource
from vp_rl.scenes.grammar import Scene, parse, unique_scenes
from vp_rl.types import Split
from vp_rl.visionprefer.raw import sample

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
"""GenEval's (Ghosh et al. 2023, arXiv 2310.11513)."""
RELATIONS = ("left of", "right of", "above", "below")
_CLAUSE = {"class", "count", "color", "position"}


class Clause(NamedTuple):
    """Objects of one class, at least so many."""

    name: str
    """The class."""
    count: int = 1
    color: str | None = None
    position: tuple[str, int] | None = None
    """One of `RELATIONS`, and the place of the earlier clause whose objects these stand in it to."""


class Wanted(NamedTuple):
    """What one prompt asks for."""

    task: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()
    """So many of a class are too many."""

    @property
    def names(self) -> tuple[str, ...]:
        """Every class that is looked for, once."""
        return tuple(dict.fromkeys(clause.name for clause in (*self.include, *self.exclude)))

    @property
    def colors(self) -> tuple[str, ...]:
        """Every colour that is asked for, once."""
        return tuple(dict.fromkeys(clause.color for clause in self.include if clause.color))


class ObjectPrompts(PromptSource):
    """Prompts with what they ask for. All of them are the test split, by category of task."""

    @abstractmethod
    def wanted(self, prompt: str) -> Wanted:
        """What this prompt of its asks for."""

    @abstractmethod
    def vocabulary(self) -> tuple[str, ...]:
        """The classes that a detector must tell apart, those of prompts that were not drawn included."""

    def category(self, prompt: str) -> str:
        """The task."""
        return self.wanted(prompt).task


class GenEvalPrompts(ObjectPrompts):
    """GenEval's `evaluation_metadata.jsonl`, or a table like it: an object a line.

    `{"tag": "counting", "prompt": "a photo of two cups", "include": [{"class": "cup", "count": 2}], "exclude":
    [{"class": "cup", "count": 3}]}`; a clause of `include` may have a `color` and a `position`, which is a relation
    and the place of an earlier clause.

    Args:
        path: of the file.
        column, category_column: what a line calls its prompt and its task.
        limit: prompts to draw at random where there are more. None: all.
        seed: of that draw.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is damaged, asks for what no check looks at, or contradicts another.
    """

    def __init__(
        self,
        path: Text,
        column: Text = "prompt",
        category_column: Text = "tag",
        limit: Count | None = None,
        seed: Seed = 0,
    ) -> None:
        found: dict[str, Wanted] = {}
        for place, row in tables.objects(_file(path), [column, category_column]):
            try:
                prompt, wanted = _read(row, column, category_column)
                if found.setdefault(prompt, wanted) != wanted:
                    raise ValueError(f"{prompt[:200]!r} was there before and asked for something else")
            except ValueError as error:
                raise ValueError(f"{path}, {place}: {error}.") from error
        if not found:
            raise ValueError(f"prompts.path={path!r} has no prompts.")
        drawn = sample(len(found), limit, seed)
        self._names = tuple(dict.fromkeys(name for wanted in found.values() for name in wanted.names))
        self._wanted = {prompt: wanted for place, (prompt, wanted) in enumerate(found.items()) if place in drawn}

    def split(self, name: Split) -> list[str]:
        """All prompts, in the file's order, for `test`; none for the others."""
        return list(self._wanted) if name == "test" else []

    def wanted(self, prompt: str) -> Wanted:
        """As its line says."""
        return self._wanted[prompt]

    def vocabulary(self) -> tuple[str, ...]:
        """Every class of the file."""
        return self._names


class SceneObjects(ObjectPrompts):
    """Prompts of the embedded world's test split: the grammar says what must be there.

    Its prompts always name colours, so these are checked in every task. Sizes are not, as GenEval has none. Left out
    are two things of one shape, which the checks cannot tell apart, and compositions, which are no task of GenEval's.

    Args:
        test: how many.
        seed: of the draw.

    Raises:
        ValueError: there are not so many.
    """

    note = "The embedded world: its detector is the scene judge's own, so it is no second opinion on that judge."

    def __init__(self, test: Count = 128, seed: Seed = 0) -> None:
        fitting = [scene for scene in unique_scenes("test", 2 * test, seed) if _checkable(scene)][:test]
        if len(fitting) < test or not fitting:
            raise ValueError(f"prompts.test={test}: the embedded world gave {len(fitting)} prompts with objects.")
        self._prompts = [scene.prompt for scene in fitting]

    def split(self, name: Split) -> list[str]:
        """All prompts for `test`; none for the others."""
        return list(self._prompts) if name == "test" else []

    def wanted(self, prompt: str) -> Wanted:
        """By the grammar.

        Raises:
            ValueError: the prompt is not of this grammar.
        """
        return of_scene(parse(prompt))

    def vocabulary(self) -> tuple[str, ...]:
        """The shapes of its prompts."""
        return tuple(dict.fromkeys(name for prompt in self._prompts for name in self.wanted(prompt).names))


def _checkable(scene: Scene) -> bool:
    shapes = [thing.shape for thing in scene.things]
    return scene.category != "composition" and len(set(shapes)) == len(shapes)


_TASK_OF = {"size": "colors", "count": "counting", "binding": "color_attr", "relation": "position"}


def of_scene(scene: Scene) -> Wanted:
    """What a scene asks for, in GenEval's terms. The relation is of the first thing to the second, so that comes first.

    Raises:
        ValueError: it is a composition, or has one shape twice.
    """
    if not _checkable(scene):
        raise ValueError(f"{scene.prompt!r} is no task of GenEval's: one or two things of different shapes are.")
    clauses = [Clause(thing.shape, thing.count, thing.color) for thing in scene.things]
    if scene.relation is not None:
        relation = scene.relation.removeprefix("to the ")
        clauses = [clauses[1], clauses[0]._replace(position=(relation, 0))]
    task = _TASK_OF[scene.category]
    too_many = tuple(Clause(each.name, each.count + 1) for each in clauses if task == "counting")
    return Wanted(task, tuple(clauses), too_many)


# --- one line


def _file(path: str) -> Path:
    file = paths.user_path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"prompts.path={path!r} is no file: give GenEval's evaluation_metadata.jsonl (djghosh13/geneval, prompts/)."
        )
    return file


def _read(row: Mapping[str, Any], column: str, category_column: str) -> tuple[str, Wanted]:
    prompt, task = row.get(column), row.get(category_column)
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"it has no text in column {column!r}; it has {', '.join(row) or 'none'}")
    if task not in TASKS:
        raise ValueError(f"{category_column}={task!r} is no task: choose from {', '.join(TASKS)}")
    include = [_clause(each, place, "include") for place, each in enumerate(_listed(row, "include"))]
    exclude = [_clause(each, place, "exclude") for place, each in enumerate(_listed(row, "exclude"))]
    names = [clause.name for clause in include]
    if not include:
        raise ValueError("include is empty, so that any image would be right")
    if len(set(names)) < len(names):
        raise ValueError(f"include has a class twice ({', '.join(names)}): a check takes the surest objects of a class")
    return prompt.strip(), Wanted(str(task), tuple(include), tuple(exclude))


def _listed(row: Mapping[str, Any], name: str) -> Sequence[Any]:
    value = row.get(name, [])
    if not isinstance(value, list):
        raise ValueError(f"{name} is {type(value).__name__}, not a list of clauses")
    return value


def _clause(given: Any, place: int, part: str) -> Clause:
    where = f"{part}[{place}]"
    if not isinstance(given, dict) or not isinstance(given.get("class"), str) or not given["class"].strip():
        raise ValueError(f"{where} has no class")
    count, color, position = given.get("count"), given.get("color"), given.get("position")
    if type(count) is not int or count < 1:
        raise ValueError(f"{where}: count={count!r} must be a whole number of at least 1")
    if strange := given.keys() - (_CLAUSE if part == "include" else {"class", "count"}):
        raise ValueError(f"{where} has {', '.join(sorted(strange))}, which no check looks at")
    if color is not None and (not isinstance(color, str) or not color):
        raise ValueError(f"{where}: color={color!r} is no colour's name")
    if position is None:
        return Clause(given["class"], count, color)
    if not isinstance(position, list) or len(position) != 2 or position[0] not in RELATIONS:
        raise ValueError(f"{where}: position={position!r} must be [one of {', '.join(RELATIONS)}; an earlier clause]")
    if type(position[1]) is not int or not 0 <= position[1] < place:
        raise ValueError(f"{where}: position={position!r} points to no earlier clause")
    return Clause(given["class"], count, color, (position[0], position[1]))
