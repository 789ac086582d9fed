"""What of a run needs how much memory at its peak, by part: counted on fakes, before anything is on a device."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)

from vp_rl.algorithms.base import MakeOptimizer, PolicyTraining
from vp_rl.algorithms.ddpo import DDPO
from vp_rl.planning.geometry import Plan
from vp_rl.planning.memory import Fakes, optimizer_bytes, size_of, weights
from vp_rl.planning.work import PROMPT, Context, Work

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
        policy, reward = self._fakes.module(algorithm.policy), self._fakes.module(algorithm.reward)
        conditioning = {name: self._fakes.tensor(value) for name, value in algorithm.policy.encode([PROMPT]).items()}
        self._work = Work(algorithm, conditioning, policy, reward, precision)

    def parts(self, plan: Plan) -> list[Part]:
        """Everything that is on a device, but evaluations."""
        sample, train = plan.sample_batch, plan.train_batch
        found = self.beside(plan)
        if isinstance(self._algorithm, DDPO):
            found += [
                Part(f"sampling, {sample} images at once", self.sampling_step(sample), "sampling"),
                Part(f"VAE decode, {sample} at once", self.decoding(sample), "decoding"),
                Part(f"reward, {sample} at once", self.scoring(sample), "reward"),
            ]
        else:
            found.append(Part(f"sampling, {train} at once", self.sampling_step(train), "sampling"))
        what = "states" if isinstance(self._algorithm, DDPO) else "images, with VAE and reward"
        found.append(Part(f"activations, {train} {what} at once", self.training(train), "training"))
        return found

    def beside(self, plan: Plan) -> list[Part]:
        """What is there beside the work itself."""
        with self._fakes.peak():
            latents = self._work.policy.noise(1)
        return [*self.weights(), *self._adapter(), *self._rounds(plan, latents)]

    def training(self, batch: int) -> int | None:
        """Peak of a micro-batch, without the gradients of the adapter, which stay."""
        return self._count(lambda: self._work.train(batch))

    def sampling(self, batch: int) -> int | None:
        """Peak of making so many images at once, by whichever phase has the largest."""
        found = self.sampling_step(batch), self.decoding(batch), self.scoring(batch)
        return max((size for size in found if size is not None), default=None)

    def sampling_step(self, batch: int) -> int | None:
        """Peak of one step of so many images."""
        return self._count(lambda: self._work.sample(batch))

    def decoding(self, batch: int) -> int | None:
        """Peak of decoding so many images at once."""
        with self._fakes.peak():
            latents = self._work.policy.noise(batch)
        return self._count(lambda: self._work.decode(latents))

    def scoring(self, batch: int) -> int | None:
        """Peak of the reward on so many images at once, beside them; None too where it is no network of ours."""
        if not any(True for _ in self._algorithm.reward.parameters()):
            return None
        try:
            with self._fakes.peak():
                images = self._work.decode(self._work.policy.noise(batch))
        except _UNCOUNTABLE:
            return None
        return self._count(lambda: self._work.score(images))

    def _count(self, run: Callable[[], object]) -> int | None:
        try:
            with self._fakes.peak() as memory:
                run()
                gradients = size_of(p.grad for p in self._work.policy.parameters() if p.grad is not None)
                self._work.forget()
        except _UNCOUNTABLE:
            return None
        return memory.peak - gradients

    def weights(self) -> list[Part]:
        """Of everything that is frozen, by the parts of the policy."""
        policy, reward = self._algorithm.policy, self._algorithm.reward
        trained = size_of(p for p in policy.parameters() if p.requires_grad)
        named: dict[str, int] = {}
        for name, child in policy.named_children():
            if size := weights(child):
                label = "text encoders" if name.startswith("text_encoder") else name
                named[label] = named.get(label, 0) + size
        for name, child in policy.named_children():
            if _trains(child):
                named[name] -= trained
        named["reward"] = weights(reward)
        return [Part(f"frozen weights: {name}", size, "always") for name, size in named.items() if size]

    def _adapter(self) -> list[Part]:
        parameters = [p for p in self._algorithm.policy.parameters() if p.requires_grad]
        size, numbers = size_of(parameters), sum(p.numel() for p in parameters)
        remembered = int(numbers * self._optimizer)
        return [Part("adapter: weights, gradients, optimizer", 2 * size + remembered, "always")]

    def _rounds(self, plan: Plan, latents: torch.Tensor) -> list[Part]:
        """DDPO keeps a round's states in main memory; here are the trajectories of the images being sampled."""
        algorithm = self._algorithm
        if not isinstance(algorithm, DDPO):
            return []
        one = 4 * latents[0].numel() * plan.sample_batch  # in float32
        states = 2 if algorithm.branch is not None else algorithm.sampler.steps + 1
        return [Part("their trajectories, twice while they are stacked", 2 * states * one, "sampling")]


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
