"""Stable Diffusion 1.x and 2.x from a hub name or a diffusers folder, with a LoRA adapter on the denoiser."""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_unet_state_dict_to_peft
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from torch import Tensor

from vp_rl.interfaces import Policy
from vp_rl.processes.ddim import DDIM
from vp_rl.scenes import tiny
from vp_rl.types import Conditioning, Images, Latents

log = logging.getLogger(__name__)

_ADAPTER_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class StableDiffusion(Policy):
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
        if dtype not in _DTYPES:
            raise ValueError(f"policy.dtype={dtype!r} is unknown: choose from {', '.join(_DTYPES)}.")
        pipeline = load_pipeline(path, _DTYPES[dtype], revision, variant)
        self.tokenizer = pipeline.tokenizer
        self.text_encoder = pipeline.text_encoder
        self.vae = pipeline.vae
        self.unet = pipeline.unet
        self.process = DDIM(dict(pipeline.scheduler.config))
        self.requires_grad_(False)
        self.eval()
        self._adapted = lora is not None  # and switched on
        if lora is not None:
            self._add_adapter(lora)
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        size = self.unet.config.sample_size * pipeline.vae_scale_factor if resolution is None else resolution
        if size < 1 or size % pipeline.vae_scale_factor:
            raise ValueError(f"policy.resolution={size} must be a multiple of {pipeline.vae_scale_factor} pixels.")
        self._latent_shape = (self.unet.config.in_channels, *[size // pipeline.vae_scale_factor] * 2)
        self.register_buffer("_negative", self.encode([negative_prompt])["text"], persistent=False)

    def _add_adapter(self, lora: LoraConfig) -> None:
        try:
            self.unet.add_adapter(lora)
        except ValueError as error:
            raise ValueError(f"The LoRA settings do not fit this U-Net: {error}") from error
        cast_training_params(self.unet, dtype=torch.float32)

    def train(self, mode: bool = True) -> "StableDiffusion":
        """Stays in evaluation mode: dropout would make replayed log-probabilities differ from sampled ones."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return self.unet.device

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        """{"text": (B, tokens, width)}; what does not fit the text encoder is cut off, with a warning."""
        limit = self.tokenizer.model_max_length
        tokens = self.tokenizer(prompts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
        for prompt, row in zip(prompts, tokens.attention_mask, strict=True):
            if row.all() and len(self.tokenizer(prompt[: 20 * limit]).input_ids) > limit:
                log.warning("The text encoder reads %d tokens; the end of this prompt is cut: %.80r", limit, prompt)
        return {"text": self.text_encoder(tokens.input_ids.to(self.device))[0]}

    def noise(self, batch: int, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Latents:
        """Standard normal latents, as diffusers' pipeline draws them from the same generators."""
        several = list(generator) if isinstance(generator, Sequence) else generator
        return randn_tensor((batch, *self._latent_shape), several, self.device, torch.float32)

    def predict(
        self, latents: Latents, timestep: Float[Tensor, " batch"], conditioning: Conditioning, guidance: float
    ) -> Latents:
        """The U-Net's output in float32; guidance other than 1 runs the negative prompt in the same batch."""
        text = conditioning["text"]
        if guidance == 1:
            return self._denoise(latents, timestep, text)
        negative = self._negative.expand(len(text), -1, -1)
        both = self._denoise(torch.cat([latents] * 2), torch.cat([timestep] * 2), torch.cat([negative, text]))
        without, with_prompt = both.chunk(2)
        return without + guidance * (with_prompt - without)

    def _denoise(self, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return self.unet(latents.to(self.unet.dtype), timestep, text, return_dict=False)[0].float()

    def decode(self, latents: Latents) -> Images:
        """The VAE's images; gradients flow where the image is not clipped at black or white."""
        scaled = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
        return (self.vae.decode(scaled, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode_images(self, images: Images) -> Latents:
        """The mean of the VAE's posterior, scaled as the denoiser expects."""
        posterior = self.vae.encode((images * 2 - 1).to(self.vae.dtype)).latent_dist
        return posterior.mean.float() * self.vae.config.scaling_factor

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Adapter off. Always switched back on, since a backward pass with it off silently gives no gradients."""
        if not self._adapted:
            yield
            return
        self.unet.disable_adapters()
        self._adapted = False
        try:
            yield
        finally:
            self._adapted = True
            self.unet.enable_adapters()

    @contextmanager
    def merged(self) -> Iterator[None]:
        """The adapter added into the frozen weights, which saves a third of a tiny denoiser's time.

        Only where these are float32: in half precision small changes would be rounded away. The weights are put back as
        they were, not computed back, so that nothing accumulates.
        """
        layers = [module for module in self.unet.modules() if isinstance(module, LoraLayer)]
        if not self._adapted or self.unet.dtype != torch.float32 or any(layer.lora_variant for layer in layers):
            yield
            return
        frozen = [layer.get_base_layer().weight for layer in layers]
        before = [weight.data for weight in frozen]
        with torch.no_grad():
            for layer, weight in zip(layers, frozen, strict=True):
                weight.data = weight.data + layer.get_delta_weight("default")
        try:
            with self.reference():
                yield
        finally:
            for weight, data in zip(frozen, before, strict=True):
                weight.data = data

    def save_adapter(self, directory: Path) -> None:
        """`pytorch_lora_weights.safetensors` as diffusers reads it, with the settings needed to scale it right.

        PEFT's names for all layers: diffusers' older ones exist for attention only, and mixed files load in part.
        """
        StableDiffusionPipeline.save_lora_weights(
            directory,
            unet_lora_layers=get_peft_model_state_dict(self.unet),
            unet_lora_adapter_metadata=self._lora_metadata(),
        )

    def _lora_metadata(self) -> dict:
        """The adapter's settings in JSON's types (without them a loader assumes alpha = rank)."""
        settings = self.unet.peft_config["default"].to_dict()
        return {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}

    def load_adapter(self, directory: Path) -> None:
        """Reads what `save_adapter` wrote.

        Raises:
            FileNotFoundError: there is no adapter in the folder.
            ValueError: the folder's adapter has other layers, another rank or another alpha than this policy's.
        """
        if not (directory / _ADAPTER_FILE).is_file():
            raise FileNotFoundError(f"There is no {_ADAPTER_FILE} in '{directory}'; runs write theirs to adapter/.")
        state, _, settings = StableDiffusionPipeline.lora_state_dict(
            directory, weight_name=_ADAPTER_FILE, use_safetensors=True, return_lora_metadata=True
        )
        prefix = "unet."
        state = convert_unet_state_dict_to_peft({key.removeprefix(prefix): value for key, value in state.items()})
        expected = get_peft_model_state_dict(self.unet)
        wrong = state.keys() ^ expected.keys() | {
            key for key in state.keys() & expected.keys() if state[key].shape != expected[key].shape
        }
        if wrong:
            raise ValueError(
                f"The adapter in {directory} does not fit this policy's LoRA settings: {len(wrong)} tensors differ, "
                f"{min(wrong)!r} first. Use the same policy.lora as in the run that made it."
            )
        own, alpha = self.unet.peft_config["default"].lora_alpha, (settings or {}).get("unet.lora_alpha")
        if alpha not in (None, own):
            raise ValueError(
                f"The adapter in {directory} was trained with lora_alpha={alpha} and would count {own / alpha:.3g} "
                f"times as much here: set policy.lora.lora_alpha={alpha}."
            )
        set_peft_model_state_dict(self.unet, state)


def load_pipeline(
    path: str, dtype: torch.dtype, revision: str | None = None, variant: str | None = None
) -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline in evaluation mode, from safetensors only.

    Raises:
        FileNotFoundError: there is neither such a folder nor such a hub repository.
        ValueError: the pipeline is of another family.
    """
    folder = Path(tiny.resolve(path)).expanduser()
    if not folder.is_dir() and (path.count("/") != 1 or path.startswith((".", "/", "~"))):
        raise FileNotFoundError(
            f"policy.path={path!r} is neither a folder in diffusers' format nor a hub name like 'owner/model'. "
            "The embedded model is 'tiny-sd'."
        )
    source = str(folder) if folder.is_dir() else path
    try:
        family = DiffusionPipeline.load_config(source, revision=revision).get("_class_name")
    except (OSError, json.JSONDecodeError, AttributeError) as error:
        raise FileNotFoundError(f"policy.path={path!r} could not be read as a diffusers pipeline: {error}") from error
    if family != "StableDiffusionPipeline":
        raise ValueError(f"policy.path={path!r} holds a {family}; this policy reads Stable Diffusion 1.x and 2.x.")
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            source,
            dtype=dtype,
            use_safetensors=True,
            safety_checker=None,
            requires_safety_checker=False,
            revision=revision,
            variant=variant,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"policy.path={path!r} could not be loaded as a diffusers pipeline: {error}") from error
    if pipeline.tokenizer.model_max_length > 10_000:  # what transformers takes where a folder has no tokenizer in it
        raise ValueError(f"policy.path={path!r} has no usable tokenizer: its files are missing or incomplete.")
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        module.eval()
    return pipeline
