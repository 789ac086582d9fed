"""What of a run needs how much memory at its peak, by part: counted on fakes, before anything is on a device."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)

from vp_rl.algorithms.base import MakeOptimizer, PolicyTraining
from vp_rl.algorithms.phases import PROMPT, Load, Phase
from vp_rl.planning.memory import Fakes, optimizer_bytes, size_of, weights
from vp_rl.planning.work import Context, Work

_UNCOUNTABLE = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)


class Part(NamedTuple):
    """Bytes of one part, and when they are there."""

    name: str
    bytes: int | None
    """None: it could not be counted."""
    phase: str
    """"always", or the one of its phases; the peak is the largest phase's."""


class Estimator:
    """Counts an algorithm's parts, whatever the batches.

    Args:
        algorithm: what will be run.
        make_optimizer: as it will be.
        precision: what training and sampling are done within.
        fakes: that the algorithm is of already; None: it has numbers.
    """

    def __init__(
        self,
        algorithm: PolicyTraining,
        make_optimizer: MakeOptimizer,
        precision: Context = nullcontext,
        fakes: Fakes | None = None,
    ) -> None:
        self._algorithm, self._fakes = algorithm, fakes or Fakes()
        self._optimizer = optimizer_bytes(make_optimizer)
        self._policy = self._fakes.module(algorithm.policy)
        self._reward = None if algorithm.reward is None else self._fakes.module(algorithm.reward)
        prompt = {name: self._fakes.tensor(value) for name, value in algorithm.policy.encode([PROMPT]).items()}
        self.work = Work(algorithm, prompt, precision)

    def parts(self, load: Load) -> list[Part]:
        """Everything that is on a device, but evaluations."""
        counted = [Part(phase.label, self.count(phase), phase.name) for phase in self.work.phases(load)]
        return [*self.beside(load), *counted]

    def beside(self, load: Load) -> list[Part]:
        """What is there beside the work itself."""
        with self._fakes.peak():
            one = 4 * self._policy.noise(1).numel()  # in float32
        kept = [(phase.name, int(phase.latents * one)) for phase in self.work.phases(load) if phase.latents]
        latents = [Part("latents that are kept meanwhile", size, name) for name, size in kept]
        return [*self.weights(), *self._adapter(), *latents]

    def of(self, name: str, rows: int) -> int | None:
        """The same as `count`, of the phase of a name, with so many rows at once."""
        return self.count(self.work.phase(name, rows))

    def count(self, phase: Phase) -> int | None:
        """Peak of one piece of work, without the gradients of the adapter, which stay; None: it cannot be known."""
        if not phase.counted:
            return None
        try:
            with self._faked():
                with self._fakes.peak():
                    prepared = self.work.prepare(phase, phase.rows)
                with self._fakes.peak() as memory:
                    self.work.do(phase, prepared)
                    gradients = size_of(p.grad for p in self._policy.parameters() if p.grad is not None)
                    self.work.forget()
        except _UNCOUNTABLE:
            return None
        return memory.peak - gradients

    @contextmanager
    def _faked(self) -> Iterator[None]:
        """Inside it the algorithm has the policy and the reward without numbers."""
        algorithm = self._algorithm
        own, reward = algorithm.policy, algorithm.reward
        algorithm.policy, algorithm.reward = self._policy, self._reward
        try:
            yield
        finally:
            algorithm.policy, algorithm.reward = own, reward

    def weights(self) -> list[Part]:
        """Of everything that is frozen, by the parts of the policy."""
        policy = self._algorithm.policy
        trained = size_of(p for p in policy.parameters() if p.requires_grad)
        named: dict[str, int] = {}
        for name, child in policy.named_children():
            if size := weights(child):
                label = "text encoders" if name.startswith("text_encoder") else name
                named[label] = named.get(label, 0) + size
        for name, child in policy.named_children():
            if _trains(child):
                named[name] -= trained
        for name, child in self._algorithm.named_children():  # the reward, and whatever else it has
            if child is not policy:
                named[name] = weights(child)
        return [Part(f"frozen weights: {name}", size, "always") for name, size in named.items() if size]

    def _adapter(self) -> list[Part]:
        parameters = [p for p in self._algorithm.policy.parameters() if p.requires_grad]
        size, numbers = size_of(parameters), sum(p.numel() for p in parameters)
        remembered = int(numbers * self._optimizer)
        return [Part("adapter: weights, gradients, optimizer", 2 * size + remembered, "always")]


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def peak(parts: Sequence[Part]) -> tuple[int, str]:
    """Bytes of the largest phase with all that is always there, and which one it is; what is not known counts 0."""
    always = sum(part.bytes or 0 for part in parts if part.phase == "always")
    phases: dict[str, int] = {}
    for part in parts:
        if part.phase != "always":
            phases[part.phase] = phases.get(part.phase, 0) + (part.bytes or 0)
    largest = max(phases, key=lambda phase: phases[phase])
    return always + phases[largest], largest
