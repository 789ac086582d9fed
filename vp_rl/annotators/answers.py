"""Ratings as annotators write them down: one JSON form, read with as much patience as is safe."""

import json
from collections.abc import Sequence
from typing import Any

from vp_rl.types import Rating


def write_ratings(ratings: Sequence[Rating]) -> str:
    """What `read_ratings` reads, in its strictest form."""
    return json.dumps({"ratings": [rating._asdict() for rating in ratings]}, ensure_ascii=False)


def read_ratings(answer: str, images: int) -> list[Rating]:
    """One rating for each of that many images, in order, out of `{"ratings": [{"rating": 4, "rationale": ...}, ...]}`.

    Text around the JSON is passed over (models like to fence it, or to explain themselves). Anything that would need a
    guess is not: a missing image, a rating that is no whole number from 1 to 5.

    Raises:
        ValueError: there are no such ratings in the answer; says why, without repeating more than its beginning.
    """
    found = read_object(answer)
    listed = found.get("ratings")
    if not isinstance(listed, list):
        raise ValueError(f"no list of ratings in the answer {answer[:80]!r}")
    if len(listed) != images:
        raise ValueError(f"{len(listed)} ratings for {images} images")
    return [_rating(entry, number) for number, entry in enumerate(listed, 1)]


def read_object(answer: str) -> dict[str, Any]:
    """The JSON object in an answer, whatever stands around it.

    Raises:
        ValueError: there is none, or it is malformed.
    """
    start, end = answer.find("{"), answer.rfind("}")
    if start < 0 or end < start:
        raise ValueError(f"no JSON object in the answer {answer[:80]!r}")
    try:
        return json.loads(answer[start : end + 1])
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a plain ValueError
        raise ValueError(f"malformed JSON: {error}") from error


def _rating(entry: Any, number: int) -> Rating:
    rating = entry.get("rating") if isinstance(entry, dict) else None
    if isinstance(rating, float) and rating.is_integer():
        rating = int(rating)
    if isinstance(rating, bool) or not isinstance(rating, int) or not 1 <= rating <= 5:
        raise ValueError(f"the rating of image {number} is {rating!r}, not a whole number from 1 to 5")
    rationale = entry.get("rationale", "")
    if not isinstance(rationale, str):
        raise ValueError(f"the rationale of image {number} is no text")
    return Rating(rating, storable(rationale.strip()))


def storable(text: str) -> str:
    """The same text without halves of surrogate pairs, which no file takes; what is cut off may end in one."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
