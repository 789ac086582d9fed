"""Compose, instantiate, fit, report. With scripts/, the only code that knows Hydra.

python train.py experiment=ddpo_vpscore          fine-tune the tiny Stable Diffusion against VP-Score by policy gradient
python train.py experiment=refl_vpscore          the same through the reward's gradient
python train.py experiment=vpscore               build VisionPrefer and train the reward model on it
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before their import: it warns of missing torchvision

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, InstantiationException
from hydra.types import RunMode
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from scripts.command_line import CONF, NAMED_HERE, start, stay_alone
from vp_rl.configuration.check import check
from vp_rl.configuration.own import AUTOMATIC, TRAIN
from vp_rl.evaluation.lock import is_held
from vp_rl.evaluation.terminal import is_full, quiet_libraries, stop
from vp_rl.secrets import masked

if TYPE_CHECKING:  # `--help` and mistyped settings need not wait for it
    import lightning

log = logging.getLogger("vp_rl")


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config: DictConfig) -> float | None:
    """One run; its result is what a sweep maximises."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        with quiet_libraries():
            return _as_job(config) if _is_job() and not config.dry_run else run(config)
    except InstantiationException as error:
        _stop(error.__cause__ if isinstance(error.__cause__, ValueError | OSError) else error, folder)
    except (ValueError, OSError, OmegaConfBaseException) as error:
        _stop(error, folder)
    except Exception as error:
        if not is_full(error):  # each library has an exception of its own for that
            raise
        _stop(error, folder)


def _as_job(config: DictConfig) -> float | None:
    """A job of a sweep: what was done before is not done again, what was interrupted goes on."""
    from vp_rl.evaluation.job import Job

    chosen = HydraConfig.get()
    with Job(Path(chosen.runtime.output_dir), list(chosen.overrides.task)) as job:
        if not job.finished:
            job.finish(run(config))
        return job.objective


def run(config: DictConfig) -> float | None:
    """Builds the objects of a config and trains.

    Returns:
        The held-out judge's mean rating gain for a policy, or the test accuracy of a reward model; None of a dry run.
    """
    import lightning
    from lightning.pytorch.utilities import rank_zero_only

    from vp_rl.planning.devices import check_devices

    folder = Path(HydraConfig.get().runtime.output_dir)
    asked: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    written: Any = OmegaConf.to_container(config)
    check(asked, TRAIN, written=written, folder=folder, later=AUTOMATIC)
    if rank_zero_only.rank == 0 and not _is_job():  # a job has its own lock; torchrun's and SLURM's processes come here
        stay_alone(folder)
    lightning.seed_everything(config.seed, workers=True, verbose=False)
    check_devices(config.trainer, lambda: instantiate(config.trainer, logger=False, enable_checkpointing=False))
    _check_length(config.trainer)
    planned = _planned(config)
    if config.dry_run:
        return None
    data = instantiate(config.data)
    settings: dict[str, Any] = masked(OmegaConf.to_container(config, resolve=True))
    checkpoint = _checkpoint(config.resume or ("auto" if _is_job() else None), folder, settings)
    if checkpoint is None and config.resume:
        log.info("resume=%s: nothing to go on from, the run begins", config.resume)
    algorithm = planned or instantiate(config.algorithm)
    trainer: lightning.Trainer = instantiate(
        config.trainer, callbacks=_present(config.callbacks), logger=_present(config.logger)
    )
    from vp_rl.callbacks.checkpoint import RunCheckpoints
    from vp_rl.callbacks.held_out import HeldOutEvaluation
    from vp_rl.callbacks.trackers import tracked

    for watching in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(watching, HeldOutEvaluation):
            watching.settings = settings
    if isinstance(trainer.checkpoint_callback, RunCheckpoints):
        trainer.checkpoint_callback.settings = settings
    for file in folder.glob("hpc_ckpt_*.ckpt"):  # Lightning's, of a job that was queued again: it would prefer them
        file.unlink(missing_ok=True)
    with tracked(trainer, settings):
        trainer.fit(algorithm, data, ckpt_path=checkpoint, weights_only=True)
        if config.test:
            trainer.test(algorithm, data, verbose=False)
    if _is_job() and trainer.is_global_zero:
        from vp_rl.evaluation.sweep import write_table

        write_table(folder.parent)
    return _objective(trainer, config.objective)


