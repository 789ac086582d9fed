"""Experiment trackers: a table of metrics that survives a resumed run, and images where they can be shown."""

import csv
from collections.abc import Iterable
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from vp_rl.evaluation.grid import grid
from vp_rl.evaluation.images import Evaluation


class MetricsTable(CSVLogger):
    """Lightning's CSV logger, which removes the table of the epochs before when a run is resumed; this one goes on."""

    @property
    def experiment(self) -> ExperimentWriter:
        """The writer, started with what is in the file already."""
        table = Path(self.log_dir) / "metrics.csv"
        starts = self._experiment is None and rank_zero_only.rank == 0
        before = table.read_text(encoding="utf-8") if starts and table.is_file() else ""
        writer = super().experiment
        if before:
            table.write_text(before, encoding="utf-8")
            writer.metrics_keys = next(csv.reader(before.splitlines()))
        return writer


def send_images(loggers: Iterable[Logger], base: Evaluation, now: Evaluation, step: int) -> None:
    """A table of prompts with both images in W&B, a grid in TensorBoard; other trackers take no images."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_table("held_out/images", *_table(base, now), step=step)
        elif isinstance(logger, TensorBoardLogger):
            pixels = grid([base.images[:16], now.images[:16]])
            logger.experiment.add_image("held_out/images", _array(pixels), step, dataformats="HWC")


def _table(base: Evaluation, now: Evaluation) -> tuple[list[str], list[list]]:
    import wandb  # a second to import, and only where it is used

    columns = ["prompt", "base", "now", "base reward", "reward", "base rating", "rating"]
    rows = [
        [
            prompt,
            # From PIL: W&B casts float arrays in [0, 1] to all-black images.
            wandb.Image(Image.fromarray(base.images[index])),
            wandb.Image(Image.fromarray(now.images[index])),
            float(base.scores[index]),
            float(now.scores[index]),
            float(base.ratings[index].mean()),
            float(now.ratings[index].mean()),
        ]
        for index, prompt in enumerate(now.prompts)
    ]
    return columns, rows


def _array(image: Image.Image):  # noqa: ANN202
    import numpy as np

    return np.asarray(image)
