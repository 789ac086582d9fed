"""What of raw prompts is worth making images of: normalised, of fair length, safe, different from each other."""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from datasketch import MinHash, MinHashLSH
from jaxtyping import Float
from tqdm import tqdm

from vp_rl.configuration.kinds import Count, Part, Share, Text, Whole
from vp_rl.files import paths, tables
from vp_rl.types import Dropped
from vp_rl.visionprefer.diversity import farthest_first
from vp_rl.visionprefer.markdown import escape
from vp_rl.visionprefer.raw import RawPrompt

Embedder = Callable[[list[str]], Float[np.ndarray, "prompts features"]]
"""Vectors that are near each other where prompts mean the same; only their directions count."""

_PERMUTATIONS = 128
_RECALL = 0.995
_GRAM = 5  # characters
_JOINERS = "\u200c\u200d"  # invisible, but letters of Persian or Hindi and parts of an emoji are joined by them

Found = tuple[int, str, str]
"""The row of a prompt to be dropped, the reason, and the detail."""


class Cleaner:
    """Normalises prompts and drops those that are unfit or say again what another one says.

    The rules run in the order of the settings, each on what the one before it left: empty prompts, safety, length,
    exact repetitions (whatever their case), near duplicates, and at last the choice of the most different ones. Of
    prompts that repeat each other the first one stays. Nothing is random, and what is clean is left as it is.

    Args:
        max_nsfw: highest NSFW score, 0 to 1, among the rows that have the prompt; 0.4 is HPD v2's. None: any. A prompt
            that has no score, where others have, is dropped too. Sources without scores are not judged at all.
        unsafe_words: a text file of words and phrases, one a line, that make a prompt unsafe, whole and whatever their
            case; or `english`: the list of the better-profanity package. Crude: "naked trees" are gone too. None: none.
        min_words, max_words: separated by spaces. CLIP reads 75 tokens, and a word is one or more.
        max_characters: after normalisation.
        near_duplicates: Jaccard similarity, in (0, 1], of the sets of 5 successive characters (without case and
            punctuation) from which on two prompts are the same. A pair at this similarity is found with a probability
            of 99.5% or more, one below it never is. None: no search.
        diverse: how many to keep of what is left, the most different ones by farthest-first traversal. None: all.
        embedder: makes the vectors that tell how different prompts are.

    Raises:
        ValueError: a setting is outside its range, or `diverse` has no embedder.
    """

    def __init__(
        self,
        *,
        max_nsfw: Share | None = 0.4,
        unsafe_words: Text | None = None,
        min_words: Whole = 1,
        max_words: Count = 75,
        max_characters: Count = 1000,
        near_duplicates: Part | None = 0.9,
        diverse: Count | None = None,
        embedder: Embedder | None = None,
    ) -> None:
        if not 1 <= min_words <= max_words or max_characters < 1:
            raise ValueError(
                f"No prompt can have min_words={min_words} to max_words={max_words} and max_characters="
                f"{max_characters}: each must be at least 1, and the first not above the second."
            )
        if near_duplicates is not None and not 0 < near_duplicates <= 1:
            raise ValueError(f"near_duplicates={near_duplicates} must be a similarity above 0 and up to 1, or null.")
        if max_nsfw is not None and not 0 <= max_nsfw <= 1:
            raise ValueError(f"max_nsfw={max_nsfw} must be a score from 0 to 1, or null.")
        if diverse is not None and diverse < 1:
            raise ValueError(f"diverse={diverse} must be at least 1, or null.")
        if diverse is not None and embedder is None:
            raise ValueError(f"diverse={diverse} needs an embedder, which tells how different prompts are.")
        self.min_words, self.max_words, self.max_characters = min_words, max_words, max_characters
        self.max_nsfw, self.near_duplicates = max_nsfw, near_duplicates
        self.diverse, self.embedder = diverse, embedder
        self._unsafe_words = None if unsafe_words is None else _pattern(unsafe_words)

    def clean(self, raw: Sequence[RawPrompt]) -> tuple[list[str], list[Dropped]]:
        """The prompts that stay, normalised, and the others as they came; each in the order given."""
        texts = {row: normalise(prompt.text) for row, prompt in enumerate(raw)}
        dropped: dict[int, Dropped] = {}
        rules = (_empty, self._unsafe, self._unsafe_word, self._length, _duplicates, self._near_duplicates)
        for rule in (*rules, self._surplus):
            for row, reason, detail in list(rule(texts, raw)):
                dropped[row] = Dropped(_writable(raw[row].text), reason, _writable(detail))
                del texts[row]
        return list(texts.values()), [dropped[row] for row in sorted(dropped)]

    def _unsafe(self, texts: Mapping[int, str], raw: Sequence[RawPrompt]) -> Iterator[Found]:
        """A prompt is as unsafe as the worst of its rows: DiffusionDB has one for each image, scored by that too."""
        if self.max_nsfw is None:
            return
        worst: dict[str, float] = {}
        for row, text in texts.items():
            score = raw[row].nsfw
            if score is not None and not math.isnan(score):
                worst[text.casefold()] = max(score, worst.get(text.casefold(), -math.inf))
        for row, text in texts.items():
            score = worst.get(text.casefold())
            if score is not None and score > self.max_nsfw:
                yield row, "unsafe", f"score {score:.2f}"
            elif score is None and raw[row].nsfw is not None:
                yield row, "unscored", "no NSFW score"

    def _unsafe_word(self, texts: Mapping[int, str], raw: Sequence[RawPrompt]) -> Iterator[Found]:
        if self._unsafe_words is None:
            return
        for row, text in texts.items():
            if found := self._unsafe_words.search(text.casefold()):
                yield row, "unsafe", f"has the word {found[0]!r}"

    def _length(self, texts: Mapping[int, str], raw: Sequence[RawPrompt]) -> Iterator[Found]:
        for row, text in texts.items():
            words = len(text.split(" "))
            if words < self.min_words:
                yield row, "short", f"{words} words"
            elif words > self.max_words:
                yield row, "long", f"{words} words"
            elif len(text) > self.max_characters:
                yield row, "long", f"{len(text)} characters"

    def _near_duplicates(self, texts: Mapping[int, str], raw: Sequence[RawPrompt]) -> Iterator[Found]:
        """Candidates come from locality-sensitive hashing, and are then compared exactly."""
        if self.near_duplicates is None:
            return
        index = MinHashLSH(num_perm=_PERMUTATIONS, params=bands(self.near_duplicates))
        nothing = MinHash(_PERMUTATIONS)
        for row, text in tqdm(texts.items(), "near duplicates", unit="prompt", mininterval=2, delay=5):
            own, sketch = grams(text), nothing.copy()
            sketch.update_batch(gram.encode() for gram in own)
            # Kept ones only: what is like a dropped one, yet not like any that stays, stays too.
            candidates: list[Any] = index.query(sketch)
            alike = {other: similarity(own, grams(texts[other])) for other in sorted(candidates)}
            nearest = max(alike, key=alike.__getitem__, default=None)
            if nearest is not None and alike[nearest] >= self.near_duplicates:
                yield row, "near-duplicate", f"{_as(nearest, raw)}, {alike[nearest]:.2f}: {texts[nearest]}"
            else:
                index.insert(row, sketch, check_duplication=False)

    def _surplus(self, texts: Mapping[int, str], raw: Sequence[RawPrompt]) -> Iterator[Found]:
        if self.diverse is None or self.embedder is None or len(texts) <= self.diverse:
            return
        chosen = set(farthest_first(self.embedder(list(texts.values())), self.diverse))
        for place, row in enumerate(texts):
            if place not in chosen:
                yield row, "surplus", f"not among the {self.diverse} most different"


