"""Small stand-ins with known optima, so that laws can be checked without networks."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import lightning
import torch
from diffusers import DDIMScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

from vp_rl.algorithms.base import PolicyTraining
from vp_rl.data.prompts import PromptDataModule
from vp_rl.interfaces import Policy, PromptSource, Reward
from vp_rl.processes.ddim import DDIM
from vp_rl.types import Conditioning, Images, Latents, Scores, Split
from vp_rl.visionprefer import schema


class LinearPolicy(Policy):
    """Predicts the clean image as `gain * x_t + bias`, with a trainable bias: every sampling step is linear-Gaussian.

    Latents are images of 3 x 1 x 1, so that the optimum for a quadratic reward is known: the image mean at its target.
    """

    def __init__(self, gain: float = 0.1) -> None:
        super().__init__()
        self.process = DDIM(DDIMScheduler(prediction_type="sample", clip_sample=False, set_alpha_to_one=False))
        self.gain = gain
        self.bias = nn.Parameter(torch.zeros(3, 1, 1))
        self.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
        self.on = True

    def encode(self, prompts: list[str]) -> Conditioning:
        return {"text": torch.zeros(len(prompts), 1)}

    def noise(self, batch: int, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Latents:
        several = list(generator) if isinstance(generator, Sequence) else generator
        return randn_tensor((batch, 3, 1, 1), several)

    def predict(self, latents: Latents, timestep: torch.Tensor, conditioning: Conditioning, guidance: float) -> Latents:
        return self.gain * latents + (self.bias if self.on else 0.0)

    def decode(self, latents: Latents) -> Images:
        return latents

    def encode_images(self, images: Images) -> Latents:
        return images

    @contextmanager
    def reference(self) -> Iterator[None]:
        self.on = False
        try:
            yield
        finally:
            self.on = True

    def save_adapter(self, directory: Path) -> None:
        torch.save(self.bias.detach(), directory / "bias.pt")

    def load_adapter(self, directory: Path) -> None:
        self.bias.data = torch.load(directory / "bias.pt", weights_only=True)


class QuadraticReward(Reward):
    """-|image mean - target|^2, summed over colours."""

    differentiable = True

    def __init__(self, target: tuple[float, float, float] = (0.5, -0.3, 0.2)) -> None:
        super().__init__()
        self.target = nn.Buffer(torch.tensor(target))

    def forward(self, images: Images, prompts: list[str]) -> Scores:
        return -(images.mean((2, 3)) - self.target).square().sum(1)


class BlackBox(Reward):
    """The same scores without gradients."""

    differentiable = False

    def forward(self, images: Images, prompts: list[str]) -> Scores:
        return QuadraticReward()(images.detach(), prompts)


class Words(PromptSource):
    """`number` different prompts in every split."""

    def __init__(self, number: int = 16) -> None:
        self.number = number

    def split(self, name: Split) -> list[str]:
        return [f"{name} prompt {index}" for index in range(self.number)]


def fit(
    algorithm: PolicyTraining,
    *,
    epochs: int = 1,
    ckpt_path: Path | None = None,
    data: lightning.LightningDataModule | None = None,
    **trainer: object,
) -> lightning.Trainer:
    """Trains with the real Trainer and data module, without files or output unless asked for."""
    settings: dict = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    runner = lightning.Trainer(max_epochs=epochs, **{**settings, **trainer})
    runner.fit(algorithm, data or PromptDataModule(Words(), batch_size=4), ckpt_path=ckpt_path)
    return runner


def write_dataset(rows: Mapping[Split, list[schema.Row]], folder: Path, card: str = "") -> None:
    """A VisionPrefer dataset of given rows, whose own annotator is `judge`."""
    with schema.Writer(folder, "judge") as writer:
        for split, split_rows in rows.items():
            for row in split_rows:
                writer.add(split, row)
        writer.finish_rows()
        (writer.unfinished / "README.md").write_text(card)


def read_dataset(folder: Path, split: Split) -> list[schema.Row]:
    """All rows of a split."""
    return list(schema.read(folder, split))
