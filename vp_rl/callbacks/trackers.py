"""Experiment trackers: metrics that survive a resumed run, images where they can be shown, and what a run leaves."""

import csv
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import numpy as np
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from vp_rl.configuration.kinds import Text
from vp_rl.evaluation.grid import grid
from vp_rl.evaluation.images import Evaluation
from vp_rl.evaluation.settings import publishable

# What a run leaves in its folder for others, by W&B's type of artifact.
_LEFT = {
    "adapter": ("adapter",),
    "report": ("report.html", "accuracy.md", "summary.json", "samples"),
}


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


def wandb_logger(
    folder: Text, project: Text, name: Text | None, entity: Text | None = None, tags: Sequence[str] = ()
) -> WandbLogger:
    """A W&B run that says nothing of the machine it runs on, and that goes on when the run is resumed.

    Left out are the host's name and hardware, folders, command line, code, git remote, installed packages and what the
    terminal shows. System metrics such as the GPU's load stay; and W&B's client writes into an artifact's manifest
    where its files lay. WANDB_MODE=offline needs no account.

    Args:
        folder: the run's; it keeps the W&B run's name for resuming, and W&B's files. One whose name is a number is a
            sweep's job: its W&B run is called by the number, in a group for the sweep.
        project: of W&B.
        name: what the run is called.
        entity: the user or team that the project belongs to; None: W&B's default.
        tags: to find it by.
    """
    import wandb  # a second to import, and only where it is used

    own = Path(folder)
    is_job = own.name.isdigit()
    quiet = {"console": "off", "host": "", "program": "", "save_code": False}
    without = dict.fromkeys(("x_disable_meta", "x_disable_machine_info", "disable_git", "disable_code"), True)
    return WandbLogger(
        name=f"{own.parent.name}/{own.name}" if is_job else name,
        group=f"{name}/{own.parent.name}" if is_job else None,
        project=project,
        save_dir=folder,
        version=_run_id(own / "wandb" / "run_id"),
        entity=entity,
        tags=list(tags),
        settings=wandb.Settings(**quiet, **without, x_save_requirements=False),
    )


@rank_zero_only
def _run_id(file: Path) -> str:
    """The run's identity in W&B, the same one when it is resumed."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(secrets.token_hex(4))
    return file.read_text()


@contextmanager
def tracked(trainer: lightning.Trainer, settings: Mapping[str, Any]) -> Iterator[None]:
    """Inside it the trainer's loggers know of the run's settings; at its end W&B gets the results and is closed.

    Closed, or the next job of a sweep in the same process would write into this run.
    """
    for logger in trainer.loggers:
        logger.log_hyperparams(publishable(dict(settings)))
    code = 1
    try:
        yield
        code = 0
    finally:
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and trainer.is_global_zero:
                if code == 0:
                    _send_results(logger, Path(trainer.default_root_dir))
                logger.experiment.finish(exit_code=code)


def _send_results(logger: WandbLogger, folder: Path) -> None:
    """The adapter and the report, as artifacts."""
    import wandb

    for kind, names in _LEFT.items():
        artifact = wandb.Artifact(f"{kind}-{logger.version}", type=kind)
        for path in (folder / name for name in names):
            if path.is_dir():
                artifact.add_dir(str(path), name=None if len(names) == 1 else path.name, policy="immutable")
            elif path.is_file():
                artifact.add_file(str(path), policy="immutable")
        if artifact.manifest.entries:
            logger.experiment.log_artifact(artifact)


def send_images(loggers: Iterable[Logger], base: Evaluation, now: Evaluation, step: int) -> None:
    """A table of prompts with both images and all their scores in W&B, a grid in TensorBoard; others take no images."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_table("held_out/images", *_table(base, now), step=step)
        elif isinstance(logger, TensorBoardLogger):
            pixels = np.asarray(grid([base.images[:16], now.images[:16]]))
            logger.experiment.add_image("held_out/images", pixels, step, dataformats="HWC")


def _table(base: Evaluation, now: Evaluation) -> tuple[list[str], list[list[Any]]]:
    import wandb

    before, after = base.metrics(), now.metrics()
    columns = ["prompt", "seed", "base", "now", *(f"{when}{name}" for name in after for when in ("base ", ""))]
    rows = [
        [
            prompt,
            now.seeds[row],
            # From PIL: W&B casts float arrays in [0, 1] to all-black images.
            wandb.Image(Image.fromarray(base.images[row])),
            wandb.Image(Image.fromarray(now.images[row])),
            *(float(values[name][row]) for name in after for values in (before, after)),
        ]
        for row, prompt in enumerate(now.prompts)
    ]
    return columns, rows
