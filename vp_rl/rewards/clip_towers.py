"""CLIP's two towers, its tokenizer and its preprocessing, from folders and hub repositories in transformers' format.

Strict: a tensor that is missing, left over or of another shape is an error that names it. Errors begin with the setting
that they are about, which callers give.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from vp_rl.rewards.checkpoints import first, line
from vp_rl.rewards.preprocess import Colours
from vp_rl.scenes import tiny

_PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_BICUBIC = 3  # PIL's number


class Towers(nn.Module):
    """Images and tokens to embeddings of length 1. Frozen, and always in evaluation mode: embeddings are not random.

    Attributes:
        size: of the square images that it looks at, in pixels.
        words: of its vocabulary.
        longest: prompt, in tokens.
        width: of the embeddings.
        logit_scale: what the checkpoint multiplies cosines by, about 100.
    """

    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        text = model.text_model.config
        self.size: int = model.vision_model.config.image_size  # type: ignore[assignment]  # as `read_architecture` saw
        self.words, self.longest = text.vocab_size, text.max_position_embeddings
        self.width = model.visual_projection.out_features
        self.logit_scale: float = model.logit_scale.exp().item()
        self.vision, self.vision_projection = model.vision_model, model.visual_projection
        self.text, self.text_projection = model.text_model, model.text_projection
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, source: str, setting: str, dtype: str, revision: str | None = None) -> "Towers":
        """The model in a folder or hub repository, in that precision.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged, of another model than CLIP, or does not fit its own config.json.
        """
        wanted, config = _precision(dtype), read_architecture(source, setting, revision)
        try:
            wrong = f"{setting}={source!r} does not fit its own config.json"
            return _filled(config, None, wrong, source, revision).to(wanted)
        except OSError as error:
            raise _absent(setting, source, "the weights of a CLIP model", error) from error
        except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{setting}={source!r} has damaged weights: {line(error)}") from error

    @classmethod
    def of(cls, config: CLIPConfig, state: dict[str, Tensor], dtype: str, wrong: str) -> "Towers":
        """A model of these tensors in that precision; `wrong` begins the error if they do not fit.

        Raises:
            ValueError: they do not fit.
        """
        return _filled(config, state, wrong).to(_precision(dtype))

    def train(self, mode: bool = True) -> "Towers":
        """Nothing."""
        return super().train(False)

    def look(self, pixels: Float[Tensor, "batch 3 side side"]) -> Float[Tensor, "batch features"]:
        """The embeddings of preprocessed images, in float32."""
        return F.normalize(self.vision_projection(self.vision(pixels).pooler_output).float(), dim=1)

    def read(self, tokens: Int[Tensor, "batch length"], end: int) -> Float[Tensor, "batch features"]:
        """The embeddings of prompts that end with the first token `end`, in float32.

        Attention is causal and the embedding is taken at the end, so it makes no difference which token the prompts
        are padded with and how much, and no mask is needed. transformers' own pooling goes by the configuration's
        `eos_token_id`, which is wrong in models older than that.
        """
        ends = (tokens == end).int().argmax(1)
        states = self.text(tokens).last_hidden_state[torch.arange(len(tokens), device=ends.device), ends]
        return F.normalize(self.text_projection(states).float(), dim=1)


def read_architecture(source: str, setting: str, revision: str | None = None) -> CLIPConfig:
    """The sizes of the model in a folder or hub repository, as transformers writes them.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or of another model than CLIP.
    """
    if Path(source).expanduser().is_file():
        raise FileNotFoundError(
            f"{setting}={source!r} is a file; it must be a folder with a CLIP model in transformers' format, or a hub "
            "name. A checkpoint in open_clip's names is read as that of reward=hps_v2 is."
        )
    try:
        config = AutoConfig.from_pretrained(_place(source), revision=revision or "main")
    except OSError as error:
        raise _absent(setting, source, "a CLIP model in transformers' format", error) from error
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ValueError(f"{setting}={source!r} has a damaged config.json: {line(error)}") from error
    if not isinstance(config, CLIPConfig):
        raise ValueError(f"{setting}={source!r} holds a model of type {config.model_type!r}; it must be a whole CLIP.")
    if not isinstance(config.vision_config.image_size, int):  # type: ignore[union-attr]  # a config, once read
        raise ValueError(f"{setting}={source!r} looks at images that are not square.")
    return config


def read_tokenizer(source: str, setting: str, words: int, revision: str | None = None) -> CLIPTokenizer:
    """CLIP's, of `words` words.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or has another number of words.
    """
    try:
        read = CLIPTokenizer.from_pretrained(_place(source), revision=revision or "main")
    except OSError as error:
        raise _absent(setting, source, "CLIP's tokenizer", error) from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{setting}={source!r} has a damaged tokenizer: {line(error)}") from error
    if len(read) <= len(read.all_special_tokens) + 1:  # made up: transformers does not say that it found none
        raise FileNotFoundError(f"{setting}={source!r} has no tokenizer. reward.processor can name where one is.")
    if len(read) != words:
        raise ValueError(f"{setting}={source!r} has a tokenizer of {len(read)} words; the model reads {words}.")
    return read


def read_colours(source: str, setting: str, size: int, revision: str | None = None) -> Colours:
    """By what the model's own preprocessing normalises.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it does something else than resize (bicubic) and crop to `size`, and normalise.
    """
    try:
        stored = CLIPImageProcessorPil.from_pretrained(_place(source), revision=revision or "main").to_dict()
    except OSError as error:
        raise _absent(setting, source, "a preprocessor_config.json", error) from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{setting}={source!r} has a damaged preprocessor_config.json: {line(error)}") from error
    wanted = {
        "resample": _BICUBIC,
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
        **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), True),
    }
    other = [f"{key}={stored.get(key)}" for key, value in wanted.items() if stored.get(key) != value]
    if other:
        raise ValueError(
            f"{setting}={source!r}: its preprocessor_config.json is not of CLIP at {size} pixels: {', '.join(other)}."
        )
    return Colours(tuple(stored["image_mean"]), tuple(stored["image_std"]))


def _precision(dtype: str) -> torch.dtype:
    if dtype not in _PRECISIONS:
        raise ValueError(f"reward.dtype={dtype!r} must be one of {', '.join(_PRECISIONS)}.")
    return _PRECISIONS[dtype]


def _filled(
    config: CLIPConfig,
    state: dict[str, Tensor] | None,
    wrong: str,
    source: str | None = None,
    revision: str | None = None,
) -> Towers:
    """In float32, in which the checkpoint's scale is read: half precision would move it by a part in a thousand."""
    loaded: Any = CLIPModel.from_pretrained(
        source and _place(source),
        config=config,
        state_dict=state,
        revision=revision or "main",
        dtype=torch.float32,
        ignore_mismatched_sizes=True,  # to be told their names
        output_loading_info=True,
    )
    model, found = loaded
    reshaped = {name for name, *_ in found["mismatched_keys"]}
    kinds = {
        "missing": found["missing_keys"] - reshaped,
        "left over": found["unexpected_keys"],
        "of another shape": reshaped,
    }
    unfit = [f"{first(sorted(names))} {what}" for what, names in kinds.items() if names]
    if unfit:
        raise ValueError(f"{wrong}: {'; '.join(unfit)}.")
    return Towers(model)


def _place(source: str) -> str:
    """An embedded model's folder, a folder with its `~` replaced; a hub name as it is."""
    path = Path(tiny.resolve(source)).expanduser()
    return str(path) if path.is_dir() else source


def _absent(setting: str, source: str, what: str, error: Exception) -> FileNotFoundError:
    return FileNotFoundError(
        f"{setting}={source!r} is neither a folder with {what} nor a hub name that could be fetched: {line(error)}"
    )
