"""Gradient clipping where Lightning refuses more than it has to."""

import lightning
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch.optim import Optimizer


class ClippedModule(lightning.LightningModule):
    """Its gradients are clipped as Lightning does, and a fused optimizer's too where there is no loss scale.

    Such an optimizer takes a loss scale out itself, in its step: before it, there is nothing to clip by. Lightning
    refuses all mixed precision with it, though bf16-mixed has no scale.
    """

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Called by the Trainer.

        Raises:
            ValueError: the optimizer is fused, and there is a loss scale.
        """
        plugin = self.trainer.precision_plugin
        kind = GradClipAlgorithmType(gradient_clip_algorithm or GradClipAlgorithmType.NORM)
        fused = getattr(optimizer, "_step_supports_amp_scaling", False)
        if not (gradient_clip_val and fused and isinstance(plugin, MixedPrecision)):
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif plugin.scaler is None:
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val, kind)
        else:
            raise ValueError(
                f"A fused {type(optimizer).__name__} cannot clip gradients under trainer.precision={plugin.precision}: "
                "take optimizer@algorithm.optimizer=adamw, trainer.precision=bf16-mixed or "
                "trainer.gradient_clip_val=null."
            )
