"""A round of DDPO on several devices: what each of them does, and what they know together."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor, distributed

from vp_rl.types import Conditioning, Images, Latents, PromptBatch, Scores, Steps


class StepBatch(NamedTuple):
    """A micro-batch of states x_t, each with the steps that were drawn from it: one, or with `branch` several."""

    latents: Float[Tensor, "batch *latent"]
    next_latents: Float[Tensor, "batch draws *latent"]
    step: Steps
    log_probs: Float[Tensor, "batch draws"]
    """Under the policy that sampled."""
    advantages: Float[Tensor, "batch draws"]
    weight: Float[Tensor, " batch"]
    prompt: Int[Tensor, " batch"]
    """Row of the round's conditioning."""


class Share(NamedTuple):
    """What of a round this device does."""

    places: list[int]
    """Of its prompts among those of all devices."""
    images: range
    """The numbers of the images that it makes of each of them."""
    prompts: int
    """Of all devices."""


class Rollout(NamedTuple):
    """A round's images, as what is needed to learn from them: all states with their steps, and the encoded prompts."""

    states: StepBatch
    """Prompt by prompt, image by image, step by step; with `branch`, one for each prompt."""
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


def of_all(scores: Float[Tensor, "own_prompts own_images"], devices_per_prompt: int) -> Float[Tensor, "prompts images"]:
    """The scores of all devices: by the prompts' places and the images' numbers, and so alike on each of them."""
    every = [scores]
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        every = [torch.empty_like(scores) for _ in range(distributed.get_world_size())]
        distributed.all_gather(every, scores.contiguous())
    # As the data module deals: prompts in turn to the first devices, the same to the next ones.
    order = "(share device) prompt image -> (prompt device) (image share)"
    return rearrange(torch.stack(every), order, share=devices_per_prompt)


class Replayed:
    """What an epoch's micro-batches gave, looked at once: looking at each would wait for the device, and logging each
    takes milliseconds.
    """

    def __init__(self) -> None:
        self._values: list[Float[Tensor, "loss_ratio_clipped samples"]] = []
        self._drifts: list[Float[Tensor, ""]] = []

    def add(
        self, loss: Float[Tensor, ""], log_ratio: Float[Tensor, " samples"], clip_range: float, sampled: bool
    ) -> None:
        """A micro-batch; whether the policy is still the one that `sampled` it, so that the ratio should be 1."""
        ratio = log_ratio.exp()
        clipped = ((ratio - 1).abs() > clip_range).float()
        self._values.append(torch.stack([loss.expand_as(ratio), ratio, clipped]))
        if sampled:
            self._drifts.append(log_ratio.abs().max())

    def means(self) -> dict[str, float]:
        """Over all samples, by the metrics' names."""
        names = "train/loss", "train/ratio", "train/clip_fraction"
        return dict(zip(names, torch.cat(self._values, 1).mean(1).tolist(), strict=True))

    def drift(self) -> Float[Tensor, ""] | None:
        """The largest difference of two log-probabilities that should be one; None where nothing was so fresh."""
        return torch.stack(self._drifts).max() if self._drifts else None


class Scoring:
    """Scores the images of a round as they come, in their order.

    A reward whose work is done elsewhere gets them in a thread, and the next ones are sampled meanwhile. They wait for
    it in main memory: it may be slow.

    Args:
        decode: latents to images.
        score: images of prompts to scores.
        batch: images at once.
        elsewhere: see `Reward`.
    """

    def __init__(
        self,
        decode: Callable[[Latents], Images],
        score: Callable[[Images, list[str]], Scores],
        batch: int,
        elsewhere: bool,
    ) -> None:
        self._decode, self._score, self._batch = decode, score, batch
        self._pool = ThreadPoolExecutor(1) if elsewhere else None
        self._found: list[Scores | Future[Scores]] = []
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

    def result(self) -> Scores:
        """Of all images so far, in their order.

        Raises:
            Exception: what scoring raised first.
        """
        started = time.monotonic()
        scores = torch.cat([each.result() if isinstance(each, Future) else each for each in self._found])
        self.seconds += time.monotonic() - started
        return scores
