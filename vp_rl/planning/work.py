"""An algorithm's pieces of work, done one by one: on fakes to be counted, on the device to be tried and timed.

What they are the algorithm says (`PolicyTraining.phases`). They work on made-up latents and images, through the code
that the run itself goes through.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vp_rl.algorithms.base import PolicyTraining
from vp_rl.algorithms.phases import PROMPT, Load, Phase
from vp_rl.types import Conditioning

Context = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Work:
    """An algorithm's work.

    Attributes:
        algorithm: whose it is, with the policy and the reward that do it.
        prompt: `PROMPT`, encoded.
        precision: what everything is done within.
    """

    algorithm: PolicyTraining
    prompt: Conditioning
    precision: Context = field(default=nullcontext)

    def phases(self, load: Load) -> list[Phase]:
        """The pieces of a round."""
        return self.algorithm.phases(load, self.prompt)

    def phase(self, name: str, rows: int) -> Phase:
        """The one of this name, of so many rows at once."""
        load = Load(images=rows, prompts=1, sample_batch=rows, train_batch=rows, micro_batches=1)
        return next(phase for phase in self.phases(load) if phase.name == name)

    def prepare(self, phase: Phase, rows: int) -> object:
        """What so many rows of a phase begin with."""
        with self.precision():
            return phase.prepare(rows)

    def do(self, phase: Phase, prepared: object) -> None:
        """A phase's work on what was prepared. Gradients stay."""
        with self.precision():
            result = phase.run(prepared)
        if isinstance(result, Tensor) and result.requires_grad:
            result.backward()

    def forget(self) -> None:
        """Drops the gradients."""
        for parameter in self.algorithm.policy.parameters():
            parameter.grad = None


@contextmanager
def real(algorithm: PolicyTraining, device: torch.device, precision: Context = nullcontext) -> Iterator[Work]:
    """The work with the algorithm itself on a device; it is left as it was, and so are random numbers."""
    before = algorithm.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        algorithm.to(device)
        work = Work(algorithm, algorithm.policy.encode([PROMPT]), precision)
        try:
            yield work
        finally:
            work.forget()
            algorithm.to(before)
