"""The architecture: what a reward, a process, a policy and an annotator promise.

A new one of a kind is one subclass in one file, and one yaml. Implementations are final: nobody subclasses them.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vp_rl.types import (
    Answer,
    Aspect,
    Conditioning,
    Dropped,
    GivenImage,
    Images,
    Latents,
    Negative,
    Rating,
    Scores,
    Split,
    Steps,
    Transition,
    Usage,
)


class Reward(nn.Module, ABC):
    """Scores images for prompts. Owns its preprocessing, so images of any height and width are welcome.

    Row i of the result depends on row i of the input only.
    """

    differentiable: bool
    """Whether gradients flow from scores to images; of the class, or of a reward made of others."""
    elsewhere: bool = False
    """Whether others than the policy's device do the work, so that images may be sampled meanwhile."""

    @abstractmethod
    def forward(self, images: Images, prompts: list[str]) -> Scores:
        """Float32 scores, higher is better; images are RGB in [0, 1]."""


class TrainableReward(Reward):
    """A reward that preferences can be fitted to. It has one output, or one for each aspect, which make its score."""

    @abstractmethod
    def outputs(self, images: Images, prompts: list[str]) -> Float[Tensor, "batch outputs"]:
        """Standardised, in float32; where there are several, in the order of `ASPECTS`."""

    @abstractmethod
    def combine(self, outputs: Float[Tensor, "batch outputs"]) -> Scores:
        """The score that they make together: what `forward` gives."""

    @abstractmethod
    def weigh(self, weights: Float[Tensor, " outputs"]) -> None:
        """Sets how much each output counts in the score; only their ratios matter."""

    @abstractmethod
    def freeze(self, fraction: float) -> None:
        """Makes everything trainable but the first `fraction` of each tower's layers."""

    @abstractmethod
    def standardise(self, outputs: Float[Tensor, "batch outputs"]) -> None:
        """Shifts and scales all outputs to come so that these would have mean 0 and standard deviation 1."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes what loading this reward needs."""


class Process(ABC):
    """The maths of one family of samplers: no network, no mutable position, everything in float32."""

    @property
    @abstractmethod
    def train_timesteps(self) -> int:
        """How many noise levels the denoiser was pretrained on, 0 to this less 1; 1000 for most."""

    @abstractmethod
    def timesteps(self, steps: int, device: torch.device | None = None) -> Float[Tensor, " steps"]:
        """What the denoiser is told at each of `steps` sampling steps, noisiest first; in main memory, or on a device.

        They are there already when they are asked for again: a copy would wait for all that the device is yet to do.
        """

    def start(self, steps: int) -> float:
        """What standard normal noise is multiplied by to begin with."""
        return 1.0

    @abstractmethod
    def transition(self, output: Latents, latents: Latents, step: Steps, steps: int, eta: float) -> Transition:
        """The Gaussian step from `latents`, given the denoiser's `output`; rows may be at different steps.

        `eta` scales the noise: 0 is the deterministic sampler, 1 the full ancestral one. Gradients flow from `output`.
        """

    @abstractmethod
    def add_noise(self, x0: Latents, noise: Latents, timestep: Float[Tensor, " batch"]) -> Latents:
        """The forward process: clean latents noised to `timestep`."""

    @abstractmethod
    def target(self, x0: Latents, noise: Latents, timestep: Float[Tensor, " batch"]) -> Latents:
        """What a perfect denoiser would output for those noised latents."""


