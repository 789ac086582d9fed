"""Stable Diffusion XL from a hub name or a diffusers folder, with a LoRA adapter on the U-Net."""

from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from peft import LoraConfig
from torch import Tensor

from vp_rl.configuration.kinds import Count, Dtype, Text
from vp_rl.policies.adapted import AdaptedPolicy, Tokens
from vp_rl.policies.economy import DEFAULT, Economy
from vp_rl.policies.guidance import Guidance, embedded, of_unet
from vp_rl.policies.pipelines import Source, latent_size, load_pipeline, load_vae, native_size
from vp_rl.policies.settings import check
from vp_rl.policies.start import Reference, Start
from vp_rl.policies.text import tokenize
from vp_rl.processes.ddim import DDIM
from vp_rl.types import Conditioning


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
        economy: other ways of saving memory, and time.
        start: file or folder of an adapter to begin with; None: it begins as none.
        reference: what KL and DPO are measured from: `base`, the model without an adapter, or `start`.
        revision, variant: of a hub repository's files.
    """

    def __init__(
        self,
        path: Text,
        lora: LoraConfig | None,
        *,
        dtype: Dtype = "float32",
        vae: Text | None = None,
        resolution: Count | None = None,
        negative_prompt: str | None = None,
        gradient_checkpointing: bool = False,
        economy: Economy = DEFAULT,
        start: Text | None = None,
        reference: Reference = "base",
        revision: Text | None = None,
        variant: Text | None = None,
    ) -> None:
        check(path=path, lora=lora, dtype=dtype, resolution=resolution, vae=vae)
        check(negative_prompt="" if negative_prompt is None else negative_prompt)
        check(gradient_checkpointing=gradient_checkpointing, revision=revision, variant=variant)
        source = Source(path, dtype, revision, variant, economy.quantize)
        components: dict[str, Any] = {"add_watermarker": False}
        if vae is not None:
            components["vae"] = load_vae(vae, dtype)
        pipeline = load_pipeline(source, StableDiffusionXLPipeline, "Stable Diffusion XL", components)
        pipeline.vae = _wide_enough(pipeline.vae)
        super().__init__(pipeline, "unet", lora, economy, gradient_checkpointing, Start(start, reference))
        self.process = DDIM(pipeline.scheduler)
        pixels = pipeline.vae_scale_factor
        size = latent_size(resolution, native_size(pipeline.unet.config.sample_size, pixels), pixels)
        self.latent_shape = (pipeline.unet.config.in_channels, size, size)
        height = width = float(size * pixels)
        self.register_buffer("_sizes", torch.tensor([[height, width, 0.0, 0.0, height, width]]), persistent=False)
        negative = self.encode([negative_prompt or ""])
        if negative_prompt is None and pipeline.config.force_zeros_for_empty_prompt:
            negative = {name: torch.zeros_like(tensor) for name, tensor in negative.items()}
        self.guidance = of_unet(pipeline.unet, negative)
        self.guided = isinstance(self.guidance, Guidance)

    def tokenize(self, prompts: list[str]) -> Tokens:
        """Of two CLIPs that read equally far."""
        limit = self.tokenizer.model_max_length
        return [tokenize(self.tokenizer, prompts, limit), tokenize(self.tokenizer_2, prompts, limit, warn=False)]

    def embed(self, tokens: Tokens) -> Conditioning:
        """{"text": (B, tokens, width), "pooled": (B, width)}: the last layers but one, the second's summary."""
        first = self.text_encoder(tokens[0], output_hidden_states=True)
        second = self.text_encoder_2(tokens[1], output_hidden_states=True)
        text = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        return {"text": text, "pooled": second.text_embeds}

    def _denoise(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        added = {"text_embeds": conditioning["pooled"], "time_ids": self._sizes.expand(len(latents), -1)}
        inputs = latents.to(self._dtype), timestep, conditioning["text"]
        scale = embedded(self.unet, conditioning)
        return self.unet(*inputs, timestep_cond=scale, added_cond_kwargs=added, return_dict=False)[0].float()


def _wide_enough(vae: AutoencoderKL) -> AutoencoderKL:
    """In float32 where it says that float16 would overflow: whole images are NaN then, not a few pixels."""
    if vae.config.latents_mean is not None:
        raise ValueError(
            "This model's VAE has means and deviations of latents (as Playground v2.5's), which SDXL has not."
        )
    return vae.float() if vae.dtype == torch.float16 and vae.config.force_upcast else vae
