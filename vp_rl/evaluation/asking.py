"""The held-out judge as an evaluation asks it: nothing that it has answered before, and everything counted."""

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from vp_rl.evaluation.store import Store, key_of, same_pixels
from vp_rl.interfaces import Annotator
from vp_rl.secrets import masked
from vp_rl.types import ASPECTS, Answer, Aspect, Rating, Usage
from vp_rl.visionprefer.annotate import rate_all
from vp_rl.visionprefer.generate import as_png
from vp_rl.waiting import wait

_AT_ONCE = 64  # prompts whose images are encoded and wait to be sent, or more where as many are asked about

Picture = UInt8[np.ndarray, "height width 3"]
Rated = list[list[Rating]]
"""Of a prompt's images, each in the order of `ASPECTS`."""


class Asked(NamedTuple):
    """What judging took."""

    questions: int = 0
    """That were answered; one is of all images that are shown at once, in one aspect."""
    kept: int = 0
    """That had been answered before."""
    usage: Usage = Usage()
    """What the answers cost; tokens and price are 0 where the judge does not tell."""

    def plus(self, other: "Asked") -> "Asked":
        """Both together."""
        return Asked(self.questions + other.questions, self.kept + other.kept, self.usage.plus(other.usage))


class _Counted(Annotator):
    """Another annotator, and what has been asked of it."""

    def __init__(self, annotator: Annotator) -> None:
        self._annotator, self.asked = annotator, Asked()
        self.name, self.version, self.concurrency = annotator.name, annotator.version, annotator.concurrency

    async def ask(self, prompt: str, images: Sequence[bytes], aspect: Aspect) -> Answer:
        answer = await self._annotator.ask(prompt, images, aspect)
        self.asked = self.asked.plus(Asked(1, 0, answer.usage))
        return answer

    def read(self, answer: str, images: int) -> list[Rating]:
        return self._annotator.read(answer, images)


def rate(
    judge: Annotator, prompts: Sequence[str], shown: Sequence[Sequence[Picture]], store: Store, *, quiet: bool = True
) -> tuple[list[Rated], Asked]:
    """The judge's ratings, and what they took. Each prompt's are kept as soon as they are there.

    Args:
        judge: who is asked, also where an event loop is running, as in a notebook.
        prompts: what the images are of.
        shown: the images of each prompt, which the judge sees at once, in that order.
        store: what was answered before, and is not asked again.
        quiet: no progress bar.
    """
    keys = [
        key_of("rating", judge.name, judge.version, prompt, [same_pixels(image) for image in images])
        for prompt, images in zip(prompts, shown, strict=True)
    ]
    found = {key: _unpack(data) for key, data in store.get(keys).items()}
    missing = [place for place, key in enumerate(keys) if key not in found]
    counted = _Counted(judge)
    with tqdm(total=len(missing), desc=f"asking {judge.name}", unit="prompt", mininterval=2, disable=quiet) as bar:
        size = max(_AT_ONCE, 8 * judge.concurrency)  # the slowest of them all is waited for
        for some in (missing[i : i + size] for i in range(0, len(missing), size)):

            def keep(place: int, ratings: dict[Aspect, list[Rating]], some: list[int] = some) -> None:
                by_image = [list(each) for each in zip(*(ratings[aspect] for aspect in ASPECTS), strict=True)]
                found[keys[some[place]]] = by_image
                store.put([(keys[some[place]], json.dumps(masked(by_image)).encode())])
                bar.update()

            pictures = ([as_png(image) for image in shown[place]] for place in some)
            wait(rate_all(counted, [prompts[place] for place in some], pictures, quiet=True, on_rated=keep))
    kept = len(ASPECTS) * (len(keys) - len(missing))
    return [found[key] for key in keys], counted.asked.plus(Asked(kept=kept))


def _unpack(data: bytes) -> Rated:
    return [[Rating(*each) for each in image] for image in json.loads(data)]
