"""Preference pairs to train a reward model on, from sets that people have judged (conf/human/)."""

import logging
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import chain, combinations
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import UInt8
from PIL import Image
from torch.utils.data import Dataset

from vp_rl.configuration.kinds import Count, Seed, Several, Share, Text, Whole
from vp_rl.data.preferences import PairLoaders, shifted
from vp_rl.data.sets.base import HumanSet, Judged
from vp_rl.data.sets.pack import Pack, packed
from vp_rl.files import images as image_files
from vp_rl.files.paths import user_path
from vp_rl.types import ASPECTS, PreferenceBatch, Split
from vp_rl.visionprefer.schema import SPLITS

log = logging.getLogger(__name__)

Reader = Callable[[str], bytes]
"""Finds an image's file by its name."""


Source = tuple[Split, str]
"""Where a set is in the settings: data.SPLIT.NAME."""


class Compared(NamedTuple):
    """One prompt, or a part of its images where there are many, with what people prefer among them."""

    source: Source
    """The set that it is of."""
    prompt: str
    images: tuple[str, ...]
    """Each once, by its name in the set."""
    pairs: tuple[tuple[int, int, float], ...]
    """The better image, the worse one, and how many ranks are between them."""


class Seen(NamedTuple):
    """The same with the pictures."""

    compared: Compared
    pixels: UInt8[np.ndarray, "images size size 3"]


class HumanDataModule(PairLoaders):
    """Batches of prompts: each image once, with every pair of it that people do not tie.

    Prompts of the test sets are left out of training and validation, those of validation out of training, whatever set
    they come from. Judgements that are only there to choose a protocol's setting on are not used.

    Args:
        train: sets by a name of yours.
        test: sets that are measured on after training, by their names.
        validation: sets by their names; none: a share of the training prompts, which follows from their text alone.
        validation_share: that share.
        size: images are scaled to this shorter side (bicubic) and cropped in the middle, as the published trainings do
            it before they batch images of many sizes: the side that the reward looks at.
        group: most images of a prompt that come together; a prompt with more comes in parts.
        cache: folder for copies of sets whose images are in their tables; see `sets.pack`.
        batch_size, shift, num_workers, seed: see `PairLoaders`.

    Raises:
        ValueError: a setting makes no sense.
    """

    def __init__(
        self,
        train: Mapping[str, HumanSet],
        test: Mapping[str, HumanSet],
        validation: Mapping[str, HumanSet],
        validation_share: Share = 0.05,
        size: Count = 224,
        group: Several = 16,
        cache: Text = "data/human",
        batch_size: Count = 16,
        shift: Whole = 0,
        num_workers: Whole = 0,
        seed: Seed = 0,
    ) -> None:
        super().__init__(batch_size, shift, num_workers, seed)
        if not train:
            raise ValueError("data.train has no set: choose one by human@data.train.set=NAME.")
        if not validation and not 0 < validation_share < 1:
            raise ValueError(
                f"data.validation_share={validation_share} must be between 0 and 1 where data.validation has no set: "
                "the best weights are chosen on validation pairs."
            )
        if size < 1 or group < 2 or batch_size < 1:
            raise ValueError(f"data.size={size}, data.group={group}, data.batch_size={batch_size}: one is too small.")
        self._sets: dict[Split, Mapping[str, HumanSet]] = {"train": train, "validation": validation, "test": test}
        self._share, self._size, self._group, self._cache = validation_share, size, group, user_path(cache)

    def prepare_data(self) -> None:
        """Downloads what is absent, and copies the images of sets that cannot be read in any order.

        Raises:
            FileNotFoundError, ValueError: see `HumanSet.load`; a split has no pair.
        """
        for split in SPLITS:
            if split != "test" or self._sets["test"]:
                self.prompts(split)

    def collate(self, shift: int) -> "Collate":
        """See `PairLoaders`."""
        return Collate(shift)

    def prompts(self, split: Split) -> "ComparedPrompts":
        """See `PairLoaders`."""
        if not self._splits[split]:
            raise ValueError(
                f"No prompt of data.{split} has two images that people rank differently, or all of them are in "
                "validation or test as well. Choose another set, or more of it; without data.test, give test=false."
            )
        return ComparedPrompts(self._splits[split], self._readers, self._size)

    @cached_property
    def _grouped(self) -> dict[Split, list[Compared]]:
        return {
            split: [each for name, human in sets.items() for each in compared((split, name), human.load(), self._group)]
            for split, sets in self._sets.items()
        }

    @cached_property
    def _splits(self) -> dict[Split, list[Compared]]:
        """No prompt is in two of them."""
        test = self._grouped["test"]
        taken = {plain(each.prompt) for each in test}
        own = bool(self._sets["validation"])
        held = [
            each
            for each in self._grouped["validation" if own else "train"]
            if plain(each.prompt) not in taken and (own or self._is_held_out(each.prompt))
        ]
        taken |= {plain(each.prompt) for each in held}
        train = [each for each in self._grouped["train"] if plain(each.prompt) not in taken]
        found: dict[Split, list[Compared]] = {"train": train, "validation": held, "test": test}
        counts = ", ".join(f"{sum(len(each.pairs) for each in items)} of {split}" for split, items in found.items())
        log.info("human preferences: %s pairs, no prompt in two of the splits", counts)
        return found

    def _is_held_out(self, prompt: str) -> bool:
        return zlib.crc32(plain(prompt).encode()) < self._share * 2**32

    @cached_property
    def _readers(self) -> dict[Source, Reader]:
        names: dict[Source, dict[str, None]] = {}
        for each in chain.from_iterable(self._grouped.values()):
            names.setdefault(each.source, {}).update(dict.fromkeys(each.images))
        humans = {source: self._sets[source[0]][source[1]] for source in names}
        return {
            source: Direct(human).one
            if human.any_order
            else Pack(packed(human, sorted(names[source]), self._cache)).one
            for source, human in humans.items()
        }


