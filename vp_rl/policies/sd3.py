"""Stable Diffusion 3 and 3.5 from a hub name or a diffusers folder, with a LoRA adapter on the transformer."""

from collections.abc import Sequence

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float
from peft import LoraConfig
from torch import Tensor
from torch.nn import functional as F

from vp_rl.policies import autoencoder
from vp_rl.policies.guidance import Guidance
from vp_rl.policies.lora import AdaptedPolicy, Adapter
from vp_rl.policies.pipelines import Source, latent_size, load_pipeline
from vp_rl.policies.text import tokenize
from vp_rl.processes.flow import Flow
from vp_rl.types import Conditioning, Images, Latents

_T5 = "text_encoder_3", "tokenizer_3"


class StableDiffusion3(AdaptedPolicy):
    """A frozen Stable Diffusion 3 or 3.5 whose transformer (MMDiT) carries a trainable LoRA in float32.

    Args:
        path: hub name, or folder in diffusers' format.
        lora: what to adapt and at which rank; None: nothing, for images only.
        dtype: of the frozen weights: float32, float16 or bfloat16.
        t5: whether to use the third text encoder, where the pipeline has it; without it (more than half of SD 3.5
            medium's weights) the model reads zeros in its place, as it often did in training; spelling suffers most.
        t5_tokens: that it reads.
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
        t5: bool = True,
        t5_tokens: int = 256,
        resolution: int | None = None,
        negative_prompt: str = "",
        gradient_checkpointing: bool = False,
        revision: str | None = None,
        variant: str | None = None,
    ) -> None:
        super().__init__()
        source, without = Source(path, dtype, revision, variant), {} if t5 else dict.fromkeys(_T5)
        pipeline = load_pipeline(source, StableDiffusion3Pipeline, "Stable Diffusion 3 and 3.5", without, optional=_T5)
        self.tokenizer, self.tokenizer_2 = pipeline.tokenizer, pipeline.tokenizer_2
        self.text_encoder, self.text_encoder_2 = pipeline.text_encoder, pipeline.text_encoder_2
        self.tokenizer_3, self.text_encoder_3 = pipeline.tokenizer_3, pipeline.text_encoder_3  # T5, or None
        self.vae = pipeline.vae
        self.transformer = pipeline.transformer
        self.requires_grad_(False)
        self.eval()
        self.adapter = Adapter(self.transformer, lora, "transformer", StableDiffusion3Pipeline)
        if gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        config, pixels = self.transformer.config, pipeline.vae_scale_factor
        patches = latent_size(resolution, config.sample_size * pixels, config.patch_size * pixels)
        if patches > config.pos_embed_max_size:
            largest = config.pos_embed_max_size * config.patch_size * pixels
            raise ValueError(f"policy.resolution={resolution} is more than this model's positions reach: {largest}.")
        self.process = Flow(dict(pipeline.scheduler.config), patches**2)
        self._latent_shape = (config.in_channels, *[patches * config.patch_size] * 2)
        self._t5_tokens = t5_tokens
        self.guidance = Guidance(self.encode([negative_prompt]))

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return self.transformer.device

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        """{"text": (B, CLIP's tokens + T5's, width), "pooled": (B, width)}: from two CLIPs beside each other, then T5.

        What does not fit T5 (without it: CLIP) is cut off, with a warning.
        """
        limit, alone = self.tokenizer.model_max_length, self.text_encoder_3 is None
        first = self.text_encoder(
            tokenize(self.tokenizer, prompts, limit, warn=alone).to(self.text_encoder.device),
            output_hidden_states=True,
        )
        second = self.text_encoder_2(
            tokenize(self.tokenizer_2, prompts, limit, warn=False).to(self.text_encoder_2.device),
            output_hidden_states=True,
        )
        clip = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1).to(self.device)
        t5 = self._encode_t5(prompts).to(clip)
        text = torch.cat([F.pad(clip, (0, t5.shape[-1] - clip.shape[-1])), t5], 1)
        return {"text": text, "pooled": torch.cat([first.text_embeds, second.text_embeds], -1).to(self.device)}

    def _encode_t5(self, prompts: list[str]) -> Float[Tensor, "batch tokens width"]:
        if self.text_encoder_3 is None:
            return torch.zeros(len(prompts), self._t5_tokens, self.transformer.config.joint_attention_dim)
        tokens = tokenize(self.tokenizer_3, prompts, self._t5_tokens)
        return self.text_encoder_3(tokens.to(self.text_encoder_3.device))[0]

    def noise(self, batch: int, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Latents:
        """Standard normal latents, as diffusers' pipeline draws them from the same generators."""
        several = list(generator) if isinstance(generator, Sequence) else generator
        return randn_tensor((batch, *self._latent_shape), several, self.device, torch.float32)

    def predict(
        self, latents: Latents, timestep: Float[Tensor, " batch"], conditioning: Conditioning, guidance: float
    ) -> Latents:
        """The velocity in float32; guidance other than 1 runs the negative prompt in the same batch."""
        return self.guidance(self._denoise, latents, timestep, conditioning, guidance)

    def _denoise(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        return self.transformer(
            hidden_states=latents.to(self.transformer.dtype),
            timestep=timestep,
            encoder_hidden_states=conditioning["text"],
            pooled_projections=conditioning["pooled"],
            return_dict=False,
        )[0].float()

    def decode(self, latents: Latents) -> Images:
        """The VAE's images; gradients flow where the image is not clipped at black or white."""
        return autoencoder.decode(self.vae, latents)

    def encode_images(self, images: Images) -> Latents:
        """The mean of the VAE's posterior, shifted and scaled as the denoiser expects."""
        return autoencoder.encode(self.vae, images)
