"""A page on which people compare a tuned model's images with its base model's, blind; and the key to its answers.

The page is one file, to be sent to whoever is asked: it needs neither a network nor this program, and saves what was
answered as a file. Nothing in it says which image is whose: names and sides are drawn by the operating system's random
numbers, and only the key, a file of its own, knows them. The first image of a pair is the tuned model's in half of all
pairs, and each person sees all pairs of an aspect either so or turned round, in an order of their own.
"""

import hashlib
import json
import random
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from markdown_it import MarkdownIt
from PIL import Image

from vp_rl.evaluation.categories import in_turn
from vp_rl.evaluation.compare import BASE, Rival
from vp_rl.evaluation.images import Evaluation
from vp_rl.evaluation.report import PAGES, embed
from vp_rl.evaluation.store import same_pixels
from vp_rl.secrets import mask
from vp_rl.visionprefer.votes import OVERALL

GUIDELINE = """\
Imagine that you had asked for what the prompt says, and may keep one image. **Which one would you keep?** Weigh
whatever matters to you: whether everything that was asked for is there, whether it is good to look at, whether it is
free of errors. Call them equal if you could not choose."""
"""What people are told to look for in `OVERALL`."""

PAGE, KEY = "compare.html", "key.json"

_BYTES = 9_500_000  # of a page's images, so that it can be sent by mail
_SIZES = (1024, 768, 512, 384, 256)  # longest side of an image in the page: the first with which all images fit


@dataclass(frozen=True)
class Compared:
    """A pair of images, and whose they are."""

    prompt: str
    seed: int
    base: str
    """The name of the base model's, or the other adapter's, image in the page and its answers."""
    tuned: str
    judged: Mapping[str, Sequence[int]]
    """The held-out judge's ratings by an image's name, in the order of `ASPECTS`."""


@dataclass(frozen=True)
class Key:
    """What a page's answers mean."""

    study: str
    """The page's name, which answers repeat."""
    content: str
    """Changes with the images and with what is asked."""
    aspects: Sequence[str]
    pairs: Sequence[Compared]
    rival: str = BASE.name
    """What the tuned model is compared with."""


def write_page(
    folder: Path,
    base: Evaluation,
    tuned: Evaluation,
    pairs: int,
    guidelines: Mapping[str, str],
    rng: random.Random | None = None,
    rival: Rival = BASE,
) -> Path:
    """Writes the page and its key, unless they are there already, and returns the page's path.

    Args:
        folder: of both.
        base, tuned: the same prompts and seeds, by the rival and by the adapter.
        pairs: how many to ask about; the same ones each time, of as many prompts as can be. Fewer, if there are no more
            or if they would not fit into the page.
        guidelines: Markdown by what is asked: `OVERALL`, or an aspect.
        rng: of names and sides; None is the operating system's, which cannot be drawn again.
        rival: what `base` is of; the page does not say.

    Raises:
        ValueError: nothing is asked, or the folder has a page of other images or questions.
    """
    if pairs < 1 or not guidelines:
        raise ValueError(f"A blind comparison of {pairs} pairs in {len(guidelines)} aspects asks nothing.")
    rows = _choose(base, pairs)
    said = [[same_pixels(side.images[row]) for side in (base, tuned)] + [base.prompts[row]] for row in rows]
    content = hashlib.sha256(json.dumps([said, dict(guidelines)]).encode()).hexdigest()
    page = folder / PAGE
    if (folder / KEY).is_file():
        if not page.is_file():
            raise ValueError(
                f"'{folder}' has the key of a page that is no longer there, and its answers need it: put {PAGE} back, "
                "or move the key away."
            )
        if read_key(folder).content == content:
            return page
        raise ValueError(
            f"'{folder}' has a page of other images or questions, and its answers need its key: move the folder away."
        )
    pictures, size = _fit(base, tuned, rows)
    study, pairs_told, compared = _draw(base, tuned, rows[: len(pictures)], pictures, rng or secrets.SystemRandom())
    key = Key(study, content, list(guidelines), compared, rival.name)
    markdown = MarkdownIt("commonmark", {"html": False})
    whole = max(base.images.shape[1:3])
    rendered = _PAGES.get_template("blind.html").render(
        data={"study": study, "aspects": key.aspects, "pairs": pairs_told},
        overall=OVERALL,
        guidelines={aspect: markdown.render(words) for aspect, words in guidelines.items()},
        note=f"Images are shown at {size} of {whole} pixels. " if size < whole else "",
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / KEY).write_text(json.dumps(asdict(key), indent=1) + "\n", encoding="utf-8")
    page.write_text(mask(rendered), encoding="utf-8")
    return page


