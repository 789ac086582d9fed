"""Gives up the hopeless jobs of a sweep, whatever sweeper and launcher it has."""

import csv
import logging
import math
from pathlib import Path
from statistics import median
from typing import Any

import lightning

from vp_rl.configuration.kinds import Count, Text
from vp_rl.files.paths import user_path

log = logging.getLogger(__name__)


class SweepPruning(lightning.Callback):
    """Stops a job that until now has done worse than half of the sweep's other jobs had after as many epochs.

    That is the median rule (Golovin et al. 2017). The others' values are read from the `metrics.csv` beside this
    run's folder, so it needs `logger=csv`, which every logger has, and works between processes and machines that share
    the sweep's folder. A job that is stopped ends like any other: its adapter is evaluated, and that is its objective.

    Args:
        folder: the run's.
        metric: by which jobs are judged while they train; higher is better.
        warmup: epochs that every job gets.
        least: how many others there must be to compare with.
    """

    def __init__(
        self, folder: Text, metric: Text = "held_out/mean_rating", warmup: Count = 4, least: Count = 3
    ) -> None:
        if warmup < 1 or least < 1:
            raise ValueError(f"callbacks.pruning.warmup={warmup} and least={least} must be at least 1.")
        self._folder, self._metric, self._warmup, self._least = user_path(folder), metric, warmup, least
        self._best, self._given_up = -math.inf, False

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """A job that was killed after it was given up is not trained on; its evaluation is made up for."""
        trainer.should_stop = trainer.should_stop or self._given_up

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """After the held-out evaluation, whose callback comes before."""
        done = trainer.current_epoch + 1
        self._best = max(self._best, float(trainer.callback_metrics.get(self._metric, -math.inf)))
        hopeless = trainer.is_global_zero and done >= self._warmup and self._is_hopeless(done)
        self._given_up = trainer.strategy.broadcast(hopeless)
        trainer.should_stop = trainer.should_stop or self._given_up

    def state_dict(self) -> dict[str, Any]:
        """The best value so far, and whether that was too little."""
        return {"best": self._best, "given_up": self._given_up}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Reads what `state_dict` gave."""
        self._best, self._given_up = state_dict["best"], state_dict.get("given_up", False)

    def _is_hopeless(self, done: int) -> bool:
        tables = (file for file in self._folder.parent.glob("*/metrics.csv") if file.parent != self._folder)
        others = [best for file in tables if (best := self._best_of(file, done)) is not None]
        if len(others) < self._least or math.isinf(self._best) or self._best >= median(others):
            return False
        log.warning(
            "given up after epoch %d: %s has been %.3f at best, the median of %d other jobs is %.3f",
            done,
            self._metric,
            self._best,
            len(others),
            median(others),
        )
        return True

    def _best_of(self, table: Path, done: int) -> float | None:
        """Another job's best value in its first so many epochs; None of one that has not got there."""
        try:
            with table.open(newline="") as file:
                # Lightning counts epochs from 0; the base model's evaluation is -1.
                rows = [(int(row["epoch"]) + 1, row.get(self._metric)) for row in csv.DictReader(file) if row["epoch"]]
                values = [float(value) for epoch, value in rows if 0 < epoch <= done and value]
        except (ValueError, TypeError, KeyError):  # it is being written
            return None
        return max(values, default=None) if max((epoch for epoch, _ in rows), default=0) >= done else None
