"""Watches a run from outside: held-out prompts and a judge that the run is not trained against."""

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import lightning
import torch
from tqdm import tqdm

from vp_rl.algorithms.base import PolicyTraining
from vp_rl.callbacks.trackers import send_images
from vp_rl.evaluation.compare import as_dict, as_markdown, compare
from vp_rl.evaluation.grid import grid
from vp_rl.evaluation.images import Evaluation, Evaluator
from vp_rl.evaluation.report import write_report

log = logging.getLogger(__name__)

_COLUMNS = 16  # images in a row of the sample grids


class HeldOutEvaluation(lightning.Callback):
    """Evaluates the base model once, the policy now and then, and compares the two when training ends.

    Logs `held_out/*` (of the first `small` prompts) and, at the end, the changes as `final/*` (of all prompts). Writes
    `samples/`, and at the end `adapter/`, `summary.json` and `report.html`, to the run's folder. The main process
    evaluates alone, so the policy must be whole there (one device or DDP, not FSDP).

    Args:
        evaluator: makes and judges the images.
        every: epochs between evaluations on the first `small` prompts.
        small: prompts of those evaluations and of the sample grids.
        note: what readers of the report must know about the data.
    """

    def __init__(self, evaluator: Evaluator, every: int, small: int, note: str = "") -> None:
        if every < 1 or small < 1:
            raise ValueError(f"callbacks.held_out.every={every} and small={small} must be at least 1.")
        self._evaluator, self._every, self._small = evaluator, every, small
        self._note = note
        self._base: Evaluation | None = None
        self._seconds = 0.0  # of training, before a resumed run was interrupted
        self._started = time.monotonic()

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """The base model's images: the adapter is off, so a resumed run gets the same ones."""
        if trainer.is_global_zero:
            assert isinstance(module, PolicyTraining)
            log.info("evaluating the base model on %d held-out prompts", len(self._evaluator.prompts))
            with module.policy.reference():
                self._base = self._evaluate(trainer, module, None, "base model")
            log.info("base: %s", "  ".join(f"{name} {value:.3f}" for name, value in self._base.means().items()))
            if trainer.global_step == 0:
                # Straight to the loggers: what is logged through the module waits for the end of the first epoch.
                small = self._base.first(self._small * len(self._evaluator.seeds))
                _log(trainer, "held_out", small.means())
        trainer.strategy.barrier()
        self._started = time.monotonic()

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """A small evaluation: metrics under `held_out/`, a grid under `samples/`, images to the trackers."""
        if (trainer.current_epoch + 1) % self._every or not trainer.is_global_zero:
            return
        assert isinstance(module, PolicyTraining)
        assert self._base is not None, "evaluated when training started"
        now = self._evaluate(trainer, module, self._small, f"epoch {trainer.current_epoch + 1}")
        # Through the module, so that a ModelCheckpoint can monitor these: held_out/reward.
        module.log_dict({f"held_out/{name}": value for name, value in now.means().items()}, rank_zero_only=True)
        self._show(trainer, now, trainer.current_epoch + 1)

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """The full comparison, and everything a user takes away from the run."""
        if not trainer.is_global_zero:
            return
        assert isinstance(module, PolicyTraining)
        assert self._base is not None, "evaluated when training started"
        seconds, folder = self._elapsed(), Path(trainer.default_root_dir)
        (folder / "adapter").mkdir(parents=True, exist_ok=True)
        module.policy.save_adapter(folder / "adapter")  # first: it survives whatever goes wrong below
        tuned = self._evaluate(trainer, module, None, "trained model")
        if trainer.current_epoch % self._every:
            small = tuned.first(self._small * len(self._evaluator.seeds))
            _log(trainer, "held_out", small.means())
            self._show(trainer, small, trainer.current_epoch)
        changes = compare(self._base, tuned)
        final = {name: change.difference for name, change in changes.items()}
        _log(trainer, "final", final)
        # For whoever started the run, as a sweep does: logging through the module is over by now.
        trainer.callback_metrics.update({f"final/{name}": torch.tensor(value) for name, value in final.items()})
        summary = {
            "held_out": as_dict(changes),
            "prompts": len(self._evaluator.prompts),
            "images": len(tuned.prompts),
            "epochs": trainer.current_epoch,
            "training_seconds": round(seconds, 1),
        }
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        print(f"\nHeld-out prompts, base against trained, same seeds\n{as_markdown(changes)}")
        sampler = self._evaluator.sampler
        report = write_report(folder, self._base, tuned, changes, sampler=sampler, seconds=seconds, note=self._note)
        print(f"\nReport: {report}\nAdapter: {folder / 'adapter'}")

    def state_dict(self) -> dict[str, Any]:
        """The wall time so far, so that a resumed run reports all of it."""
        return {"seconds": self._elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Reads what `state_dict` gave."""
        self._seconds = state_dict["seconds"]

    def _elapsed(self) -> float:
        return self._seconds + time.monotonic() - self._started

    def _evaluate(
        self, trainer: lightning.Trainer, module: PolicyTraining, number: int | None, what: str
    ) -> Evaluation:
        total = len(self._evaluator.prompts[:number]) * len(self._evaluator.seeds)
        quiet = not sys.stderr.isatty()
        with (
            trainer.precision_plugin.forward_context(),
            tqdm(total=total, desc=f"held-out images, {what}", unit="img", leave=False, disable=quiet) as bar,
        ):
            return self._evaluator.evaluate(module.policy, module.reward, number, bar.update)

    def _show(self, trainer: lightning.Trainer, now: Evaluation, epoch: int) -> None:
        """The policy's images after `epoch` epochs below the base's, as a file and to the trackers."""
        assert self._base is not None, "evaluated when training started"
        base = self._base.first(len(now.prompts))
        folder = Path(trainer.default_root_dir) / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        columns = base.of_first_seed()[:_COLUMNS]
        grid([base.images[columns], now.images[columns]]).save(folder / f"epoch_{epoch:04d}.png")
        send_images(trainer.loggers, base, now, trainer.global_step)


def _log(trainer: lightning.Trainer, group: str, values: dict[str, float]) -> None:
    """To the loggers at once; `epoch` counts from 0 as Lightning's own does, so that before the first it is -1."""
    for logger in trainer.loggers:
        named = {f"{group}/{name}": value for name, value in values.items()}
        logger.log_metrics({**named, "epoch": trainer.current_epoch - 1}, step=trainer.global_step)
        logger.save()
