"""The trainable part of a policy: a LoRA on its denoiser, whatever the family, and its file in diffusers' format."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.tuners.lora import Linear, LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from vp_rl.policies import lora_file, lora_settings

_NAMES = {"unet": "U-Net", "transformer": "transformer"}


class _Linear(Linear):
    """PEFT's layer without its detours, which cost more than the adapter itself.

    It computes in the precision of its input, as autocast would, instead of turning that to float32; and the second
    product adds itself to the frozen layer's output, scaled. Weights and what their gradients are summed in stay in
    float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        """frozen(x) + scaling B A x."""
        frozen = self.base_layer(x)
        if self.disable_adapters:
            return frozen
        first, second, scaling = self.lora_A["default"].weight, self.lora_B["default"].weight, self.scaling["default"]
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        low = functional.linear(x.to(dtype), first.to(dtype)).flatten(0, -2)
        wide = frozen.flatten(0, -2).to(dtype)
        return torch.addmm(wide, low, second.to(dtype).t(), alpha=scaling).view(frozen.shape).to(frozen.dtype)


class Adapter:
    """A LoRA in float32 on a frozen denoiser, which holds its parameters.

    Args:
        denoiser: what is adapted; only the adapter's parameters will require gradients.
        lora: which layers, at which rank; None: nothing, for images only.
        component: the denoiser's name in the pipeline.
        pipeline: diffusers' class of it, which knows the format of the adapter's file.

    Raises:
        ValueError: the settings do not fit the denoiser.
    """

    def __init__(
        self,
        denoiser: ModelMixin,
        lora: LoraConfig | None,
        component: Literal["unet", "transformer"],
        pipeline: type[DiffusionPipeline],
    ) -> None:
        self.denoiser, self._component, self._pipeline = denoiser, component, pipeline
        self._on = lora is not None
        self._merged: Sequence[tuple[nn.Parameter, Tensor]] = ()
        """While it is merged: the frozen weights, and what they are without it."""
        denoiser.requires_grad_(False)
        if lora is not None:
            lora_settings.check(lora, denoiser, _NAMES[component])
            try:
                denoiser.add_adapter(lora)
            except ValueError as error:
                raise ValueError(f"The LoRA settings do not fit this {_NAMES[component]}: {error}") from error
            cast_training_params(denoiser, dtype=torch.float32)
            for layer in denoiser.modules():
                plain = type(layer) is Linear and type(layer.base_layer) is nn.Linear
                if plain and not _special(layer):
                    layer.__class__ = _Linear

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside it the adapter is off, also where it is merged into the frozen weights.

        Always switched back on, since a backward pass with it off silently gives no gradients.
        """
        if self._merged:
            with self._swapped(self._merged):
                yield
            return
        if not self._on:
            yield
            return
        self.denoiser.disable_adapters()
        self._on = False
        try:
            yield
        finally:
            self._on = True
            self.denoiser.enable_adapters()

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Inside it the adapter is added into the frozen weights, which saves a third of a tiny denoiser's time.

        Only where these are float32: in fewer bits small changes would be rounded away. The weights are put back as
        they were, not computed back, so that nothing accumulates.
        """
        layers = [module for module in self.denoiser.modules() if isinstance(module, LoraLayer)]
        # Under autocast the sum would be rounded where training rounds its two parts: other log-probabilities.
        rounding = torch.is_autocast_enabled(self.denoiser.device.type)
        frozen = [layer.get_base_layer().weight for layer in layers]
        rounding = rounding or any(weight.dtype != torch.float32 for weight in frozen)  # quantised ones are integers
        sharded = any(isinstance(weight, DTensor) for weight in frozen)  # by FSDP2, which gathers them layer by layer
        if not self._on or rounding or sharded or any(map(_special, layers)):
            yield
            return
        with torch.no_grad():
            sums = [
                weight.data + layer.get_delta_weight("default") for layer, weight in zip(layers, frozen, strict=True)
            ]
        before = [(weight, weight.data) for weight in frozen]
        with self.off(), self._swapped(list(zip(frozen, sums, strict=True))):
            self._merged = before
            try:
                yield
            finally:
                self._merged = []

    @contextmanager
    def _swapped(self, others: Sequence[tuple[nn.Parameter, Tensor]]) -> Iterator[None]:
        """Inside it these weights are others."""
        before = [weight.data for weight, _ in others]
        for weight, data in others:
            weight.data = data
        try:
            yield
        finally:
            for (weight, _), data in zip(others, before, strict=True):
                weight.data = data

    def save(self, directory: Path) -> None:
        """`pytorch_lora_weights.safetensors` as diffusers reads it, with the scale in its weights.

        PEFT's names for all layers: diffusers' older ones exist for attention only, and mixed files load in part.
        """
        state, own = get_peft_model_state_dict(self.denoiser), self._scales()
        self._pipeline.save_lora_weights(
            directory,
            **{
                f"{self._component}_lora_layers": lora_file.scaled(state, own),
                f"{self._component}_lora_adapter_metadata": lora_file.plain(
                    self.denoiser.peft_config["default"].to_dict(), list(own)
                ),
            },
        )
        lora_file.readable_as_its_folder(directory / lora_file.FILE)

    def _scales(self) -> dict[str, float]:
        """By layer, what B A counts."""
        layers = self.denoiser.named_modules()
        return {name: float(layer.scaling["default"]) for name, layer in layers if isinstance(layer, LoraLayer)}

    def load(self, path: Path) -> None:
        """Reads what `save` wrote, and what others did: it counts as much as it did there, whatever alpha is here.

        Args:
            path: a file, or its folder: see `lora_file.find`.

        Raises:
            FileNotFoundError: there is no adapter.
            ValueError: it is for another model, or has other layers or another rank; or its format is unknown.
        """
        file = lora_file.find(path)
        state = lora_file.read(file, self._pipeline, self._component, self.denoiser.config)
        self._check_layers(state, f"The adapter in {path}")
        by = {layer: 1 / own for layer, own in self._scales().items()}
        set_peft_model_state_dict(self.denoiser, lora_file.scaled(state, by))

    def _check_layers(self, state: Mapping[str, Tensor], shown: str) -> None:
        expected = get_peft_model_state_dict(self.denoiser)
        wrong = state.keys() ^ expected.keys() | {
            key for key in state.keys() & expected.keys() if state[key].shape != expected[key].shape
        }
        if not wrong:
            return
        layers = lora_settings.layers_of(self.denoiser)
        foreign = {key for key in state if key.partition(".lora_")[0] not in layers} | {
            key for key in state.keys() & expected.keys() if _widths(key, state) != _widths(key, expected)
        }
        ranks, own = _ranks(state), _ranks(expected)
        if foreign:
            what = f"it was made with another model, since {min(foreign)!r} is of no layer here"
        elif ranks != own:
            what = f"its rank is {', '.join(map(str, ranks))}, and policy.lora.r={', '.join(map(str, own))}"
        else:
            what = f"{len(wrong)} tensors differ, {min(wrong)!r} first"
        way = "Use the same policy and policy.lora as in the run that made it."
        if not foreign and ranks:
            way = f"It is of policy.lora.r={ranks[-1]} policy.lora.target_modules=[{self._targets(state)}]"
            way += " policy.lora.use_dora=true" if any("magnitude" in key for key in state) else ""
            way += f", and policy.lora.rank_pattern for the layers of {ranks[:-1]}." if ranks[1:] else "."
        raise ValueError(f"{shown} does not fit this policy's LoRA settings: {what}. {way}")

    def _targets(self, state: Mapping[str, Tensor]) -> str:
        """What `target_modules` must be for the layers of a file to be adapted, and no others."""
        return ",".join(lora_settings.targets({lora_file.layer_of(key) for key in state}, self.denoiser))


def _special(layer: LoraLayer) -> bool:
    """Whether its output is more than frozen(x) + scaling B A x: DoRA's, or one with biases."""
    return bool(layer.lora_variant) or layer.lora_bias["default"]


def _ranks(state: Mapping[str, Tensor]) -> list[int]:
    """Those that layers have; PEFT's first matrix is of (rank, in)."""
    return sorted({len(tensor) for key, tensor in state.items() if key.endswith("lora_A.weight")})


def _widths(key: str, state: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Of the adapted layer, whatever the rank: PEFT's matrices are (rank, in, ...) and (out, rank, ...)."""
    shape = tuple(state[key].shape)
    return shape[1:] if key.endswith("lora_A.weight") else shape[:1] + shape[2:]
