"""Watches a run from outside: held-out prompts and a judge that the run is not trained against."""

import logging
import re
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from tqdm import tqdm

from vp_rl.algorithms.base import PolicyTraining
from vp_rl.callbacks.best import BestAdapter
from vp_rl.callbacks.held_out_images import gather, kept_images, show
from vp_rl.configuration.kinds import Count, Text
from vp_rl.evaluation.asking import Asked
from vp_rl.evaluation.claims import FIRST
from vp_rl.evaluation.conclusion import ALONE, conclude, publish
from vp_rl.evaluation.guidance_curve import GuidanceCurve, Side, guidance_curves, without_curve
from vp_rl.evaluation.images import Evaluation, Evaluator
from vp_rl.evaluation.no_adapter import BELOW
from vp_rl.evaluation.signs import Moment, Sign, moment, signs
from vp_rl.evaluation.store import NOTHING, Kept, Store
from vp_rl.evaluation.verdict import Chosen
from vp_rl.files.paths import user_path
from vp_rl.interfaces import Policy
from vp_rl.types import Usage

log = logging.getLogger(__name__)


class HeldOutEvaluation(lightning.Callback):
    """Evaluates the base model once, the policy now and then, and compares the two when training ends.

    While training it looks at prompts of `evaluation.watch`, at the end at those of `evaluation.split`: what is chosen
    by the first has not seen the second. Then it draws `evaluation.curve`, if that is wanted. Logs `held_out/*` and, at
    the end, the changes as `final/*`; says in words what looks like an exploited reward. Writes `samples/`, `best/`,
    and at the end `adapter/`, `summary.json` and `report.html`, to the run's folder. All processes make images, the
    main one scores and rates them. The policy must be whole in each (one device or DDP, not FSDP).

    Args:
        evaluator: makes and judges the images.
        every: epochs between evaluations while training; the last epoch has one too.
        small: prompts of those evaluations and of the sample grids.
        note: what readers of the report must know about the data.
        best: the held-out metric by which the best adapter is kept in `best/`, and becomes the run's result. The base
            model competes: where no epoch beats it there is no `adapter/`, terminal and report say so, and the best
            trained one is in `below_base/`. None: the result is the last one.
        patience: evaluations without a better one after which training stops. None: it goes on to its end.
        judged: a file for what the judge answers, which is not asked again about the same images: by this run when it
            is resumed, nor by others with the same file. None: nothing is kept.
        cache: a file for the base model's images, scores and ratings, which other runs of that model need not make
            again. Whoever starts the run tells its `settings`, by which the model is known. None: nothing is kept.

    Raises:
        ValueError: a setting makes no sense.
    """

    settings: Mapping[str, Any] = {}
    """Of the run, by node."""

    def __init__(
        self,
        evaluator: Evaluator,
        every: Count,
        small: Count,
        note: str = "",
        best: Text | None = None,
        patience: Count | None = None,
        judged: Text | None = None,
        cache: Text | None = None,
    ) -> None:
        if every < 1 or small < 1:
            raise ValueError(f"callbacks.held_out.every={every} and small={small} must be at least 1.")
        if patience is not None and (best is None or patience < 1):
            raise ValueError(
                f"callbacks.held_out.patience={patience} must be at least 1, and needs a metric: set "
                "callbacks.held_out.best=mean_rating, or patience=null."
            )
        self._evaluator, self._every, self._note = evaluator, every, note
        self._watched = evaluator.watched[:small]
        if not self._watched:
            raise ValueError(
                f"callbacks.held_out watches prompts of the {evaluator.watch} split (evaluation.watch), where none is. "
                "Hold some out with prompts.validation, or set callbacks.held_out=null."
            )
        if best is not None and (both := set(self._watched) & set(evaluator.prompts)):
            raise ValueError(
                f"callbacks.held_out.best={best} would be chosen by prompts that the result is measured on, such as "
                f"{min(both)!r}: let evaluation.watch={evaluator.watch} be another split than evaluation.split."
            )
        self._best = None if best is None else BestAdapter(best, patience)
        self._judged, self._kept = judged, NOTHING  # opened on the main process
        self._cache, self._of_base = cache, NOTHING  # opened on all
        self._base: Evaluation | None = None  # of the final prompts; None on all but the main process
        self._small: Evaluation | None = None  # of the watched ones
        self._history: list[Moment] = []
        self._said: set[str] = set()
        self._seconds = 0.0  # of training, before a resumed run was interrupted
        self._asked = Asked()  # of the judge, in this run so far
        self._parts: dict[str, float] = {}  # seconds of the evaluations of this process
        self._started = time.monotonic()

    def setup(self, trainer: lightning.Trainer, module: lightning.LightningModule, stage: str) -> None:
        """Looks whether each process has the whole policy, and what the judge has answered before.

        Raises:
            ValueError: its weights are divided among devices; the file of answers is something else.
        """
        if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy):
            raise ValueError(
                "callbacks.held_out needs the whole policy on each device, and FSDP divides it among them: add "
                "callbacks.held_out=null (adapter/ then has the last adapter), or use trainer=ddp or deepspeed."
            )

        if self._cache is not None and self._of_base is NOTHING and isinstance(module, PolicyTraining):
            try:
                self._of_base = kept_images(user_path(self._cache), trainer, module, self._evaluator, self.settings)
            except OSError as error:
                raise ValueError(f"callbacks.held_out.cache: {error} With null nothing is kept.") from error
        if self._judged is not None and self._kept is NOTHING and trainer.is_global_zero:
            try:
                self._kept = Kept(Store(user_path(self._judged)))
            except OSError as error:
                raise ValueError(f"callbacks.held_out.judged: {error} With null no answers are kept.") from error

    def teardown(self, trainer: lightning.Trainer, module: lightning.LightningModule, stage: str) -> None:
        """Lets go of the files."""
        for kept in (self._kept, self._of_base):
            if kept is not NOTHING:
                kept.store.close()
        self._kept = self._of_base = NOTHING

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """The base model's images: the adapter is off, so a resumed run gets the same ones.

        Raises:
            ValueError: the judge cannot be asked; there is no metric that is called as `best` says.
        """
        assert isinstance(module, PolicyTraining)
        self._evaluator.annotator.check()
        log.info("evaluating the base model on %d held-out prompts", len(self._evaluator.prompts))
        self._base = self._evaluate(trainer, module, self._evaluator.prompts, "base model", "base")
        self._small = self._evaluate(trainer, module, self._watched, "base model", "base")
        if self._base is not None and self._small is not None:
            log.info("base: %s", "  ".join(f"{name} {value:.3f}" for name, value in self._base.means().items()))
            base = moment(0, self._small)
            if self._history and not self._history[0].is_like(base):
                log.warning("the evaluations until here were of other prompts or metrics: their history is left out")
                self._history = []
            if not self._history:
                self._history.append(base)
                # Straight to the loggers: what is logged through the module waits for the end of the first epoch.
                _log(trainer, "held_out", self._small.means())
            if self._best is not None:
                self._best.base = self._small.means().get(self._best.metric, float("nan"))
            if self._best is not None and self._best.epoch:  # the run may go on in another folder
                self._best.save(Path(trainer.default_root_dir), module.policy)
        names = trainer.strategy.broadcast([] if self._small is None else list(self._small.metrics()))
        if self._best is not None and self._best.metric not in names:
            raise ValueError(f"callbacks.held_out.best={self._best.metric!r} is none of {', '.join(names)}.")
        trainer.should_stop = trainer.should_stop or (self._best is not None and self._best.exhausted)
        self._started = time.monotonic()

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """A small evaluation: metrics under `held_out/`, a grid under `samples/`, images to the trackers."""
        done = trainer.current_epoch + 1
        last = done == trainer.max_epochs or trainer.global_step == trainer.max_steps or trainer.should_stop
        if done % self._every and not last:
            return
        assert isinstance(module, PolicyTraining)
        with module.averaged():
            now, value = self._evaluate(trainer, module, self._watched, f"epoch {done}"), 0.0
        if now is not None:
            means = now.means()
            value = 0.0 if self._best is None else means[self._best.metric]
            kl = trainer.callback_metrics.get("train/kl")
            self._history.append(moment(done, now, None if kl is None else float(kl)))
            found = self._say(module)
            means["signs"] = float(sum(sign.severity == "warning" for sign in found))
            # Through the module, so that a ModelCheckpoint can monitor these: held_out/reward.
            module.log_dict({f"held_out/{name}": mean for name, mean in means.items()}, rank_zero_only=True)
            show(trainer, self._small, now, done)
        if self._best is None:
            trainer.strategy.barrier()
            return
        with module.averaged():
            better = self._best.see(trainer.strategy.broadcast(value), done, module.policy)
        if better and trainer.is_global_zero:
            self._best.save(Path(trainer.default_root_dir), module.policy)
        if self._best.exhausted and not last:
            log.info("stopping after epoch %d: the best by %s is epoch %d", done, self._best.metric, self._best.epoch)
            trainer.should_stop = True

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """The full comparison, and everything a user takes away from the run."""
        assert isinstance(module, PolicyTraining)
        seconds, folder = self._elapsed(), Path(trainer.default_root_dir)
        with module.averaged(), nullcontext() if self._best is None else self._best.on(module.policy):
            if trainer.is_global_zero:  # first: it survives whatever goes wrong below
                self._leave(folder / "adapter", module.policy)
            tuned = self._evaluate(trainer, module, self._evaluator.prompts, "trained model")
            curves = self._curves(trainer, module, tuned)
        if tuned is not None:
            self._conclude(trainer, module, tuned, curves, seconds)

    def _leave(self, adapter: Path, policy: Policy) -> None:
        """The run's result; no adapter where the base model is better."""
        if self._best is not None and self._best.epoch and not self._best.beats_base:
            shutil.rmtree(adapter, ignore_errors=True)
            return
        adapter.mkdir(parents=True, exist_ok=True)
        policy.save_adapter(adapter)

    def _curves(
        self, trainer: lightning.Trainer, module: PolicyTraining, tuned: Evaluation | None
    ) -> list[GuidanceCurve]:
        """Over guidance scales; on the main process."""
        why_not = without_curve(self._evaluator, module.policy)
        if why_not is not None:
            log.info(why_not) if why_not else None
            return []

        def make(side: Side, evaluator: Evaluator, prompts: list[str]) -> Evaluation | None:
            return self._evaluate(trainer, module, prompts, "guidance curve", side, evaluator)

        sampler = getattr(module, "sampler", None)
        trained = None if sampler is None or sampler.scales else sampler.guidance
        metric = FIRST if self._best is None else self._best.metric
        known: dict[Side, Evaluation | None] = {"base": self._base, "tuned": tuned}
        agree = trainer.strategy.broadcast
        return guidance_curves(self._evaluator, make, known, metric=metric, trained=trained, agree=agree)

    def _conclude(
        self,
        trainer: lightning.Trainer,
        module: PolicyTraining,
        tuned: Evaluation,
        curves: list[GuidanceCurve],
        seconds: float,
    ) -> None:
        assert self._base is not None, "evaluated when training started"
        folder, asked = Path(trainer.default_root_dir), {ALONE: self._asked}
        done = conclude(self._evaluator, self._base, tuned, self._history, _name(module), asked=asked, curves=curves)
        final = {name: change.difference for name, change in done.compared.changes.items()}
        final |= curves[0].logged() if curves else {}
        _log(trainer, "final", final)
        # For whoever started the run, as a sweep does: logging through the module is over by now.
        trainer.callback_metrics.update({f"final/{name}": torch.tensor(value) for name, value in final.items()})
        more: dict[str, Any] = {"epochs": trainer.current_epoch, "training_seconds": round(seconds, 1)}
        chosen, best = None, self._best
        if best is not None and best.epoch:
            chosen = Chosen(best.metric, best.epoch, trainer.current_epoch, best.value, best.base)
            told = {"metric": best.metric, "epoch": best.epoch, "value": best.value, "base": best.base}
            more["best"] = told | {"beats_base": chosen.beats_base}
        seconds_by_part = {"training": seconds, **self._parts}
        publish(done, folder, self._evaluator, seconds_by_part, more, note=self._note, chosen=chosen)
        if chosen is not None and not chosen.beats_base:
            print(f"Adapter: {chosen.words}. The best trained one: {folder / BELOW}")
        else:
            print(f"Adapter: {folder / 'adapter'}{'' if chosen is None else f' ({chosen.words})'}")

    def state_dict(self) -> dict[str, Any]:
        """The wall time so far, so that a resumed run reports all of it; the evaluations, and the best adapter."""
        state: dict[str, Any] = {
            "seconds": self._elapsed(),
            "history": [each.as_dict() for each in self._history],
            "asked": [self._asked.questions, self._asked.kept, list(self._asked.usage)],
        }
        return state if self._best is None else state | {"best": self._best.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Reads what `state_dict` gave."""
        self._seconds = state_dict["seconds"]
        questions, kept, usage = state_dict.get("asked", (0, 0, ()))
        self._asked = Asked(questions, kept, Usage(*usage))
        self._history = [Moment(**each) for each in state_dict.get("history", [])]
        if self._best is not None and "best" in state_dict:
            self._best.load_state_dict(state_dict["best"])

    def _elapsed(self) -> float:
        return self._seconds + time.monotonic() - self._started

    def _evaluate(
        self,
        trainer: lightning.Trainer,
        module: PolicyTraining,
        prompts: list[str],
        what: str,
        side: Side = "tuned",
        evaluator: Evaluator | None = None,
    ) -> Evaluation | None:
        """On the main process; None on the others, which have made their share of the images."""
        evaluator = evaluator or self._evaluator
        started, rank, ranks = time.monotonic(), trainer.global_rank, trainer.world_size
        quiet, total = not sys.stderr.isatty(), len(prompts[rank::ranks]) * len(evaluator.seeds)
        images = self._of_base if side == "base" else NOTHING
        with (
            module.policy.base() if side == "base" else nullcontext(),
            trainer.precision_plugin.forward_context(),
            tqdm(total=total, desc=f"held-out images, {what}", unit="img", leave=False, disable=quiet) as bar,
        ):
            share = (rank, ranks)
            made = evaluator.make(module.policy, prompts, bar.update, share=share, kept=images) if total else None
            pixels = gather(made, len(evaluator.seeds), ranks)
            if pixels is None or not trainer.is_global_zero:
                return None
            kept = self._kept if images is NOTHING else images
            evaluation = evaluator.judge(pixels, module.reward, prompts, module.device, kept)
            self._asked = self._asked.plus(evaluation.asked)
        if not what.startswith("epoch"):  # those count as training
            part = f"{what}'s images"
            self._parts[part] = self._parts.get(part, 0.0) + time.monotonic() - started
        return evaluation

    def _say(self, module: PolicyTraining) -> list[Sign]:
        """New signs to the log; numbers apart, each is said once."""
        found = signs(self._history, reward=_name(module))
        for sign in found:
            if (kind := re.sub(r"[-+\d.%]+", "", sign.words)) not in self._said:
                self._said.add(kind)
                log.warning("%s (epoch %d)", sign.words, self._history[-1].epoch)
        return found


def _name(module: PolicyTraining) -> str:
    return f"the trained reward ({type(module.reward).__name__})"


def _log(trainer: lightning.Trainer, group: str, values: dict[str, float]) -> None:
    """To the loggers at once; `epoch` counts from 0 as Lightning's own does, so that before the first it is -1."""
    for logger in trainer.loggers:
        named = {f"{group}/{name}": value for name, value in values.items()}
        logger.log_metrics({**named, "epoch": trainer.current_epoch - 1}, step=trainer.global_step)
        logger.save()
