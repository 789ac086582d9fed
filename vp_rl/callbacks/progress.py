"""One progress bar over the whole run, with what matters beside it."""

import logging
import math
import sys
import time
from typing import Any

import lightning
from tqdm import tqdm

from vp_rl.algorithms.base import PolicyTraining

log = logging.getLogger(__name__)

_LINES = 20  # of a run whose output goes to a file
_FORMAT = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"


class Progress(lightning.Callback):
    """A bar on a terminal; a line now and then where the output goes to a file.

    Args:
        show: metrics beside the bar, by the label they get.
    """

    def __init__(self, show: dict[str, str]) -> None:
        self._show = dict(show)
        self._bar: tqdm | None = None
        self._started = time.monotonic()

    def on_train_start(self, *_: Any) -> None:
        """Starts the clock."""
        self._started = time.monotonic()

    def on_train_epoch_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Shows what the last epoch gave: only now has the module logged all of it, after the callbacks' turn."""
        if self._bar is None:
            # Not when training starts: other callbacks show their own progress there.
            self._bar = _bar(trainer)
        else:
            self._report(trainer)
        # Lightning asks for the first batch next: DDPO samples a round of images for it.
        phase = "sampling" if isinstance(module, PolicyTraining) else "reading"
        self._bar.set_description_str(f"epoch {_epochs(trainer, trainer.current_epoch + 1)} {phase}")

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        """There is a batch to train on."""
        assert self._bar is not None, "opened when the first epoch starts"
        self._bar.set_description_str(f"epoch {_epochs(trainer, trainer.current_epoch + 1)} training", refresh=False)

    def on_train_batch_end(self, *_: Any) -> None:
        """Moves the bar."""
        assert self._bar is not None, "opened when the first epoch starts"
        self._bar.update()

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Shows the last epoch and closes the bar."""
        if self._bar is not None:
            self._report(trainer)
            self._close()

    def on_exception(self, *_: Any) -> None:
        """Closes the bar, so that the error starts on a line of its own."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _report(self, trainer: lightning.Trainer) -> None:
        assert self._bar is not None, "opened when the first epoch starts"
        metrics, done = trainer.callback_metrics, trainer.current_epoch
        shown = {label: f"{metrics[name].item():.3g}" for label, name in self._show.items() if name in metrics}
        self._bar.set_postfix(shown, refresh=False)
        every = max(1, (trainer.max_epochs or 1) // _LINES)
        if self._bar.disable and trainer.is_global_zero and (done % every == 0 or done == trainer.max_epochs):
            values = "  ".join(f"{label} {value}" for label, value in shown.items())
            minutes = (time.monotonic() - self._started) / 60
            log.info("epoch %s  %s  %.1f min", _epochs(trainer, done), values, minutes)


def _bar(trainer: lightning.Trainer) -> tqdm:
    """Over the batches of all epochs; without an end where the run has none, or the loader does not know its length."""
    each, epochs = trainer.num_training_batches, trainer.max_epochs or 1
    known = math.isfinite(each) and epochs > 0
    return tqdm(
        total=int(each) * epochs if known else None,
        initial=int(each) * trainer.current_epoch if known else 0,
        bar_format=_FORMAT if known else None,
        dynamic_ncols=True,
        disable=not (trainer.is_global_zero and sys.stderr.isatty()),
    )


def _epochs(trainer: lightning.Trainer, number: int) -> str:
    limit = trainer.max_epochs or -1
    return f"{number}/{limit}" if limit > 0 else str(number)
