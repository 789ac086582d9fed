"""Prompts to tokens."""

import logging

from diffusers.loaders import TextualInversionLoaderMixin
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


def tokenize(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], limit: int, warn: bool = True, inversions: bool = True
) -> Int[Tensor, "batch limit"]:
    """Token numbers, padded; what does not fit is cut off, with a warning.

    Args:
        tokenizer: of a text encoder.
        prompts: what to encode.
        limit: tokens that the text encoder reads.
        warn: False where another text encoder reads further than this one.
        inversions: whether a token that a textual inversion has learned as several (`<toy>`, `<toy>_1`, ...) stands
            for all of them, as in those pipelines of diffusers that load textual inversions.
    """
    if inversions:
        prompts = _spelt(tokenizer, prompts)
    tokens = tokenizer(prompts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
    for prompt, row in zip(prompts, tokens.attention_mask, strict=True):
        if warn and row.all() and len(tokenizer(prompt[: 20 * limit]).input_ids) > limit:
            log.warning("The text encoder reads %d tokens; the end of this prompt is cut: %.80r", limit, prompt)
    return tokens.input_ids


def attended(tokenizer: PreTrainedTokenizerBase, prompts: list[str], limit: int) -> Int[Tensor, "batch limit"]:
    """1 where a token is the prompt's, and 0 where it is padding."""
    words = _spelt(tokenizer, prompts)
    return tokenizer(words, padding="max_length", max_length=limit, truncation=True, return_tensors="pt").attention_mask


def _spelt(tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[str]:
    """With all tokens of each textual inversion written out."""
    return [*TextualInversionLoaderMixin().maybe_convert_prompt(list(prompts), tokenizer)]
