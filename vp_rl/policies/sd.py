"""Stable Diffusion 1.x and 2.x from a hub name or a diffusers folder, with a LoRA adapter on the U-Net."""

from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from torch import Tensor

from vp_rl.configuration.kinds import Count, Dtype, Text
from vp_rl.policies.adapted import AdaptedPolicy, Tokens
from vp_rl.policies.economy import DEFAULT, Economy
from vp_rl.policies.guidance import Guidance, embedded, of_unet
from vp_rl.policies.pipelines import Source, latent_size, load_pipeline, native_size
from vp_rl.policies.settings import check
from vp_rl.policies.start import Reference, Start
from vp_rl.policies.text import attended, tokenize
from vp_rl.processes.ddim import DDIM
from vp_rl.types import Conditioning

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
        resolution: Count | None = None,
        negative_prompt: str = "",
        gradient_checkpointing: bool = False,
        economy: Economy = DEFAULT,
        start: Text | None = None,
        reference: Reference = "base",
        revision: Text | None = None,
        variant: Text | None = None,
    ) -> None:
        check(path=path, lora=lora, dtype=dtype, resolution=resolution, negative_prompt=negative_prompt)
        check(gradient_checkpointing=gradient_checkpointing, revision=revision, variant=variant)
        source, models = Source(path, dtype, revision, variant, economy.quantize), "Stable Diffusion 1.x and 2.x"
        pipeline = load_pipeline(source, StableDiffusionPipeline, models, _UNCHECKED)
        super().__init__(pipeline, "unet", lora, economy, gradient_checkpointing, Start(start, reference))
        self.process = DDIM(pipeline.scheduler)
        pixels = pipeline.vae_scale_factor
        size = latent_size(resolution, native_size(pipeline.unet.config.sample_size, pixels), pixels)
        self.latent_shape = (pipeline.unet.config.in_channels, size, size)
        self.guidance = of_unet(pipeline.unet, self.encode([negative_prompt]))
        self.guided = isinstance(self.guidance, Guidance)

    def tokenize(self, prompts: list[str]) -> Tokens:
        """CLIP's; and what is no padding, where the encoder is told to look at nothing else."""
        words = tokenize(self.tokenizer, prompts, self.tokenizer.model_max_length)
        if not getattr(self.text_encoder.config, "use_attention_mask", False):
            return [words]
        return [words, attended(self.tokenizer, prompts, self.tokenizer.model_max_length)]

    def embed(self, tokens: Tokens) -> Conditioning:
        """{"text": (B, tokens, width)}."""
        words, *mask = tokens
        return {"text": self.text_encoder(words, attention_mask=mask[0] if mask else None)[0]}

    def _denoise(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        return self.unet(
            latents.to(self._dtype),
            timestep,
            conditioning["text"],
            timestep_cond=embedded(self.unet, conditioning),
            return_dict=False,
        )[0].float()