def _pattern(unsafe_words: str) -> re.Pattern[str]:
    """Finds any of the words.

    Raises:
        ValueError: the list cannot be read, or is empty.
    """
    file = paths.user_path(unsafe_words)
    if unsafe_words == "english":
        package = find_spec("better_profanity")  # its own search also finds words that are spelt otherwise: hours here
        if package is None or package.origin is None:
            raise ValueError("unsafe_words=english needs a package: pip install 'vp_rl[words]', or name a file.")
        file = Path(package.origin).with_name("profanity_wordlist.txt")
    try:
        words = {normalise(line).casefold() for _, line in tables.lines(file)} - {""}
    except (OSError, ValueError) as error:
        raise ValueError(f"unsafe_words={unsafe_words!r} must be a UTF-8 text file, a word a line: {error}") from error
    if not words:
        raise ValueError(f"unsafe_words={unsafe_words!r} has no word in it.")
    longest_first = sorted(words, key=lambda word: (-len(word), word))
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)")


def _empty(texts: Mapping[int, str], raw: Sequence[RawPrompt]) -> Iterator[Found]:
    return ((row, "empty", "") for row, text in texts.items() if not text)


def _duplicates(texts: Mapping[int, str], raw: Sequence[RawPrompt]) -> Iterator[Found]:
    first: dict[str, int] = {}
    for row, text in texts.items():
        if (known := first.setdefault(text.casefold(), row)) != row:
            yield row, "duplicate", _as(known, raw)


