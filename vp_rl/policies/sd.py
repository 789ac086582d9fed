"""Stable Diffusion 1.x and 2.x from a hub name or a diffusers folder, with a LoRA adapter on the U-Net."""

from collections.abc import Sequence

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float
from peft import LoraConfig
from torch import Tensor

from vp_rl.policies import autoencoder
from vp_rl.policies.guidance import Guidance
from vp_rl.policies.lora import AdaptedPolicy, Adapter
from vp_rl.policies.pipelines import Source, latent_size, load_pipeline
from vp_rl.policies.text import tokenize
from vp_rl.processes.ddim import DDIM
from vp_rl.types import Conditioning, Images, Latents

_UNCHECKED = {"safety_checker": None, "requires_safety_checker": False}


class StableDiffusion(AdaptedPolicy):
    """A frozen Stable Diffusion whose U-Net carries a trainable LoRA in float32.

    Args:
        path: hub name, folder in diffusers' format, or `tiny-sd` for the embedded one.
        lora: what to adapt and at which rank; None: nothing, for images only.
        dtype: of the frozen weights: float32, float16 or bfloat16.
        resolution: image height and width in pixels; None is what the model was trained at.
        negative_prompt: what guidance points away from.
        gradient_checkpointing: trades about 30% more time for activations' memory.
        revision, variant: of a hub repository's files.
    """

    def __init__(
        self,
        path: str,
        lora: LoraConfig | None,
        *,
        dtype: str = "float32",
        resolution: int | None = None,
        negative_prompt: str = "",
        gradient_checkpointing: bool = False,
        revision: str | None = None,
        variant: str | None = None,
    ) -> None:
        super().__init__()
        source, models = Source(path, dtype, revision, variant), "Stable Diffusion 1.x and 2.x"
        pipeline = load_pipeline(source, StableDiffusionPipeline, models, _UNCHECKED)
        self.tokenizer = pipeline.tokenizer
        self.text_encoder = pipeline.text_encoder
        self.vae = pipeline.vae
        self.unet = pipeline.unet
        self.process = DDIM(dict(pipeline.scheduler.config))
        self.requires_grad_(False)
        self.eval()
        self.adapter = Adapter(self.unet, lora, "unet", StableDiffusionPipeline)
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        pixels = pipeline.vae_scale_factor
        size = latent_size(resolution, self.unet.config.sample_size * pixels, pixels)
        self._latent_shape = (self.unet.config.in_channels, size, size)
        self.guidance = Guidance(self.encode([negative_prompt]))

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return self.unet.device

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        """{"text": (B, tokens, width)}; what does not fit the text encoder is cut off, with a warning."""
        tokens = tokenize(self.tokenizer, prompts, self.tokenizer.model_max_length)
        return {"text": self.text_encoder(tokens.to(self.text_encoder.device))[0].to(self.device)}

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
        return self.unet(latents.to(self.unet.dtype), timestep, conditioning["text"], return_dict=False)[0].float()

    def decode(self, latents: Latents) -> Images:
        """The VAE's images; gradients flow where the image is not clipped at black or white."""
        return autoencoder.decode(self.vae, latents)

    def encode_images(self, images: Images) -> Latents:
        """The mean of the VAE's posterior, scaled as the denoiser expects."""
        return autoencoder.encode(self.vae, images)
