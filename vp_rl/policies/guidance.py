"""Classifier-free guidance (Ho & Salimans 2022), and what models have that were distilled to do without."""

import logging
from collections.abc import Callable

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from jaxtyping import Float
from torch import Tensor, nn

from vp_rl.types import Conditioning, Latents

log = logging.getLogger(__name__)

Denoise = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""Latents, timesteps and conditioning to the denoiser's output."""


class Guidance(nn.Module):
    """Leads away from a negative prompt, whose conditioning (of batch 1) it keeps beside the denoiser."""

    def __init__(self, negative: Conditioning) -> None:
        super().__init__()
        for name, tensor in negative.items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(
        self,
        denoise: Denoise,
        latents: Latents,
        timestep: Float[Tensor, " batch"],
        conditioning: Conditioning,
        scale: float,
    ) -> Latents:
        """without + scale (with - without), both in one batch; a scale of 1 is the denoiser itself.

        So is 0: the cards of models that do without guidance say 0, which in diffusers is none, and not its formula's
        image of no prompt.
        """
        if scale in (0, 1):
            return denoise(latents, timestep, conditioning)
        negative = {name: self.get_buffer(name).expand_as(tensor) for name, tensor in conditioning.items()}
        both = {name: torch.cat([negative[name], tensor]) for name, tensor in conditioning.items()}
        without, with_prompt = denoise(torch.cat([latents] * 2), torch.cat([timestep] * 2), both).chunk(2)
        return without + scale * (with_prompt - without)


class Distilled(nn.Module):
    """Tells the scale to a denoiser that has an input for it, as `guidance`; one without ignores it, with a warning."""

    def __init__(self, embeds: bool) -> None:
        super().__init__()
        self._embeds, self._warned = embeds, False

    def forward(
        self,
        denoise: Denoise,
        latents: Latents,
        timestep: Float[Tensor, " batch"],
        conditioning: Conditioning,
        scale: float,
    ) -> Latents:
        """The denoiser itself, at no further cost."""
        if self._embeds:
            conditioning = {**conditioning, "guidance": torch.full_like(timestep, scale)}
        elif scale not in (0, 1) and not self._warned:
            self._warned = True
            log.warning("This model (schnell) has no guidance: a scale of %g is ignored. Set it to 1.", scale)
        return denoise(latents, timestep, conditioning)


def of_unet(unet: UNet2DConditionModel, negative: Conditioning) -> Guidance | Distilled:
    """Away from a negative prompt; or as an input, which U-Nets have that were distilled for few steps (LCM's)."""
    return Guidance(negative) if unet.config.time_cond_proj_dim is None else Distilled(embeds=True)


def embedded(unet: UNet2DConditionModel, conditioning: Conditioning) -> Float[Tensor, "batch width"] | None:
    """The scale as such U-Nets read it beside the timestep; None: for one that does not."""
    width = unet.config.time_cond_proj_dim
    if width is None:
        return None
    return get_timestep_embedding((conditioning["guidance"] - 1) * 1000, width, downscale_freq_shift=1).to(unet.dtype)
