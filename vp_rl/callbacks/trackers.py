"""Images to the experiment trackers that can show them."""

from collections.abc import Iterable

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from PIL import Image

from vp_rl.evaluation.grid import grid
from vp_rl.evaluation.images import Evaluation


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
