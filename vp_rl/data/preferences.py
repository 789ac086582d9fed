"""Preference pairs to train a reward model on, from a VisionPrefer dataset that is built if it is absent."""

import logging
import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import numpy as np
import torch
from einops import rearrange
from jaxtyping import UInt8
from PIL import ImageOps
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from vp_rl.configuration.kinds import Count, Part, Seed, Text, Whole
from vp_rl.files import images as image_files
from vp_rl.files import parquet
from vp_rl.files.paths import user_path
from vp_rl.types import ASPECTS, Aspect, Images, PreferenceBatch, Split
from vp_rl.visionprefer import schema
from vp_rl.visionprefer.build import Builder
from vp_rl.visionprefer.pairs import all_pairs, aspects_of, pairs
from vp_rl.visionprefer.ratings import COLUMNS, Batch

log = logging.getLogger(__name__)

_AT_ONCE = 2048  # prompts, without their images


class RatedPrompt(NamedTuple):
    """A prompt with its images, still encoded, and their ratings by aspect."""

    prompt: str
    images: list[bytes]
    ratings: dict[Aspect, list[int]]


class RatedPrompts(Dataset[RatedPrompt]):
    """The prompts of a split that have a pair by the rule; images are read when a prompt is asked for.

    `share`: of them that are used, from the first.

    Raises:
        FileNotFoundError, ValueError: see `schema.shards`.
    """

    def __init__(self, folder: Path, split: Split, rule: str, share: float = 1.0) -> None:
        self._rows, self._annotator = schema.Rows(folder, split), schema.about(folder)["annotator"]
        self._wanted: list[int] = []
        first = 0
        for file in schema.shards(folder, split):
            for batch in parquet.batches(file, _AT_ONCE, COLUMNS):
                ratings, _ = Batch(batch).ratings(self._annotator)
                self._wanted += (first + np.unique(all_pairs(ratings, rule).prompt)).tolist()
                first += len(ratings)
        del self._wanted[math.ceil(share * len(self._wanted)) :]

    def __len__(self) -> int:
        return len(self._wanted)

    def __getitem__(self, index: int) -> RatedPrompt:
        return _rated(self._rows[self._wanted[index]], self._annotator)


class PairLoaders(lightning.LightningDataModule, ABC):
    """Batches of prompts that devices share, as many for each.

    Args:
        batch_size: prompts of each device in a batch.
        shift: training images are moved by up to so many pixels each way, their edges repeated. A small set is learnt
            by heart without it. 0: they are not.
        num_workers: processes that decode images.
        seed: of the order of training.
    """

    def __init__(self, batch_size: int, shift: int, num_workers: int, seed: int) -> None:
        super().__init__()
        self._batch_size, self._shift, self._num_workers, self._seed = batch_size, shift, num_workers, seed

    @abstractmethod
    def prompts(self, split: Split) -> Dataset[Any]:
        """The prompts of a split.

        Raises:
            ValueError: none has a pair.
        """

    @abstractmethod
    def collate(self, shift: int) -> Callable[[Any], PreferenceBatch]:
        """Makes a batch of prompts, their images moved by up to so many pixels; worker processes can be sent it."""

    def train_dataloader(self) -> DataLoader:
        """Shuffled anew in every epoch, by the seed and the epoch alone."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """In the data's order."""
        return self._loader("validation", shuffle=False)

    def test_dataloader(self) -> DataLoader:
        """In the data's order."""
        return self._loader("test", shuffle=False)

    def _loader(self, split: Split, shuffle: bool) -> DataLoader:
        prompts, trainer = self.prompts(split), self.trainer
        sampler = DistributedSampler(
            prompts,
            num_replicas=trainer.world_size if trainer else 1,
            rank=trainer.global_rank if trainer else 0,
            shuffle=shuffle,
            seed=zlib.crc32(str(self._seed).encode()),  # the epoch is added: neighbouring seeds must not overlap
        )
        return DataLoader(
            prompts,
            self._batch_size,
            sampler=sampler,
            num_workers=self._num_workers,
            collate_fn=self.collate(self._shift if shuffle else 0),
            persistent_workers=self._num_workers > 0,
        )


