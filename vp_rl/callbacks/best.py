"""The adapter of the best evaluation so far, and when to give up waiting for a better one."""

import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor

from vp_rl.evaluation.no_adapter import BELOW, beats
from vp_rl.interfaces import Policy


class BestAdapter:
    """Kept in memory and in checkpoints, so that a resumed run has it too, whatever folder it goes on in.

    The base model competes (`base`): where no epoch beats it, the run's result is the base model, and the best trained
    adapter is kept under another name, to be looked at.

    Args:
        metric: of the evaluations while training; higher is better.
        patience: evaluations without a better one after which training should stop. None: never.
    """

    def __init__(self, metric: str, patience: int | None) -> None:
        self.metric, self._patience = metric, patience
        self.epoch, self.value, self._waited = 0, -float("inf"), 0
        self.base = float("nan")
        """The base model's value, where it is known: on the main process."""
        self._weights: dict[str, Tensor] = {}

    def see(self, value: float, epoch: int, policy: Policy) -> bool:
        """Whether this evaluation is the best one; the policy's adapter is then kept."""
        if not value > self.value:  # NaN is none
            self._waited += 1
            return False
        self.epoch, self.value, self._waited = epoch, value, 0
        self._weights = {name: weight.cpu() for name, weight in policy.adapter_weights().items()}
        return True

    @property
    def beats_base(self) -> bool:
        """Whether any epoch does; on the main process."""
        return self.epoch > 0 and beats(self.value, self.base)

    @property
    def exhausted(self) -> bool:
        """Whether `patience` is."""
        return self._patience is not None and self._waited >= self._patience

    def on(self, policy: Policy) -> AbstractContextManager[None]:
        """Inside it the policy has the best adapter, if there has been an evaluation; afterwards its own again."""
        return policy.using(self._weights)

    def save(self, run: Path, policy: Policy) -> None:
        """Writes the adapter into a run's folder in the policy's own format: to `best/` or, below the base, `BELOW`."""
        name, other = ("best", BELOW) if self.beats_base else (BELOW, "best")
        shutil.rmtree(run / other, ignore_errors=True)
        (run / name).mkdir(parents=True, exist_ok=True)
        with self.on(policy):
            policy.save_adapter(run / name)

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        return {"epoch": self.epoch, "value": self.value, "waited": self._waited, "weights": self._weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Reads what `state_dict` gave."""
        self.epoch, self.value, self._waited = state["epoch"], state["value"], state["waited"]
        self._weights = state["weights"]