def plain(prompt: str) -> str:
    """What prompts have in common that are to be in one split."""
    return " ".join(prompt.casefold().split())


def compared(source: Source, judged: Sequence[Judged], most: int) -> list[Compared]:
    """Each prompt with all that people said of it, in parts of at most so many images, or of one judgement.

    What they tie is left out, and so are judgements that are only there for a protocol.
    """
    by_prompt: dict[str, list[Judged]] = {}
    for each in judged:
        if not each.tuning and len(set(each.ranks.tolist())) > 1:
            by_prompt.setdefault(each.prompt, []).append(each)
    found = []
    for prompt, own in by_prompt.items():
        rows: dict[str, int] = {}
        pairs: list[tuple[int, int, float]] = []
        for each in own:
            if pairs and len(rows.keys() | set(each.images)) > most:
                found.append(Compared(source, prompt, tuple(rows), tuple(pairs)))
                rows, pairs = {}, []
            for name in each.images:
                rows.setdefault(name, len(rows))
            for first, second in combinations(range(len(each.images)), 2):
                gap = float(each.ranks[second] - each.ranks[first])
                better, worse = (first, second) if gap > 0 else (second, first)
                if gap:
                    pairs.append((rows[each.images[better]], rows[each.images[worse]], abs(gap)))
        found.append(Compared(source, prompt, tuple(rows), tuple(pairs)))
    return found


class Direct:
    """Reads a set's images from where they are."""

    def __init__(self, human: HumanSet) -> None:
        self._human = human

    def one(self, name: str) -> bytes:
        """An image's file."""
        [(_, content)] = self._human.read([name])
        return content


class ComparedPrompts(Dataset[Seen]):
    """Prompts with their images, which are read and scaled when a prompt is asked for."""

    def __init__(self, items: Sequence[Compared], readers: Mapping[Source, Reader], size: int) -> None:
        self._items, self._readers, self._size = items, readers, size

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Seen:
        item = self._items[index]
        pixels = []
        for name in item.images:
            try:
                pixels.append(scaled(self._readers[item.source](name), self._size))
            except Exception as error:  # a decoder fed with garbage raises anything
                raise ValueError(
                    f"Image '{name}' of the prompt {item.prompt[:200]!r}, in data.{'.'.join(item.source)}, cannot be "
                    f"read: {error}. Put the right file there, or take the image out of the set's table."
                ) from error
        return Seen(item, np.stack(pixels))


def scaled(content: bytes, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """An image file's pixels: shorter side to `size` (bicubic), centre crop; of the picture as people saw it."""
    image = image_files.rgb(content)
    short = min(image.size)
    width, height = (size * side // short for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))


class Collate:
    """Prompts with their images to a batch; an object, so that workers can be sent it.

    Args:
        shift: see `PreferenceDataModule`.
    """

    def __init__(self, shift: int = 0) -> None:
        self._shift = shift

    def __call__(self, seen: Sequence[Seen]) -> PreferenceBatch:
        """Images are of one size already."""
        found: list[tuple[int, int, float]] = []
        first = 0
        for each in seen:
            found += [(first + better, first + worse, gap) for better, worse, gap in each.compared.pairs]
            first += len(each.pixels)
        better, worse, margins = zip(*found, strict=True)
        images = rearrange(torch.from_numpy(np.concatenate([each.pixels for each in seen])), "b h w c -> b c h w")
        # From what the batch is made of, which is new in every epoch and the same in a resumed run.
        seed = zlib.crc32("|".join(each.compared.prompt for each in seen).encode())
        return PreferenceBatch(
            prompts=[each.compared.prompt for each in seen for _ in each.pixels],
            images=shifted(images.float() / 255, self._shift, seed),
            ratings=torch.zeros(first, len(ASPECTS), dtype=torch.int64),
            better=torch.tensor(better),
            worse=torch.tensor(worse),
            aspects=torch.full((len(found),), -1),
            margins=torch.tensor(margins),
        )
