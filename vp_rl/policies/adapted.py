"""What all families do alike: a family says how prompts are read and how its denoiser is called, and nothing else."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import ClassVar, Literal

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float, Int
from peft import LoraConfig
from torch import Tensor, nn

from vp_rl.files.paths import user_path
from vp_rl.interfaces import Policy
from vp_rl.policies import autoencoder
from vp_rl.policies.economy import Economy
from vp_rl.policies.lora import Adapter
from vp_rl.policies.precision import keep_norms
from vp_rl.policies.start import NOWHERE, Held, Start
from vp_rl.policies.text_cache import TextCache, fingerprint, key_of
from vp_rl.types import Conditioning, Images, Latents, Negative

Tokens = list[Int[Tensor, "batch _"]]
"""What each text encoder reads, in the order of the encoders."""


class AdaptedPolicy(Policy):
    """A frozen pipeline whose denoiser carries a trainable LoRA in float32.

    A family sets `process`, `guidance` and `latent_shape` (of one image, as the VAE has it).

    Args:
        pipeline: its parts keep their names here.
        component: the denoiser's name.
        lora: what to adapt and at which rank; None: nothing, for images only.
        economy: see there.
        gradient_checkpointing: of the denoiser and of the VAE.
        start: what the adapter begins with, and the reference.

    Raises:
        ValueError: the adapter to begin with is none, or does not fit; or there is nothing to be trained.
    """

    guidance: nn.Module
    latent_shape: tuple[int, int, int]
    shifted: ClassVar[bool] = False
    """Whether the family's latents are shifted by what the VAE says, and not only scaled."""

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        component: Literal["unet", "transformer"],
        lora: LoraConfig | None,
        economy: Economy,
        gradient_checkpointing: bool,
        start: Start = NOWHERE,
    ) -> None:
        super().__init__()
        if start.path is not None and lora is None:
            raise ValueError(f"policy.start={start.path!r} needs policy.lora, the adapter that it is read into.")
        self.economy = economy
        parts = pipeline.components
        for name in sorted(parts):
            if name.startswith("tokenizer"):
                setattr(self, name, parts[name])
        self._take_encoders({name: parts[name] for name in sorted(parts) if name.startswith("text_encoder")})
        self.vae = parts["vae"]
        denoiser = parts[component]
        setattr(self, component, denoiser)
        self._dtype = denoiser.dtype  # milliseconds each time: it looks at every parameter
        self.requires_grad_(False)
        self.eval()
        economy.arrange(denoiser, self.vae)
        keep_norms(denoiser)
        keep_norms(self.vae)
        self.adapter = Adapter(denoiser, lora, component, type(pipeline))
        if start.path is not None:
            self.adapter.load(user_path(start.path))
        self.start = Held(denoiser) if start.reference == "start" else None
        if gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
            self.vae.enable_gradient_checkpointing()
        economy.compiled(denoiser)

    def _take_encoders(self, encoders: dict[str, nn.Module | None]) -> None:
        """As modules, if they are to be on the device, they go where the policy goes.

        As mere attributes they are out of reach of whoever moves, casts, wraps or shards modules.
        """
        self._encoders = tuple(encoders)
        folder = self.economy.text_cache
        self._cache = None if folder is None else TextCache(Path(folder), [*encoders.values()], type(self).__name__)
        for name, encoder in encoders.items():
            if self.economy.text_encoders == "device" or encoder is None:
                setattr(self, name, encoder)
            else:
                vars(self)[name] = encoder.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return self.adapter.denoiser.device

    @abstractmethod
    def tokenize(self, prompts: list[str]) -> Tokens:
        """What each encoder is given to read; what fits none of them is cut off, with a warning."""

    @abstractmethod
    def embed(self, tokens: Tokens) -> Conditioning:
        """What the denoiser is told, from tokens where the encoders are."""

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        """See the family's `embed`; what does not fit the text encoders is cut off, with a warning.

        Each prompt is encoded by itself and in the encoders' own precision, so that its numbers are the same bits in
        any batch and shard, under autocast, and from the cache.
        """
        tokens = self.tokenize(prompts)
        each = [[part[row : row + 1] for part in tokens] for row in range(len(prompts))]
        keys = [key_of(row) for row in each]
        rows = self._cache.get(keys) if self._cache else {}
        fresh = {key: row for key, row in zip(keys, each, strict=True) if key not in rows}
        if fresh:
            with self._reading() as place, torch.autocast(place.type, enabled=False):
                made = {key: self.embed([part.to(place) for part in row]) for key, row in fresh.items()}
            if self._cache:
                self._cache.put(made)
            rows |= made
        return {name: torch.cat([rows[key][name].to(self.device) for key in keys]) for name in rows[keys[0]]}

    @contextmanager
    def _reading(self) -> Iterator[torch.device]:
        """Where the encoders are inside it."""
        encoders = [encoder for name in self._encoders if (encoder := getattr(self, name)) is not None]
        if self.economy.text_encoders != "visit":
            yield encoders[0].device
            return
        try:
            for encoder in encoders:
                encoder.to(self.device)
            yield self.device
        finally:
            for encoder in encoders:
                encoder.to("cpu")

    def noise(self, batch: int, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Latents:
        """Standard normal latents, as diffusers' pipeline draws them from the same generators."""
        several = list(generator) if isinstance(generator, Sequence) else generator
        return self._pack(randn_tensor((batch, *self.latent_shape), several, self.device, torch.float32))

    def predict(
        self,
        latents: Latents,
        timestep: Float[Tensor, " batch"],
        conditioning: Conditioning,
        guidance: float,
        negative: Negative = "train",
    ) -> Latents:
        """The denoiser's output in float32, after the family's kind of guidance."""
        base = self.base if negative == "base" else None
        return self.guidance(self._denoise, latents, timestep, conditioning, guidance, negative == "detach", base)

    @abstractmethod
    def _denoise(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor: ...

    def decode(self, latents: Latents) -> Images:
        """The VAE's images; gradients flow where the image is not clipped at black or white."""
        return autoencoder.decode(self.vae, self._unpack(latents), self.economy.vae_batch, self.shifted)

    def encode_images(self, images: Images) -> Latents:
        """The mean of the VAE's posterior, shifted and scaled as the denoiser expects."""
        return self._pack(autoencoder.encode(self.vae, images, self.economy.vae_batch, self.shifted))

    def image_encoder(self) -> str:
        """The VAE's weights and settings, and what the family makes of its latents."""
        recipe = f"{type(self).__name__} shifted={self.shifted} tiling={self.economy.vae_tiling}"
        return fingerprint([self.vae], recipe, diffusers.__version__)

    def _pack(self, latents: Float[Tensor, "batch channels height width"]) -> Latents:
        """As the denoiser takes them, where that is not as the VAE does."""
        return latents

    def _unpack(self, latents: Latents) -> Float[Tensor, "batch channels height width"]:
        return latents

    def train(self, mode: bool = True) -> "AdaptedPolicy":
        """Stays in evaluation mode: dropout would make replayed log-probabilities differ from sampled ones."""
        return super().train(False)

    def reference(self) -> AbstractContextManager[None]:
        """The model without its adapter, or with the one that it began with."""
        return self.base() if self.start is None else self.start.on(self.adapter.denoiser)

    def base(self) -> AbstractContextManager[None]:
        """The model without its adapter."""
        return self.adapter.off()

    def eagerly(self) -> AbstractContextManager[None]:
        """Each size is compiled by itself, which takes a minute."""
        return torch.compiler.set_stance("force_eager") if self.economy.compile else nullcontext()

    def merged(self) -> AbstractContextManager[None]:
        """The adapter is added into the frozen weights where these are float32."""
        return self.adapter.merged()

    def save_adapter(self, directory: Path) -> None:
        """`pytorch_lora_weights.safetensors`; see `Adapter.save`."""
        self.adapter.save(directory)

    def load_adapter(self, directory: Path) -> None:
        """Reads what `save_adapter` wrote, or another program; see `Adapter.load` for what it refuses."""
        self.adapter.load(directory)
