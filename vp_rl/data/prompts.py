"""Prompts to train a policy on, in an order that follows from the seed alone."""

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import lightning
import torch
from torch import Tensor

from vp_rl.configuration.kinds import Count, Seed, Text
from vp_rl.data.preferences import best_images
from vp_rl.files.paths import user_path
from vp_rl.functional import seed_of
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
        devices_per_prompt: so many devices have the same prompts, and divide the images of each among themselves; more
            than 1 where there are more devices than prompts are wanted in a batch.
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
        batch_size: Count = 8,
        devices_per_prompt: Count = 1,
        batches_per_epoch: Count = 1,
        images: Text | None = None,
        images_per_batch: Count = 16,
        seed: Seed = 0,
    ) -> None:
        super().__init__()
        for name, value in (
            ("batch_size", batch_size),
            ("devices_per_prompt", devices_per_prompt),
            ("batches_per_epoch", batches_per_epoch),
            ("images_per_batch", images_per_batch),
        ):
            if not isinstance(value, int):
                raise ValueError(f"data.{name}={value!r} must be a whole number.")
            if value < 1:
                raise ValueError(f"data.{name}={value} must be at least 1.")
        self._source, self._batch_size, self._batches, self._seed = prompts, batch_size, batches_per_epoch, seed
        self._folder, self._images_per_batch, self._sharing = images, images_per_batch, devices_per_prompt

    def setup(self, stage: str) -> None:
        """Reads the prompts, and the images where they are asked for."""
        self._prompts = list(dict.fromkeys(self._source.split("train")))
        assert self.trainer is not None
        devices = self.trainer.world_size
        if devices % self._sharing:
            raise ValueError(f"data.devices_per_prompt={self._sharing} must divide the number of devices, {devices}.")
        together = self._batch_size * devices // self._sharing
        if len(self._prompts) < together:
            raise ValueError(
                f"A batch takes {together} different prompts (data.batch_size={self._batch_size} on each of "
                f"{devices} devices), but the train split has {len(self._prompts)}: "
                "give more prompts or lower data.batch_size."
            )
        self._pairs = best_images(user_path(self._folder), "train") if self._folder else []

    def train_dataloader(self) -> Iterable[Any]:
        """What the algorithm makes of an epoch's prompts."""
        assert self.trainer is not None
        algorithm = self.trainer.lightning_module
        if not isinstance(algorithm, TrainsOnPrompts):
            raise ValueError(
                f"{type(algorithm).__name__} does not train on prompts: choose data=preferences for a reward model "
                "(experiment=vpscore does), or algorithm=ddpo or refl."
            )
        rank, devices = self.trainer.global_rank, self.trainer.world_size
        apart = devices // self._sharing  # have different prompts
        prompts = Stream(len(self._prompts), self._batch_size, f"{self._seed}/prompts", rank % apart, apart)
        images = None
        if self._pairs:
            images = Stream(len(self._pairs), self._images_per_batch, f"{self._seed}/images", rank, devices)
        share = rank // apart, self._sharing
        epoch = EpochPrompts(self.trainer, self._prompts, self._pairs, prompts, images, share, self._batches)
        return algorithm.batches(epoch)


class Stream:
    """Pass after pass over `number` items, each in its own order, cut into batches that devices share.

    Every device's batch follows from its position alone: there is nothing to save, and two devices with half the batch
    see together what one sees.
    """

    def __init__(self, number: int, batch_size: int, seed: str, rank: int, world_size: int) -> None:
        self.batch_size, self._number, self._seed = batch_size, number, seed
        self._world_size = world_size
        self.places = list(range(rank, batch_size * world_size, world_size))
        """Of this device's items in the batch of all devices: it is dealt out in turn."""
        self._order = lru_cache(maxsize=2)(self._shuffle)

    def batch(self, position: int) -> list[int]:
        """The items of this device's batch at a position."""
        start = position * self.batch_size * self._world_size
        places = [start + place for place in self.places]
        return [int(self._order(place // self._number)[place % self._number]) for place in places]

    def _shuffle(self, turn: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed_of(self._seed, turn))
        return torch.randperm(self._number, generator=generator)


class EpochPrompts:
    """An epoch's batches: those of the trainer's current epoch, so that a resumed run goes on with the right ones."""

    def __init__(
        self,
        trainer: lightning.Trainer,
        prompts: Sequence[str],
        pairs: Sequence[tuple[str, Tensor]],
        stream: Stream,
        images: Stream | None,
        share: tuple[int, int],
        batches: int,
    ) -> None:
        self._trainer, self._prompts, self._pairs, self._batches = trainer, prompts, pairs, batches
        self._stream, self._images, self._share = stream, images, share
        self.batch_size, self.devices_per_prompt = stream.batch_size, share[1]

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[PromptBatch]:
        for number in range(self._batches):
            position = self._trainer.current_epoch * self._batches + number
            prompts = [self._prompts[item] for item in self._stream.batch(position)]
            batch = PromptBatch(prompts, places=self._stream.places, share=self._share)
            if self._images is not None:
                captions, images = zip(*(self._pairs[item] for item in self._images.batch(position)), strict=True)
                batch = batch._replace(images=torch.stack(images).float() / 255, captions=list(captions))
            yield batch
