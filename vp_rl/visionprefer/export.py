"""Stage 5 of VisionPrefer: rows out of images and answers, written as a dataset with its card."""

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from tqdm import tqdm

from vp_rl.files import images as image_files
from vp_rl.types import ASPECTS, Dropped, GivenImage
from vp_rl.visionprefer import annotate, schema
from vp_rl.visionprefer.annotate import Call, Note, Opinion
from vp_rl.visionprefer.card import About, write_card
from vp_rl.visionprefer.clean import summary
from vp_rl.visionprefer.generate import ImageStore, Recipe
from vp_rl.visionprefer.journal import Journal
from vp_rl.visionprefer.polish import Item
from vp_rl.visionprefer.votes import Votes

log = logging.getLogger(__name__)

SCREENED = "image screened out"
REFUSED = "image refused"


class Rated(NamedTuple):
    """What a build has come to."""

    items: Sequence[Item]
    origins: Mapping[str, Recipe | GivenImage]
    """By image id: how it was made, or that it was there."""
    images: Mapping[int, Sequence[str]]
    """Ids by prompt."""
    opinions: Sequence[tuple[Opinion, Sequence[Call]]]
    """Each annotator with what it was asked, in the order of the prompts; the dataset's own annotator first."""


def export(
    folder: Path,
    rated: Rated,
    store: ImageStore,
    journal: Journal,
    dropped: Sequence[Dropped],
    about: About,
) -> None:
    """Writes the dataset and its card.

    Images that the first annotator did not rate in every aspect are left out, and with them prompts that have fewer
    than two left; the card counts them.

    Args:
        about: what the card says, but for what was dropped.

    Raises:
        FileExistsError: the folder has something in it.
        ValueError: no prompt has two rated images.
    """
    first = rated.opinions[0][0]
    left_out: list[Dropped] = []
    with schema.Writer(folder, first.name) as writer:
        rows = images = 0
        prompts = tqdm(_by_prompt(rated, journal), "export", len(rated.items), unit="prompt", mininterval=1)
        for item, notes in zip(rated.items, prompts, strict=True):
            row = _row(item, rated, notes, store)
            if len(row["images"]) < 2:
                left_out.append(Dropped(item.source_prompt, "fewer than two rated images"))
                continue
            writer.add(item.split, row)
            rows, images = rows + 1, images + len(row["images"])
        if not rows:
            why = journal.commonest_reason(first.name)
            raise ValueError(
                f"No prompt has two images that {first.name} rated in every aspect, so there is no dataset to write: "
                "the journal says why (outcome and reason in its table `answers`)."
                + (f" Mostly: {why[:800]}" if why else "")
            )
        writer.finish_rows()
        gone = [case for case in [*dropped, *left_out] if case.reason not in (SCREENED, REFUSED)]  # those are images
        said = replace(about, dropped=summary(rows, gone))
        if images < len(rated.origins):
            lost = f"{len(rated.origins) - images:,} of {len(rated.origins):,} images are not in the set"
            said = replace(
                said, limits=[*about.limits, f"{lost}: refused, screened out, or not rated in every aspect."]
            )
        write_card(writer.unfinished, said, spent=journal.spent(), votes=Votes(journal.file).read())


def push(folder: Path, repository: str) -> str:
    """Uploads a finished dataset to the hub, into a private repository that is made if it is absent; its address.

    The token is huggingface_hub's own (`hf auth login`, or $HF_TOKEN). Files that it has already are not sent again.

    Raises:
        FileNotFoundError, ValueError: there is no dataset, or one of another version.
        OSError: the hub refused, or is not to be reached.
    """
    schema.about(folder)
    hub = HfApi()
    try:
        address = hub.create_repo(repository, repo_type="dataset", private=True, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder, repo_type="dataset")
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError) as error:
        raise OSError(f"'{folder}' could not be uploaded to {repository!r}: {error}") from error
    return str(address)


def _by_prompt(rated: Rated, journal: Journal) -> Iterator[list[tuple[Opinion, Note]]]:
    """Everything that was said of each prompt's images, prompt by prompt."""
    streams = []
    for opinion, calls in rated.opinions:
        streams.append((opinion, _read(opinion, calls, journal)))
    heads = {opinion.name: next(stream, None) for opinion, stream in streams}
    for item in rated.items:
        said: list[tuple[Opinion, Note]] = []
        for opinion, stream in streams:
            head = heads[opinion.name]
            while head is not None and head[0].item.prompt_id == item.prompt_id:
                said += [(opinion, note) for note in head[1] or ()]
                head = next(stream, None)
            heads[opinion.name] = head
        yield said


def _read(opinion: Opinion, calls: Sequence[Call], journal: Journal) -> Iterator[tuple[Call, list[Note] | None]]:
    """Each call with what was answered.

    Raises:
        ValueError: an accepted answer cannot be read today; says which, and how to have it asked again.
    """
    return zip(calls, annotate.notes(opinion, calls, journal), strict=True)


def _row(item: Item, rated: Rated, notes: list[tuple[Opinion, Note]], store: ImageStore) -> schema.Row:
    first = rated.opinions[0][0].name
    aspects: dict[str, set[str]] = defaultdict(set)
    for opinion, note in notes:
        if opinion.name == first:
            aspects[note.image_id].add(note.aspect)
    complete = [image_id for image_id in rated.images[item.prompt_id] if len(aspects[image_id]) == len(ASPECTS)]
    return {
        **item._asdict(),
        "images": [_image(image_id, rated.origins[image_id], store.read(image_id)) for image_id in complete],
        "annotations": [
            {
                "image_id": note.image_id,
                "aspect": note.aspect,
                **note.rating._asdict(),
                "annotator": opinion.name,
                "template_version": opinion.annotator.version,
                "position": note.position,
            }
            for opinion, note in notes
            if note.image_id in complete
        ],
    }


def _image(image_id: str, origin: Recipe | GivenImage, data: bytes) -> schema.Row:
    made = isinstance(origin, Recipe)
    try:
        width, height = image_files.size(data)
    except ValueError as error:
        raise ValueError(
            f"The image {image_id} of the work folder is no longer one ({error}): remove its file, and build again."
        ) from error
    return {
        "image_id": image_id,
        "image": {"bytes": data, "path": None},
        "generator": origin.generator,
        "guidance_scale": origin.guidance_scale if made else None,
        "seed": origin.seed if made else None,
        "steps": origin.steps if made else None,
        "width": width,
        "height": height,
    }
