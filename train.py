"""Compose, instantiate, fit, report. With scripts/, the only code that knows Hydra.

python train.py experiment=ddpo_vpscore          fine-tune the tiny Stable Diffusion against VP-Score by policy gradient
python train.py experiment=refl_vpscore          the same through the reward's gradient
python train.py experiment=vpscore               build VisionPrefer and train the reward model on it
"""

import logging
import os
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before their import: it warns of missing torchvision

import hydra
import lightning
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

log = logging.getLogger("vp_rl")


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config: DictConfig) -> float | None:
    """One run; its result is what a sweep maximises."""
    try:
        return run(config)
    except InstantiationException as error:
        _stop(error.__cause__ if isinstance(error.__cause__, ValueError | OSError) else error)
    except (ValueError, OSError, OmegaConfBaseException) as error:
        _stop(error)


def run(config: DictConfig) -> float | None:
    """Builds the objects of a config and trains.

    Returns:
        The held-out judge's mean rating gain for a policy, or the test accuracy of a reward model.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    lightning.seed_everything(config.seed, workers=True, verbose=False)
    data = instantiate(config.data)
    algorithm = instantiate(config.algorithm)
    trainer: lightning.Trainer = instantiate(
        config.trainer, callbacks=_present(config.callbacks), logger=_present(config.logger)
    )
    for logger in trainer.loggers:
        logger.log_hyperparams(OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]
    trainer.fit(algorithm, data, ckpt_path=_checkpoint(config.resume, folder))
    if config.test:
        trainer.test(algorithm, data, verbose=False)
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        from vp_rl.evaluation.sweep import write_table

        write_table(folder.parent)
    return _objective(trainer, config.objective)


def _present(nodes: DictConfig) -> list[Any]:
    """The nodes that were not switched off with `=null`."""
    return [instantiate(node) for node in nodes.values() if node is not None]


def _checkpoint(resume: str | None, folder: Path) -> str | None:
    """The checkpoint to go on from.

    Raises:
        FileNotFoundError: there is none where `resume` says.
        ValueError: that file is no checkpoint, or a truncated one.
    """
    if resume is None:
        return None
    path = folder / "checkpoints" / "last.ckpt" if resume == "auto" else Path(resume)
    if not path.is_file():
        if resume == "auto":
            return None
        raise FileNotFoundError(f"resume={resume!r}: there is no such checkpoint. Runs keep theirs in checkpoints/.")
    if not zipfile.is_zipfile(path):  # what torch.save writes, closed properly
        raise ValueError(
            f"resume={resume!r}: {path} is no checkpoint, or a truncated one. Give another of checkpoints/."
        )
    return str(path)


def _objective(trainer: lightning.Trainer, name: str) -> float | None:
    value = trainer.callback_metrics.get(name)
    return None if value is None else float(value)


def _stop(error: BaseException) -> None:
    """One message for what the user can put right; HYDRA_FULL_ERROR=1 shows where it came from."""
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        raise error
    sys.exit(f"error: {error}")


def _quieten() -> None:
    """Hides what other libraries say to themselves; their errors, and warnings that a user can act on, stay."""
    for expected in (
        ".*LeafSpec.*",  # Lightning 2.6 on torch 2.13
        "Found .* in eval mode at the start of training",  # frozen models, as they should be
        "Experiment logs directory .* exists and is not empty",  # Hydra has written the settings there
        "Checkpoint directory .* exists and is not empty",  # a resumed run
        "The '.*_dataloader' does not have many workers",  # images are small; data.num_workers is a setting
    ):
        warnings.filterwarnings("ignore", message=expected)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)  # tips and devices
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a CPU kernel that this system does not use


if __name__ == "__main__":
    _quieten()
    main()
