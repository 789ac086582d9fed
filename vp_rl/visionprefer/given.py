"""Stage 3 of VisionPrefer for images that were there before: they are checked and taken over, not made."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence

from tqdm import tqdm

from vp_rl.text import storable
from vp_rl.types import GivenImage
from vp_rl.visionprefer import pictures
from vp_rl.visionprefer.generate import ImageStore
from vp_rl.visionprefer.polish import Item


def given_images(item: Item, images: Sequence[GivenImage]) -> dict[str, GivenImage]:
    """A prompt's images by id, which follows from the file's content: the same picture twice is one image."""
    found: dict[str, GivenImage] = {}
    for image in images:
        with image.file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()[:8]
        named = image._replace(generator=storable(image.generator))  # no column of a table takes half a character
        found.setdefault(f"{item.prompt_id}-{digest}", named)
    return found


def prompt_of(image_id: str) -> int:
    """The id of the prompt that an image is of."""
    return int(image_id.partition("-")[0])


def take_over(given: Mapping[str, GivenImage], store: ImageStore) -> Iterator[tuple[str, str]]:
    """Copies images (by id) that the store lacks into it, as plain RGB files.

    Yields:
        The id of each one that cannot be used, and why.
    """
    there = store.ids()
    for image_id, image in tqdm(given.items(), "take over", unit="image", disable=not given):
        if image_id in there:
            continue
        try:
            store.write(image_id, pictures.read(image.file))
        except ValueError as error:
            yield image_id, str(error)
