"""Diffusers' pipelines from a folder or the hub, checked: what cannot be loaded is told in one message."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_type_hints

import torch
from diffusers import AutoencoderKL, BitsAndBytesConfig, DiffusionPipeline
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedTokenizerBase

from vp_rl.scenes import tiny

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_PARTS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
OPTIONAL = ("text_encoder_3", "tokenizer_3")
"""T5, which pipelines of Stable Diffusion 3 may have been saved without."""
_UNREADABLE = (OSError, ValueError, TypeError, KeyError, RuntimeError, NotImplementedError, SafetensorError)
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
        ValueError: the pipeline is of another family, or one of its parts is of another class or not whole; or
            quantised layers have no GPU.
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
    given = {**(components or {}), **{part: None for part in optional if index.get(part) in (None, [None, None])}}
    try:
        folder = name if Path(name).is_dir() else _download(kind, name, source, given)
        parts = {
            part: _load_part(Path(folder), part, wanted, index.get(part), source, dtype)
            for part, wanted in _modules(kind).items()
            if part not in given
        }
        pipeline = kind.from_pretrained(folder, use_safetensors=True, variant=source.variant, **{**given, **parts})
    except _UNREADABLE as error:
        raise ValueError(f"{shown} could not be loaded as a diffusers pipeline: {error}") from error
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.eval()
    _check_tokenizers(pipeline.components, shown)
    return pipeline


def _modules(kind: type[DiffusionPipeline]) -> dict[str, type[nn.Module]]:
    """The denoiser, the VAE and the text encoders, with the classes that the pipeline was written for."""
    hints = get_type_hints(kind.__init__)
    return {part: wanted for part, wanted in hints.items() if part in _PARTS and issubclass(wanted, nn.Module)}


def _download(kind: type[DiffusionPipeline], name: str, source: Source, given: Mapping[str, Any]) -> str:
    """The folder that a hub repository's files lie in, once they are here."""
    return str(
        kind.download(name, revision=source.revision, variant=source.variant, use_safetensors=True, **dict(given))
    )


def _load_part(
    folder: Path, part: str, wanted: type[nn.Module], entry: Any, source: Source, dtype: torch.dtype
) -> nn.Module:
    """One of the pipeline's models, whole: libraries fill in what a file lacks by random numbers.

    Raises:
        ValueError: it is not there, is of another class, or its file has not exactly its tensors; names the part.
    """
    library, class_name = entry if isinstance(entry, list | tuple) and len(entry) == 2 else (None, None)
    if library is None:
        raise ValueError(f"it has no {part}, which this policy needs.")
    kind = getattr(import_module(library), class_name, None) if library in ("diffusers", "transformers") else None
    if not (isinstance(kind, type) and issubclass(kind, wanted)):
        raise ValueError(f"its {part} is a {class_name}; this policy reads a {wanted.__name__}.")
    files = folder / part
    try:
        with _quantizing(source.quantize if part in ("unet", "transformer") else None, dtype) as quantized:
            model, found = kind.from_pretrained(  # type: ignore[attr-defined]
                str(files),
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                **({"variant": source.variant} if _has_variant(files, source.variant) else {}),
                **quantized,
            )
    except _UNREADABLE as error:
        raise ValueError(f"its {part}: {error}") from error
    _check_whole(found, f"its {part}")
    return model


def _has_variant(files: Path, variant: str | None) -> bool:
    """Whether there are weights of that variant: pipelines take the others of a part where it has none."""
    return variant is not None and any(files.glob(f"*.{variant}*"))


