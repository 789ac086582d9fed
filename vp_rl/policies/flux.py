"""FLUX.1 (dev, schnell) from a hub name or a diffusers folder, with a LoRA adapter on the transformer."""

import torch
from diffusers import FluxPipeline
from einops import rearrange
from jaxtyping import Float
from peft import LoraConfig
from torch import Tensor

from vp_rl.configuration.kinds import Count, Dtype, Text
from vp_rl.policies.adapted import AdaptedPolicy, Tokens
from vp_rl.policies.economy import DEFAULT, Economy
from vp_rl.policies.guidance import Distilled
from vp_rl.policies.pipelines import Source, latent_size, load_pipeline
from vp_rl.policies.settings import check
from vp_rl.policies.start import Reference, Start
from vp_rl.policies.text import tokenize
from vp_rl.processes.flow import Flow
from vp_rl.types import Conditioning


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
        economy: other ways of saving memory, and time.
        start: file or folder of an adapter to begin with; None: it begins as none.
        reference: what KL and DPO are measured from: `base`, the model without an adapter, or `start`.
        revision, variant: of a hub repository's files.
    """

    shifted = True
    guided = False

    def __init__(
        self,
        path: Text,
        lora: LoraConfig | None,
        *,
        dtype: Dtype = "float32",
        t5_tokens: Count = 512,
        resolution: Count = 1024,
        gradient_checkpointing: bool = False,
        economy: Economy = DEFAULT,
        start: Text | None = None,
        reference: Reference = "base",
        revision: Text | None = None,
        variant: Text | None = None,
    ) -> None:
        check(path=path, lora=lora, dtype=dtype, t5_tokens=t5_tokens, resolution=resolution)
        check(gradient_checkpointing=gradient_checkpointing, revision=revision, variant=variant)
        source = Source(path, dtype, revision, variant, economy.quantize)
        pipeline = load_pipeline(source, FluxPipeline, "FLUX.1 dev and schnell")
        super().__init__(pipeline, "transformer", lora, economy, gradient_checkpointing, Start(start, reference))
        config, self._t5_tokens = pipeline.transformer.config, t5_tokens
        self._side = latent_size(resolution, resolution, 2 * pipeline.vae_scale_factor)
        self.latent_shape = (config.in_channels // 4, 2 * self._side, 2 * self._side)
        self.process = Flow(pipeline.scheduler, self._side**2, even=True)
        self.guidance = Distilled(config.guidance_embeds)
        across = torch.arange(self._side, dtype=torch.float32)
        positions = torch.cartesian_prod(torch.zeros(1), across, across)
        self.register_buffer("_positions", positions, persistent=False)  # (tokens, 3): nothing, row, column

    def tokenize(self, prompts: list[str]) -> Tokens:
        """Of CLIP, and of T5, which reads further."""
        words = tokenize(self.tokenizer, prompts, self.tokenizer.model_max_length, warn=False)
        return [words, tokenize(self.tokenizer_2, prompts, self._t5_tokens)]

    def embed(self, tokens: Tokens) -> Conditioning:
        """{"text": (B, tokens, width) from T5, "pooled": (B, width) from CLIP}."""
        return {"text": self.text_encoder_2(tokens[1])[0], "pooled": self.text_encoder(tokens[0]).pooler_output}

    def _denoise(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        text = conditioning["text"]
        return self.transformer(
            hidden_states=latents.to(self._dtype),
            timestep=timestep / 1000,
            guidance=conditioning.get("guidance"),
            pooled_projections=conditioning["pooled"],
            encoder_hidden_states=text,
            txt_ids=self._positions.new_zeros(text.shape[1], 3),
            img_ids=self._positions,
            return_dict=False,
        )[0].float()

    def _pack(self, latents: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch tokens packed"]:
        return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)

    def _unpack(self, latents: Float[Tensor, "batch tokens packed"]) -> Float[Tensor, "batch channels height width"]:
        return rearrange(latents, "b (h w) (c p q) -> b c (h p) (w q)", h=self._side, p=2, q=2)
