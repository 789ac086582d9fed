"""From a run's settings to its plan: what they leave to be worked out is filled in."""

import os
from collections.abc import Mapping, Set
from functools import cached_property
from typing import Any

import lightning

from vp_rl.algorithms.base import MakeOptimizer, PolicyTraining
from vp_rl.algorithms.phases import Load, Phase
from vp_rl.planning import fit
from vp_rl.planning.estimate import Estimator
from vp_rl.planning.geometry import AUTO, Geometry, Plan, at, automatic, divisors, solve
from vp_rl.planning.memory import Fakes
from vp_rl.planning.work import Work, real

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
        if not isinstance(algorithm, PolicyTraining):
            raise ValueError(
                f"geometry, auto and dry_run plan the training of policies, not {type(algorithm).__name__}: "
                "give it data.batch_size and trainer.accumulate_grad_batches."
            )
        self.settings, self.algorithm, self.trainer = settings, algorithm, trainer
        self.context, self._stated = trainer.precision_plugin.forward_context, stated
        self._make_optimizer, self._fakes = make_optimizer, fakes
        self._train, self._sample = algorithm.bounds
        self._geometry, auto = self._read(), automatic(settings)
        if self._geometry is None and self._train in auto:
            raise ValueError(f"{self._train}=auto keeps what an update is of: say that by geometry.images_per_update.")
        if other := [name for name in auto if name not in algorithm.bounds]:
            raise ValueError(
                f"{other[0]}=auto: what {type(algorithm).__name__} does at once is {' and '.join(algorithm.bounds)}."
            )
        self.plan = self._solved(*(self._found(auto) if auto else self._bounds()))

    @property
    def filled(self) -> dict[str, int]:
        """The settings that were worked out, by name.

        Raises:
            ValueError: the run has others.
        """
        if self._geometry is None:
            return {self._sample: self.plan.load.sample_batch} if self._sample in automatic(self.settings) else {}
        values = self.algorithm.settings_of(self.plan.load, self.plan.accumulate, self.plan.devices_per_prompt)
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
        return Geometry(images_per_update=images, updates=updates, cut=self.algorithm.cut())

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
        accumulate = self.trainer.accumulate_grad_batches
        load, updates = self.algorithm.load(self.settings["data"], accumulate)
        geometry = self._geometry_of(max(1, load.images * devices // updates), updates)
        sharing = self.settings["data"].get("devices_per_prompt", 1)
        return Plan(geometry, devices, sharing, accumulate, load._replace(sample_batch=min(sample, load.images)))

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
            plan = self._solved(train, sample)
            train = self._largest(self._train, plan.load.train_batch * plan.accumulate, plan.load, "train_batch")
        if self._sample in auto and self._sample != self._train:
            plan = self._solved(train, sample)
            sample = self._largest(self._sample, plan.load.images, plan.load, "sample_batch")
        os.environ[_FOUND] = f"{train},{sample}"
        return train, sample

    def _largest(self, name: str, number: int, load: Load, size_of: str) -> int:
        """The largest divisor of a number that fits as a micro-batch."""
        sizes = [size for size in divisors(number) if size <= fit.MOST]
        device, estimator = self.trainer.strategy.root_device, self.estimator

        def phases(work: Work, size: int) -> list[Phase]:
            return [phase for phase in work.phases(load._replace(**{size_of: size})) if phase.setting == name]

        def held(size: int, there: str | None = None) -> int:
            names = {"always", *(phase.name for phase in phases(estimator.work, size))}
            beside = (part for part in estimator.beside(load._replace(**{size_of: size})) if part.phase in names)
            return sum(part.bytes or 0 for part in beside if there is None or not part.name.startswith(there))

        def estimated(size: int) -> int | None:
            found = [estimator.count(phase) for phase in phases(estimator.work, size)]
            return max((each for each in found if each is not None), default=None)

        if device.type != "cuda":
            return fit.largest(sizes, lambda size: fit.within_main_memory(estimated, held(size))(size), name)
        with real(self.algorithm, device, self.context) as work:

            def run(size: int) -> None:
                for phase in phases(work, size):
                    work.do(phase, work.prepare(phase, phase.rows))

            return fit.largest(sizes, lambda size: fit.on_gpu(run, device, held(size, "frozen"))(size), name)
