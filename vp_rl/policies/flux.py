"""FLUX.1 (dev, schnell) from a hub name or a diffusers folder, with a LoRA adapter on the transformer."""

import logging
from collections.abc import Sequence

import torch
from diffusers import FluxPipeline
from diffusers.utils.torch_utils import randn_tensor
from einops import rearrange
from jaxtyping import Float
from peft import LoraConfig
from torch import Tensor

from vp_rl.policies import autoencoder
from vp_rl.policies.lora import AdaptedPolicy, Adapter
from vp_rl.policies.pipelines import Source, latent_size, load_pipeline
from vp_rl.policies.text import tokenize
from vp_rl.processes.flow import Flow
from vp_rl.types import Conditioning, Images, Latents

log = logging.getLogger(__name__)


class Flux(AdaptedPolicy):
    """A frozen FLUX.1 whose transformer carries a trainable LoRA in float32.

    Latents are packed: (B, tokens, channels), a token being a square of 2 x 2. There is no negative prompt: dev was
    distilled to take the guidance scale as an input, at no further cost, and schnell to do without.

    Args:
        path: hub name, or folder in diffusers' format.
        lora: what to adapt and at which rank; None: nothing, for images only.
        dtype: of the frozen weights: float32, float16 or bfloat16.
        t5_tokens: that the text encoder reads; schnell was trained for 256.
        resolution: image height and width in pixels.
        gradient_checkpointing: trades about 30% more time for activations' memory.
        revision, variant: of a hub repository's files.
    """

    def __init__(
        self,
        path: str,
        lora: LoraConfig | None,
        *,
        dtype: str = "float32",
        t5_tokens: int = 512,
        resolution: int = 1024,
        gradient_checkpointing: bool = False,
        revision: str | None = None,
        variant: str | None = None,
    ) -> None:
        super().__init__()
        pipeline = load_pipeline(Source(path, dtype, revision, variant), FluxPipeline, "FLUX.1 dev and schnell")
        self.tokenizer, self.tokenizer_2 = pipeline.tokenizer, pipeline.tokenizer_2
        self.text_encoder, self.text_encoder_2 = pipeline.text_encoder, pipeline.text_encoder_2
        self.vae = pipeline.vae
        self.transformer = pipeline.transformer
        self.requires_grad_(False)
        self.eval()
        self.adapter = Adapter(self.transformer, lora, "transformer", FluxPipeline)
        if gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        self._side = latent_size(resolution, resolution, 2 * pipeline.vae_scale_factor)
        self.process = Flow(dict(pipeline.scheduler.config), self._side**2, even=True)
        self._t5_tokens, self._warned = t5_tokens, False
        across = torch.arange(self._side, dtype=torch.float32)
        positions = torch.cartesian_prod(torch.zeros(1), across, across)
        self.register_buffer("_positions", positions, persistent=False)  # (tokens, 3): nothing, row, column

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return self.transformer.device

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        """{"text": (B, tokens, width) from T5, "pooled": (B, width) from CLIP}.

        What does not fit T5 is cut off, with a warning.
        """
        words = tokenize(self.tokenizer, prompts, self.tokenizer.model_max_length, warn=False)
        pooled = self.text_encoder(words.to(self.text_encoder.device)).pooler_output
        tokens = tokenize(self.tokenizer_2, prompts, self._t5_tokens)
        text = self.text_encoder_2(tokens.to(self.text_encoder_2.device))[0]
        return {"text": text.to(self.device), "pooled": pooled.to(self.device)}

    def noise(self, batch: int, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Latents:
        """Standard normal latents, as diffusers' pipeline draws them from the same generators."""
        several = list(generator) if isinstance(generator, Sequence) else generator
        shape = (batch, self.transformer.config.in_channels // 4, 2 * self._side, 2 * self._side)
        return _pack(randn_tensor(shape, several, self.device, torch.float32))

    def predict(
        self, latents: Latents, timestep: Float[Tensor, " batch"], conditioning: Conditioning, guidance: float
    ) -> Latents:
        """The velocity in float32; guidance is an input of the transformer where it has one, and ignored where not."""
        text = conditioning["text"]
        return self.transformer(
            hidden_states=latents.to(self.transformer.dtype),
            timestep=timestep / 1000,
            guidance=self._embedded(guidance, timestep),
            pooled_projections=conditioning["pooled"],
            encoder_hidden_states=text,
            txt_ids=self._positions.new_zeros(text.shape[1], 3),
            img_ids=self._positions,
            return_dict=False,
        )[0].float()

    def _embedded(self, guidance: float, timestep: Tensor) -> Tensor | None:
        if self.transformer.config.guidance_embeds:
            return torch.full_like(timestep, guidance)
        if guidance != 1 and not self._warned:
            self._warned = True
            log.warning("This FLUX (schnell) has no guidance: a scale of %g is ignored. Set it to 1.", guidance)
        return None

    def decode(self, latents: Latents) -> Images:
        """The VAE's images; gradients flow where the image is not clipped at black or white."""
        return autoencoder.decode(self.vae, _unpack(latents, self._side))

    def encode_images(self, images: Images) -> Latents:
        """The mean of the VAE's posterior, shifted and scaled as the denoiser expects, and packed."""
        return _pack(autoencoder.encode(self.vae, images))


def _pack(latents: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch tokens packed"]:
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


def _unpack(latents: Float[Tensor, "batch tokens packed"], side: int) -> Float[Tensor, "batch channels height width"]:
    return rearrange(latents, "b (h w) (c p q) -> b c (h p) (w q)", h=side, w=side, p=2, q=2)
