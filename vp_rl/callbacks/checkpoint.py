"""Checkpoints that a killed run goes on from as if nothing had happened.

One holds the adapter, the optimizer, the learning rate's schedule, the precision's loss scale, the position in the run,
the callbacks' and the reward's own state, and the settings. Random numbers follow from the position (seed, epoch,
round, prompt, image), so there are none to save. On the same number of devices a resumed run ends with the adapter of
an unbroken one, bit by bit where the device computes reproducibly. On another number it goes on from the same weights:
to rounding as before, if all devices together still have as many prompts in a round and states in an update, and the
checkpoint is of an epoch's end; otherwise with other prompts and other noise.
"""

import copy
import logging
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import lightning
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import Checkpoint, Timer

from vp_rl.algorithms.base import PolicyTraining
from vp_rl.algorithms.prompt_training import Resumable
from vp_rl.callbacks.checkpoint_files import AtomicCheckpointIO, order
from vp_rl.configuration.kinds import Count, Seconds, Text
from vp_rl.files.paths import user_path

log = logging.getLogger(__name__)


class Interrupted(SystemExit):
    """A signal has ended the run; its exit code is 128 + the signal's number, as shells and schedulers read it."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signal = signal.Signals(signum)


class RunCheckpoints(Checkpoint):
    """Keeps the run's last checkpoints, and writes one when it is told to stop.

    SIGTERM, SIGUSR1 and Ctrl-C let the run go on to the next place it can be resumed from exactly (the end of ReFL's
    update, or of DDPO's round; at once where no update has been made since the last such place), but no longer than
    `grace`. Then it writes a checkpoint and exits with 128 + the signal's number. If time runs out, or on the second
    Ctrl-C, it exits without: what was learned since the last checkpoint is lost. Of several processes it is enough that
    one is told; as they must agree, sampling is finished then, though nothing is learned from it any more. Where
    Lightning runs a SLURM job with automatic requeueing, its own handler is called after the checkpoint is written, and
    has the job started again; a job of one process also where time ran out, from its last checkpoint.
    A run that is resumed within an epoch has that epoch's metrics of the second part only. A reward model's run stops
    at the end of epochs only.

    Checkpoints of sharded strategies that write folders are not atomic.

    Args:
        folder: where they go, as `epoch-0008.ckpt` after eight epochs, `epoch-0008-batch-0003.ckpt` within the ninth.
        every_n_epochs: epochs between them; the end of the last epoch has one too.
        keep: how many.
        grace: seconds that a signal leaves for finishing. Held-out evaluations at an epoch's end count.
    """

    def __init__(self, folder: Text, every_n_epochs: Count = 1, keep: Count = 3, grace: Seconds = 60.0) -> None:
        if every_n_epochs < 1 or keep < 1:
            raise ValueError(
                f"callbacks.checkpoint.every_n_epochs={every_n_epochs} and keep={keep} must be at least 1."
            )
        if grace <= 0:
            raise ValueError(f"callbacks.checkpoint.grace={grace} must be more than 0 seconds.")
        self.settings: Mapping[str, Any] = {}
        """The run's, to be kept in its checkpoints; whoever composed them sets this."""
        self._folder, self._every, self._keep, self._grace = user_path(folder), every_n_epochs, keep, grace
        self._replaced: dict[int, Any] = {}
        self._asked: int | None = None  # the signal that has come
        self._running = False
        self._alone = True  # in one process: others need not be told to stop
        self._started = self._left = False
        self._exact = False  # no update has been made since the last place that can be resumed from
        self._place = self._saved = (0, 0)  # epochs, and batches of the next one: that place, and the last checkpoint's
        self._extra_state: dict[str, Any] = {}  # at that place

    def setup(self, trainer: lightning.Trainer, module: lightning.LightningModule, stage: str) -> None:
        """Has checkpoints written atomically, unless the user chose how; removes what a kill left half-written."""
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        if trainer.is_global_zero and self._folder.is_dir():
            for file in self._folder.glob(".*.ckpt.*.tmp"):
                file.unlink()

    # --- when

    def on_fit_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Listens to signals from here on; SIGUSR1 later, for what Lightning does with it has to be known."""
        self._running, self._alone = True, trainer.world_size == 1
        self._listen(signal.SIGTERM, signal.SIGINT)

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Opens the epoch for everybody where a run goes on in the middle of one: Lightning leaves that out."""
        self._started = True
        self._listen(signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        if trainer.fit_loop.restarted_mid_epoch:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                callback.on_train_epoch_start(trainer, module)
            module.on_train_epoch_start()
        self._saved = trainer.current_epoch, _batches(trainer) if trainer.fit_loop.restarted_mid_epoch else 0

    def on_train_epoch_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """A place to resume from; and to stop at, where that was wanted in the epoch before."""
        if self._left:
            raise Interrupted(self._stopper())
        self._reach(module, trainer.current_epoch, _batches(trainer) if trainer.fit_loop.restarted_mid_epoch else 0)

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        """The last moment before weights change: several processes stop here if one was told to while it sampled."""
        if not self._alone and self._exact and self._is_asked(trainer):
            self._stop(trainer)
        self._exact = False

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops if it was asked to and a run can be resumed from here; an epoch's last batch leaves that to its end."""
        done = batch_idx + 1
        loader = trainer.train_dataloader  # which knows what of its batches it can give again
        whole = isinstance(loader, Resumable) and loader.resumable_after(done)
        if not whole or done % trainer.accumulate_grad_batches or done == trainer.num_training_batches:
            return
        self._reach(module, trainer.current_epoch, done)
        if self._is_asked(trainer):
            self._stop(trainer)

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Writes one now and then, at the end of the run, and when the run is to stop."""
        done, asked = trainer.current_epoch + 1, self._is_asked(trainer)
        last = done == trainer.max_epochs or trainer.global_step == trainer.max_steps or trainer.should_stop
        if done % self._every == 0 or last or asked:
            self._save(trainer, done, 0)
        if asked:
            self._leave()  # when the next epoch starts: the metrics of this one are not logged yet
        if last:  # what comes is evaluated again if it is broken off
            self._exact, self._place = True, self._saved
        if asked and last and self._alone:
            signal.setitimer(signal.ITIMER_REAL, 0.5)
        elif asked and last:
            raise Interrupted(self._stopper())

    def on_exception(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Writes what was learned where a signal came while images were sampled; an error leaves things as they are."""
        if not isinstance(exception, Interrupted):
            return
        # Lightning's own count is still the last epoch's for a moment after a new one has begun.
        if self._alone and self._exact and _batches(trainer) == self._place[1]:
            self._save(trainer, *self._place)
        if not self._alone:
            self._end_others(trainer, exception)
        if trainer.is_global_zero:
            newest = max(self._own(), key=order, default=None)
            kept = f"resume=auto goes on from {newest}" if newest else "there was nothing to keep yet"
            log.warning("stopped by %s; %s", exception.signal.name, kept)
        if self._alone and not self._left and exception.signal == self._asked:  # not by a Ctrl-C after it
            self._leave()

    def on_fit_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Finishes a run that was killed after its last epoch: Lightning has nothing to train and skips the rest."""
        if self._started or trainer.ckpt_path is None:
            return
        progress: Any = trainer.fit_loop.epoch_progress.current
        progress.completed = progress.processed
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            callback.on_train_start(trainer, module)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            callback.on_train_end(trainer, module)
        module.on_train_end()

    def teardown(self, trainer: lightning.Trainer, module: lightning.LightningModule, stage: str) -> None:
        """Signals do again what they did before."""
        self._running = False
        if threading.current_thread() is threading.main_thread():
            signal.setitimer(signal.ITIMER_REAL, 0)

    # --- what

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds the settings; and the reward's state as it was before the round that was broken off."""
        # For good, as by patience; a run whose time was up may go on.
        stopped = trainer.should_stop and not any(isinstance(each, Timer) for each in trainer.callbacks)  # type: ignore[attr-defined]
        checkpoint["run"] = {"settings": dict(self.settings), "devices": trainer.world_size, "stopped": stopped}
        if self._exact:
            checkpoint["state_dict"].update(self._extra_state)

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Says so where the number of devices is another one."""
        before = checkpoint.get("run", {}).get("devices", trainer.world_size)
        if before != trainer.world_size and trainer.is_global_zero:
            log.warning(
                "the run was on %d devices and goes on with %d: from the same weights, but not bit for bit, and if all "
                "of them together do not do as much as before, with other prompts and other noise",
                before,
                trainer.world_size,
            )

    def _save(self, trainer: lightning.Trainer, epoch: int, batch: int) -> None:
        if (epoch, batch) == self._saved:
            return
        name = f"epoch-{epoch:04d}.ckpt" if not batch else f"epoch-{epoch:04d}-batch-{batch:04d}.ckpt"
        trainer.save_checkpoint(self._folder / name, weights_only=False)
        self._saved = epoch, batch
        if trainer.is_global_zero:
            until_now = sorted((file for file in self._own() if order(file) <= self._saved), key=order)
            for old in until_now[: -self._keep]:
                old.unlink()

    def _stop(self, trainer: lightning.Trainer) -> NoReturn:
        self._save(trainer, *self._place)
        self._leave()
        raise Interrupted(self._stopper())

    def _end_others(self, trainer: lightning.Trainer, exception: Interrupted) -> None:
        """Nobody is to wait for ever for a process that has gone; nor to be killed while it goes.

        Lightning kills the main process, and what it exits with, if one that it has started ends with another code
        than 0. Where torchrun or a scheduler has started them, it is theirs to end the others, and to read the codes.
        """
        strategy: Any = trainer.strategy
        if not isinstance(strategy.cluster_environment, LightningEnvironment):
            return
        if not self._left:
            strategy.launcher.kill(signal.SIGKILL)
        elif not trainer.is_global_zero:
            exception.code = 0

    def _own(self) -> list[Path]:
        return [file for file in self._folder.glob("epoch*.ckpt") if order(file) >= (0, 0)]

    def _reach(self, module: lightning.LightningModule, epoch: int, batch: int) -> None:
        self._exact, self._place = True, (epoch, batch)
        if isinstance(module, PolicyTraining):
            self._extra_state = copy.deepcopy(module.extra_state())

    # --- signals

    def _listen(self, *signals: signal.Signals) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # Python allows it nowhere else
        for signum in signals:
            before = signal.signal(signum, self._hear)
            while isinstance(owner := getattr(before, "__self__", None), RunCheckpoints) and not owner._running:
                before = owner._replaced.get(signum)  # of a run before this one, in the same process
            if before != self._hear:  # the second time it is Lightning's for SIGTERM, which stops after any batch
                self._replaced.setdefault(signum, before)

    def _hear(self, signum: int, frame: FrameType | None) -> None:
        """A signal has come: to this process, in the middle of anything."""
        if not self._running:
            signal.signal(signum, self._replaced[signum] or signal.SIG_DFL)
            signal.raise_signal(signum)
        elif self._asked is not None:
            if signum == signal.SIGINT:  # the user does not want to wait
                self._exact = False
                raise Interrupted(signum)
        elif self._alone and (self._exact or not self._started):
            self._asked = signum
            raise Interrupted(signum)
        else:
            self._asked = signum
            log.warning("%s: finishing what can be resumed, up to %g s", signal.Signals(signum).name, self._grace)
            signal.signal(signal.SIGALRM, self._run_out)
            signal.setitimer(signal.ITIMER_REAL, self._grace)

    def _run_out(self, signum: int, frame: FrameType | None) -> None:
        if self._running and self._asked is not None:
            if not self._left:
                log.warning("callbacks.checkpoint.grace=%g seconds were too few for a checkpoint", self._grace)
            raise Interrupted(self._asked)

    def _is_asked(self, trainer: lightning.Trainer) -> bool:
        """Whether any process was told to stop; all of them answer alike. From then on time is not short any more."""
        asked = self._asked is not None
        if not self._alone:
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        if asked and self._asked is not None:
            signal.signal(signal.SIGALRM, self._run_out)
            signal.setitimer(signal.ITIMER_REAL, 0)
        return asked

    def _leave(self) -> None:
        """The checkpoint is written: whoever has the job started again may do so."""
        self._left, requeue = True, self._replaced.get(self._stopper())
        if self._stopper() == signal.SIGUSR1 and callable(requeue):
            requeue(signal.SIGUSR1, None)

    def _stopper(self) -> int:
        return self._asked or signal.SIGTERM  # another process was asked


def _batches(trainer: lightning.Trainer) -> int:
    """Of the running epoch, those that are done."""
    return trainer.fit_loop.epoch_loop.batch_progress.current.processed  # pyright: ignore[reportAttributeAccessIssue]
