"""Between images in [0, 1] and the latents that denoisers work on."""

from contextlib import AbstractContextManager, nullcontext

import torch
from diffusers import AutoencoderKL
from jaxtyping import Float
from torch import Tensor

from vp_rl.types import Images


def decode(
    vae: AutoencoderKL,
    latents: Float[Tensor, "batch channels rows columns"],
    at_once: int | None = None,
    shifted: bool = False,
) -> Images:
    """The VAE's images; gradients flow where the image is not clipped at black or white.

    Args:
        vae: what decodes.
        latents: as the denoiser's process has them.
        at_once: images that are decoded together, which bounds the peak; None: all.
        shifted: whether the family's latents are shifted by what the VAE says, and not only scaled.
    """
    scaled = (latents / vae.config.scaling_factor + _shift(vae, shifted)).to(vae.dtype)
    parts = scaled.split(at_once or max(1, len(scaled)))
    with _wide(vae):
        images = [vae.decode(rows, return_dict=False)[0].float() for rows in parts]
    return (torch.cat(images) / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def encode(
    vae: AutoencoderKL, images: Images, at_once: int | None = None, shifted: bool = False
) -> Float[Tensor, "batch channels rows columns"]:
    """The mean of the VAE's posterior, shifted and scaled as the denoiser expects; the rest as in `decode`."""
    inputs = (images * 2 - 1).to(vae.dtype).split(at_once or max(1, len(images)))
    with _wide(vae):
        mean = torch.cat([vae.encode(rows).latent_dist.mean for rows in inputs])
    return (mean.float() - _shift(vae, shifted)) * vae.config.scaling_factor


def _shift(vae: AutoencoderKL, shifted: bool) -> float:
    """Pipelines of U-Nets do not look at it, whatever the VAE says."""
    return vae.config.shift_factor or 0.0 if shifted else 0.0


def _wide(vae: AutoencoderKL) -> AbstractContextManager[object]:
    """A VAE that is in float32 stays so under an autocast to float16, which SDXL's would overflow in."""
    kind = vae.device.type
    narrow = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    return torch.autocast(kind, enabled=False) if narrow and vae.dtype == torch.float32 else nullcontext()
