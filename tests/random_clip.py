"""CLIP models of random weights, small enough for a test, stored as the real ones are."""

from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

SIZE = 32
MEAN, STD = (0.48, 0.45, 0.4), (0.27, 0.25, 0.28)
_BYTES = sorted(ByteLevel.alphabet())
_WORDS = [*_BYTES, *(f"{byte}</w>" for byte in _BYTES), "re", "red</w>", "<|startoftext|>", "<|endoftext|>"]
END = len(_WORDS) - 1


def config(act: str = "gelu", end: int = END, width: int = 16) -> CLIPConfig:
    """Two layers of width 32 (text) and 24 (vision, patches of 8); prompts of up to 77 tokens."""
    small = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_act": act}
    text = {"vocab_size": len(_WORDS), "hidden_size": 32, "bos_token_id": END - 1, "eos_token_id": end, **small}
    vision = {"hidden_size": 24, "image_size": SIZE, "patch_size": 8, **small}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=width)


def shake(model: torch.nn.Module) -> None:
    """Random values for every parameter, large enough that embeddings depend on all of the image and the prompt."""
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name or "ln_" in name), std=0.25)


def save_processor(folder: Path) -> None:
    """Tokenizer and preprocessing."""
    merges = [("r", "e"), ("re", "d</w>")]
    CLIPTokenizer(vocab={word: index for index, word in enumerate(_WORDS)}, merges=merges).save_pretrained(folder)
    crop = {"height": SIZE, "width": SIZE}
    CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size=crop, image_mean=list(MEAN), image_std=list(STD)
    ).save_pretrained(folder)


def save_clip(folder: Path, act: str = "gelu", end: int = END, width: int = 16) -> CLIPModel:
    """A whole model; the same weights whatever it is called with."""
    torch.manual_seed(1)
    model = CLIPModel(config(act, end, width)).eval()
    shake(model)
    torch.nn.init.ones_(model.logit_scale)
    model.save_pretrained(folder)
    save_processor(folder)
    return model