class Policy(nn.Module, ABC):
    """A frozen text-to-image model with a trainable adapter. Only the adapter's parameters require gradients."""

    process: Process
    guided: bool = True
    """Whether it takes a scale of classifier-free guidance; models that were distilled to do without do not."""

    @abstractmethod
    def encode(self, prompts: list[str]) -> Conditioning:
        """The prompts as the denoiser reads them, without gradients."""

    @abstractmethod
    def noise(self, batch: int, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Latents:
        """Starting latents on the policy's device; a generator for each image makes them independent of batching."""

    @abstractmethod
    def predict(
        self,
        latents: Latents,
        timestep: Float[Tensor, " batch"],
        conditioning: Conditioning,
        guidance: float,
        negative: Negative = "train",
    ) -> Latents:
        """The denoiser's output in float32, after classifier-free guidance (1.0, or 0: none, at half the cost).

        Args:
            conditioning: may have a scale for each row (`SCALE`), in place of `guidance`.
            negative: what guidance points away from. Nothing else than the default is asked of a policy unless
                `sampler.negative` is set; one without a negative half may leave it out.
        """

    @abstractmethod
    def decode(self, latents: Latents) -> Images:
        """Finished latents to images in [0, 1]; gradients flow."""

    @abstractmethod
    def encode_images(self, images: Images) -> Latents:
        """Images to clean latents, without gradients."""

    def image_encoder(self) -> str | None:
        """A name for what `encode_images` makes, by which it may be kept: of the encoder's weights and settings.

        None: there is no such name, and nothing is kept.
        """
        return None

    @abstractmethod
    def reference(self) -> AbstractContextManager[None]:
        """Inside it the policy is what it is held near to, and measured from: the model without its adapter, for most.

        Leave it before `backward()`.
        """

    def base(self) -> AbstractContextManager[None]:
        """Inside it the adapter is off: the model on disk, which results are compared with; at no memory cost."""
        return self.reference()

    def eagerly(self) -> AbstractContextManager[None]:
        """Inside it nothing is compiled, even where the policy is: for batches of a size that nothing else has."""
        return nullcontext()

    def merged(self) -> AbstractContextManager[None]:
        """Inside it sampling may be faster; only without gradients, and with the same images to rounding."""
        return nullcontext()

    def adapter_weights(self) -> dict[str, Tensor]:
        """A copy of what is trained, by name."""
        return {name: p.detach().clone() for name, p in self.named_parameters() if p.requires_grad}

    @contextmanager
    def using(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside it the adapter has these weights, as `adapter_weights` gives them; afterwards its own again.

        For what is done without gradients: a graph that was made inside would meet the other weights outside.
        """
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
        own = {name: trained[name].detach().clone() for name in weights}
        with torch.no_grad():
            for name, weight in weights.items():
                trained[name].copy_(weight)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, weight in own.items():
                    trained[name].copy_(weight)

    @abstractmethod
    def save_adapter(self, directory: Path) -> None:
        """Writes the adapter in diffusers' LoRA format: `pipeline.load_lora_weights(directory)` reads it."""

    @abstractmethod
    def load_adapter(self, directory: Path) -> None:
        """Reads what `save_adapter` wrote."""


class Unanswered(Exception):
    """No answer came, though the question is a good one: the service was down, busy or too slow. Ask again later."""


class Rejected(ValueError):
    """A question was not taken, as others may be or not: says why, and what to change if none is.

    Args:
        message: what the server said, with the way out.
        all: it sounds as though it would meet all questions: a setting that the server does not know, for instance.
    """

    def __init__(self, message: str, all: bool = False) -> None:
        super().__init__(message)
        self.all = all


class Annotator(ABC):
    """Rates images like a human annotator who was given the guideline of an aspect.

    Asking and reading are apart, so that what was answered, and perhaps paid for, is kept as it came.
    """

    name: str
    """Recorded with each rating."""
    version: str
    """Of its guidelines: with others, questions are new ones."""
    concurrency: int
    """How many questions it likes to be asked at once."""
    elsewhere: bool = False
    """Whether others than this process do the work."""

    def check(self) -> None:  # noqa: B027  # most have nothing to look for
        """Looks whether it could be asked at all, before anything costly is done; asks nothing.

        Raises:
            ValueError: not with these settings: there is no key, for instance.
        """

    @abstractmethod
    async def ask(self, prompt: str, images: Sequence[bytes], aspect: Aspect) -> Answer:
        """Shows it image files (PNG, JPEG, WebP) and has it rate them in the order given.

        Raises:
            Unanswered: no answer came, this time.
            Rejected: this question was not taken.
            ValueError: no answer will ever come, whatever is asked: a refused key, an unknown model.
        """

    @abstractmethod
    def read(self, answer: str, images: int) -> list[Rating]:
        """The ratings in an answer, one for each of that many images, in order.

        Raises:
            ValueError: it has no such ratings; says what is wrong with it.
        """

    def estimate(self, prompt: str, images: Sequence[bytes], aspect: Aspect) -> Usage:
        """What asking would cost; nothing, for whoever is not paid."""
        return Usage()

    def stop_retrying(self) -> None:  # noqa: B027  # most try once
        """What is being asked may still be answered, but is `Unanswered` rather than tried again: asking ends."""

    async def annotate(self, prompt: str, images: Sequence[bytes], aspect: Aspect) -> list[Rating]:
        """Asks and reads.

        Raises:
            Unanswered, ValueError: see `ask` and `read`; ValueError for a refusal too.
        """
        answer = await self.ask(prompt, images, aspect)
        if answer.refused:
            raise ValueError(f"{self.name} refused to rate images of {prompt[:200]!r}: {answer.text[:500]}")
        return self.read(answer.text, len(images))


class Rewriter(ABC):
    """Rewrites raw prompts into plain descriptions of what is to be seen. Asking and reading are apart, as above."""

    name: str
    version: str
    concurrency: int

    def check(self) -> None:  # noqa: B027  # most have nothing to look for
        """See `Annotator.check`."""

    @abstractmethod
    async def ask(self, prompt: str) -> Answer:
        """Has one prompt rewritten; raises what `Annotator.ask` does."""

    @abstractmethod
    def read(self, answer: str, prompt: str) -> str:
        """The rewritten prompt in an answer.

        Raises:
            ValueError: there is none that could stand for `prompt`: it is empty, far too long, an excuse.
        """

    def estimate(self, prompt: str) -> Usage:
        """What asking would cost."""
        return Usage()

    def stop_retrying(self) -> None:  # noqa: B027  # as above
        """See `Annotator.stop_retrying`."""


class PromptSource(ABC):
    """Where prompts come from. A prompt is in one split only."""

    note: ClassVar[str] = ""
    """What readers of anything that was made from these prompts must know."""

    @abstractmethod
    def split(self, name: Split) -> list[str]:
        """The prompts of one split, always in the same order."""

    def dropped(self) -> Sequence[Dropped]:
        """What the source had but left out, and why."""
        return ()

    def category(self, prompt: str) -> str | None:
        """What kind of prompt of its this is, so that results can be told apart by it; None: of no kind."""
        return None

    def categories(self, prompt: str) -> tuple[str, ...]:
        """All kinds that it is of: its category, and such as go across categories."""
        own = self.category(prompt)
        return (own,) if own else ()

    def images(self, prompt: str) -> Sequence[GivenImage]:
        """Images that it has of a prompt, to be rated instead of new ones; none, for most sources."""
        return ()
