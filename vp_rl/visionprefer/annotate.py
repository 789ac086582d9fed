"""Stage 4 of VisionPrefer: an annotator rates every image in every aspect."""

import asyncio
import io
from collections.abc import Iterable, Sequence

from PIL import Image
from tqdm import tqdm

from vp_rl.interfaces import Annotator
from vp_rl.types import ASPECTS, Aspect, Rating

_CONCURRENCY = 16  # prompts


async def rate_all(
    annotator: Annotator, prompts: Sequence[str], images: Iterable[Sequence[Image.Image]], *, quiet: bool = False
) -> list[dict[Aspect, list[Rating]]]:
    """For each prompt, the ratings of its images by aspect; a few prompts are in flight at once.

    The annotator's first error ends it all, and is raised as it is.
    """
    gate = asyncio.Semaphore(_CONCURRENCY)
    with tqdm(total=len(prompts), desc="annotate", unit="prompt", mininterval=2, disable=quiet) as bar:

        async def one(prompt: str, pictures: Sequence[Image.Image]) -> dict[Aspect, list[Rating]]:
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


def rate_png(
    annotator: Annotator, prompts: Sequence[str], images: Sequence[Sequence[bytes]]
) -> list[dict[Aspect, list[Rating]]]:
    """`rate_all` for encoded images, run to its end."""
    # Not a list, which would keep all images decoded: each prompt's are let go when it is done.
    pictures = ([Image.open(io.BytesIO(png)) for png in row] for row in images)
    return asyncio.run(rate_all(annotator, prompts, pictures))
