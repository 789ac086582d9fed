"""Diffusers' pipelines from a folder or the hub, checked: what cannot be loaded is told in one message."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from diffusers import AutoencoderKL, BitsAndBytesConfig, DiffusionPipeline, PipelineQuantizationConfig
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedTokenizerBase

from vp_rl.scenes import tiny

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_Pipeline = TypeVar("_Pipeline", bound=DiffusionPipeline)


class Source(NamedTuple):
    """Where a pipeline lies and how it is read; the fields are settings of every policy."""

    path: str
    """Hub name, or folder in diffusers' format."""
    dtype: str
    """Of the weights: float32, float16 or bfloat16."""
    revision: str | None = None
    variant: str | None = None
    quantize: str | None = None
    """The denoiser's linear layers."""


def load_pipeline(
    source: Source,
    kind: type[_Pipeline],
    models: str,
    components: Mapping[str, Any] | None = None,
    optional: tuple[str, ...] = (),
) -> _Pipeline:
    """A pipeline in evaluation mode, from safetensors only.

    Args:
        source: where it lies.
        kind: diffusers' class of it; no other will do.
        models: in words, for whoever has brought another.
        components: what to have in place of the pipeline's own; None for a component: without it.
        optional: components that a pipeline may have been saved without.

    Raises:
        FileNotFoundError: there is neither such a folder nor such a hub repository.
        ValueError: the pipeline is of another family, or is incomplete; or quantised layers have no GPU.
    """
    if source.quantize is not None and not torch.cuda.is_available():
        raise ValueError(
            f"policy.economy.quantize={source.quantize} needs a GPU, and there is none here: leave it null, which is "
            "the same model in more memory."
        )
    dtype, name, shown = _read_dtype(source.dtype), _locate(source.path), f"policy.path={source.path!r}"
    try:
        index = DiffusionPipeline.load_config(name, revision=source.revision)
        family = index.get("_class_name")
    except (OSError, json.JSONDecodeError, AttributeError) as error:
        raise FileNotFoundError(f"{shown} could not be read as a diffusers pipeline: {error}") from error
    if family != kind.__name__:
        raise ValueError(
            f"{shown} holds a {family}; this policy reads {models}. conf/policy has those of other models."
        )
    absent = {part: None for part in optional if index.get(part) in (None, [None, None])}
    try:
        with _quantizing(source.quantize, dtype, "unet" if "unet" in index else "transformer") as quantized:
            pipeline = kind.from_pretrained(
                name,
                dtype=dtype,
                use_safetensors=True,
                revision=source.revision,
                variant=source.variant,
                **{**(components or {}), **absent, **quantized},
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{shown} could not be loaded as a diffusers pipeline: {error}") from error
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.eval()
        elif isinstance(component, PreTrainedTokenizerBase) and _is_empty(component):
            raise ValueError(f"{shown} has no usable tokenizer: its files are missing or incomplete.")
    return pipeline


@contextmanager
def _quantizing(bits: str | None, dtype: torch.dtype, denoiser: str) -> Iterator[dict[str, Any]]:
    """What to tell diffusers, which quantises as it loads, on this process's GPU."""
    if bits is None:
        yield {}
        return
    settings = {
        "8bit": BitsAndBytesConfig(load_in_8bit=True),
        "4bit": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype),
    }
    with torch.cuda.device(int(os.environ.get("LOCAL_RANK", "0"))):
        yield {"quantization_config": PipelineQuantizationConfig(quant_mapping={denoiser: settings[bits]})}


def load_vae(path: str, dtype: str) -> AutoencoderKL:
    """A VAE of its own, from a hub name or a folder that holds nothing else.

    Raises:
        ValueError: there is none; names the setting.
    """
    try:
        return AutoencoderKL.from_pretrained(Path(path).expanduser(), dtype=_read_dtype(dtype), use_safetensors=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"policy.vae={path!r} could not be loaded as a diffusers AutoencoderKL: {error}") from error


def _read_dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise ValueError(f"policy.dtype={name!r} is unknown: choose from {', '.join(_DTYPES)}.")
    return _DTYPES[name]


def _is_empty(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it is what transformers makes up where a folder has no tokenizer in it."""
    return tokenizer.model_max_length > 10_000 and len(tokenizer) < 1000


def _locate(path: str) -> str:
    folder = Path(tiny.resolve(path)).expanduser()
    if folder.is_dir():
        return str(folder)
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"policy.path={path!r} is neither a folder in diffusers' format nor a hub name like 'owner/model'. "
            "The embedded model is 'tiny-sd'."
        )
    return path


def latent_size(resolution: int | None, native: int, multiple: int) -> int:
    """`resolution` in units of `multiple` pixels; None is the `native` resolution.

    Raises:
        ValueError: it is not a multiple.
    """
    size = native if resolution is None else resolution
    if size < 1 or size % multiple:
        raise ValueError(f"policy.resolution={size} must be a multiple of {multiple} pixels.")
    return size // multiple
