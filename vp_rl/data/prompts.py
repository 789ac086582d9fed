"""Prompts to train a policy on, in an order that follows from the seed alone."""

import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lightning
import torch
from torch import Tensor

from vp_rl.data.preferences import best_images
from vp_rl.interfaces import PromptSource
from vp_rl.types import PromptBatch


@runtime_checkable
class TrainsOnPrompts(Protocol):
    """An algorithm that says what it trains on, given an epoch's prompts; DDPO samples rounds of images for them."""

    def batches(self, prompts: "EpochPrompts") -> Iterable[Any]: ...


class PromptDataModule(lightning.LightningDataModule):
    """Batches of prompts from the train split; the policy's algorithm decides what is made of them.

    Args:
        prompts: where they come from.
        batch_size: prompts of each device in a batch.
        batches_per_epoch: one is a round of DDPO, or an update of ReFL.
        images: a VisionPrefer folder; the best-rated image of each of its training prompts then comes along, for
            losses that hold the policy near given images. None: no images.
        images_per_batch: of those, on each device.
        seed: of the order.

    Raises:
        ValueError: there are fewer prompts than a batch takes, or a size is below 1.
    """

    def __init__(
        self,
        prompts: PromptSource,
        batch_size: int = 8,
        batches_per_epoch: int = 1,
        images: str | None = None,
        images_per_batch: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (
            ("batch_size", batch_size),
            ("batches_per_epoch", batches_per_epoch),
            ("images_per_batch", images_per_batch),
        ):
            if not isinstance(value, int):
                raise ValueError(f"data.{name}={value!r} must be a whole number.")
            if value < 1:
                raise ValueError(f"data.{name}={value} must be at least 1.")
        self._source, self._batch_size, self._batches, self._seed = prompts, batch_size, batches_per_epoch, seed
        self._folder, self._images_per_batch = images, images_per_batch

    def setup(self, stage: str) -> None:
        """Reads the prompts, and the images where they are asked for."""
        self._prompts = list(dict.fromkeys(self._source.split("train")))
        assert self.trainer is not None
        together = self._batch_size * self.trainer.world_size
        if len(self._prompts) < together:
            raise ValueError(
                f"A batch takes {together} different prompts (data.batch_size={self._batch_size} on each of "
                f"{self.trainer.world_size} devices), but the train split has {len(self._prompts)}: "
                "give more prompts or lower data.batch_size."
            )
        self._pairs = best_images(Path(self._folder), "train") if self._folder else []

    def train_dataloader(self) -> Iterable[Any]:
        """What the algorithm makes of an epoch's prompts."""
        assert self.trainer is not None
        algorithm = self.trainer.lightning_module
        if not isinstance(algorithm, TrainsOnPrompts):
            raise ValueError(
                f"{type(algorithm).__name__} does not train on prompts: choose data=preferences for a reward model "
                "(experiment=vpscore does), or algorithm=ddpo or refl."
            )
        shares = self.trainer.global_rank, self.trainer.world_size
        streams = [
            Stream(len(items), size, f"{self._seed}/{name}", *shares) if items else None
            for name, items, size in (
                ("prompts", self._prompts, self._batch_size),
                ("images", self._pairs, self._images_per_batch),
            )
        ]
        return algorithm.batches(EpochPrompts(self.trainer, self._prompts, self._pairs, streams, self._batches))


class Stream:
    """Pass after pass over `number` items, each in its own order, cut into batches that devices share.

    Every device's batch follows from its position alone: there is nothing to save, and two devices with half the batch
    see together what one sees.
    """

    def __init__(self, number: int, batch_size: int, seed: str, rank: int, world_size: int) -> None:
        self.batch_size, self._number, self._seed = batch_size, number, seed
        self._rank, self._world_size = rank, world_size
        self._order = lru_cache(maxsize=2)(self._shuffle)

    def batch(self, position: int) -> list[int]:
        """The items of this device's batch at a position."""
        start = position * self.batch_size * self._world_size + self._rank
        places = [start + step * self._world_size for step in range(self.batch_size)]
        return [int(self._order(place // self._number)[place % self._number]) for place in places]

    def _shuffle(self, turn: int) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self._seed}/{turn}".encode()))
        return torch.randperm(self._number, generator=generator)


class EpochPrompts:
    """An epoch's batches: those of the trainer's current epoch, so that a resumed run goes on with the right ones."""

    def __init__(
        self,
        trainer: lightning.Trainer,
        prompts: Sequence[str],
        pairs: Sequence[tuple[str, Tensor]],
        streams: Sequence[Stream | None],
        batches: int,
    ) -> None:
        self._trainer, self._prompts, self._pairs, self._batches = trainer, prompts, pairs, batches
        stream, self._images = streams
        assert stream is not None, "setup has refused an empty list of prompts"
        self._stream, self.batch_size = stream, stream.batch_size

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[PromptBatch]:
        for number in range(self._batches):
            position = self._trainer.current_epoch * self._batches + number
            prompts = [self._prompts[item] for item in self._stream.batch(position)]
            if self._images is None:
                yield PromptBatch(prompts)
            else:
                captions, images = zip(*(self._pairs[item] for item in self._images.batch(position)), strict=True)
                yield PromptBatch(prompts, torch.stack(images).float() / 255, list(captions))
