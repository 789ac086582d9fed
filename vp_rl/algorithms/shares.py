"""Each device's share of a data set's prompts, and what all of them have together."""

from typing import Any, TypeVar

from torch import distributed
from torch.utils.data import DistributedSampler

from vp_rl.types import PreferenceBatch

_T = TypeVar("_T")


def unrepeated(batch: PreferenceBatch, batch_idx: int, loader: Any) -> PreferenceBatch:
    """A device's batch without the prompt that only makes its share as large as the others'; of images in order.

    Torch's `DistributedSampler` repeats fewer prompts than there are devices, so it is the last one of a share.
    """
    sampler = getattr(loader, "sampler", None)
    if not isinstance(sampler, DistributedSampler) or batch_idx + 1 < len(loader):
        return batch
    share = list(sampler)
    if sampler.rank + (len(share) - 1) * sampler.num_replicas < len(loader.dataset):
        return batch
    repeated: PreferenceBatch = loader.collate_fn([loader.dataset[share[-1]]])
    images, pairs = len(batch.prompts) - len(repeated.prompts), len(batch.better) - len(repeated.better)
    return PreferenceBatch(
        batch.prompts[:images],
        batch.images[:images],
        batch.ratings[:images],
        batch.better[:pairs],
        batch.worse[:pairs],
        batch.aspects[:pairs],
        batch.margins[:pairs],
    )


def of_all_devices(own: _T) -> list[_T]:
    """What each device has, on each of them; anything that can be pickled. A GPU's tensors would stay on it."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [own]
    every: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(every, own)
    return every