class PreferenceDataModule(PairLoaders):
    """Batches of whole prompts: each image once, with every pair of it that the ratings do not tie.

    Args:
        folder: of the dataset.
        aspects: how ratings become pairs: `pooled`, `mean`, one aspect or several (see `visionprefer.pairs`).
        share: of the training prompts that are used, from the first: what are more of them worth?
        builder: makes the dataset if the folder is absent; None if it must be there.
        batch_size, shift, num_workers, seed: see `PairLoaders`.

    Raises:
        ValueError: the rule is unknown, or the share impossible.
    """

    def __init__(
        self,
        folder: Text,
        batch_size: Count = 16,
        aspects: Text = "pooled",
        share: Part = 1.0,
        builder: Builder | None = None,
        shift: Whole = 0,
        num_workers: Whole = 0,
        seed: Seed = 0,
    ) -> None:
        super().__init__(batch_size, shift, num_workers, seed)
        aspects_of(aspects)
        if not 0 < share <= 1:
            raise ValueError(f"data.share={share} must be above 0 and at most 1.")
        self._folder, self._rule, self._share, self._builder = user_path(folder), aspects, share, builder

    def prepare_data(self) -> None:
        """Builds the dataset where there is none; one process of a machine does.

        Raises:
            FileNotFoundError: it is absent and there is no builder.
        """
        if schema.exists(self._folder):
            log.info("VisionPrefer: %s is there and used as it is; remove it to build it anew", self._folder)
        elif self._builder is None:
            raise FileNotFoundError(
                f"The VisionPrefer dataset data.folder='{self._folder}' is absent, and data.builder is null, "
                "so there is nothing to build it with."
            )
        else:
            log.info("VisionPrefer: building %s", self._folder)
            self._builder.build(self._folder)

    def prompts(self, split: Split) -> "RatedPrompts":
        """See `PairLoaders`."""
        prompts = RatedPrompts(self._folder, split, self._rule, self._share if split == "train" else 1.0)
        if not len(prompts):
            raise ValueError(
                f"No prompt of the {split} split in '{self._folder}' has two images that data.aspects={self._rule!r} "
                "ranks differently: there is nothing to learn from. Choose another rule, or build a larger set."
            )
        return prompts

    def collate(self, shift: int) -> "Collate":
        """See `PairLoaders`."""
        return Collate(self._rule, shift)


class Collate:
    """Rated prompts to a batch of decoded images and the pairs among them; an object, so that workers can be sent it.

    Args:
        rule: see `visionprefer.pairs`.
        shift: see `PreferenceDataModule`.
    """

    def __init__(self, rule: str, shift: int = 0) -> None:
        self._rule, self._shift = rule, shift

    def __call__(self, rated: Sequence[RatedPrompt]) -> PreferenceBatch:
        """Images of several sizes are cropped and scaled to the smallest width and height among them."""
        found: list[tuple[int, int, int]] = []
        first = 0
        for each in rated:
            found += [
                (first + better, first + worse, aspect) for better, worse, aspect in pairs(each.ratings, self._rule)
            ]
            first += len(each.images)
        better, worse, aspects = torch.tensor(found, dtype=torch.int64).reshape(-1, 3).unbind(1)
        columns = [torch.tensor([rating for each in rated for rating in each.ratings[aspect]]) for aspect in ASPECTS]
        ratings = torch.stack(columns, 1)
        means = torch.cat([ratings.float(), ratings.float().mean(1, keepdim=True)], 1)  # at -1, as in `aspects`
        pixels = decode([png for each in rated for png in each.images])
        images = rearrange(torch.from_numpy(pixels), "b h w c -> b c h w").float() / 255
        # From what the batch is made of, which is new in every epoch and the same in a resumed run.
        seed = zlib.crc32("|".join(each.prompt for each in rated).encode())
        return PreferenceBatch(
            prompts=[each.prompt for each in rated for _ in each.images],
            images=shifted(images, self._shift, seed),
            ratings=ratings,
            better=better,
            worse=worse,
            aspects=aspects,
            margins=means[better, aspects] - means[worse, aspects],
        )


