"""Whether a run's devices are there: looked at before anything is loaded, said by the settings that ask for them."""

from collections.abc import Callable, Mapping
from typing import Any

import lightning
import torch
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

_OF_DEVICES = ("GPU", "gpu backend", "machine only has", "devices", "accelerator is not available", "DeepSpeed")


def check_devices(trainer: Mapping[str, Any], make: Callable[[], lightning.Trainer]) -> None:
    """Has Lightning look for what `trainer` asks for.

    Args:
        trainer: the run's settings of it.
        make: the trainer, without callbacks and loggers; what it raises may have Lightning's word as its cause.

    Raises:
        ValueError: it is not here; says what is, and how to ask for it.
    """
    try:
        strategy = make().strategy
    except Exception as error:
        found = error if isinstance(error, MisconfigurationException) else error.__cause__
        if not isinstance(found, MisconfigurationException):
            raise
        said = " ".join(str(found).split())
        if "DeepSpeed" in said and CUDAAccelerator.is_available():
            raise ValueError(f"{said} Or take trainer=ddp.") from error
        if not any(word in said for word in _OF_DEVICES):
            raise  # of another setting, which it names
        raise ValueError(_unavailable(trainer, said)) from error
    if isinstance(strategy, DeepSpeedStrategy) and not isinstance(strategy.accelerator, CUDAAccelerator):
        raise ValueError(_unavailable(trainer, "DeepSpeed works on CUDA GPUs alone."))


def _unavailable(trainer: Mapping[str, Any], why: str) -> str:
    asked = " ".join(f"trainer.{name}={trainer[name]}" for name in ("accelerator", "devices") if name in trainer)
    kinds = (CUDAAccelerator, MPSAccelerator)
    gpus = next((kind.auto_device_count() for kind in kinds if kind.is_available()), 0)
    if gpus:
        here = f"{gpus} GPU{'s are' if gpus > 1 else ' is'} here: trainer.devices=auto takes"
        out = f"{here} {'all of them' if gpus > 1 else 'it'}, trainer=cpu none."
    else:
        out = f"No GPU is here that torch {torch.__version__} can use: trainer=cpu does without."
    return f"{asked} cannot be had on this machine ({why.rstrip('.')}). {out}"
