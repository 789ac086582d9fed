"""From a run's settings to its plan: what they leave to be worked out is filled in."""

import math
import os
from collections.abc import Mapping, Set
from dataclasses import replace
from functools import cached_property
from typing import Any

import lightning

from vp_rl.algorithms.base import MakeOptimizer
from vp_rl.algorithms.ddpo import DDPO
from vp_rl.algorithms.refl import ReFL
from vp_rl.planning import fit
from vp_rl.planning.estimate import Estimator
from vp_rl.planning.geometry import AUTO, Geometry, Plan, at, automatic, divisors, solve
from vp_rl.planning.memory import Fakes
from vp_rl.planning.work import real

_DEFAULTS = {  # of what a geometry decides: who has these has not stated them
    "data.batch_size": 8,
    "data.devices_per_prompt": 1,
    "data.batches_per_epoch": 1,
    "trainer.accumulate_grad_batches": 1,
}
_FOUND = "VP_RL_BATCHES"  # the first process tells those that it starts what it has found


class Planner:
    """Works out what a run's settings leave open.

    Args:
        settings: all of the run's.
        algorithm: built with them, `auto` being 1.
        trainer: the run's, for its devices and precision.
        make_optimizer: the algorithm's.
        stated: names of the settings that the command line gives.
        fakes: see `Estimator`.

    Attributes:
        plan: what will be done.

    Raises:
        ValueError: the settings contradict each other, the geometry is impossible, or not even 1 fits.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        algorithm: lightning.LightningModule,
        trainer: lightning.Trainer,
        make_optimizer: MakeOptimizer,
        stated: Set[str] = frozenset(),
        fakes: Fakes | None = None,
    ) -> None:
        if not isinstance(algorithm, DDPO | ReFL):
            raise ValueError(
                f"geometry, auto and dry_run plan runs of ddpo and refl, not of {type(algorithm).__name__}: "
                "give it data.batch_size and trainer.accumulate_grad_batches."
            )
        self.settings, self.algorithm, self.trainer = settings, algorithm, trainer
        self.context, self._stated = trainer.precision_plugin.forward_context, stated
        self._make_optimizer, self._fakes = make_optimizer, fakes
        ddpo = isinstance(algorithm, DDPO)
        self._train, self._sample = ("algorithm.train_batch", "algorithm.sample_batch") if ddpo else _BATCHES
        self._geometry, auto = self._read(), automatic(settings)
        if self._geometry is None and self._train in auto:
            raise ValueError(f"{self._train}=auto keeps what an update is of: say that by geometry.images_per_update.")
        if ddpo and "data.batch_size" in auto:
            raise ValueError("data.batch_size=auto: DDPO's micro-batches are algorithm.train_batch and sample_batch.")
        self.plan = self._solved(*(self._found(auto) if auto else self._bounds()))

    @property
    def filled(self) -> dict[str, int]:
        """The settings that were worked out, by name.

        Raises:
            ValueError: the run has others.
        """
        if self._geometry is None:
            return {self._sample: self.plan.sample_batch} if self._sample in automatic(self.settings) else {}
        values = self.plan.ddpo() if isinstance(self.algorithm, DDPO) else self.plan.refl()
        for name, value in values.items():
            given, bound = at(self.settings, name), name in (self._train, self._sample)
            if not bound and given != value and (name in self._stated or given != _DEFAULTS[name]):
                raise ValueError(
                    f"{name}={given} contradicts the geometry, by which it is {value} on {self.plan.devices} "
                    "device(s): leave it out, or set geometry.images_per_update=null."
                )
        return values

    @cached_property
    def estimator(self) -> Estimator:
        """Of the run's memory."""
        return Estimator(self.algorithm, self._make_optimizer, self.context, self._fakes)

    def _read(self) -> Geometry | None:
        images = at(self.settings, "geometry.images_per_update")
        return None if images is None else self._geometry_of(images, at(self.settings, "geometry.updates"))

    def _geometry_of(self, images: int, updates: int) -> Geometry:
        algorithm = self.algorithm
        if not isinstance(algorithm, DDPO):
            return Geometry(images_per_update=images, updates=updates)
        return Geometry(
            images_per_update=images,
            updates=updates,
            images_per_prompt=algorithm.images_per_prompt,
            steps=algorithm.steps_per_sample,
            branch=algorithm.branch is not None,
            inner_epochs=algorithm.inner_epochs,
        )

    def _bounds(self) -> tuple[int, int]:
        """Most that may be trained on and sampled at once; `auto` begins at 1."""
        found = []
        for name in (self._train, self._sample):
            size = at(self.settings, name)
            if size != AUTO and (not isinstance(size, int) or size < 1):
                raise ValueError(f"{name}={size!r} must be a whole number of at least 1, or auto.")
            found.append(1 if size == AUTO else size)
        return found[0], found[1]

    def _solved(self, train: int, sample: int) -> Plan:
        """The plan with these bounds; without a geometry, what the settings amount to."""
        devices = self.trainer.world_size
        if self._geometry is not None:
            return solve(self._geometry, devices, train, sample)
        prompts, accumulate = at(self.settings, "data.batch_size"), self.trainer.accumulate_grad_batches
        algorithm = self.algorithm
        if not isinstance(algorithm, DDPO):
            updates = math.ceil(at(self.settings, "data.batches_per_epoch") / accumulate)
            geometry = self._geometry_of(prompts * accumulate * devices, updates)
            return Plan(geometry, devices, prompts * accumulate * updates, 1, prompts, prompts, accumulate)
        sharing = at(self.settings, "data.devices_per_prompt")
        images = prompts * algorithm.images_per_prompt // sharing
        micro_batches = algorithm.batches_per_round(prompts, sharing) // algorithm.inner_epochs
        updates = max(1, micro_batches // accumulate)
        geometry = self._geometry_of(images * devices // updates, updates)
        return Plan(geometry, devices, prompts, sharing, min(sample, images), train, accumulate)

    def _found(self, auto: list[str]) -> tuple[int, int]:
        """The bounds, `auto` ones by trying."""
        if int(os.environ.get("LOCAL_RANK", 0)) > 0 and _FOUND in os.environ:
            train, sample = map(int, os.environ[_FOUND].split(","))
            return train, sample
        cluster = getattr(self.trainer.strategy, "cluster_environment", None)
        if self.trainer.world_size > 1 and cluster is not None and cluster.creates_processes_externally:
            raise ValueError(
                f"{auto[0]}=auto: these processes were started from outside (torchrun, SLURM), and each could find "
                "another size. Ask one device what fits, by dry_run=true trainer.devices=1, and give that number."
            )
        train, sample = self._bounds()
        if self._train in auto:
            first = self._solved(train, sample)
            train = self._largest(self._train, first.train_batch * first.accumulate, first, "training")
        if self._sample in auto and self._sample != self._train:
            first = self._solved(train, sample)
            sample = self._largest(self._sample, first.images, first, "sampling")
        os.environ[_FOUND] = f"{train},{sample}"
        return train, sample

    def _largest(self, name: str, number: int, plan: Plan, phase: str) -> int:
        """The largest divisor of a number that fits as a micro-batch."""
        sizes = [size for size in divisors(number) if size <= fit.MOST]
        device, estimator, training = self.trainer.strategy.root_device, self.estimator, phase == "training"

        def held(size: int, there: str | None = None) -> int:
            beside = estimator.beside(plan if training else replace(plan, sample_batch=size))
            wanted = (part for part in beside if part.phase in ("always", phase))
            return sum(part.bytes or 0 for part in wanted if there is None or not part.name.startswith(there))

        if device.type != "cuda":
            count = estimator.training if training else estimator.sampling
            return fit.largest(sizes, lambda size: fit.within_main_memory(count, held(size))(size), name)
        with real(self.algorithm, device, self.context) as work:
            run = work.train if training else work.make
            return fit.largest(sizes, lambda size: fit.on_gpu(run, device, held(size, "frozen"))(size), name)


_BATCHES = "data.batch_size", "data.batch_size"  # ReFL samples what it trains on