def _planned(config: DictConfig) -> lightning.LightningModule | None:
    """Fills in what a geometry and `auto` leave to be worked out, and shows it in a dry run.

    Returns:
        The algorithm, which had to be built for that; None: there was nothing to be done.
    """
    from vp_rl.planning.geometry import automatic, is_wanted

    settings: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    if not is_wanted(settings):
        return None
    from vp_rl.planning.plan import Planner
    from vp_rl.planning.shown import show

    for name in automatic(settings):
        OmegaConf.update(config, name, 1)
    algorithm = instantiate(config.algorithm)
    trainer = instantiate(config.trainer, logger=False, enable_checkpointing=False)
    stated = {given.partition("=")[0].lstrip("+") for given in HydraConfig.get().overrides.task}
    planner = Planner(settings, algorithm, trainer, instantiate(config.algorithm.optimizer), stated)
    for name, value in planner.filled.items():
        OmegaConf.update(config, name, value)
    algorithm.resize({name: size for name, size in planner.filled.items() if name.startswith("algorithm.")})
    if config.dry_run:
        show(planner)
    return algorithm


def _present(nodes: DictConfig) -> list[Any]:
    """The nodes that were not switched off with `=null`."""
    return [instantiate(node) for node in nodes.values() if node is not None]


def _checkpoint(resume: str | None, folder: Path, settings: dict[str, Any]) -> Path | None:
    """The checkpoint to go on from; None: begin.

    `auto` is the newest valid one in this run's folder; or, where that is a new one that Hydra named, in the newest
    unfinished run beside it whose settings do not forbid it. A path is a checkpoint, or the folder of a run.

    Raises:
        FileNotFoundError: there is none where `resume` says.
        ValueError: the file is no checkpoint, or of a run with other settings; or the folder has a run's checkpoints
            and nobody said to go on.
    """
    from vp_rl.callbacks.checkpoint_files import differences, newest

    own = folder / "checkpoints"
    if resume is None:
        if any(own.glob("*.ckpt")):
            raise ValueError(
                f"{folder} has the checkpoints of a run. Go on with it by resume=auto, or choose another hydra.run.dir."
            )
        return None
    if resume != "auto":
        found = _given(Path(resume))
    elif (found := newest(own)) is None and os.environ.get(NAMED_HERE) == str(folder):
        found = _beside(folder, settings)
    if found is None:
        return None
    path, content = found
    before = content.get("run", {}).get("settings", settings)
    fixed, rounding = differences(before, settings, _class_of(settings))
    if fixed:
        raise ValueError(
            f"resume={resume}: {path} is of a run with other settings, which a run cannot change on its way: "
            f"{'; '.join(fixed)}. Give that run's, or begin a new run without resume."
        )
    if rounding:
        log.warning("the resumed run is not bit for bit the one that was stopped: %s", "; ".join(rounding))
    log.info("going on from %s", path)
    for file in (path.parents[1] / name for name in ("metrics.csv", "judged.sqlite")):
        if path.parent != own and file.is_file() and not (folder / file.name).exists():
            shutil.copy(file, folder)  # what the run has measured, and paid for, until there
    return path


def _class_of(settings: dict[str, Any]) -> type | None:
    """The algorithm's, which knows what of its settings a resumed run may change."""
    target = settings.get("algorithm", {}).get("_target_")
    return None if target is None else get_class(target)


