"""Stage 1 of VisionPrefer: where prompts come from."""

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from typing import get_args

from vp_rl.configuration.kinds import Count, Seed, Text, Texts, Whole
from vp_rl.interfaces import PromptSource
from vp_rl.scenes.grammar import UNSAFE_SHAPE, parse, unique_scenes
from vp_rl.types import Dropped, Split
from vp_rl.visionprefer.clean import Cleaner
from vp_rl.visionprefer.raw import Columns, RawPrompt, read_file, read_hub, sample

log = logging.getLogger(__name__)

Splits = dict[Split, list[str]]


class ScenePrompts(PromptSource):
    """Prompts of the embedded world; the test split holds combinations that no other split has."""

    note = (
        "The embedded world: tiny models that draw coloured shapes, and a judge that measures pixels. It shows that "
        "the system is wired right and learns; it says nothing about real images."
    )

    def __init__(self, train: Whole = 2000, validation: Whole = 128, test: Whole = 128, seed: Seed = 0) -> None:
        self._sizes: dict[Split, int] = {"train": train, "validation": validation, "test": test}
        self._seed = seed

    def split(self, name: Split) -> list[str]:
        """`train`, `validation` or `test` different prompts; see `unique_scenes` for the shares of categories."""
        return [scene.prompt for scene in unique_scenes(name, self._sizes[name], self._seed)]

    def category(self, prompt: str) -> str:
        """The grammar's."""
        return parse(prompt).category

    def categories(self, prompt: str) -> tuple[str, ...]:
        """That, and `unsafe` where what the prompt asks for is: there the judge's aspects want opposite things."""
        scene = parse(prompt)
        unsafe = any(thing.shape == UNSAFE_SHAPE for thing in scene.things)
        return (scene.category, "unsafe") if unsafe else (scene.category,)


class FilePrompts(PromptSource):
    """The prompts of a text file (one a line) or of a CSV, TSV, JSON, JSONL or Parquet file, cleaned and then split.

    Args:
        path: the name's ending says what it is, see `read_file`.
        column: which column of a table the prompt is.
        nsfw_columns: which of its columns are NSFW scores, 0 to 1; what the cleaner does with them is its setting.
        id_column: which of its columns names a prompt where a report speaks of it. None: its row does.
        limit: rows to draw at random where there are more. None: all.
        cleaner: what is left out; None is `Cleaner()`.
        validation, test: prompts held out for these splits. All others are for training.
        seed: draws those prompts, so that the order in the file does not matter, and one more prompt there moves few.
            None: the last ones in the file are held out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or nothing is left to train on.
    """

    def __init__(
        self,
        path: Text,
        *,
        column: Text = "prompt",
        nsfw_columns: Sequence[Text] = (),
        id_column: Text | None = None,
        limit: Count | None = None,
        cleaner: Cleaner | None = None,
        validation: Whole = 64,
        test: Whole = 128,
        seed: Seed | None = None,
    ) -> None:
        raw = read_file(path, Columns(column, tuple(nsfw_columns), id_column))
        drawn = [raw[row] for row in sample(len(raw), limit, seed or 0)]
        kept, self._dropped = _cleaned(drawn, cleaner or Cleaner(), path)
        self._splits = split_prompts(kept, validation, test, seed, path)

    def split(self, name: Split) -> list[str]:
        """The prompts of one split, in the file's order."""
        return self._splits[name]

    def dropped(self) -> Sequence[Dropped]:
        """What the cleaner left out, in the file's order."""
        return self._dropped


class HubPrompts(PromptSource):
    """The prompts of a dataset of the Hugging Face hub, or of what else `datasets.load_dataset` reads.

    Args:
        dataset: hub name, local folder, or the format of `files`: `parquet`, `json`, `csv`.
        config: of a dataset that has several.
        files: paths or URLs, where `dataset` is a format.
        source_split: of the dataset's own splits, the one that is read.
        revision: of a hub repository. None: the newest.
        column, nsfw_columns, id_column, limit, cleaner, validation, test, seed: as for `FilePrompts`.

    Raises:
        ValueError: it cannot be had, lacks a column, or leaves nothing to train on.
    """

    def __init__(
        self,
        dataset: Text,
        *,
        config: Text | None = None,
        files: Text | Texts | None = None,
        source_split: Text = "train",
        revision: Text | None = None,
        column: Text = "prompt",
        nsfw_columns: Sequence[Text] = (),
        id_column: Text | None = None,
        limit: Count | None = None,
        cleaner: Cleaner | None = None,
        validation: Whole = 64,
        test: Whole = 128,
        seed: Seed | None = 0,
    ) -> None:
        raw = read_hub(
            dataset,
            Columns(column, tuple(nsfw_columns), id_column),
            config=config,
            files=files,
            split=source_split,
            revision=revision,
            limit=limit,
            seed=seed or 0,
        )
        kept, self._dropped = _cleaned(raw, cleaner or Cleaner(), dataset)
        self._splits = split_prompts(kept, validation, test, seed, dataset)

    def split(self, name: Split) -> list[str]:
        """The prompts of one split, in the dataset's order."""
        return self._splits[name]

    def dropped(self) -> Sequence[Dropped]:
        """What the cleaner left out, in the dataset's order."""
        return self._dropped


def _cleaned(raw: Sequence[RawPrompt], cleaner: Cleaner, origin: str) -> tuple[list[str], list[Dropped]]:
    kept, dropped = cleaner.clean(raw)
    if dropped:
        counts = ", ".join(f"{number} {reason}" for reason, number in Counter(d.reason for d in dropped).most_common())
        log.info("%s: %d prompts kept; left out: %s", origin, len(kept), counts)
    return kept, dropped


def split_prompts(prompts: Sequence[str], validation: int, test: int, seed: int | None, origin: str) -> Splits:
    """The splits of different prompts, each in the order given.

    With a seed, those whose hash with it is lowest are the test split and the next ones the validation split: it
    depends on nothing but which prompts there are. Without, the last ones are.

    Raises:
        ValueError: a size is negative, or none is left to train on.
    """
    if validation < 0 or test < 0:
        raise ValueError(f"validation={validation} and test={test} are numbers of prompts: 0 or more.")
    if len(prompts) <= validation + test:
        raise ValueError(
            f"{origin} has {len(prompts)} different prompts that are fit for use; {validation + test} are held out, so "
            "none is left to train on. Add prompts, clean less, or lower `validation` and `test`."
        )

    def rank(place: int) -> tuple[bytes, int]:
        return (b"" if seed is None else hashlib.sha256(f"{seed}/{prompts[place]}".encode()).digest()), -place

    places = sorted(range(len(prompts)), key=rank)
    parts: dict[Split, list[int]] = {
        "train": places[test + validation :],
        "validation": places[test : test + validation],
        "test": places[:test],
    }
    return {name: [prompts[place] for place in sorted(part)] for name, part in parts.items()}


def split_of_each(source: PromptSource) -> dict[str, Split]:
    """The split of every prompt, in the source's order; a prompt that a split repeats counts once.

    Raises:
        ValueError: a prompt is in two splits, so that what is tested would have been trained on.
    """
    splits: dict[str, Split] = {}
    for split in get_args(Split):
        for prompt in source.split(split):
            if splits.setdefault(prompt, split) != split:
                raise ValueError(
                    f"The prompt {prompt[:200]!r} is in two splits, {splits[prompt]} and {split}: keep one."
                )
    return splits