def read_key(folder: Path) -> Key:
    """The key in a folder.

    Raises:
        ValueError: it is not there, or no longer whole.
    """
    file = folder / KEY
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
        pairs = [Compared(**pair) for pair in read.pop("pairs")]
        return Key(pairs=pairs, **read)
    except OSError as error:
        raise ValueError(
            f"'{folder}' has no {KEY} ({error.strerror}): name the folder that `evaluate.py images ... blind.pairs=60` "
            "wrote."
        ) from error
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"'{file}' is damaged: {error!r}. Without it, answers say nothing.") from error


class _Pictures(NamedTuple):
    """A pair's, as URLs that hold them."""

    base: str
    tuned: str


def _choose(base: Evaluation, pairs: int) -> list[int]:
    """One image of each prompt, by chance, then another of each, and so on."""
    order = np.random.default_rng(0).permutation(len(base.prompts)).tolist()
    return in_turn(order, base.prompts)[:pairs]


def _fit(base: Evaluation, tuned: Evaluation, rows: Sequence[int]) -> tuple[list[_Pictures], int]:
    """The pairs' pictures and their longest side: as large as fits; at the smallest, as many as fit."""
    found: list[_Pictures] = []
    whole = max(base.images.shape[1:3])
    sizes = [min(whole, _SIZES[0]), *(size for size in _SIZES[1:] if size < whole)]
    for size in sizes:
        found, room = [], _BYTES
        for row in rows:
            pair = _Pictures(*(embed(Image.fromarray(side.images[row]), size, size) for side in (base, tuned)))
            room -= sum(map(len, pair))
            if room < 0 and found:
                break
            found.append(pair)
        if len(found) == len(rows):
            return found, size
    return found, sizes[-1]


def _draw(
    base: Evaluation,
    tuned: Evaluation,
    rows: Sequence[int],
    pictures: Sequence[_Pictures],
    rng: random.Random,
) -> tuple[str, list[dict[str, Any]], list[Compared]]:
    """The study's name, what the page is told of each pair, and what the key knows besides."""
    order = list(range(len(rows)))
    rng.shuffle(order)
    half = len(rows) // 2 + (rng.randrange(2) if len(rows) % 2 else 0)
    tuned_first = [True] * half + [False] * (len(rows) - half)
    rng.shuffle(tuned_first)
    study, shown, known = _name(rng), [], []
    for place, turned in zip(order, tuned_first, strict=True):
        row, names = rows[place], (_name(rng), _name(rng))
        urls = pictures[place][::-1] if turned else pictures[place]
        images = [{"name": name, "url": url} for name, url in zip(names, urls, strict=True)]
        shown.append({"prompt": base.prompts[row], "images": images})
        own = names[::-1] if turned else names
        judged = {name: side.ratings[row].tolist() for name, side in zip(own, (base, tuned), strict=True)}
        known.append(Compared(base.prompts[row], base.seeds[row], *own, judged=judged))
    return study, shown, known


def _name(rng: random.Random) -> str:
    return f"{rng.getrandbits(64):016x}"


_PAGES = PAGES.overlay(
    loader=jinja2.ChoiceLoader([PAGES.loader, jinja2.PackageLoader("vp_rl.visionprefer", ".")])  # type: ignore[list-item]
)
