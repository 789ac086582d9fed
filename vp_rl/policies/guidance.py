"""Classifier-free guidance (Ho & Salimans 2022), and what models have that were distilled to do without."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from jaxtyping import Float
from torch import Tensor, nn

from vp_rl.functional import rows
from vp_rl.types import SCALE, Conditioning, Latents, unscaled

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
        detach: bool = False,
        base: Callable[[], AbstractContextManager[None]] | None = None,
    ) -> Latents:
        """without + scale (with - without), both in one batch; a scale of 1 is the denoiser itself.

        So is 0: the cards of models that do without guidance say 0, which in diffusers is none, and not its formula's
        image of no prompt.

        Args:
            denoise: the denoiser.
            latents, timestep, conditioning: of the images; a scale of each row's own (`SCALE`) counts more.
            scale: of all rows.
            detach: whether `without` has no gradient, which then is `scale` times that of the half for the prompt.
            base: inside it the denoiser is the one that `without` comes from; None: as it is.
        """
        conditioning, scales = _scales(conditioning, scale, latents)
        if scales is None and scale in (0, 1):
            return denoise(latents, timestep, conditioning)
        scaled = scale if scales is None else scales
        negative = {name: self.get_buffer(name).expand_as(tensor) for name, tensor in conditioning.items()}
        if base is not None or (detach and torch.is_grad_enabled()):
            with torch.no_grad(), nullcontext() if base is None else base():
                without = denoise(latents, timestep, negative)
            return without + scaled * (denoise(latents, timestep, conditioning) - without)
        both = {name: torch.cat([negative[name], tensor]) for name, tensor in conditioning.items()}
        without, with_prompt = denoise(torch.cat([latents] * 2), torch.cat([timestep] * 2), both).chunk(2)
        return without + scaled * (with_prompt - without)


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
        detach: bool = False,
        base: Callable[[], AbstractContextManager[None]] | None = None,
    ) -> Latents:
        """The denoiser itself, at no further cost. It has no negative half that `detach` and `base` could change."""
        conditioning, scales = _scales(conditioning, scale, latents)
        if self._embeds:
            given = torch.full_like(timestep, scale) if scales is None else scales.flatten().to(timestep)
            conditioning = {**conditioning, "guidance": given}
        elif scale not in (0, 1) and not self._warned:
            self._warned = True
            log.warning("This model (schnell) has no guidance: a scale of %g is ignored. Set it to 1.", scale)
        return denoise(latents, timestep, conditioning)


def _scales(
    conditioning: Conditioning, scale: float, latents: Latents
) -> tuple[Conditioning, Float[Tensor, "batch *ones"] | None]:
    """What the denoiser is told, and the scales of the rows, where they have their own."""
    if SCALE not in conditioning:
        return conditioning, None
    return unscaled(conditioning), rows(conditioning[SCALE].to(latents), latents)


def of_unet(unet: UNet2DConditionModel, negative: Conditioning) -> Guidance | Distilled:
    """Away from a negative prompt; or as an input, which U-Nets have that were distilled for few steps (LCM's)."""
    return Guidance(negative) if unet.config.time_cond_proj_dim is None else Distilled(embeds=True)


def embedded(unet: UNet2DConditionModel, conditioning: Conditioning) -> Float[Tensor, "batch width"] | None:
    """The scale as such U-Nets read it beside the timestep; None: for one that does not."""
    width = unet.config.time_cond_proj_dim
    if width is None:
        return None
    return get_timestep_embedding((conditioning["guidance"] - 1) * 1000, width, downscale_freq_shift=1).to(unet.dtype)
