"""How the work of an update is cut to the devices at hand.

A user says what an update is of: so many images, so many of each prompt, so many updates of a round's images. Shards,
micro-batches and accumulation follow, so that the same update is made on one device and on many.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from vp_rl.algorithms.phases import Cut, Load

AUTO = "auto"
_GROUPS = ("algorithm", "data")  # whose settings may be auto


def automatic(settings: Mapping[str, Any]) -> list[str]:
    """The settings that are to be what the device has room for."""
    groups = ((group, settings.get(group) or {}) for group in _GROUPS)
    return [f"{group}.{name}" for group, values in groups for name, value in values.items() if value == AUTO]


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
        cut: how the examples that are learned from follow from the images.

    Raises:
        ValueError: a number is below 1.
    """

    images_per_update: int
    updates: int = 1
    cut: Cut = Cut()

    def __post_init__(self) -> None:
        for name in ("images_per_update", "updates"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"geometry.{name}={value!r} must be a whole number of at least 1.")

    @property
    def images_per_round(self) -> int:
        """Of all devices."""
        return self.images_per_update * self.updates

    def examples_per_update(self, devices: int, devices_per_prompt: int = 1) -> Fraction:
        """That each device trains on; a whole number where the geometry is possible."""
        images, cut = Fraction(self.images_per_update, devices), self.cut
        of = images * devices_per_prompt / cut.images_per_prompt if cut.whole_prompts else images
        return of * cut.examples

    def devices_per_prompt(self, devices: int) -> int | None:
        """Fewest devices that must share each prompt's images for all to have the same work; None: none can."""
        each = self.cut.images_per_prompt
        for sharing in divisors(math.gcd(devices, each)):
            prompts = Fraction(self.images_per_round * sharing, each * devices)
            whole = self.images_per_round % each == 0 and prompts.denominator == 1
            if whole and self.examples_per_update(devices, sharing).denominator == 1:
                return sharing
        return None


@dataclass(frozen=True)
class Plan:
    """A geometry on so many devices.

    Attributes:
        geometry: what is planned.
        devices: of the run.
        devices_per_prompt: that share the images of each prompt.
        accumulate: micro-batches of an update.
        load: each device's share of a round.
    """

    geometry: Geometry
    devices: int
    devices_per_prompt: int
    accumulate: int
    load: Load

    @property
    def updates_per_round(self) -> int:
        """Steps of the optimizer."""
        return self.geometry.updates * self.geometry.cut.passes


def solve(geometry: Geometry, devices: int, train_limit: int, sample_limit: int) -> Plan:
    """The plan with the largest micro-batches within the limits; those of an update are all of one size.

    Raises:
        ValueError: so many devices cannot share the geometry evenly; names the nearest ones that could be.
    """
    sharing = geometry.devices_per_prompt(devices)
    if sharing is None:
        raise ValueError(_impossible(geometry, devices))
    examples, images = int(geometry.examples_per_update(devices, sharing)), geometry.images_per_round // devices
    train_batch = largest_divisor(examples, train_limit)
    accumulate = examples // train_batch
    load = Load(
        images=images,
        prompts=images * sharing // geometry.cut.images_per_prompt,
        sample_batch=min(sample_limit, images),
        train_batch=train_batch,
        micro_batches=accumulate * geometry.updates * geometry.cut.passes,
    )
    return Plan(geometry, devices, sharing, accumulate, load)


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

    each, asked = geometry.cut.images_per_prompt, geometry.images_per_update
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
