"""Stage 4 of VisionPrefer: annotators rate every image in every aspect."""

import asyncio
import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from tqdm import tqdm

from vp_rl.configuration.kinds import Part
from vp_rl.interfaces import Annotator
from vp_rl.types import ASPECTS, Answer, Aspect, Rating, Usage
from vp_rl.visionprefer.ask import Question
from vp_rl.visionprefer.journal import Journal, key_of
from vp_rl.visionprefer.polish import Item

ReadImage = Callable[[str], bytes]
OnRated = Callable[[int, dict[Aspect, list[Rating]]], object]
"""Told a prompt's place and its ratings as soon as they are there."""


class Opinion(NamedTuple):
    """An annotator's part in a build."""

    annotator: Annotator
    name: str
    """Recorded with each rating; the annotator's own, or that with `/reversed`."""
    share: float
    """Of the prompts, in (0, 1]: a second opinion is asked on a sample."""
    backwards: bool = False
    """The images are shown in the opposite order, which tells how much their place matters."""


@dataclass(frozen=True)
class SecondOpinions:
    """Other ratings of a sample of prompts, so that a reader of the dataset knows how far to trust the first ones.

    Args:
        annotator: who else is asked; None: nobody.
        share: of the prompts that they are asked of, in (0, 1].
        backwards: whether the annotator itself is asked again with the images in the opposite order.
    """

    annotator: Annotator | None = None
    share: Part = 0.05
    backwards: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"second_opinions.share={self.share} must be above 0 and at most 1.")


def opinions(annotator: Annotator, second: SecondOpinions | None) -> list[Opinion]:
    """The annotator's own part first, then the others' on a sample.

    Raises:
        ValueError: two would be recorded under one name.
    """
    found = [Opinion(annotator, annotator.name, 1.0)]
    if second is not None and second.annotator is not None:
        if second.annotator.name == annotator.name:
            raise ValueError(f"Two annotators are called {annotator.name!r}: their ratings could not be told apart.")
        found.append(Opinion(second.annotator, second.annotator.name, second.share))
    if second is not None and second.backwards:
        found.append(Opinion(annotator, f"{annotator.name}/reversed", second.share, backwards=True))
    return found


class Call(NamedTuple):
    """One question: some images of a prompt, in one aspect."""

    item: Item
    aspect: Aspect
    images: tuple[str, ...]
    """Their ids in the order in which they are shown."""


class Note(NamedTuple):
    """A rating as it goes into the dataset."""

    image_id: str
    aspect: Aspect
    rating: Rating
    position: int
    """Of the image in its call, from 0."""


def calls(opinion: Opinion, item: Item, images: Sequence[str], per_call: int, seed: int) -> list[Call]:
    """What one annotator is asked of one prompt's images: nothing where it has no two, or is not in the sample.

    Images are shuffled anew for each aspect, and the same for whoever is asked, so that a backwards opinion differs
    from the first one by the order alone.

    Args:
        per_call: images shown at once; 0: all of the prompt's.
    """
    if len(images) < 2 or zlib.crc32(f"{seed}/{item.prompt_id}".encode()) >= opinion.share * 2**32:
        return []
    size = per_call or len(images)
    made = []
    for aspect in ASPECTS:
        order = list(images)
        random.Random(f"{seed}/{item.prompt_id}/{aspect}").shuffle(order)
        for start in range(0, len(order), size):
            shown = order[start : start + size]
            made.append(Call(item, aspect, tuple(shown[::-1] if opinion.backwards else shown)))
    return made


def questions(opinion: Opinion, planned: Iterable[Call], read: ReadImage) -> Iterator[Question]:
    """Their images are read, by id, when a question is asked, not before."""
    for call in planned:
        yield Question(
            key(opinion.annotator, call),
            _subject(call),
            partial(_ask, opinion.annotator, call, read),
            partial(opinion.annotator.read, images=len(call.images)),
            partial(_estimate, opinion.annotator, call, read),
            call.item.prompt,
        )


def notes(opinion: Opinion, planned: Sequence[Call], journal: Journal) -> Iterator[list[Note] | None]:
    """The ratings of each call, as they are read today from what was answered then; None: it has no answer."""
    annotator = opinion.annotator
    keys = [key(annotator, call) for call in planned]
    for call, asked, text in zip(planned, keys, journal.texts(keys), strict=True):
        if text is None:
            yield None
            continue
        try:
            ratings = annotator.read(text, len(call.images))
        except ValueError as error:
            raise journal.unreadable_now(
                asked, f"{_subject(call)}, {call.item.prompt[:200]}", annotator.name, error
            ) from error
        yield [
            Note(image_id, call.aspect, rating, position)
            for position, (image_id, rating) in enumerate(zip(call.images, ratings, strict=True))
        ]


def key(annotator: Annotator, call: Call) -> bytes:
    """What makes a question another one: prompt, images, their order, aspect, annotator, version of its guidelines."""
    return key_of("annotate", annotator.name, annotator.version, call.item.prompt, call.images, call.aspect)


def _subject(call: Call) -> str:
    return f"{call.aspect} of {', '.join(call.images)}"


async def _ask(annotator: Annotator, call: Call, read: ReadImage) -> Answer:
    return await annotator.ask(call.item.prompt, [read(image_id) for image_id in call.images], call.aspect)


def _estimate(annotator: Annotator, call: Call, read: ReadImage) -> Usage:
    return annotator.estimate(call.item.prompt, [read(image_id) for image_id in call.images], call.aspect)


async def rate_all(
    annotator: Annotator,
    prompts: Sequence[str],
    images: Iterable[Sequence[bytes]],
    *,
    quiet: bool = False,
    on_rated: OnRated = lambda place, ratings: None,
) -> list[dict[Aspect, list[Rating]]]:
    """For each prompt, the ratings of its images (as files) by aspect, without a journal: for held-out judges.

    The annotator's first error ends it all, and is raised as it is; `on_rated` has had what was rated before.
    """
    gate = asyncio.Semaphore(annotator.concurrency)
    with tqdm(total=len(prompts), desc="annotate", unit="prompt", mininterval=2, disable=quiet) as bar:

        async def one(place: int, prompt: str, pictures: Sequence[bytes]) -> dict[Aspect, list[Rating]]:
            ratings: dict[Aspect, list[Rating]] = {}
            async with gate:
                for aspect in ASPECTS:
                    ratings[aspect] = await annotator.annotate(prompt, pictures, aspect)
            bar.update()
            on_rated(place, ratings)
            return ratings

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(one(place, *each)) for place, each in enumerate(zip(prompts, images, strict=True))
                ]
        except ExceptionGroup as errors:  # callers tell users of a ValueError; they cannot see it in a group
            raise errors.exceptions[0] from errors
    return [task.result() for task in tasks]
