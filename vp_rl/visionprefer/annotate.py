"""Stage 4 of VisionPrefer: an annotator rates every image in every aspect."""

import asyncio
from collections.abc import Iterable, Sequence

from tqdm import tqdm

from vp_rl.interfaces import Annotator
from vp_rl.types import ASPECTS, Aspect, Rating


async def rate_all(
    annotator: Annotator, prompts: Sequence[str], images: Iterable[Sequence[bytes]], *, quiet: bool = False
) -> list[dict[Aspect, list[Rating]]]:
    """For each prompt, the ratings of its images (as files) by aspect; a few prompts are in flight at once.

    The annotator's first error ends it all, and is raised as it is.
    """
    gate = asyncio.Semaphore(annotator.concurrency)
    with tqdm(total=len(prompts), desc="annotate", unit="prompt", mininterval=2, disable=quiet) as bar:

        async def one(prompt: str, pictures: Sequence[bytes]) -> dict[Aspect, list[Rating]]:
            ratings: dict[Aspect, list[Rating]] = {}
            async with gate:
                for aspect in ASPECTS:
                    ratings[aspect] = await annotator.annotate(prompt, pictures, aspect)
            bar.update()
            return ratings

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(*each)) for each in zip(prompts, images, strict=True)]
        except ExceptionGroup as errors:  # callers tell users of a ValueError; they cannot see it in a group
            raise errors.exceptions[0] from errors
    return [task.result() for task in tasks]
