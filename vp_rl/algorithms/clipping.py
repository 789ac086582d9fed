"""Gradient clipping where Lightning refuses more than it has to."""

import lightning
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch.optim import Optimizer


def clip_gradients(
    module: lightning.LightningModule, optimizer: Optimizer, most: float | None, algorithm: str | None
) -> None:
    """Clips as Lightning does, and a fused optimizer's gradients too where there is no loss scale.

    Such an optimizer takes a loss scale out itself, in its step: before it, there is nothing to clip by. Lightning
    refuses all mixed precision with it, though bf16-mixed has no scale.

    Raises:
        ValueError: there is one.
    """
    plugin, kind = module.trainer.precision_plugin, GradClipAlgorithmType(algorithm or GradClipAlgorithmType.NORM)
    fused = getattr(optimizer, "_step_supports_amp_scaling", False)
    if not (most and fused and isinstance(plugin, MixedPrecision)):
        module.clip_gradients(optimizer, most, algorithm)
    elif plugin.scaler is None:
        Precision.clip_gradients(plugin, optimizer, most, kind)
    else:
        raise ValueError(
            f"A fused {type(optimizer).__name__} cannot clip gradients under trainer.precision={plugin.precision}: "
            "take optimizer@algorithm.optimizer=adamw, trainer.precision=bf16-mixed or trainer.gradient_clip_val=null."
        )
