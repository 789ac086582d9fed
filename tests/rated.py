"""Rated prompts as the Arrow rows that an exported dataset has, without image files."""

from collections.abc import Mapping

import numpy as np
import pyarrow

from vp_rl.types import ASPECTS

_IMAGE = {"image_id": pyarrow.string(), "generator": pyarrow.string(), "guidance_scale": pyarrow.float32()}
_NOTE = {"image_id": pyarrow.string(), "aspect": pyarrow.string(), "rating": pyarrow.int32()}
SCHEMA = pyarrow.schema(
    {
        "prompt_id": pyarrow.int64(),
        "images": pyarrow.list_(pyarrow.struct({**_IMAGE, "steps": pyarrow.int32()})),
        "annotations": pyarrow.list_(
            pyarrow.struct({**_NOTE, "annotator": pyarrow.string(), "position": pyarrow.int32()})
        ),
    }
)


def rows(
    ratings: Mapping[str, np.ndarray],
    *,
    places: Mapping[str, np.ndarray] | None = None,
    generators: np.ndarray | None = None,
    guidance: np.ndarray | None = None,
    counts: np.ndarray | None = None,
    first: int = 0,
) -> pyarrow.RecordBatch:
    """Rows with these ratings.

    Args:
        ratings: by annotator, (prompts, images, aspects); 0 is none.
        places: in the call, of the same shape; the image's own place unless given.
        generators, guidance: of each image, (prompts, images); one for all unless given.
        counts: images of each prompt, the rest of its row being padding; all unless given.
        first: the first prompt's number.
    """
    prompts, images, _ = next(iter(ratings.values())).shape
    found = []
    for prompt in range(prompts):
        here = range(images if counts is None else counts[prompt])
        made = [
            {
                "image_id": f"{first + prompt}-{image}",
                "generator": "one" if generators is None else str(generators[prompt, image]),
                "guidance_scale": 7.5 if guidance is None else float(guidance[prompt, image]),
                "steps": 20,
            }
            for image in here
        ]
        said = [
            {
                "image_id": f"{first + prompt}-{image}",
                "aspect": name,
                "rating": int(given[prompt, image, aspect]),
                "annotator": annotator,
                "position": int(places[annotator][prompt, image, aspect]) if places else image,
            }
            for annotator, given in ratings.items()
            for aspect, name in enumerate(ASPECTS)
            for image in here
            if given[prompt, image, aspect]
        ]
        found.append({"prompt_id": first + prompt, "images": made, "annotations": said})
    return pyarrow.RecordBatch.from_pylist(found, schema=SCHEMA)