def _check_whole(found: Mapping[str, Any], shown: str) -> None:
    """Refuses a file that lacks tensors or has others: `found` is what its library says of the loading."""
    wrong = [
        f"{len(names)} {what}, {min(names)!r} first"
        for what, names in (
            ("of its tensors are missing", [*found["missing_keys"]]),
            ("tensors belong to no layer of it", [*found["unexpected_keys"]]),
        )
        if names
    ]
    if not wrong:
        return
    adapted = any(mark in name for name in found["unexpected_keys"] for mark in ("lora_", ".base_layer."))
    hint = (
        "It was saved with a LoRA: save it without (pipeline.fuse_lora() and pipeline.unload_lora_weights() before "
        "save_pretrained)."
        if adapted
        else "The file is damaged, or of another model than its config.json says."
    )
    raise ValueError(f"{shown} is not whole: {'; '.join(wrong)}. {hint}")


def _check_tokenizers(parts: Mapping[str, Any], shown: str) -> None:
    """A tokenizer of a CLIP says how far it reads; and none may have more tokens than its encoder knows."""
    for name, tokenizer in parts.items():
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            continue
        limit, encoder = tokenizer.model_max_length, parts[name.replace("tokenizer", "text_encoder")]
        reach = getattr(encoder.config, "max_position_embeddings", None)
        made_up = 1000 if reach is None else 16  # tokens that transformers gives a T5's, or a CLIP's, without files
        if limit > 10_000 and len(tokenizer) < made_up:
            raise ValueError(f"{shown} has no usable tokenizer: its files are missing or incomplete.")
        if reach is not None and not 2 <= limit <= reach:
            raise ValueError(
                f"{shown}: its {name} says model_max_length={limit}, and its text encoder reads at most {reach} "
                f"tokens: set model_max_length to {reach} in {name}/tokenizer_config.json."
            )
        known = encoder.get_input_embeddings().num_embeddings
        if (last := max(tokenizer.get_vocab().values(), default=0)) >= known:
            raise ValueError(
                f"{shown}: its {name} has a token of number {last}, and its text encoder knows {known}: tokens that "
                "were added, such as of a textual inversion, must be saved with the encoder that learned them."
            )


@contextmanager
def _quantizing(bits: str | None, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """What to tell diffusers, which quantises as it loads, on this process's GPU."""
    if bits is None:
        yield {}
        return
    settings = {
        "8bit": BitsAndBytesConfig(load_in_8bit=True),
        "4bit": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype),
    }
    with torch.cuda.device(int(os.environ.get("LOCAL_RANK", "0"))):
        yield {"quantization_config": settings[bits]}


def load_vae(path: str, dtype: str) -> AutoencoderKL:
    """A VAE of its own, from a hub name or a folder that holds nothing else.

    Raises:
        ValueError: there is none; names the setting.
    """
    shown, folder = f"policy.vae={path!r}", Path(path).expanduser()
    try:
        vae, found = AutoencoderKL.from_pretrained(  # type: ignore[misc]
            folder if folder.is_dir() else path,
            dtype=_read_dtype(dtype),
            use_safetensors=True,
            output_loading_info=True,
        )
    except _UNREADABLE as error:
        raise ValueError(f"{shown} could not be loaded as a diffusers AutoencoderKL: {error}") from error
    _check_whole(found, shown)
    return vae


def _read_dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise ValueError(f"policy.dtype={name!r} is unknown: choose from {', '.join(_DTYPES)}.")
    return _DTYPES[name]


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


def latent_size(resolution: int | None, native: Any, multiple: int) -> int:
    """`resolution` in units of `multiple` pixels; None is the `native` resolution.

    Raises:
        ValueError: it is not a multiple; or none is given, and the model's own is not square.
    """
    if resolution is None and not isinstance(native, int):
        raise ValueError(
            "This model's own images are not square, as those of policies are: set policy.resolution to pixels."
        )
    size = native if resolution is None else resolution
    if size < 1 or size % multiple:
        raise ValueError(f"policy.resolution={size} must be a multiple of {multiple} pixels.")
    return size // multiple


def native_size(sample: Any, pixels: int) -> Any:
    """In pixels, from a denoiser's sample_size, which is a pair where it is not square."""
    sides = {*sample} if isinstance(sample, list | tuple) else {sample}
    return sides.pop() * pixels if len(sides) == 1 else None
