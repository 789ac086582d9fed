"""How large BLIP's towers are: the published sizes, and what must fit what."""

from typing import Any

from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig

_VISION = {  # ViT-L/16
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
}
_TEXT = {  # BERT-base
    "vocab_size": 30524,
    "hidden_size": 768,
    "encoder_hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}


def published() -> tuple[BlipVisionConfig, BlipTextConfig]:
    """The towers of ImageReward, which VP-Score follows: 303 and 142 million parameters.

    Dropout in the text tower is the published 0.1. The published vision tower also skips whole blocks at random in
    training, up to one in ten of the last; transformers' has no such thing, so ours does not.
    """
    return BlipVisionConfig(**_VISION), BlipTextConfig(**_TEXT)


def check(vision: BlipVisionConfig, text: BlipTextConfig, tokenizer: BertTokenizer, max_length: int) -> None:
    """Whether the towers and the tokenizer fit each other.

    Raises:
        ValueError: they do not; says which numbers.
    """
    if text.encoder_hidden_size != vision.hidden_size:
        raise ValueError(f"{text.encoder_hidden_size=} must be {vision.hidden_size=}: the text looks at the image.")
    if len(tokenizer) > text.vocab_size:
        raise ValueError(f"The tokenizer has {len(tokenizer)} words, more than {text.vocab_size=}.")
    if max_length > text.max_position_embeddings:
        raise ValueError(f"{max_length=} is more than {text.max_position_embeddings=}.")


def settings(config: Any) -> dict[str, Any]:
    """A BLIP config as its constructor takes it, without what changes with the version of transformers."""
    skip = ("transformers_version", "dtype", "model_type")
    return {name: value for name, value in config.to_diff_dict().items() if name not in skip}
