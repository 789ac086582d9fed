"""Stops, or says so in words, where a run looks healthy and learns nothing."""

import logging
import math
from typing import Any, Literal

import lightning
import torch
from torch import Tensor
from torch.optim import Optimizer

from vp_rl.algorithms.base import PolicyTraining, total_norm
from vp_rl.configuration.kinds import Count
from vp_rl.functional import differ

log = logging.getLogger(__name__)


class Guards(lightning.Callback):
    """Looks at what training rests on: the algorithm's self-test, the scores of each round, each update's gradient.

    Rounds are DDPO's, or the batches of ReFL. With `on_nonfinite=skip`, DDPO leaves a prompt out of its round if any of
    its scores is not finite, and an update whose loss or gradient is not finite is not made; `train/skipped` counts
    both. A loss scale (precision 16-mixed) skips updates itself, as its way of finding the scale: there only losses are
    looked at.

    Args:
        self_test: before the first update, also of a resumed run.
        on_nonfinite: an error, or leave it out and go on.
        patience: so many rounds of equal scores, or skipped updates, in a row are an error; fewer a warning.
    """

    def __init__(
        self, self_test: bool = True, on_nonfinite: Literal["raise", "skip"] = "raise", patience: Count = 5
    ) -> None:
        if on_nonfinite not in ("raise", "skip"):
            raise ValueError(f"callbacks.guards.on_nonfinite={on_nonfinite!r} must be raise or skip.")
        if patience < 1:
            raise ValueError(f"callbacks.guards.patience={patience} must be at least 1.")
        self._patience = patience
        self._on_nonfinite: Literal["raise", "skip"] = on_nonfinite
        self._tested = not self_test
        self._batch: Any = None
        self._losses: list[Tensor] = []  # of the coming update
        self._seen: Tensor | None = None  # scores
        self._constant = self._bad_updates = 0  # in a row
        self._skipped = 0  # in the epoch
        self._warned: set[str] = set()

    def on_fit_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Tells the algorithm what to do with scores that are not finite; looks at the policy's precision."""
        if isinstance(module, PolicyTraining):
            module.on_nonfinite = self._on_nonfinite
            narrow = any(parameter.dtype == torch.float16 for parameter in module.policy.parameters())
            if narrow and trainer.precision != "16-mixed":
                log.warning(
                    "The policy computes in float16, where gradients as small as those of an accumulated micro-batch "
                    "vanish: set policy.dtype=bfloat16, or trainer.precision=16-mixed, which scales the loss."
                )

    def on_train_batch_start(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The self-test, on the run's first batch, computed as training computes it.

        Raises:
            ValueError: training would teach nothing.
        """
        self._batch = batch
        if not self._tested and isinstance(module, PolicyTraining):
            with trainer.precision_plugin.forward_context():
                found = module.self_test(batch)
            if found is not None:
                log.info("self-test: %s", found)
        self._tested = True

    def on_before_backward(self, trainer: lightning.Trainer, module: lightning.LightningModule, loss: Tensor) -> None:
        """Keeps the loss for the update it is of: looking at it now would wait for the device."""
        self._losses.append(loss.detach())

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, optimizer: Optimizer
    ) -> None:
        """An update must be of finite numbers.

        Raises:
            ValueError: it is not; or it is skipped, but so were all of the last ones.
        """
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        loss = torch.stack(self._losses).mean().item()
        norm = 0.0 if trainer.precision == "16-mixed" else total_norm(gradients)
        self._losses = []
        finite = math.isfinite(loss) and math.isfinite(norm)
        if trainer.world_size > 1:
            finite = trainer.strategy.reduce_boolean_decision(finite, all=True)  # all skip, or none
        if finite:
            self._bad_updates = 0
            return
        self._bad_updates += 1
        said = f"Update {trainer.global_step + 1} is not of finite numbers (loss {loss:.3g}, gradient norm {norm:.3g}"
        said += f"{_against(module, self._batch, trainer.accumulate_grad_batches)})."
        if self._on_nonfinite == "raise" or self._bad_updates >= self._patience:
            skipped = f" So were the {self._bad_updates - 1} before it." if self._bad_updates > 1 else ""
            raise ValueError(
                f"{said}{skipped} The last checkpoint is intact: try trainer.precision=32-true, a lower "
                "algorithm.optimizer.lr, or callbacks.guards.on_nonfinite=skip where it is an odd prompt."
            )
        optimizer.zero_grad(set_to_none=True)  # the optimizer passes over what has no gradient: no decay, no momentum
        self._skipped += 1
        log.warning("%s It is skipped.", said)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Looks at the scores of a round once.

        Raises:
            ValueError: rounds in a row have had equal scores only.
        """
        if isinstance(module, PolicyTraining) and module.scores is not None and module.scores is not self._seen:
            self._seen = module.scores
            self._look(trainer, module, module.scores)

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Logs how much was left out."""
        if self._on_nonfinite == "skip":
            module.log("train/skipped", float(self._skipped), sync_dist=True, reduce_fx="sum")
        self._skipped = 0

    def _look(self, trainer: lightning.Trainer, module: PolicyTraining, scores: Tensor) -> None:
        reward = type(module.reward).__name__
        bad = ~torch.isfinite(scores).all(1)
        if bad.any():  # the algorithm has raised, unless it is to skip
            self._skipped += int(bad.sum())
            self._say(
                "scores", f"{reward} gave scores that are not finite; their prompts are left out (train/skipped)."
            )
            scores = scores[~bad]
        constant = scores.numel() != 1 and not bool(differ(scores.reshape(1, -1)).any()) if len(scores) else True
        if trainer.world_size > 1:
            constant = trainer.strategy.reduce_boolean_decision(constant, all=True)
        self._constant = self._constant + 1 if constant else 0
        if constant:
            value = f"the score {scores.mean().item():.4g}" if len(scores) else "no finite score"
            said = f"every image after {trainer.global_step} updates got {value} from {reward}: nothing to learn from."
            if self._constant >= self._patience:
                raise ValueError(
                    f"{self._constant} rounds in a row, {said} Does the reward work (a service that fails may answer "
                    "0)? Have the images become alike? callbacks.guards.patience allows more such rounds."
                )
            self._say("constant", said[0].upper() + said[1:])
        elif scores.shape[1] > 1:
            share = 1 - differ(scores).float().mean().item()
            if share >= 0.5:
                self._say(
                    "groups",
                    f"{share:.0%} of the round's prompts have images that {reward} scores alike: they teach nothing "
                    "(train/zero_variance_groups).",
                )

    def _say(self, kind: str, words: str) -> None:
        """Once a run: the metrics tell how it goes on."""
        if kind not in self._warned:
            self._warned.add(kind)
            log.warning("%s", words)


def _against(module: lightning.LightningModule, batch: Any, accumulated: int) -> str:
    if not isinstance(module, PolicyTraining):
        return ""
    others = f", or the {accumulated - 1} micro-batches before it" if accumulated > 1 else ""
    reward = "" if module.reward is None else f"{type(module.reward).__name__} on "
    return f"; {reward}{module.describe(batch)}{others}"
