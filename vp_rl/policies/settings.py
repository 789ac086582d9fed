"""A policy's settings, told by name where they are of a wrong type: a yaml can say anything."""

from peft import LoraConfig


def check(**settings: object) -> None:
    """Looks at what any policy may be given, by the names that yamls use.

    Raises:
        ValueError: one of them cannot be; names it, and says what it may be.
    """
    for name, value in settings.items():
        fits, wanted = _KINDS[name]
        if not fits(value):
            raise ValueError(f"policy.{name}={value!r} must be {wanted}.")


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_text_or_none(value: object) -> bool:
    return value is None or isinstance(value, str)


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 100_000


_KINDS = {
    "path": (_is_text, "a hub name, or a folder"),
    "dtype": (_is_text, "the name of a type, such as bfloat16"),
    "revision": (_is_text_or_none, "a name, or null"),
    "variant": (_is_text_or_none, "a name, or null"),
    "vae": (_is_text_or_none, "a hub name, a folder, or null"),
    "negative_prompt": (_is_text, "a text; '' is none"),
    "resolution": (
        lambda value: value is None or _is_whole(value),
        "one whole number of pixels, for images are square; null is the model's own",
    ),
    "t5": (_is_flag, "true or false"),
    "t5_tokens": (_is_whole, "a whole number of tokens, at least 1"),
    "gradient_checkpointing": (_is_flag, "true or false"),
    "lora": (lambda value: value is None or isinstance(value, LoraConfig), "LoRA settings (peft.LoraConfig), or null"),
}
