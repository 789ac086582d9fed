"""Between images in [0, 1] and the latents that denoisers work on."""

import torch
from diffusers import AutoencoderKL

from vp_rl.types import Images, Latents


def decode(vae: AutoencoderKL, latents: Latents) -> Images:
    """The VAE's images; gradients flow where the image is not clipped at black or white."""
    scaled = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    return (vae.decode(scaled.to(vae.dtype), return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Images) -> Latents:
    """The mean of the VAE's posterior, shifted and scaled as the denoiser expects."""
    posterior = vae.encode((images * 2 - 1).to(vae.dtype)).latent_dist
    return (posterior.mean.float() - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
