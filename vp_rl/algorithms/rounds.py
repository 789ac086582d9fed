"""A round on several devices: what each of them does, and what they know together."""

import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor, distributed

from vp_rl.types import Conditioning, Images, Latents, PromptBatch


class Share(NamedTuple):
    """What of a round this device does."""

    places: list[int]
    """Of its prompts among those of all devices."""
    images: range
    """The numbers of the images that it makes of each of them."""
    prompts: int
    """Of all devices."""


class Part(NamedTuple):
    """Images that a device samples together; those of a prompt are next to each other."""

    conditioning: Conditioning
    """A row for each image."""
    noise: list[torch.Generator]
    """One for each image. What is drawn from it depends neither on the batch nor on the device."""
    places: list[int]
    """Of the prompts among those of all devices: what is drawn once a prompt follows from these."""
    each: int
    """Images of each prompt; with `whole_prompts` all that this device makes of it."""
    of: list[int]
    """The place of each image's prompt."""


class Batch(NamedTuple):
    """Examples to learn from: a round's, or a micro-batch of them."""

    examples: Any
    """What `collect` gave: a NamedTuple of tensors whose rows are examples."""
    advantages: Float[Tensor, "examples images"]
    """Of the images that an example is of: one, with `whole_prompts` all of its prompt on this device."""
    prompt: Int[Tensor, " examples"]
    """Row of the round's conditioning."""
    kl_weights: Float[Tensor, "examples images"] | None = None
    """How much the KL to the reference counts for an image, 1 on average over the round's; None: alike for all."""

    def take(self, rows: Int[Tensor, " rows"], device: torch.device | None = None) -> "Batch":
        """Some of them, where they are or on a device."""
        return self._each(lambda field: field[rows].to(device))

    def pinned(self) -> "Batch":
        """In memory that is sent to a GPU without waiting for it."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        examples = type(self.examples)(*map(change, self.examples))
        kl_weights = None if self.kl_weights is None else change(self.kl_weights)
        return Batch(examples, change(self.advantages), change(self.prompt), kl_weights)


class Rollout(NamedTuple):
    """A round: all that there is to learn from, in main memory, and its encoded prompts."""

    batch: Batch
    """Prompt by prompt, image by image, example by example; with `whole_prompts` prompt by prompt."""
    conditioning: Conditioning
    share: Share


def share_of(batch: PromptBatch, images_per_prompt: int, devices: int) -> Share:
    """What of a round the device does that was given this batch."""
    first, sharing = batch.share
    places = list(range(len(batch.prompts))) if batch.places is None else batch.places
    return Share(places, range(first, images_per_prompt, sharing), len(places) * devices // sharing)


def own(values: Shaped[Tensor, "prompts images *rest"], share: Share) -> Shaped[Tensor, "samples *rest"]:
    """Of values for all images of a round, those of a device's share, prompt by prompt."""
    return values[share.places][:, list(share.images)].flatten(0, 1)


def batch_of(
    examples: Any, signals: Float[Tensor, "images signals"], prompts: int, each: int, whole_prompts: bool
) -> Batch:
    """A device's round.

    Args:
        examples: in the order of `Rollout.batch`.
        signals: advantages of its images, and perhaps a second column of `kl_weights`.
        prompts: that the images are of.
        each: examples of each image; with `whole_prompts` of each prompt.
        whole_prompts: whether an example is of all images of a prompt.
    """
    groups = prompts if whole_prompts else len(signals)
    of_examples = signals.cpu().unflatten(0, (groups, -1)).repeat_interleave(each, 0)
    advantages, *kl_weights = of_examples.unbind(-1)
    return Batch(examples, advantages, torch.arange(prompts).repeat_interleave(groups // prompts * each), *kl_weights)


def of_all(
    scores: Float[Tensor, "own_prompts own_images *rest"], devices_per_prompt: int
) -> Float[Tensor, "prompts images *rest"]:
    """The scores of all devices: by the prompts' places and the images' numbers, and so alike on each of them."""
    every = [scores]
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        every = [torch.empty_like(scores) for _ in range(distributed.get_world_size())]
        distributed.all_gather(every, scores.contiguous())
    # As the data module deals: prompts in turn to the first devices, the same to the next ones.
    order = "(share device) prompt image ... -> (prompt device) (image share) ..."
    return rearrange(torch.stack(every), order, share=devices_per_prompt)


class Means:
    """Metrics of an epoch's micro-batches, kept on the device and looked at once.

    Looking at each would wait for the device, and logging each takes milliseconds.

    Args:
        largest: the metrics whose largest value counts.
    """

    def __init__(self, largest: Collection[str] = ()) -> None:
        self._largest = largest
        self._sums: dict[str, Float[Tensor, ""]] = {}
        self._samples: dict[str, int] = {}
        self._maxima: dict[str, Float[Tensor, ""]] = {}

    def add(self, values: Mapping[str, Tensor], samples: int) -> None:
        """A micro-batch: of each metric a value for each sample, or one for all of so many samples."""
        for name, value in values.items():
            value = value.detach().float()
            if name in self._largest:
                self._maxima[name] = torch.maximum(value.max(), self._maxima.get(name, value.max()))
            else:
                self._sums[name] = self._sums.get(name, 0.0) + value.mean() * samples
                self._samples[name] = self._samples.get(name, 0) + samples

    def means(self) -> dict[str, float]:
        """Over all samples."""
        return {name: (total / self._samples[name]).item() for name, total in self._sums.items()}

    def maxima(self) -> dict[str, Float[Tensor, ""]]:
        """The largest values."""
        return dict(self._maxima)


class Scoring:
    """Scores the images of a round as they come, in their order.

    A reward whose work is done elsewhere gets them in a thread, and the next ones are sampled meanwhile. They wait for
    it in main memory: it may be slow.

    Args:
        decode: latents to images.
        score: images of prompts to a row of scores each.
        batch: images at once.
        elsewhere: see `Reward`.
    """

    def __init__(
        self,
        decode: Callable[[Latents], Images],
        score: Callable[[Images, list[str]], Float[Tensor, "images columns"]],
        batch: int,
        elsewhere: bool,
    ) -> None:
        self._decode, self._score, self._batch = decode, score, batch
        self._pool = ThreadPoolExecutor(1) if elsewhere else None
        self._found: list[Tensor | Future[Tensor]] = []
        self.seconds = 0.0
        """In which nothing was sampled."""

    def __enter__(self) -> "Scoring":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:  # after an error nothing more is asked
            self._pool.shutdown(cancel_futures=True)

    def add(self, latents: Latents, prompts: list[str]) -> None:
        """Finished latents, and the prompt of each."""
        started = time.monotonic()
        for start in range(0, len(latents), self._batch):
            rows = slice(start, start + self._batch)
            images = self._decode(latents[rows])
            if self._pool is None:
                self._found.append(self._score(images, prompts[rows]))
            else:
                self._found.append(self._pool.submit(self._score, images.cpu(), prompts[rows]))
        self.seconds += time.monotonic() - started

    def result(self) -> Float[Tensor, "images columns"]:
        """Of all images so far, in their order.

        Raises:
            Exception: what scoring raised first.
        """
        started = time.monotonic()
        scores = torch.cat([each.result() if isinstance(each, Future) else each for each in self._found])
        self.seconds += time.monotonic() - started
        return scores
