"""A trained adapter as other programs read it, with what it is written into the file's header."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import convert_state_dict_to_kohya, convert_unet_state_dict_to_peft
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vp_rl.policies.pipelines import Source, load_pipeline, load_vae
from vp_rl.scenes import tiny

FILE = "pytorch_lora_weights.safetensors"  # diffusers' name, which runs use

Facts = Mapping[str, str]
"""What a file is, by name, for its header: base model, reward, settings, seed, licence."""


def to_diffusers(adapter: Path, folder: Path, facts: Facts) -> Path:
    """The adapter as it is, for `pipeline.load_lora_weights(folder)` and for ComfyUI, with the facts in its header.

    Args:
        adapter: folder that a run wrote its adapter to.
        folder: where to.
        facts: what to say of it.

    Raises:
        FileNotFoundError: there is no adapter.
    """
    state, header = _read(adapter)
    return _write(state, folder / FILE, {**header, **facts})


def to_kohya(adapter: Path, folder: Path, facts: Facts) -> Path:
    """The adapter in the format of Kohya's scripts, which AUTOMATIC1111, Forge, InvokeAI and ComfyUI read.

    Layers have their names in diffusers, with underscores, and each has its alpha. Whether those names can be read back
    is checked by diffusers' own converter.

    Raises:
        FileNotFoundError: there is no adapter.
        ValueError: it is of a transformer, or of a kind of LoRA that the format does not have.
    """
    state, header = _read(adapter)
    if not all(key.startswith("unet.") for key in state):
        raise ValueError(
            "to=kohya is for adapters of a U-Net (Stable Diffusion 1, 2 and XL), and this one is of another model: "
            "ComfyUI reads those as to=diffusers writes them."
        )
    settings = {key.removeprefix("unet."): value for key, value in _settings(header).items()}
    if settings.get("use_dora") or settings.get("alpha_pattern"):
        raise ValueError("to=kohya has no DoRA and no alpha_pattern: export this adapter with to=diffusers or merged.")
    exported = convert_state_dict_to_kohya({key: tensor.contiguous() for key, tensor in state.items()})
    alphas, ranks = set(), set()
    for key in [key for key in exported if key.endswith(".alpha")]:  # diffusers writes the rank, whatever alpha was
        rank = len(exported[f"{key.removesuffix('.alpha')}.lora_down.weight"])
        alpha = float(settings.get("lora_alpha", rank)) * (math.sqrt(rank) if settings.get("use_rslora") else 1.0)
        exported[key] = torch.tensor(alpha)
        alphas.add(alpha)
        ranks.add(rank)
    _check_names(exported, state)
    names = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(max(ranks)),
        "ss_network_alpha": str(max(alphas)),
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
    pipeline = load_pipeline(source._replace(dtype="float32"), kind, "the base of the run", parts)
    pipeline.load_lora_weights(adapter)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    pipeline.to(dtype=getattr(torch, source.dtype))
    pipeline.save_pretrained(folder, safe_serialization=True)
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


def _read(adapter: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, and the header."""
    file = adapter / FILE
    if not file.is_file():
        raise FileNotFoundError(f"There is no {FILE} in '{adapter}'; runs write theirs to adapter/ when they end.")
    with safe_open(file, framework="pt") as opened:
        return load_file(file), dict(opened.metadata() or {})


def _settings(header: Facts) -> dict[str, Any]:
    """The LoRA's, as diffusers has them in the header."""
    return json.loads(header.get(LORA_ADAPTER_METADATA_KEY, "{}"))


def _write(state: Mapping[str, Tensor], file: Path, header: Facts) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, file, metadata=dict(header))
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
