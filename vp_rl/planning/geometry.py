"""How the work of an update is cut to the devices at hand.

A user says what an update is of: so many images, so many of each prompt, so many updates of a round's images. Shards,
micro-batches and accumulation follow, so that the same update is made on one device and on many.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

AUTO = "auto"
_SIZES = ("algorithm.train_batch", "algorithm.sample_batch", "data.batch_size")


def automatic(settings: Mapping[str, Any]) -> list[str]:
    """The settings that are to be what the device has room for."""
    return [name for name in _SIZES if at(settings, name) == AUTO]


def is_wanted(settings: Mapping[str, Any]) -> bool:
    """Whether a run's settings leave anything to be worked out, or shown."""
    stated = at(settings, "geometry.images_per_update") is not None
    return stated or bool(automatic(settings)) or at(settings, "dry_run")


def at(settings: Mapping[str, Any], name: str) -> Any:
    """The setting of a dotted name; None where a group has no such setting."""
    value: Any = settings
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """What an update is of, whatever the devices.

    Attributes:
        images_per_update: whose states one step of the optimizer learns from, of all devices.
        updates: of each pass over a round's images; of an epoch, where there are no rounds (ReFL).
        images_per_prompt: in a round.
        steps: states of each image that are trained on: its trained sampling steps.
        branch: whether the images of a prompt start from one state, which is then all that is trained on.
        inner_epochs: passes over a round's images.

    Raises:
        ValueError: a number is below 1.
    """

    images_per_update: int
    updates: int = 1
    images_per_prompt: int = 1
    steps: int = 1
    branch: bool = False
    inner_epochs: int = 1

    def __post_init__(self) -> None:
        for name in ("images_per_update", "updates"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"geometry.{name}={value!r} must be a whole number of at least 1.")

    @property
    def images_per_round(self) -> int:
        """Of all devices."""
        return self.images_per_update * self.updates

    def states_per_update(self, devices: int, devices_per_prompt: int = 1) -> Fraction:
        """That each device trains on; a whole number where the geometry is possible."""
        images = Fraction(self.images_per_update, devices)
        return images * devices_per_prompt / self.images_per_prompt if self.branch else images * self.steps

    def devices_per_prompt(self, devices: int) -> int | None:
        """Fewest devices that must share each prompt's images for all to have the same work; None: none can."""
        for sharing in divisors(math.gcd(devices, self.images_per_prompt)):
            prompts = Fraction(self.images_per_round * sharing, self.images_per_prompt * devices)
            whole = self.images_per_round % self.images_per_prompt == 0 and prompts.denominator == 1
            if whole and self.states_per_update(devices, sharing).denominator == 1:
                return sharing
        return None


@dataclass(frozen=True)
class Plan:
    """A geometry on so many devices.

    Attributes:
        geometry: what is planned.
        devices: of the run.
        prompts: of each device in a round.
        devices_per_prompt: that share the images of each prompt.
        sample_batch: images sampled at once.
        train_batch: states trained at once.
        accumulate: micro-batches of an update.
    """

    geometry: Geometry
    devices: int
    prompts: int
    devices_per_prompt: int
    sample_batch: int
    train_batch: int
    accumulate: int

    @property
    def images(self) -> int:
        """Of each device in a round."""
        return self.geometry.images_per_round // self.devices

    @property
    def updates_per_round(self) -> int:
        """Steps of the optimizer."""
        return self.geometry.updates * self.geometry.inner_epochs

    def ddpo(self) -> dict[str, int]:
        """The settings that these numbers are, of a run of DDPO."""
        return {
            "data.batch_size": self.prompts,
            "data.devices_per_prompt": self.devices_per_prompt,
            "trainer.accumulate_grad_batches": self.accumulate,
            "algorithm.train_batch": self.train_batch,
            "algorithm.sample_batch": self.sample_batch,
        }

    def refl(self) -> dict[str, int]:
        """The same of a run of ReFL, whose micro-batches are batches of prompts."""
        return {
            "data.batch_size": self.train_batch,
            "data.batches_per_epoch": self.accumulate * self.geometry.updates,
            "trainer.accumulate_grad_batches": self.accumulate,
        }


def solve(geometry: Geometry, devices: int, train_limit: int, sample_limit: int) -> Plan:
    """The plan with the largest micro-batches within the limits; those of an update are all of one size.

    Raises:
        ValueError: so many devices cannot share the geometry evenly; names the nearest ones that could be.
    """
    sharing = geometry.devices_per_prompt(devices)
    if sharing is None:
        raise ValueError(_impossible(geometry, devices))
    states = int(geometry.states_per_update(devices, sharing))
    train_batch = largest_divisor(states, train_limit)
    prompts = geometry.images_per_round * sharing // (geometry.images_per_prompt * devices)
    sample_batch = min(sample_limit, geometry.images_per_round // devices)
    return Plan(geometry, devices, prompts, sharing, sample_batch, train_batch, states // train_batch)


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of a number that is at most `limit`."""
    return max(divisor for divisor in divisors(number) if divisor <= max(1, limit))


def divisors(number: int) -> list[int]:
    """Rising."""
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})


def _impossible(geometry: Geometry, devices: int) -> str:
    """Names what could be instead: other numbers of images on these devices, or other numbers of devices."""

    def with_images(images: int) -> bool:
        other = Geometry(**{**vars(geometry), "images_per_update": images})
        return other.devices_per_prompt(devices) is not None

    each, asked = geometry.images_per_prompt, geometry.images_per_update
    why = f"geometry.images_per_update={asked} cannot be {each} a prompt" if each > 1 else ""
    if geometry.devices_per_prompt(1) is not None:
        why = f"geometry.images_per_update={asked} cannot be shared by {devices} devices"
        why += f", {each} images a prompt" if each > 1 else ""
    why += f", with geometry.updates={geometry.updates}" if geometry.updates > 1 else ""
    images = _nearest(with_images, asked, each * devices * geometry.updates)
    said = f"{why}: nearest are {' and '.join(map(str, images))}."
    counts = _nearest(lambda number: geometry.devices_per_prompt(number) is not None, devices, devices)
    return f"{said} Or use {' or '.join(map(str, counts))} devices." if counts else said


def _nearest(possible: Callable[[int], bool], asked: int, reach: int) -> list[int]:
    """The nearest numbers below and above that are possible, as far as there are any within reach."""

    def first(numbers: range) -> Iterator[int]:
        yield from [number for number in numbers if possible(number)][:1]

    return [*first(range(asked - 1, max(0, asked - reach - 1), -1)), *first(range(asked + 1, asked + reach + 1))]
