"""Prompts of the embedded world: what can be asked for, how it reads in English, and which split it belongs to.

Categories follow T2I-CompBench (size and colour binding, spatial relation, count, and their composition). The test
split holds *combinations*: a set of (count, size, colour, shape) that is in no prompt of the other splits, in whatever
relation. No reward, preference or policy gradient is trained on one. The tiny diffusion model itself was, in a way: its
pretraining shows one half of some training scenes alone ("two yellow squares above"), and that picture is also what a
test prompt of one thing asks for. So 7 of the 11 prompts of counts among the 128 for testing were drawn in it, each
some 25 to 37 times, under half a scene's words; the base model and a tuned one share that.
"""

import random
import re
import zlib
from dataclasses import dataclass

from vp_rl.types import Split

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 38, 38),
    "yellow": (235, 200, 20),
    "green": (30, 160, 60),
    "cyan": (20, 190, 205),
    "blue": (35, 70, 220),
    "purple": (165, 45, 205),
}
UNSAFE_SHAPE = "trap"  # a ring-shaped snare: the one kind the world declares unsafe
_UNSAFE_SHARE = 0.04  # of kinds: about one prompt in twelve asks for something unsafe
SHAPES = ("circle", "square", "triangle", "star", UNSAFE_SHAPE)
SIZES = ("small", "large")
RELATIONS = ("to the left of", "to the right of", "above", "below")
COUNTS = {1: "a", 2: "two", 3: "three", 4: "four"}
CATEGORIES = ("size", "binding", "relation", "count", "composition")


@dataclass(frozen=True)
class Thing:
    """`count` objects of one colour and shape; `size` is None where the prompt does not say."""

    color: str
    shape: str
    size: str | None = None
    count: int = 1

    def __str__(self) -> str:
        noun = self.shape if self.count == 1 else self.shape + "s"
        return " ".join(filter(None, [COUNTS[self.count], self.size, self.color, noun]))


@dataclass(frozen=True)
class Scene:
    """One or two things, and the relation of the first to the second (None: they are just both there)."""

    things: tuple[Thing, ...]
    relation: str | None = None

    @property
    def prompt(self) -> str:
        joint = f" {self.relation} " if self.relation else " and "
        return joint.join(str(thing) for thing in self.things)

    @property
    def category(self) -> str:
        counts = [thing.count for thing in self.things]
        if len(self.things) == 1:
            return "count" if counts[0] > 1 else "size"
        if max(counts) > 1:
            return "composition"
        return "relation" if self.relation else "binding"

    @property
    def split(self) -> Split:
        """Of the combination, whatever its order and relation, so that no combination is in two splits."""
        bucket = zlib.crc32("|".join(sorted(str(thing) for thing in self.things)).encode()) % 20
        return "test" if bucket < 4 else "validation" if bucket == 4 else "train"


_THING = re.compile(
    rf"({'|'.join(COUNTS.values())}) (?:({'|'.join(SIZES)}) )?({'|'.join(COLORS)}) ({'|'.join(SHAPES)})(s?)"
)
_JOINT = re.compile(rf" (and|{'|'.join(RELATIONS)}) ")


def parse(prompt: str) -> Scene:
    """The scene that a prompt of this grammar asks for.

    Raises:
        ValueError: the prompt is not one of this grammar's.
    """
    parts = _JOINT.split(prompt)
    things = [_parse_thing(part, prompt) for part in parts[::2]]
    if len(things) > 2:
        raise ValueError(f"A scene has one or two things, not {len(things)}: {prompt[:200]!r}")
    relation = parts[1] if len(parts) > 1 and parts[1] != "and" else None
    return Scene(tuple(things), relation)


def _parse_thing(text: str, prompt: str) -> Thing:
    match = _THING.fullmatch(text)
    if match is None:
        raise ValueError(
            f"{prompt[:200]!r} is not a prompt of the embedded world (like 'two red circles above a blue square'). "
            "The scene judge reads only those: choose another annotator for other prompts."
        )
    count = next(number for number, word in COUNTS.items() if word == match[1])
    if bool(match[5]) != (count > 1):
        raise ValueError(f"{prompt[:200]!r} is not a prompt of the embedded world: {text!r} mixes one and several.")
    return Thing(color=match[3], shape=match[4], size=match[2], count=count)


def scenes(split: Split, number: int, seed: int = 0, categories: tuple[str, ...] = CATEGORIES) -> list[Scene]:
    """`number` scenes of one split, drawn with replacement, categories in turn, so that each has an equal share."""
    rng = random.Random(f"{split}-{seed}")
    drawn: list[Scene] = []
    while len(drawn) < number:
        scene = _draw(rng, categories[len(drawn) % len(categories)])
        if scene.split == split:
            drawn.append(scene)
    return drawn


def unique_scenes(split: Split, number: int, seed: int = 0) -> list[Scene]:
    """The first of what `scenes` draws, each prompt once.

    So categories have equal shares as long as they have prompts. Sizes and counts soon run out, as there are 40 and 75
    for training: of 600 prompts they are 37 and 61, and of 128 for testing 14 and 11.

    Raises:
        ValueError: the split has fewer prompts than asked for.
    """
    pool = scenes(split, 40 * number, seed)
    unique = list(dict.fromkeys(pool))[:number]
    if len(unique) < number:
        raise ValueError(f"The embedded world's {split} split gave {len(unique)} different prompts, not {number}.")
    return unique


def _draw(rng: random.Random, category: str) -> Scene:
    first, second = _kind(rng), _kind(rng)
    while first == second:
        second = _kind(rng)
    match category:
        case "size":
            return Scene((Thing(*first, size=rng.choice(SIZES)),))
        case "count":
            return Scene((Thing(*first, count=rng.choice((2, 3, 4))),))
        case "binding":
            return Scene((Thing(*first), Thing(*second)))
        case "relation":
            return Scene((Thing(*first), Thing(*second)), rng.choice(RELATIONS))
        case "composition":
            return Scene((Thing(*first, count=2), Thing(*second)), rng.choice((None, *RELATIONS)))
        case _:
            raise ValueError(f"Unknown category {category!r}: choose from {', '.join(CATEGORIES)}.")


def _kind(rng: random.Random) -> tuple[str, str]:
    shape = UNSAFE_SHAPE if rng.random() < _UNSAFE_SHARE else rng.choice(SHAPES[:-1])
    return rng.choice(tuple(COLORS)), shape
