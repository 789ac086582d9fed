"""What is read in answers: everything that needs no guess, and nothing that does."""

import json
import random
import re
import time

import pytest

from vp_rl.annotators.answers import read_ratings, write_ratings
from vp_rl.types import Rating

RATINGS = [Rating(1 + number % 5, f"Image {number + 1} is fine.") for number in range(4)]
GOOD = write_ratings(RATINGS)
OTHER = GOOD.replace('"rating": 1', '"rating": 2')


def rated(pattern: str) -> str:
    """The good answer with each rating written in another way."""
    return re.sub(r'"rating": (\d)', rf'"rating": {pattern}', GOOD)


READABLE = {
    "plain": GOOD,
    "fenced": f"```json\n{GOOD}\n```",
    "a brace before": f"Here are {{my}} ratings:\n```json\n{GOOD}\n```",
    "an unclosed brace before": f"A smile :{{ and then\n{GOOD}",
    "a brace after": f"```json\n{GOOD}\n```\nI hope {{this}} helps.",
    "thought with braces": f'<think>They want {{"ratings": [...]}}. Image 1 has {{nice}} colours.</think>\n{GOOD}',
    "thought with a draft": f"<think>Perhaps {OTHER}? No.</think>{GOOD}",
    "all of it taken for thought": f"<think>It is {GOOD}</think>",
    "twice the same": f"{GOOD}\n{GOOD}",
    "a trailing comma": GOOD.replace("}]}", "},]}"),
    "single quotes": repr(json.loads(GOOD)),
    "keys without quotes": re.sub(r'"(ratings|rating|rationale)"', r"\1", GOOD),
    "a comment": GOOD.replace("[", "[ // in order\n", 1),
    "quotes in a text": GOOD.replace("is fine", 'is "fine"'),
    "a line break in a text": GOOD.replace("is fine", "is\n\tfine"),
    "a brace in a text": GOOD.replace("is fine", "is { fine"),
    "a list alone": json.dumps(json.loads(GOOD)["ratings"]),
    "a number in quotes": rated(r'"\1"'),
    "a number with a point": rated(r"\1.0"),
    "a number with a point in quotes": rated(r'" \1.0"'),
    "an empty beginning": '{"ratings": [], ' + GOOD[1:],
    "twice the same key": rated(r'\1, "rating": \1'),
    "one brace too many": GOOD + "}",
}


@pytest.mark.parametrize("form", READABLE)
def test_ratings_are_read_in_whatever_form_they_stand(form: str) -> None:
    assert [each.rating for each in read_ratings(READABLE[form], 4)] == [1, 2, 3, 4]


UNREADABLE = {
    "half a point": (rated("3.5"), "3.5"),
    "of five": (rated(r'"\1/5"'), "'1/5'"),
    "of five without quotes": (rated(r"\1/5"), "'1/5'"),
    "of five in words": (rated(r"\1 of 5"), "JSON"),
    "one or the other": (rated(r"\1 or 5"), "JSON"),
    "a range": (rated("1-5"), "JSON"),
    "a word": (rated('"four"'), "'four'"),
    "true": (rated("true"), "True"),
    "no number": (rated("NaN"), "nan"),
    "no end of digits": (rated("1" * 5000), "not a whole number|JSON"),
    "zero": (rated("0"), "is 0"),
    "six in quotes": (rated('"6"'), "'6'"),
    "two ratings of one image": (rated(r'\1, "rating": 5'), "is 1 and 5"),
    "too few": (write_ratings(RATINGS[:3]), "3 ratings for 4 images"),
    "too many": (write_ratings([*RATINGS, Rating(3, "")]), "5 ratings for 4 images"),
    "by name": (json.dumps({"ratings": {f"Image {n}": {"rating": 3} for n in range(4)}}), "no list of ratings"),
    "another key": (GOOD.replace('"ratings"', '"scores"'), "no list of ratings"),
    "two that differ": (f"{GOOD}\n{OTHER}", "differ"),
    "two lists that differ": (f"{GOOD[:-1]}, {OTHER[1:]}", "differ"),
    "two that differ, mended": (f"{GOOD}\n{OTHER}".replace("}]}", "},]}"), "differ"),
    "an equals sign": (GOOD.replace(":", "=", 1), "JSON"),
    "an excuse": ("I cannot rate people.", "no JSON"),
    "nothing": ("", "no JSON"),
}


@pytest.mark.parametrize("form", UNREADABLE)
def test_what_needs_a_guess_is_not_read_and_its_reason_is_said(form: str) -> None:
    answer, said = UNREADABLE[form]
    with pytest.raises(ValueError, match=said):
        read_ratings(answer, 4)


@pytest.mark.parametrize("answer", [GOOD, repr(json.loads(GOOD)), f"<think>hm {{</think>```json\n{GOOD}"])
def test_no_beginning_of_an_answer_is_taken_for_the_whole(answer: str) -> None:
    end = answer.rindex("]")
    for length in range(end):
        with pytest.raises(ValueError, match="JSON|image"):
            read_ratings(answer[:length], 4)
    assert read_ratings(answer[: end + 1], 4)


def test_whatever_is_damaged_in_an_answer_no_rating_is_made_up() -> None:
    """Characters that are no digits, lost, doubled or put in anywhere, may cost the answer but change no rating."""
    rng, read = random.Random(0), 0
    for _ in range(600):
        text = list(GOOD)
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(text))
            if not text[place].isdigit():
                text[place] = rng.choice(["", text[place] * 2, rng.choice('"{}[],: \n\\') + text[place]])
        try:
            found = [each.rating for each in read_ratings("".join(text), 4)]
        except ValueError:
            continue
        assert found == [1, 2, 3, 4]
        read += 1
    assert read > 200


@pytest.mark.parametrize(
    "answer",
    [
        "[" * 50_000,
        '{"a":' * 50_000,
        "{" * 50_000 + "}" * 50_000,
        "<think>" * 20_000,
        GOOD.replace("fine", '"so" ' * 5000),
    ],
    ids=["lists", "objects", "pairs", "thoughts", "quotes"],
)
def test_an_answer_without_end_is_given_up_soon(answer: str) -> None:
    started = time.monotonic()
    with pytest.raises(ValueError, match="JSON"):
        read_ratings(answer, 4)
    assert time.monotonic() - started < 5


def test_what_no_file_takes_is_not_in_a_rationale() -> None:
    found = read_ratings(GOOD.replace("is fine.", "is \\u0000 fine \\ud83d."), 4)
    assert found[0].rationale == "Image 1 is \ufffd fine \ufffd."
