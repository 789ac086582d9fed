"""Which LoRA settings a policy can have: those that its adapter can be taken away with, in every format."""

from collections.abc import Collection
from dataclasses import fields
from typing import Any

from peft import LoraConfig
from torch import nn

FREE = frozenset(
    {
        "r",
        "lora_alpha",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "use_dora",
        "init_lora_weights",
    }
)
"""All others must be as PEFT has them by default: new ones are refused until somebody has tried them."""
INITS = (True, False, "gaussian", "orthogonal")
"""Those that leave the frozen weights as they are; all but False begin as the model on disk."""


def check(lora: LoraConfig, denoiser: nn.Module, name: str) -> None:
    """Also what PEFT would not tell, or not by name: a rank of 0, and one target of several that fits no layer.

    Raises:
        ValueError: the settings cannot be, or an adapter made with them could not be taken away.
    """
    for field in ("r", "lora_alpha"):
        value = getattr(lora, field)
        number = isinstance(value, int) or (field == "lora_alpha" and isinstance(value, float))
        if not number or isinstance(value, bool) or not 0 < value < 1e6 or (field == "r" and value < 1):
            least = "at least 1" if field == "r" else "a positive number"
            raise ValueError(f"policy.lora.{field}={value!r} must be {least}.")
    if not any(type(lora.init_lora_weights) is type(init) and lora.init_lora_weights == init for init in INITS):
        raise ValueError(
            f"policy.lora.init_lora_weights={lora.init_lora_weights!r} would change the model's frozen weights, "
            "which no adapter's file could say: choose from true, false, gaussian, orthogonal."
        )
    default = LoraConfig()
    for field in fields(lora):
        value, usual = getattr(lora, field.name), getattr(default, field.name)
        if field.name not in FREE and value != usual:
            raise ValueError(
                f"policy.lora.{field.name}={value!r} cannot be taken away in an adapter's file, so it is not trained "
                f"with: leave it {usual!r}."
            )
    _check_targets(lora.target_modules, denoiser, name)


def _check_targets(targets: Any, denoiser: nn.Module, name: str) -> None:
    if targets is None:
        raise ValueError(f"policy.lora.target_modules=None: say which layers of the {name} to adapt, such as to_q.")
    if not isinstance(targets, set):  # a regular expression, or all of a kind
        return
    layers = layers_of(denoiser)
    for target in sorted(map(str, targets)):
        if not any(path == target or path.endswith(f".{target}") for path in layers):
            raise ValueError(
                f"The LoRA settings do not fit this {name}: policy.lora.target_modules has {target!r}, "
                f"which no layer is called; some are {', '.join(_common(layers))}."
            )


def layers_of(denoiser: nn.Module) -> set[str]:
    """The names of what can be adapted, whether it is or not."""
    found = (path for path, module in denoiser.named_modules() if isinstance(module, nn.Linear | nn.Conv2d))
    return {path.removesuffix(".base_layer") for path in found if ".lora_" not in path}


def targets(wanted: Collection[str], denoiser: nn.Module) -> list[str]:
    """The shortest ends of names by which these layers, and no others, are chosen."""
    others, found = layers_of(denoiser) - set(wanted), set()
    for layer in wanted:
        parts = layer.split(".")
        ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        found.add(next(end for end in ends if not any(f".{other}".endswith(f".{end}") for other in others)))
    return sorted(found)


def _common(layers: set[str]) -> list[str]:
    """The sixteen most frequent names of layers, with what makes a mere number a name."""
    names = [".".join(path.split(".")[-2:] if path[-1].isdigit() else path.split(".")[-1:]) for path in layers]
    return sorted(set(names), key=lambda name: (-names.count(name), name))[:16]
