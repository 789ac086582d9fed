"""What a set of human judgements is: prompts, images that are read when needed, and what people said of them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
from jaxtyping import Float

NO_ASPECTS: Mapping[str, np.ndarray] = {}


class Judged(NamedTuple):
    """One prompt with its images, by name, and what people said of them."""

    prompt: str
    images: tuple[str, ...]
    """Their names in the set; what has the same name is the same image."""
    ranks: Float[np.ndarray, " images"]
    """Lower is better, equal is a tie; only the order counts."""
    shares: Float[np.ndarray, "images images"]
    """Of the people who were asked, how many prefer the row's image to the column's; half of who call them equal."""
    generators: tuple[str, ...] = ()
    """What made each image; empty where that is not known."""
    aspects: Mapping[str, Float[np.ndarray, " images"]] = NO_ASPECTS
    """Ranks in single aspects."""
    tuning: bool = False
    """Only there for a protocol to choose a setting on."""


class Scored(NamedTuple):
    """One prompt's images as people ranked them and as a reward scored them."""

    prompt: str
    """Prompts of the same text are one when intervals are worked out."""
    ranks: Float[np.ndarray, " images"]
    scores: Float[np.ndarray, " images"]
    tuning: bool = False
    """A protocol may choose a setting on it, and never reports it."""


class Outcome(NamedTuple):
    """What was earned of what could be, by prompt; a prompt that nothing can be earned on counts for nothing."""

    earned: Float[np.ndarray, " prompts"]
    possible: Float[np.ndarray, " prompts"]
    prompts: list[str]
    protocol: str
    """Its name, as in `published`."""
    note: str = ""
    """What a reader must know to read the number."""


Protocol = Callable[[Sequence[Scored]], Outcome]
"""A way to say how often a reward agrees with people: see `evaluation/protocols.py`."""


class HumanSet(ABC):
    """Images that people have judged, as they lie on disk."""

    title: str
    """Its name in tables; the published numbers are found by it."""
    protocols: Sequence[Protocol]
    """How its accuracy is measured; the first one is its own."""
    note: str = ""
    """What readers of a number must know about the set."""
    any_order: ClassVar[bool]
    """Whether `read` finds a few images without going through all of them."""

    @abstractmethod
    def load(self) -> list[Judged]:
        """All judgements, without the images.

        Raises:
            FileNotFoundError, ValueError: the set is not there, or is not what it should be; says what to do.
        """

    @abstractmethod
    def read(self, wanted: Collection[str]) -> Iterator[tuple[str, bytes]]:
        """The files of these images with their names, each once, in whatever order is quickest; one at a time."""

    @abstractmethod
    def stamp(self) -> str:
        """Changes when the set's files do, so that scores of other images are not taken for those of these."""


def shares_of(opinions: Float[np.ndarray, "people images"]) -> Float[np.ndarray, "images images"]:
    """`Judged.shares` of people who each ranked all images; lower is better, equal is a tie."""
    gaps = opinions[:, None, :] - opinions[:, :, None]
    return (0.5 + 0.5 * np.sign(gaps)).mean(0)


def pair(
    prompt: str,
    images: tuple[str, str],
    first: float,
    *,
    label: float | None = None,
    generators: tuple[str, ...] = (),
    tuning: bool = False,
) -> Judged:
    """A judgement of two images.

    Args:
        first: share of the people who prefer the first one, 0 to 1; 0.5 is a tie.
        label: what counts as the verdict, if it is not the majority; on the same scale.
    """
    shares = np.array([[0.5, first], [1 - first, 0.5]])
    ranks = np.array([0.0, np.sign((first if label is None else label) - 0.5)])
    return Judged(prompt, images, ranks, shares, generators, tuning=tuning)
