"""A trained adapter as other programs read it, with what it is written into the file's header."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import convert_unet_state_dict_to_peft
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vp_rl.policies.lora_file import FILE, layer_of, plain, readable_as_its_folder, scaled, scales
from vp_rl.policies.pipelines import OPTIONAL, Source, load_pipeline, load_vae
from vp_rl.scenes import tiny

Facts = Mapping[str, str]
"""What a file is, by name, for its header: base model, reward, settings, seed, licence."""


def to_diffusers(adapter: Path, folder: Path, facts: Facts) -> Path:
    """The adapter for `pipeline.load_lora_weights(folder)`, with the facts in its header.

    Of a transformer (SD 3, FLUX) ComfyUI reads it too; of a U-Net it does not know these names.

    Args:
        adapter: folder that a run wrote its adapter to.
        folder: where to.
        facts: what to say of it.

    Raises:
        FileNotFoundError: there is no adapter.
    """
    state, settings = _read(adapter)
    component = min(state).partition(".")[0]
    header = {LORA_ADAPTER_METADATA_KEY: json.dumps({f"{component}.{key}": each for key, each in settings.items()})}
    return _write(state, folder / FILE, {"format": "pt", **header, **facts})


def to_kohya(adapter: Path, folder: Path, facts: Facts) -> Path:
    """The adapter in the format of Kohya's scripts, which AUTOMATIC1111, Forge, InvokeAI and ComfyUI read.

    Layers have their names in diffusers, with underscores, and each has the same alpha. Whether those names can be
    read back is checked by diffusers' own converter.

    Raises:
        FileNotFoundError: there is no adapter.
        ValueError: it is of a transformer, or of a kind of LoRA that the format does not have.
    """
    state, settings = _read(adapter)
    if not all(key.startswith("unet.") for key in state):
        raise ValueError(
            "to=kohya is for adapters of a U-Net (Stable Diffusion 1, 2 and XL), and this one is of another model: "
            "ComfyUI reads those as to=diffusers writes them."
        )
    if settings.get("use_dora"):
        raise ValueError(
            "to=kohya has no DoRA that all its readers agree on: export this adapter with to=diffusers or merged."
        )
    ranks = {layer_of(key): len(tensor) for key, tensor in state.items() if key.endswith(".lora_A.weight")}
    alpha = max(ranks.values())  # one for all layers: of several, diffusers' reader loses all but one
    evened = scaled(state, {layer: rank / alpha for layer, rank in ranks.items()})
    exported = {_kohya(key): tensor for key, tensor in evened.items()}
    exported |= {f"{_kohya(layer)}.alpha": torch.tensor(float(alpha)) for layer in ranks}
    _check_names(exported, state)
    names = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(alpha),
        "ss_network_alpha": str(float(alpha)),
    }
    return _write(exported, folder / "lora.safetensors", {**names, **facts})


def to_merged(adapter: Path, source: Source, vae: str | None, folder: Path, facts: Facts) -> Path:
    """The whole pipeline with the adapter added into its weights, for `DiffusionPipeline.from_pretrained(folder)`.

    The sum is made in float32 and then rounded to the base's precision; the denoiser's header has the facts.

    Args:
        adapter: folder that a run wrote its adapter to.
        source: the base.
        vae: hub name or folder of another VAE than the base's; None: its own.
        folder: where to.
        facts: what to say of it.

    Raises:
        FileNotFoundError: there is no adapter, or no base.
        ValueError: the base could not be loaded.
    """
    _read(adapter)  # is there one
    index = DiffusionPipeline.load_config(str(tiny.resolve(source.path)), revision=source.revision)
    parts = {"vae": load_vae(vae, "float32")} if vae else {}
    kind = getattr(diffusers, index["_class_name"])
    pipeline = load_pipeline(source._replace(dtype="float32"), kind, "the base of the run", parts, optional=OPTIONAL)
    pipeline.load_lora_weights(adapter)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    pipeline.to(dtype=getattr(torch, source.dtype))
    pipeline.save_pretrained(folder, safe_serialization=True)
    for file in folder.rglob("*.safetensors"):
        readable_as_its_folder(file)
    denoiser = "unet" if "unet" in index else "transformer"
    for file in sorted((folder / denoiser).glob("*.safetensors")):  # of large models there are several
        _write(load_file(file), file, {"format": "pt", **facts})
    return folder


def licence(path: str) -> str | None:
    """The licence of a base model in a folder: what its card says, or the first line of its licence; None: unknown."""
    folder = Path(tiny.resolve(path)).expanduser()
    card = folder / "README.md"
    if card.is_file() and (found := re.search(r"\A---\n(?:.*\n)*?license: *(\S+)", card.read_text(encoding="utf-8"))):
        return found[1]
    for file in sorted(folder.glob("LICENSE*")) if folder.is_dir() else []:
        return next((line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()), None)
    return None


def _read(adapter: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, with their scale in them whoever has written them, and the LoRA's settings."""
    file = adapter / FILE
    if not file.is_file():
        raise FileNotFoundError(f"There is no {FILE} in '{adapter}'; runs write theirs to adapter/ when they end.")
    state = load_file(file)
    with safe_open(file, framework="pt") as opened:
        said = json.loads((opened.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}"))
    prefix = f"{min(state).partition('.')[0]}."
    settings = {key.removeprefix(prefix): value for key, value in said.items()}
    state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    by = scales(state, settings)
    state = {f"{prefix}{key}": tensor for key, tensor in scaled(state, by).items()}
    return state, plain(settings, list(by)) if settings else {}


def _kohya(key: str) -> str:
    """A tensor's name there, or a layer's."""
    layer, _, matrix = key.removeprefix("unet.").partition(".lora_")
    which = {"A.weight": ".lora_down.weight", "B.weight": ".lora_up.weight", "": ""}[matrix]
    return f"lora_unet_{layer.replace('.', '_')}{which}"


def _write(state: Mapping[str, Tensor], file: Path, header: Facts) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, file, metadata=dict(header))
    readable_as_its_folder(file)
    return file


def _check_names(exported: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Underscores in place of dots do not always tell where the dots were."""
    back, _ = StableDiffusionLoraLoaderMixin.lora_state_dict(dict(exported))
    layers = {key.removeprefix("unet."): tensor for key, tensor in back.items() if key.startswith("unet.")}
    again = convert_unet_state_dict_to_peft(layers)
    lost = {key for key in state if key.removeprefix("unet.") not in again}
    if lost or len(again) != len(state):
        raise ValueError(
            f"to=kohya has no unmistakable name for {len(lost)} of {len(state)} tensors, {min(lost, default='')!r} "
            "first: export this adapter with to=diffusers or merged."
        )
