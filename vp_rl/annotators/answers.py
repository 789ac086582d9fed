"""Ratings as annotators write them down: one JSON form, read with as much patience as is safe."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import json_repair

from vp_rl.text import storable
from vp_rl.types import Rating

T = TypeVar("T")

_THOUGHT = re.compile(r"</(?:think|thinking|thought|reasoning)>", re.IGNORECASE)
_OPENING, _BRACKET = re.compile(r"[{\[]"), re.compile(r"[][{}]")
_DIGIT = re.compile(r"\s*([1-5])(?:\.0+)?\s*", re.ASCII)
_UNCLEAR = re.compile(r"rating[\"']?\s*:\s*[\"']?\s*(?:[^\s\"'\d]|[\d.]+\s*[\"']?\s*[^\s\"'\d.,}\]/])")
"""More than a number where one should be, such as 3 or 4: who mends JSON takes the first."""
_CLOSES = {"}": "{", "]": "["}
_PIECES, _LONGEST = 20, 20_000  # pieces that are mended, and characters of one: the time grows with their square


class _Several(NamedTuple):
    """What stands under a key that an object has more than once, with different values."""

    values: list[Any]


def write_ratings(ratings: Sequence[Rating]) -> str:
    """What `read_ratings` reads, in its strictest form."""
    return json.dumps({"ratings": [rating._asdict() for rating in ratings]}, ensure_ascii=False)


def read_ratings(answer: str, images: int) -> list[Rating]:
    """One rating for each of that many images, in order, out of `{"ratings": [{"rating": 4, "rationale": ...}, ...]}`.

    How it is written does not matter as long as nothing has to be guessed: text around it (models like to fence it, to
    explain themselves, to think aloud in <think>), the list alone, the same ratings twice, a trailing comma, single
    quotes, "4" for 4. A missing image, a rating that is no whole number from 1 to 5, an answer that was cut off, or two
    lists that differ are not accepted.

    Raises:
        ValueError: there are no such ratings in the answer; says why, without repeating more than its beginning.
    """

    def understand(value: Any) -> list[Rating]:
        lists = value if isinstance(value, list) else value.get("ratings")
        options = several(lists)
        return _agreed([_ratings(each, images, answer) for each in options if not _empty(each, options)], _values)

    return read_json(answer, understand, _values)


def read_json(answer: str, understand: Callable[[Any], T], essence: Callable[[T], object] = lambda found: found) -> T:
    """What `understand` makes of the JSON objects and lists in an answer, whatever stands around them.

    What is JSON as it stands comes first; only where that says nothing, what can be mended is. Brackets that are never
    closed are not: an answer that was cut off is seen to be one.

    Args:
        answer: what a model wrote; what it thought aloud before only counts where nothing can be read after it.
        understand: what is wanted of a value, or ValueError; see `several` for the values in an object.
        essence: in what two of them must be alike.

    Raises:
        ValueError: there is none, or there are several that are not alike.
    """
    problems: list[ValueError] = []
    for part in dict.fromkeys([_after_thought(answer), answer]):
        found, pieces = _values_in(part)
        for values in (found, _mended(pieces)):
            understood = []
            for value in values:
                try:
                    understood.append(understand(value))
                except ValueError as error:
                    problems.append(error)
            if understood:
                return _agreed(understood, essence)
        if pieces and not problems:
            problems.append(ValueError(f"malformed JSON in the answer {answer[:80]!r}"))
    raise problems[0] if problems else ValueError(f"no JSON object in the answer {answer[:80]!r}")


def several(value: Any) -> list[Any]:
    """All that stands under a key, which an object may have more than once."""
    return value.values if isinstance(value, _Several) else [value]


def _after_thought(answer: str) -> str:
    thoughts = list(_THOUGHT.finditer(answer))
    return answer[thoughts[-1].end() :] if thoughts else answer


def _values_in(text: str) -> tuple[list[Any], list[str]]:
    """The JSON objects and lists in a text, and the pieces between matching brackets that are none."""
    decoder = json.JSONDecoder(strict=False, object_pairs_hook=_object)
    closing: dict[int, int] | None = None
    found: list[Any] = []
    pieces: list[str] = []
    place = 0
    while opening := _OPENING.search(text, place):
        start = opening.start()
        try:
            value, place = decoder.raw_decode(text, start)
            found.append(value)
        except RecursionError:
            return found, pieces
        except ValueError:  # a number of thousands of digits is one, too
            closing = _matching(text) if closing is None else closing
            place = closing.get(start, start) + 1
            if start in closing:
                pieces.append(text[start:place])
    return found, pieces


def _matching(text: str) -> dict[int, int]:
    """Where each bracket is closed that is; those in texts count, too, so pieces that have such are not mended."""
    closing, opened = {}, []
    for bracket in _BRACKET.finditer(text):
        if bracket[0] in "{[":
            opened.append(bracket)
        elif opened and opened[-1][0] == _CLOSES[bracket[0]]:
            closing[opened.pop().start()] = bracket.start()
    return closing


def _mended(pieces: list[str]) -> Iterator[Any]:
    clear = [piece for piece in pieces if len(piece) <= _LONGEST and not _UNCLEAR.search(piece)]
    for piece in clear[:_PIECES]:
        try:
            value = json_repair.repair_json(piece, return_objects=True, skip_json_loads=True, strict=True)
        except (ValueError, RecursionError):  # a key twice, or more than one value
            continue
        if isinstance(value, dict | list):
            yield value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found and found[key] != value:
            value = _Several([*several(found[key]), value])
        found[key] = value
    return found


def _agreed(found: list[T], essence: Callable[[T], object]) -> T:
    if any(essence(each) != essence(found[0]) for each in found):
        raise ValueError(f"{len(found)} answers in one, which differ")
    return found[-1]


def _values(ratings: list[Rating]) -> list[int]:
    return [each.rating for each in ratings]


def _empty(value: Any, options: list[Any]) -> bool:
    """Models begin anew under the same key; an empty beginning says nothing."""
    return value in ([], None) and len(options) > 1


def _ratings(listed: Any, images: int, answer: str) -> list[Rating]:
    if not isinstance(listed, list):
        raise ValueError(f"no list of ratings in the JSON of the answer {answer[:80]!r}")
    if len(listed) != images:
        raise ValueError(f"{len(listed)} ratings for {images} images")
    return [_rating(entry, number) for number, entry in enumerate(listed, 1)]


def _rating(entry: Any, number: int) -> Rating:
    rating = entry.get("rating") if isinstance(entry, dict) else None
    if isinstance(rating, float) and rating.is_integer():
        rating = int(rating)
    if isinstance(rating, str) and (digit := _DIGIT.fullmatch(rating)):
        rating = int(digit[1])
    if isinstance(rating, bool) or not isinstance(rating, int) or not 1 <= rating <= 5:
        shown = " and ".join(repr(each)[:80] for each in several(rating))
        raise ValueError(f"the rating of image {number} is {shown}, not a whole number from 1 to 5")
    rationale = several(entry.get("rationale", ""))[-1]
    if not isinstance(rationale, str):
        raise ValueError(f"the rationale of image {number} is no text")
    return Rating(rating, storable(rationale.strip()))
