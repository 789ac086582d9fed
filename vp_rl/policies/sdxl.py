"""Stable Diffusion XL from a hub name or a diffusers folder, with a LoRA adapter on the U-Net."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float
from peft import LoraConfig
from torch import Tensor

from vp_rl.policies import autoencoder
from vp_rl.policies.guidance import Guidance
from vp_rl.policies.lora import AdaptedPolicy, Adapter
from vp_rl.policies.pipelines import Source, latent_size, load_pipeline, load_vae
from vp_rl.policies.text import tokenize
from vp_rl.processes.ddim import DDIM
from vp_rl.types import Conditioning, Images, Latents


class StableDiffusionXL(AdaptedPolicy):
    """A frozen Stable Diffusion XL (the base model) whose U-Net carries a trainable LoRA in float32.

    The U-Net is told, as in training, the size of the original image, what was cropped away, and the size wanted: here
    the resolution, nothing, and the resolution.

    Args:
        path: hub name, or folder in diffusers' format.
        lora: what to adapt and at which rank; None: nothing, for images only.
        dtype: of the frozen weights: float32, float16 or bfloat16. A VAE that float16 is too narrow for (the published
            one) stays in float32 then.
        vae: hub name or folder of another VAE, such as madebyollin/sdxl-vae-fp16-fix, which float16 is wide enough for;
            None is the pipeline's own.
        resolution: image height and width in pixels; None is what the model was trained at.
        negative_prompt: what guidance points away from; None: from zeros where the pipeline says so, as the published
            one does, and from the empty prompt otherwise.
        gradient_checkpointing: trades about 30% more time for activations' memory.
        revision, variant: of a hub repository's files.
    """

    def __init__(
        self,
        path: str,
        lora: LoraConfig | None,
        *,
        dtype: str = "float32",
        vae: str | None = None,
        resolution: int | None = None,
        negative_prompt: str | None = None,
        gradient_checkpointing: bool = False,
        revision: str | None = None,
        variant: str | None = None,
    ) -> None:
        super().__init__()
        source = Source(path, dtype, revision, variant)
        components: dict[str, Any] = {"add_watermarker": False}
        if vae is not None:
            components["vae"] = load_vae(vae, dtype)
        pipeline = load_pipeline(source, StableDiffusionXLPipeline, "Stable Diffusion XL", components)
        self.tokenizer, self.tokenizer_2 = pipeline.tokenizer, pipeline.tokenizer_2
        self.text_encoder, self.text_encoder_2 = pipeline.text_encoder, pipeline.text_encoder_2
        self.vae = _wide_enough(pipeline.vae)
        self.unet = pipeline.unet
        self.process = DDIM(dict(pipeline.scheduler.config))
        self.requires_grad_(False)
        self.eval()
        self.adapter = Adapter(self.unet, lora, "unet", StableDiffusionXLPipeline)
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        pixels = pipeline.vae_scale_factor
        size = latent_size(resolution, self.unet.config.sample_size * pixels, pixels)
        self._latent_shape = (self.unet.config.in_channels, size, size)
        height = width = float(size * pixels)
        self.register_buffer("_sizes", torch.tensor([[height, width, 0.0, 0.0, height, width]]), persistent=False)
        negative = self.encode([negative_prompt or ""])
        if negative_prompt is None and pipeline.config.force_zeros_for_empty_prompt:
            negative = {name: torch.zeros_like(tensor) for name, tensor in negative.items()}
        self.guidance = Guidance(negative)

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return self.unet.device

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        """{"text": (B, tokens, width), "pooled": (B, width)}: both encoders' last but one layer, the second's summary.

        What does not fit the text encoders is cut off, with a warning.
        """
        limit = self.tokenizer.model_max_length
        first = self.text_encoder(
            tokenize(self.tokenizer, prompts, limit).to(self.text_encoder.device), output_hidden_states=True
        )
        second = self.text_encoder_2(
            tokenize(self.tokenizer_2, prompts, limit, warn=False).to(self.text_encoder_2.device),
            output_hidden_states=True,
        )
        text = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        return {"text": text.to(self.device), "pooled": second.text_embeds.to(self.device)}

    def noise(self, batch: int, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Latents:
        """Standard normal latents, as diffusers' pipeline draws them from the same generators."""
        several = list(generator) if isinstance(generator, Sequence) else generator
        return randn_tensor((batch, *self._latent_shape), several, self.device, torch.float32)

    def predict(
        self, latents: Latents, timestep: Float[Tensor, " batch"], conditioning: Conditioning, guidance: float
    ) -> Latents:
        """The U-Net's output in float32; guidance other than 1 runs the negative prompt in the same batch."""
        return self.guidance(self._denoise, latents, timestep, conditioning, guidance)

    def _denoise(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        added = {"text_embeds": conditioning["pooled"], "time_ids": self._sizes.expand(len(latents), -1)}
        inputs = latents.to(self.unet.dtype), timestep, conditioning["text"]
        return self.unet(*inputs, added_cond_kwargs=added, return_dict=False)[0].float()

    def decode(self, latents: Latents) -> Images:
        """The VAE's images; gradients flow where the image is not clipped at black or white."""
        return autoencoder.decode(self.vae, latents)

    def encode_images(self, images: Images) -> Latents:
        """The mean of the VAE's posterior, scaled as the denoiser expects."""
        return autoencoder.encode(self.vae, images)


def _wide_enough(vae: AutoencoderKL) -> AutoencoderKL:
    """In float32 where it says that float16 would overflow: whole images are NaN then, not a few pixels."""
    if vae.config.latents_mean is not None:
        raise ValueError(
            "This model's VAE has means and deviations of latents (as Playground v2.5's), which SDXL has not."
        )
    return vae.float() if vae.dtype == torch.float16 and vae.config.force_upcast else vae
