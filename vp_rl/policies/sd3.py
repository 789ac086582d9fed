"""Stable Diffusion 3 and 3.5 from a hub name or a diffusers folder, with a LoRA adapter on the transformer."""

import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig
from torch import Tensor
from torch.nn import functional as F

from vp_rl.configuration.kinds import Count, Dtype, Text
from vp_rl.policies.adapted import AdaptedPolicy, Tokens
from vp_rl.policies.economy import DEFAULT, Economy
from vp_rl.policies.guidance import Guidance
from vp_rl.policies.pipelines import OPTIONAL, Source, latent_size, load_pipeline, native_size
from vp_rl.policies.settings import check
from vp_rl.policies.start import Reference, Start
from vp_rl.policies.text import tokenize
from vp_rl.processes.flow import Flow
from vp_rl.types import Conditioning


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
        economy: other ways of saving memory, and time.
        start: file or folder of an adapter to begin with; None: it begins as none.
        reference: what KL and DPO are measured from: `base`, the model without an adapter, or `start`.
        revision, variant: of a hub repository's files.
    """

    shifted = True

    def __init__(
        self,
        path: Text,
        lora: LoraConfig | None,
        *,
        dtype: Dtype = "float32",
        t5: bool = True,
        t5_tokens: Count = 256,
        resolution: Count | None = None,
        negative_prompt: str = "",
        gradient_checkpointing: bool = False,
        economy: Economy = DEFAULT,
        start: Text | None = None,
        reference: Reference = "base",
        revision: Text | None = None,
        variant: Text | None = None,
    ) -> None:
        check(path=path, lora=lora, dtype=dtype, t5=t5, t5_tokens=t5_tokens, resolution=resolution)
        check(gradient_checkpointing=gradient_checkpointing, revision=revision, variant=variant)
        check(negative_prompt=negative_prompt)
        source = Source(path, dtype, revision, variant, economy.quantize)
        without = {} if t5 else dict.fromkeys(OPTIONAL)
        pipeline = load_pipeline(
            source, StableDiffusion3Pipeline, "Stable Diffusion 3 and 3.5", without, optional=OPTIONAL
        )
        super().__init__(pipeline, "transformer", lora, economy, gradient_checkpointing, Start(start, reference))
        config, pixels = pipeline.transformer.config, pipeline.vae_scale_factor
        patches = latent_size(resolution, native_size(config.sample_size, pixels), config.patch_size * pixels)
        if patches > config.pos_embed_max_size:
            largest = config.pos_embed_max_size * config.patch_size * pixels
            raise ValueError(f"policy.resolution={resolution} is more than this model's positions reach: {largest}.")
        self.process = Flow(pipeline.scheduler, patches**2)
        self.latent_shape = (config.in_channels, *[patches * config.patch_size] * 2)
        self._t5_tokens = t5_tokens
        self.guidance = Guidance(self.encode([negative_prompt]))

    def tokenize(self, prompts: list[str]) -> Tokens:
        """Of two CLIPs, and of T5, which reads further; zeros in its place."""
        limit, alone = self.tokenizer.model_max_length, self.text_encoder_3 is None
        first = tokenize(self.tokenizer, prompts, limit, warn=alone, inversions=False)
        second = tokenize(self.tokenizer_2, prompts, limit, warn=False, inversions=False)
        if alone:
            return [first, second, torch.zeros(len(prompts), self._t5_tokens, dtype=torch.long)]
        return [first, second, tokenize(self.tokenizer_3, prompts, self._t5_tokens, inversions=False)]

    def embed(self, tokens: Tokens) -> Conditioning:
        """{"text": (B, CLIP's tokens + T5's, width), "pooled": (B, width)}: two CLIPs beside each other, then T5."""
        first = self.text_encoder(tokens[0], output_hidden_states=True)
        second = self.text_encoder_2(tokens[1], output_hidden_states=True)
        clip = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        if self.text_encoder_3 is None:
            t5 = clip.new_zeros(*tokens[2].shape, self.transformer.config.joint_attention_dim)
        else:
            t5 = self.text_encoder_3(tokens[2])[0].to(clip)
        text = torch.cat([F.pad(clip, (0, t5.shape[-1] - clip.shape[-1])), t5], 1)
        return {"text": text, "pooled": torch.cat([first.text_embeds, second.text_embeds], -1)}

    def _denoise(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        return self.transformer(
            hidden_states=latents.to(self._dtype),
            timestep=timestep,
            encoder_hidden_states=conditioning["text"],
            pooled_projections=conditioning["pooled"],
            return_dict=False,
        )[0].float()