def _as(row: int, raw: Sequence[RawPrompt]) -> str:
    return f"as {raw[row].name or f'number {row + 1}'}"


def normalise(text: str) -> str:
    """NFKC, without control and other invisible characters, and with single spaces only; again changes nothing."""
    visible = []
    for character in text:
        category = unicodedata.category(character)
        if category == "Cc":
            visible.append(" ")  # tabs and line breaks part words, and so may any other
        elif category not in ("Cf", "Cs") or character in _JOINERS:
            visible.append(character)
    return " ".join(unicodedata.normalize("NFKC", "".join(visible)).split()).strip(_JOINERS + " ")


def _writable(text: str) -> str:
    """JSON may bring half a character (a lone surrogate), which no UTF-8 file can hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


def grams(text: str) -> set[str]:
    """All runs of 5 characters of a prompt, which is one itself where it is shorter; case and punctuation aside."""
    plain = "".join(" " if unicodedata.category(c).startswith("P") else c for c in text.casefold())
    plain = " ".join(plain.split()) or text
    return {plain[start : start + _GRAM] for start in range(max(1, len(plain) - _GRAM + 1))}


def similarity(one: set[str], other: set[str]) -> float:
    """Jaccard: what two sets share, of what they have together; 0 to 1."""
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)


def bands(threshold: float) -> tuple[int, int]:
    """Bands and rows a band of a MinHash index: as few candidates as find enough of the pairs at that similarity.

    With b bands of r rows a pair of Jaccard similarity s is a candidate with probability 1 - (1 - s^r)^b (Leskovec,
    Rajaraman and Ullman, Mining of Massive Datasets, 3.4).
    """
    for rows in range(_PERMUTATIONS // 2, 1, -1):
        if 1 - (1 - threshold**rows) ** (_PERMUTATIONS // rows) >= _RECALL:
            return _PERMUTATIONS // rows, rows
    return _PERMUTATIONS, 1


def summary(kept: int, dropped: Sequence[Dropped], examples: int = 2) -> str:
    """A Markdown table of how many prompts stayed and how many went for which reason, with examples.

    Nothing in a prompt is read as Markdown or HTML, and those that are unsafe, or may be, are not shown at all.
    """
    total = max(kept + len(dropped), 1)
    lines = ["| prompts | number | share | examples |", "|---|---:|---:|---|"]
    lines.append(f"| kept | {kept} | {kept / total:.1%} | |")
    for reason, number in Counter(prompt.reason for prompt in dropped).most_common():
        cases = [prompt for prompt in dropped if prompt.reason == reason][:examples]
        shown = "; ".join(_example(case) for case in cases)
        lines.append(f"| {escape(reason)} | {number} | {number / total:.1%} | {shown} |")
    return "\n".join(lines) + "\n"


def _example(case: Dropped) -> str:
    detail = escape(_shortened(case.detail))
    if case.reason in ("unsafe", "unscored", "not polished"):
        return detail
    return f'"{escape(_shortened(case.prompt))}"' + (f" ({detail})" if detail else "")


def _shortened(text: str, longest: int = 60) -> str:
    return text if len(text) <= longest else text[: longest - 1].rstrip() + "…"
