"""Stable Diffusion 1.x and 2.x from a hub name or a diffusers folder, with a LoRA adapter on the U-Net."""

from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from torch import Tensor

from vp_rl.configuration.kinds import Count, Dtype, Text
from vp_rl.policies.adapted import AdaptedPolicy, Tokens
from vp_rl.policies.economy import DEFAULT, Economy
from vp_rl.policies.guidance import Guidance
from vp_rl.policies.pipelines import Source, latent_size, load_pipeline
from vp_rl.policies.text import tokenize
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
        revision: Text | None = None,
        variant: Text | None = None,
    ) -> None:
        source, models = Source(path, dtype, revision, variant, economy.quantize), "Stable Diffusion 1.x and 2.x"
        pipeline = load_pipeline(source, StableDiffusionPipeline, models, _UNCHECKED)
        super().__init__(pipeline, "unet", lora, economy, gradient_checkpointing)
        self.process = DDIM(dict(pipeline.scheduler.config))
        pixels = pipeline.vae_scale_factor
        size = latent_size(resolution, pipeline.unet.config.sample_size * pixels, pixels)
        self.latent_shape = (pipeline.unet.config.in_channels, size, size)
        self.guidance = Guidance(self.encode([negative_prompt]))

    def tokenize(self, prompts: list[str]) -> Tokens:
        """CLIP's."""
        return [tokenize(self.tokenizer, prompts, self.tokenizer.model_max_length)]

    def embed(self, tokens: Tokens) -> Conditioning:
        """{"text": (B, tokens, width)}."""
        return {"text": self.text_encoder(tokens[0])[0]}

    def _denoise(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        return self.unet(latents.to(self._dtype), timestep, conditioning["text"], return_dict=False)[0].float()
