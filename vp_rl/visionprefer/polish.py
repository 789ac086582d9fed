"""Stage 2 of VisionPrefer: raw prompts rewritten as plain descriptions, the original kept beside each."""

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

from vp_rl.interfaces import Rewriter
from vp_rl.types import Dropped, Split
from vp_rl.visionprefer.ask import Question
from vp_rl.visionprefer.journal import Journal, key_of


class Item(NamedTuple):
    """A prompt on its way through the stages."""

    prompt_id: int
    source_prompt: str
    """As the source had it."""
    prompt: str
    """As images are made for it and rated."""
    split: Split


def prompt_id(prompt: str) -> int:
    """A number that follows from the source's prompt alone, so that building more gives the same one."""
    digest = hashlib.sha256(prompt.encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 11  # 53 bits: exact in every JSON reader


def questions(rewriter: Rewriter, items: Sequence[Item]) -> Iterator[Question]:
    """One for each prompt."""
    for item in items:
        source = item.source_prompt
        yield Question(
            _key(rewriter, item),
            source,
            partial(rewriter.ask, source),
            partial(rewriter.read, prompt=source),
            partial(rewriter.estimate, source),
            source,
        )


def polished(rewriter: Rewriter, items: Sequence[Item], journal: Journal) -> tuple[list[Item], list[Dropped]]:
    """The items with their rewritten prompts, and those that have none or the same one as another."""
    kept: dict[str, Item] = {}
    dropped = []
    keys = [_key(rewriter, item) for item in items]
    for item, key, text in zip(items, keys, journal.texts(keys), strict=True):
        if text is None:
            dropped.append(Dropped(item.source_prompt, "not polished", next(journal.reasons([key]))))
            continue
        try:
            prompt = rewriter.read(text, item.source_prompt)
        except ValueError as error:
            raise journal.unreadable_now(key, item.source_prompt, rewriter.name, error) from error
        if prompt in kept:
            same = kept[prompt].source_prompt
            dropped.append(Dropped(item.source_prompt, "duplicate after polishing", same))
        else:
            kept[prompt] = item._replace(prompt=prompt)
    return list(kept.values()), dropped


def _key(rewriter: Rewriter, item: Item) -> bytes:
    return key_of("polish", rewriter.name, rewriter.version, item.source_prompt)
