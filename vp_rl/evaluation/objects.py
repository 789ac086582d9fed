"""Base model against adapter by GenEval's checks: what each image shows, whether that is right, and scores by task."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vp_rl.evaluation.claims import held_by, mark
from vp_rl.evaluation.compare import Change, change
from vp_rl.evaluation.geneval import Detector, Found, Verdict, check, examine
from vp_rl.evaluation.images import Pixels
from vp_rl.evaluation.store import Store, key_of, same_pixels
from vp_rl.interfaces import Annotator
from vp_rl.types import Answer, Aspect, Rating
from vp_rl.visionprefer import estimates
from vp_rl.visionprefer.object_prompts import TASKS, ObjectPrompts, Wanted

OVERALL = "overall"
"""GenEval's score: the mean over tasks, however many prompts each has."""

_AT_ONCE = 32  # images, after which what was seen is kept


@dataclass(frozen=True)
class Checked:
    """What one policy made, and what is right of it. A prompt's images, one for each seed, are next to each other."""

    prompts: list[str]
    """One for each image."""
    seeds: list[int]
    """One for each image."""
    images: Pixels
    wanted: list[Wanted]
    """By each image's prompt."""
    found: list[list[Found]]
    """What counts of what the detector found, the surest first."""
    verdicts: list[Verdict]

    @property
    def correct(self) -> Float[np.ndarray, " images"]:
        """1 where all is as asked, else 0."""
        return np.array([float(verdict.correct) for verdict in self.verdicts])


class Score(NamedTuple):
    """One line of the result."""

    change: Change
    prompts: int


def examine_all(
    detector: Detector,
    source: ObjectPrompts,
    prompts: Sequence[str],
    seeds: Sequence[int],
    images: Pixels,
    store: Store,
    who: str,
    on_batch: Callable[[int], object] = lambda images: None,
) -> Checked:
    """Looks at every image and checks it.

    Args:
        detector: what looks.
        source: of the prompts.
        prompts: different ones.
        seeds: of each prompt's images.
        images: a prompt's next to each other.
        store: has what was seen before, and gets the rest.
        who: the detector's fingerprint.
        on_batch: called with the number of images that were just looked at, or found.
    """
    each = [prompt for prompt in prompts for _ in seeds]
    wanted, names = [source.wanted(prompt) for prompt in each], source.vocabulary()
    keys = [
        key_of("objects", who, names, asked, same_pixels(image)) for asked, image in zip(wanted, images, strict=True)
    ]
    seen = {key: _unpack(data) for key, data in store.get(keys).items()}
    missing = [place for place, key in enumerate(keys) if key not in seen]
    on_batch(len(keys) - len(missing))
    for some in (missing[i : i + _AT_ONCE] for i in range(0, len(missing), _AT_ONCE)):
        new = {keys[place]: examine(detector, images[place], wanted[place], names) for place in some}
        store.put((key, json.dumps(found).encode()) for key, found in new.items())
        seen |= new
        on_batch(len(some))
    found = [seen[key] for key in keys]
    verdicts = [check(there, asked) for there, asked in zip(found, wanted, strict=True)]
    return Checked(each, list(seeds) * len(prompts), images, wanted, found, verdicts)


def _unpack(data: bytes) -> list[Found]:
    return [Found(name, confidence, tuple(box), color) for name, confidence, box, color in json.loads(data)]


def compare_tasks(base: Checked, tuned: Checked) -> dict[str, Score]:
    """Each task's share of right images before and after, and `OVERALL` behind them; all decided together.

    Raises:
        ValueError: the two are not of the same prompts and seeds.
    """
    if (base.prompts, base.seeds) != (tuned.prompts, tuned.seeds):
        raise ValueError("Only images of the same prompts and seeds can be compared.")
    tasks = np.array([wanted.task for wanted in base.wanted])
    prompt = np.unique(base.prompts, return_inverse=True)[1]
    scores = {}
    for task in (name for name in TASKS if name in tasks):
        chosen = np.flatnonzero(tasks == task)
        own = np.unique(prompt[chosen], return_inverse=True)[1]
        scores[task] = Score(change(base.correct[chosen], tuned.correct[chosen], own, 1.0), int(own.max()) + 1)
    task_of = np.array([TASKS.index(task) for task in tasks])
    scores[OVERALL] = Score(overall(base.correct, tuned.correct, prompt, task_of), int(prompt.max()) + 1)
    held = held_by({name: score.change.chance for name, score in scores.items()}, OVERALL)
    return {name: score._replace(change=mark(score.change, held[name])) for name, score in scores.items()}


def overall(
    before: Float[np.ndarray, " images"],
    after: Float[np.ndarray, " images"],
    prompt: Int[np.ndarray, " images"],
    task: Int[np.ndarray, " images"],
) -> Change:
    """The mean over tasks, with an interval for which each task's prompts are drawn anew, and never fewer of a task.

    That is the interval of a plain mean over prompts whose distances from their own task's mean are scaled so that the
    mean's variance is that of a mean of independent means. Of one task alone it is that task's; where a task has one
    prompt alone there is none.

    Args:
        before, after: of each image.
        prompt: the number of each image's prompt, from 0.
        task: the number of each image's task.
    """
    by_task = [
        change(before[own], after[own], np.unique(prompt[own], return_inverse=True)[1])
        for own in (np.flatnonzero(task == each) for each in np.unique(task))
    ]
    means = {
        name: float(np.mean([getattr(own, name) for own in by_task]))
        for name in ("base", "tuned", "difference", "win", "tie", "loss")
    }
    difference = np.bincount(prompt, after - before) / np.bincount(prompt)
    task_of = task[np.unique(prompt, return_index=True)[1]]
    if np.unique(task_of, return_counts=True)[1].min() < 2:
        return replace(by_task[0], **means, low=math.nan, high=math.nan, chance=1.0)
    whole = _as_one_mean(difference, task_of)
    low, high = estimates.paired(whole, scale=1.0)
    return replace(by_task[0], **means, low=low, high=high, chance=estimates.chance(whole, 1.0))


def _as_one_mean(
    values: Float[np.ndarray, " prompts"], task: Int[np.ndarray, " prompts"]
) -> Float[np.ndarray, " prompts"]:
    """Values whose mean is the mean over tasks, and whose mean's variance is that one's: see `overall`."""
    total, tasks = len(values), np.unique(task)
    spread = np.zeros(total)
    for each in tasks:
        own = task == each
        number = int(own.sum())
        unbiased = math.sqrt(number / (number - 1) * (total - 1) / total) if number > 1 else 0.0
        spread[own] = (values[own] - values[own].mean()) * unbiased * total / (len(tasks) * number)
    return np.mean([values[task == each].mean() for each in tasks]) + spread


class Unasked(Annotator):
    """Stands where an `Evaluator` that only makes images has its judge."""

    name = "nobody"
    version = "1"
    concurrency = 1

    async def ask(self, prompt: str, images: Sequence[bytes], aspect: Aspect) -> Answer:
        """Never.

        Raises:
            ValueError: always.
        """
        raise ValueError("Object checks ask no judge: a detector looks at the images.")

    def read(self, answer: str, images: int) -> list[Rating]:
        """Never.

        Raises:
            ValueError: always.
        """
        raise ValueError("Object checks ask no judge: a detector looks at the images.")
