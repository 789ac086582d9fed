"""The vocabulary that crosses functions: what a tensor is, its shape, range and units."""

from pathlib import Path
from typing import Literal, NamedTuple, get_args

from jaxtyping import Float, Int
from torch import Tensor

Images = Float[Tensor, "batch 3 height width"]
"""RGB in [0, 1]: the only image format that crosses a function."""

Latents = Float[Tensor, "batch *latent"]
"""What the denoiser works on. Stable Diffusion: (B, 4, height / 8, width / 8)."""

Scores = Float[Tensor, " batch"]
"""What a reward returns: float32, higher is better."""

Steps = Int[Tensor, " batch"]
"""Index 0..steps-1 of the sampling loop, one for each row; step 0 is the noisiest."""

Conditioning = dict[str, Tensor]
"""What the denoiser is told about the prompts, by name; every tensor has the batch first."""

Aspect = Literal["prompt_following", "aesthetic", "fidelity", "harmlessness"]
"""What VisionPrefer rates (Wu et al. 2024)."""

Split = Literal["train", "validation", "test"]

Negative = Literal["train", "detach", "base"]
"""What guidance points away from: the policy's own output for the negative prompt, learning from both halves or from
the one for the prompt alone; or the output of the model without its adapter."""

SCALE = "guidance_scale"
"""In `Conditioning`: the guidance scale of each row, which then counts in place of the sampler's."""

ASPECTS: tuple[Aspect, ...] = get_args(Aspect)


class Transition(NamedTuple):
    """One Gaussian sampling step p(x_next | x_t) = N(mean, std^2), in float32."""

    mean: Float[Tensor, "batch *latent"]
    std: Float[Tensor, " batch"]
    """0 where the step is deterministic: such a step has no density."""
    x0: Float[Tensor, "batch *latent"]
    """The clean latents that the denoiser predicts at this step."""


class Trajectory(NamedTuple):
    """Everything one sampling run produced; no gradients flow into it."""

    latents: Float[Tensor, "batch steps_plus_one *latent"]
    """From pure noise (index 0) to the finished latents (last index), float32."""
    log_probs: Float[Tensor, "batch steps"]
    """Log-density of each step, averaged over latent dimensions; 0 at deterministic steps."""
    stds: Float[Tensor, " steps"]
    """Standard deviation of each step's transition; 0 at deterministic steps."""
    means: Float[Tensor, "batch kept *latent"]
    """Of each step's transition; of none where they are not asked for."""


class Branches(NamedTuple):
    """Samples that part at one random step; no gradients flow into it."""

    latents: Latents
    """Before that step, where they are still one."""
    next_latents: Float[Tensor, "batch branches *latent"]
    """After it."""
    log_probs: Float[Tensor, "batch branches"]
    """Log-density of the step, averaged over latent dimensions."""
    finished: Float[Tensor, "batch branches *latent"]


class Rating(NamedTuple):
    """What an annotator says of one image in one aspect."""

    rating: int
    """1 (worst) to 5 (best)."""
    rationale: str
    """Two or three sentences: why."""


class Usage(NamedTuple):
    """What an answer cost, or would."""

    input_tokens: int = 0
    output_tokens: int = 0
    usd: float = 0.0

    def plus(self, other: "Usage") -> "Usage":
        """Both together."""
        tokens = self.input_tokens + other.input_tokens, self.output_tokens + other.output_tokens
        return Usage(*tokens, self.usd + other.usd)


class Answer(NamedTuple):
    """What was answered, as it came: it is kept, so that a better reader needs no second asking."""

    text: str
    usage: Usage = Usage()
    refused: bool = False
    """The answer is that there will be none; `text` says why. It may have cost something all the same."""
    hint: str = ""
    """What to change if all answers are like this one: cut off, too large to be taken."""


class Dropped(NamedTuple):
    """A prompt that a source left out."""

    prompt: str
    reason: str
    """One of a few words that are counted, such as `duplicate`."""
    detail: str = ""
    """What makes this one a case of it."""


class GivenImage(NamedTuple):
    """An image that a user brought."""

    file: Path
    generator: str
    """What made it: a model's name, or `unknown`."""


class PromptBatch(NamedTuple):
    """Prompts to make images for; with images that fit them where a regulariser needs real ones."""

    prompts: list[str]
    images: Float[Tensor, "captioned 3 height width"] | None = None
    captions: list[str] | None = None
    """The prompts of `images`."""
    places: list[int] | None = None
    """Of these prompts among those that all devices have in this batch; None: these are all."""
    share: tuple[int, int] = (0, 1)
    """Which images of each prompt are made here, of a numbered row: the first, and how far it is to the next."""


class PreferenceBatch(NamedTuple):
    """Images scored once, however many pairs each is in."""

    prompts: list[str]
    """One for each image."""
    images: Images
    ratings: Int[Tensor, "batch aspects"]
    """1 to 5, in the order of `ASPECTS`; 0 where there is none: people who judge images as a whole give none."""
    better: Int[Tensor, " pairs"]
    """Row in `images` of each pair's preferred image."""
    worse: Int[Tensor, " pairs"]
    aspects: Int[Tensor, " pairs"]
    """Index into `ASPECTS`, or -1 where the pair is by the mean over aspects, or by a verdict on the whole."""
    margins: Float[Tensor, " pairs"]
    """How much higher the preferred image is rated, or ranked; more than 0."""


def take(conditioning: Conditioning, rows: Int[Tensor, " rows"]) -> Conditioning:
    """The given rows of every tensor: encode a prompt once, use it in many samples."""
    return {name: tensor[rows] for name, tensor in conditioning.items()}


def unscaled(conditioning: Conditioning) -> Conditioning:
    """Without the rows' own guidance scales: for what is learned apart from the scale that images were sampled at."""
    return {name: tensor for name, tensor in conditioning.items() if name != SCALE}
