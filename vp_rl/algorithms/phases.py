"""What an algorithm tells the planner of itself: how its updates are cut, and the work that they are made of."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from vp_rl.interfaces import Policy, Reward
from vp_rl.sampler import Sampler
from vp_rl.types import Conditioning, Images, Latents, take

PROMPT = "a red circle left of a blue square"
"""What made-up work is about."""


class Cut(NamedTuple):
    """How an update's examples follow from its images, whatever the devices."""

    images_per_prompt: int = 1
    """In a round."""
    examples: int = 1
    """That are learned from, of each image; with `whole_prompts` of each prompt."""
    whole_prompts: bool = False
    """Whether the images of a prompt are learned from together."""
    passes: int = 1
    """Over a round's examples."""


class Load(NamedTuple):
    """One device's share of a round, or of an epoch where there are no rounds."""

    images: int
    prompts: int
    sample_batch: int
    """Images sampled at once."""
    train_batch: int
    """Examples trained at once."""
    micro_batches: int
    """Of the round: forward and backward passes of `train_batch`."""


class Phase(NamedTuple):
    """One kind of work: what is counted on fakes, tried on a device, and timed."""

    name: str
    """One word. Memory is needed for one such word at a time."""
    label: str
    """What it is in a table, with how much of it is done at once."""
    calls: float
    """Of `run`, in a round."""
    rows: int
    """Done at once."""
    run: Callable[[Any], object]
    """Does it on what `prepare` gave. A loss that it returns is back-propagated."""
    prepare: Callable[[int], Any] = int
    """Given the rows, what lies there already, such as made-up latents or images; by default the rows themselves."""
    setting: str | None = None
    """What `auto` may make as large as fits; None: it is not looked for here."""
    latents: float = 0
    """Latents of one image that lie beside it meanwhile, in float32."""
    counted: bool = True
    """Whether memory can be counted; not, where the work is done by others."""


def alike(conditioning: Conditioning, rows: int) -> Conditioning:
    """One encoded prompt, so many times."""
    device = next(iter(conditioning.values())).device
    return take(conditioning, torch.zeros(rows, dtype=torch.long, device=device))


@runtime_checkable
class Samples(Protocol):
    """An algorithm that samples images and has them scored."""

    policy: Policy
    reward: Reward
    sampler: Sampler


def rollout_phases(
    algorithm: Samples, load: Load, prompt: Conditioning, setting: str, steps: float, kept: float
) -> list[Phase]:
    """Sampling, decoding and scoring of a round's images.

    Args:
        algorithm: looked at anew when the work is done: its policy may be another by then.
        load: of the round.
        prompt: `PROMPT`, encoded.
        setting: how many images are sampled at once.
        steps: sampling steps of each image, on average.
        kept: latents of each image that are held while it is sampled.
    """
    size, parts = load.sample_batch, load.images / load.sample_batch
    ours = any(True for _ in algorithm.reward.parameters())  # else others than this process may do the work

    @torch.no_grad()
    def step(rows: int) -> object:
        return algorithm.sampler.sample(algorithm.policy, alike(prompt, rows), until=1)

    def noise(rows: int) -> Latents:
        return algorithm.policy.noise(rows)

    @torch.no_grad()
    def decode(latents: Latents) -> Images:
        return algorithm.policy.decode(latents)

    @torch.no_grad()
    def score(images: Images) -> object:
        return algorithm.reward(images, [PROMPT] * len(images))

    sampling, decoding, reward = (f"{what}, {size}" for what in ("sampling", "VAE decode", "reward"))
    return [
        Phase("sampling", f"{sampling} images at once", parts * steps, size, step, int, setting, kept * size),
        Phase("decoding", f"{decoding} at once", parts, size, decode, noise, setting),
        Phase("reward", f"{reward} at once", parts, size, score, lambda n: decode(noise(n)), setting, counted=ours),
    ]
