"""A round of DDPO on several devices: what each of them does, and what they know together."""

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor, distributed

from vp_rl.types import Conditioning, PromptBatch, Steps


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
