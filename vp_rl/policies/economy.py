"""What a policy's memory and time are saved by, whatever its family."""

from dataclasses import dataclass
from typing import Annotated

import torch
from diffusers import AutoencoderKL, ModelMixin, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D

from vp_rl.configuration.kinds import Count, Text, one_of

_CHOICES = {
    "text_encoders": ("device", "visit", "cpu"),
    "quantize": (None, "8bit", "4bit"),
}
_VARIANTS = 256  # of all compiled blocks together: kinds x sizes x with and without gradients x adapter on, off, merged


@dataclass(frozen=True)
class Economy:
    """How a policy saves memory and time.

    Attributes:
        text_encoders: where they are: on the denoiser's device; in main memory, visiting the device only while they
            read; or in main memory, reading there.
        text_cache: folder that keeps what they made of each prompt; None: nothing is kept.
        quantize: the denoiser's frozen linear layers in 8 or 4 bit (nf4) by bitsandbytes, which needs a GPU.
        vae_batch: images that the VAE decodes or encodes at once; None: all that it is given.
        vae_tiling: the VAE works in overlapping tiles of its own training size, whose seams may show.
        channels_last: memory format of convolutions, which a GPU computes faster in half precision.
        compile: torch.compile of the denoiser's repeated blocks. Of a whole U-Net it is not offered: on a CPU torch
            2.13 then gives wrong gradients (docs/log.md).
    """

    text_encoders: Annotated[str, one_of("device", "visit", "cpu")] = "device"
    text_cache: Text | None = None
    quantize: Annotated[str, one_of("8bit", "4bit")] | None = None
    vae_batch: Count | None = None
    vae_tiling: bool = False
    channels_last: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            if (value := getattr(self, name)) not in known:
                shown = ", ".join("null" if choice is None else choice for choice in known)
                raise ValueError(f"policy.economy.{name}={value!r} is unknown: choose from {shown}.")
        if self.vae_batch is not None and self.vae_batch < 1:
            raise ValueError(f"policy.economy.vae_batch={self.vae_batch} must be at least 1, or null.")

    def arrange(self, denoiser: ModelMixin, vae: AutoencoderKL) -> None:
        """Tiles and memory format; before an adapter is added, whose file wants its matrices as they are."""
        if self.vae_tiling:
            vae.enable_tiling()
        if self.channels_last:
            denoiser.to(memory_format=torch.channels_last)
            vae.to(memory_format=torch.channels_last)

    def compiled(self, denoiser: ModelMixin) -> None:
        """In place, so that names of parameters stay; after an adapter was added, whose layers are compiled too."""
        if not self.compile:
            return
        dynamo = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, _VARIANTS)  # beyond it, code would run uncompiled
        blocks = list(denoiser._repeated_blocks or denoiser._no_split_modules or ())  # SD 3 has the latter alone
        if isinstance(denoiser, UNet2DConditionModel):  # half of its work, which diffusers leaves out
            blocks.append(ResnetBlock2D.__name__)
        denoiser._repeated_blocks = blocks
        denoiser.compile_repeated_blocks(dynamic=False)  # code for any size is slower, and takes longer to be made


DEFAULT = Economy()
