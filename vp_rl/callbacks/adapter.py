"""What a run leaves as its adapter: the last one, or a moving average, whole where devices have parts of it."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import lightning
import torch
from annotated_types import Interval
from diffusers.training_utils import EMAModel
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from vp_rl.algorithms.base import PolicyTraining
from vp_rl.callbacks.held_out import HeldOutEvaluation


class RunAdapter(lightning.Callback):
    """Writes the policy's adapter to `adapter/` in the run's folder when training ends; averages it if that is wanted.

    The average is what counts: held-out evaluations see it, the best adapter is chosen among its states, and it is what
    is written. Training does not: its images are sampled by the policy that learns from them, and it goes on from the
    weights that it has itself. Checkpoints have both.

    Args:
        ema: decay of the exponential moving average that each update adds its weights to; the n-th is added with a
            decay of at most n / (n + 9), so that a short run's average is not still where it began. None: no average.

    Raises:
        ValueError: the decay is none.
    """

    def __init__(self, ema: Annotated[float, Interval(gt=0, lt=1)] | None = None) -> None:
        if ema is not None and not 0 < ema < 1:
            raise ValueError(f"callbacks.adapter.ema={ema} must be between 0 and 1, such as 0.99; null: no average.")
        self._ema = ema
        self._average: EMAModel | None = None
        self._trained: list[nn.Parameter] = []
        self._seen = 0  # updates
        self._loaded: dict[str, Any] = {}
        self._written: Path | None = None

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Begins with the weights as they are, or goes on with a checkpoint's average.

        Raises:
            ValueError: what is trained is no policy.
        """
        if self._ema is None:
            if isinstance(module, PolicyTraining):
                module.averaged = nullcontext  # a run before this one may have left its own
            return
        if not isinstance(module, PolicyTraining):
            raise ValueError(f"callbacks.adapter.ema={self._ema} averages a policy's adapter: leave it null here.")
        self._trained = [parameter for parameter in module.policy.parameters() if parameter.requires_grad]
        self._average, self._seen = EMAModel(self._trained, decay=self._ema), trainer.global_step
        if self._loaded:
            weights = [_as(like, weight) for like, weight in zip(self._trained, self._loaded["weights"], strict=True)]
            self._average.load_state_dict(
                {"optimization_step": self._loaded["updates"], "shadow_params": weights}  # the decay is the settings'
            )
        module.averaged = self._averaged

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Adds the weights of an update."""
        if self._average is not None and trainer.global_step > self._seen:
            self._average.step(self._trained)
            self._seen = trainer.global_step

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Writes the adapter; where held-out evaluations choose the best one, they then put it in its place."""
        if not isinstance(module, PolicyTraining):
            return
        with module.averaged(), whole(module.policy):
            if trainer.is_global_zero:
                folder = Path(trainer.default_root_dir) / "adapter"
                folder.mkdir(parents=True, exist_ok=True)
                module.policy.save_adapter(folder)
                self._written = folder

    def teardown(self, trainer: lightning.Trainer, module: lightning.LightningModule, stage: str) -> None:
        """The run's last line, where no held-out evaluation has said it with its results."""
        watched = any(isinstance(each, HeldOutEvaluation) for each in trainer.callbacks)  # type: ignore[attr-defined]
        if self._written is not None and not watched:
            print(f"Adapter: {self._written}")
        self._written = None

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Inside it the policy has the average."""
        assert self._average is not None
        own = [parameter.detach().clone() for parameter in self._trained]
        try:
            self._average.copy_to(self._trained)
            yield
        finally:
            with torch.no_grad():
                for parameter, weight in zip(self._trained, own, strict=True):
                    parameter.copy_(weight)

    def state_dict(self) -> dict[str, Any]:
        """The average, whole; all devices must ask for it."""
        if self._average is None:
            return {} if self._ema is None else self._loaded  # what goes on without must not come back
        weights: list[torch.Tensor] = self._average.shadow_params
        weights = [weight.full_tensor() if isinstance(weight, DTensor) else weight for weight in weights]
        return {"updates": self._average.optimization_step, "weights": [weight.cpu() for weight in weights]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps it until training starts: the strategy may not have arranged the policy yet."""
        self._loaded = state_dict


@contextmanager
def whole(policy: nn.Module) -> Iterator[None]:
    """Inside it each device has all of the trained parameters that FSDP2 has divided among them; all must enter it."""
    divided = [
        (owner, name, parameter)
        for owner in policy.modules()
        for name, parameter in owner.named_parameters(recurse=False)
        if parameter.requires_grad and isinstance(parameter, DTensor)
    ]
    try:
        for owner, name, parameter in divided:
            setattr(owner, name, nn.Parameter(parameter.full_tensor().detach()))
        yield
    finally:
        for owner, name, parameter in divided:
            setattr(owner, name, parameter)


def _as(like: nn.Parameter, weight: torch.Tensor) -> torch.Tensor:
    """On the parameter's device, and divided as it is."""
    weight = weight.to(like.device)
    return distribute_tensor(weight, like.device_mesh, like.placements) if isinstance(like, DTensor) else weight
