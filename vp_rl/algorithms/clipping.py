"""What becomes of accumulated gradients before a step of the optimizer: weighed by rows, then clipped."""

import lightning
import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor
from torch.optim import Optimizer


class ClippedModule(lightning.LightningModule):
    """A module whose update is the mean over all its rows, however they are cut, and is clipped like Lightning's.

    Lightning sums the gradients of `trainer.accumulate_grad_batches` micro-batches, each divided by that number. That
    is their rows' mean only where all are of one size and none is missing: not where a round's last micro-batch is
    short, where an epoch's end cuts an accumulation, or where a micro-batch has as many rows as its prompts have pairs.

    A fused optimizer's gradients are clipped too where there is no loss scale. Such an optimizer takes a loss scale out
    itself, in its step: before it, there is nothing to clip by. Lightning refuses all mixed precision with it, though
    bf16-mixed has no scale.
    """

    def __init__(self) -> None:
        super().__init__()
        self._like: float | Tensor = 0.0  # rows of the running update's first micro-batch
        self._rows: float | Tensor = 0.0  # of all its micro-batches so far

    def weighed(self, loss: Tensor, rows: float | Tensor, of_all: float | Tensor | None = None) -> Tensor:
        """The loss to give to Lightning for a micro-batch, so that its rows count like those of all others.

        Args:
            loss: mean over the micro-batch's rows.
            rows: how many of them this device has.
            of_all: mean over devices, where they have different numbers of them; None: they do not.

        Raises:
            ValueError: the strategy accumulates by itself, and the micro-batches of an update have different sizes.
        """
        each = rows if of_all is None else of_all
        if not bool(self._rows):
            self._like = each
        self._rows = self._rows + each
        if self.trainer.strategy.handles_gradient_accumulation and bool(each != self._like):
            raise ValueError(
                f"trainer.strategy={type(self.trainer.strategy).__name__} weighs all micro-batches of an update alike, "
                f"and here they are of {float(self._like):g} and {float(each):g} rows. Choose an algorithm.train_batch "
                "that divides a round's, or trainer.accumulate_grad_batches=1."
            )
        return loss if of_all is None and rows == self._like else loss * (rows / self._like)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Called by the Trainer before each step of the optimizer, whether or not there is anything to clip.

        Raises:
            ValueError: the optimizer is fused, and there is a loss scale.
        """
        self._level(optimizer)
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

    def _level(self, optimizer: Optimizer) -> None:
        """Makes Lightning's sum of weighed micro-batches the mean over the update's rows."""
        accumulated = self.trainer.accumulate_grad_batches
        if self.trainer.strategy.handles_gradient_accumulation:  # it is asked to step after every micro-batch
            if self.trainer.fit_loop.epoch_loop.batch_progress.current.ready % accumulated == 0:
                self._rows = 0.0
            return
        rows, self._rows = self._rows, 0.0
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not gradients or not bool(rows):  # an update that is skipped has none
            return
        factor = accumulated * self._like / rows
        if bool(factor != 1):
            torch._foreach_mul_(gradients, float(factor))