def shifted(images: Images, most: int, seed: int) -> Images:
    """Each image moved by up to `most` pixels in both directions, its edges repeated."""
    if not most:
        return images
    height, width = images.shape[-2:]
    padded = F.pad(images, (most,) * 4, mode="replicate")
    offsets = torch.randint(2 * most + 1, (len(images), 2), generator=torch.Generator().manual_seed(seed)).tolist()
    return torch.stack([each[:, y : y + height, x : x + width] for each, (y, x) in zip(padded, offsets, strict=True)])


def decode(encoded: Sequence[bytes]) -> UInt8[np.ndarray, "batch height width 3"]:
    """Image files to RGB pixels, cropped and scaled to the smallest width and height among them.

    Raises:
        ValueError: one is not an image that can be read.
    """
    images = []
    for number, data in enumerate(encoded):
        try:
            images.append(image_files.rgb(data))
        except ValueError as error:
            raise ValueError(f"Image {number} of a batch of {len(encoded)} cannot be decoded: {error}") from error
    size = min(image.width for image in images), min(image.height for image in images)
    return np.stack([np.asarray(image if image.size == size else ImageOps.fit(image, size)) for image in images])


def rated_prompts(folder: Path, split: Split) -> list[RatedPrompt]:
    """The prompts of a split of a VisionPrefer dataset, in its order."""
    annotator = schema.about(folder)["annotator"]
    return [_rated(row, annotator) for row in schema.read(folder, split)]


def _rated(row: schema.Row, annotator: str) -> RatedPrompt:
    return RatedPrompt(row["prompt"], [image["image"]["bytes"] for image in row["images"]], ratings_of(row, annotator))


def ratings_of(row: schema.Row, annotator: str) -> dict[Aspect, list[int]]:
    """One annotator's ratings of a row's images by aspect, in the order of the images.

    Raises:
        ValueError: an image has no such rating in an aspect, or two.
    """
    found: dict[tuple[str, str], int] = {}
    for note in row["annotations"]:
        if note["annotator"] != annotator:  # a second opinion
            continue
        key = (note["image_id"], note["aspect"])
        if key in found:
            raise ValueError(
                f"Image {key[0]} of {row['prompt'][:200]!r} is rated twice in {key[1]} by {annotator}: keep one rating."
            )
        found[key] = note["rating"]
    for image in row["images"]:
        for aspect in ASPECTS:
            if (image["image_id"], aspect) not in found:
                raise ValueError(
                    f"Image {image['image_id']} of {row['prompt'][:200]!r} has no rating in {aspect} by {annotator}: "
                    "the dataset is incomplete, build it anew."
                )
    return {aspect: [found[image["image_id"], aspect] for image in row["images"]] for aspect in ASPECTS}


def best_images(folder: Path, split: Split) -> list[tuple[str, UInt8[Tensor, "3 height width"]]]:
    """Each prompt with the one of its images that has the highest mean rating, all of one size, 0 to 255."""
    rated = rated_prompts(folder, split)
    if not rated:
        raise ValueError(f"The VisionPrefer dataset in '{folder}' has no prompt in its {split} split.")
    chosen = []
    for each in rated:
        totals = [sum(each.ratings[aspect][image] for aspect in ASPECTS) for image in range(len(each.images))]
        chosen.append(each.images[totals.index(max(totals))])
    pixels = rearrange(torch.from_numpy(decode(chosen)), "b h w c -> b c h w")
    return list(zip((each.prompt for each in rated), pixels, strict=True))