def _given(path: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint that a user names, or the newest of a folder."""
    from vp_rl.callbacks.checkpoint_files import newest, read

    if path.is_file():
        try:
            return path, read(path)
        except ValueError as error:
            raise ValueError(f"resume='{path}': {error} Give another of checkpoints/, or resume=auto.") from error
    found = newest(path / "checkpoints") or newest(path)
    if found is None:
        raise FileNotFoundError(f"resume='{path}': there is no such checkpoint. Runs keep theirs in checkpoints/.")
    return found


def _beside(folder: Path, settings: dict[str, Any]) -> tuple[Path, dict[str, Any]] | None:
    """The newest unfinished run of the same settings, of those beside this one; what is still running is left alone."""
    from vp_rl.callbacks.checkpoint_files import differences, newest

    runs = {file.parents[1] for file in folder.parent.glob("*/checkpoints/*.ckpt")}
    for run in sorted(runs, reverse=True):  # by their date
        if is_held(run):
            continue
        found = newest(run / "checkpoints")
        if found is None or _is_finished(*found, settings):
            continue
        before = found[1].get("run", {}).get("settings")
        if before and not differences(before, settings, _class_of(settings))[0]:
            return found
    return None


def _is_finished(checkpoint: Path, content: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Whether a run has trained to its end, or was stopped for good, and was then evaluated if that was wanted."""
    from vp_rl.callbacks.checkpoint_files import order

    stopped = content.get("run", {}).get("stopped", False)
    evaluated = (checkpoint.parents[1] / "summary.json").is_file() or not settings["callbacks"].get("held_out")
    return evaluated and (stopped or order(checkpoint)[0] == settings["trainer"]["max_epochs"])


def _is_job() -> bool:
    """Whether this is one run of a sweep."""
    return HydraConfig.get().mode == RunMode.MULTIRUN


def _objective(trainer: lightning.Trainer, name: str) -> float | None:
    value = trainer.callback_metrics.get(name)
    return None if value is None else float(value)


def _stop(error: BaseException, folder: Path) -> NoReturn:
    """One message for what the user can put right; HYDRA_FULL_ERROR=1 shows where it came from.

    A sweep goes on with its other jobs, and ends with the message of the first that failed.
    """
    more = _kept(folder) if is_full(error) else ""
    if _is_job() and os.environ.get("HYDRA_FULL_ERROR") != "1":
        raise CompactHydraException(f"error: job {folder.name}: {error}{more}") from None
    stop(error, more)


def _kept(folder: Path) -> str:
    """What a full disk has left of a run."""
    from vp_rl.callbacks.checkpoint_files import order

    newest = max((folder / "checkpoints").glob("*.ckpt"), key=order, default=None)
    if newest is None:
        return f"\nThe disk of {folder} is full, and no checkpoint was written: free some space and start again."
    again = "the same command" if _is_job() else f"the same command with resume={folder}"
    return f"\nThe disk of {folder} is full. All until {newest} is safe: free space, and {again} goes on."


def _check_length(trainer: DictConfig) -> None:
    """Raises ValueError where nothing would be trained."""
    for name in ("max_epochs", "max_steps", "limit_train_batches"):
        if trainer.get(name) == 0:
            raise ValueError(f"trainer.{name}=0 trains nothing: give more; dry_run=true shows what a run would do.")


def _needs_experiment(config: DictConfig, given: list[str]) -> None:
    """Ends with the list of them where none was chosen: the defaults alone are settings that nobody has tried."""
    chosen = config.hydra.runtime.choices.get("experiment")
    if chosen not in (None, "null") or any(word.startswith("name=") for word in given):
        return
    lines = []
    for file in sorted((CONF / "experiment").glob("*.yaml")):
        about = file.read_text(encoding="utf-8").splitlines()[2].lstrip("# ")
        lines.append(f"  python train.py experiment={file.stem:18} {re.split(r'[:,.] |[.]$', about)[0]}")
    end = "error: which experiment? One of these, or settings of your own with a name: name=..."
    sys.stderr.write("\n".join([*lines, "", end, ""]))
    sys.exit(2)


def _quieten() -> None:
    """Hides what other libraries say to themselves; their errors, and warnings that a user can act on, stay."""
    for expected in (
        ".*LeafSpec.*",  # Lightning 2.6 on torch 2.13
        "Found .* in eval mode at the start of training",  # frozen models, as they should be
        "Experiment logs directory .* exists and is not empty",  # Hydra has written the settings there
        "Checkpoint directory .* exists and is not empty",  # a resumed run
        "Since DeepSpeed handles gradient clipping internally",  # it does clip, by trainer.gradient_clip_val
        "The '.*_dataloader' does not have many workers",  # images are small; data.num_workers is a setting
    ):
        warnings.filterwarnings("ignore", message=expected)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)  # tips and devices
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a CPU kernel that this system does not use


if __name__ == "__main__":
    _quieten()
    start(main, "train", check=_needs_experiment, alone=True)
