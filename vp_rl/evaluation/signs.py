"""Signs that a policy found a way to its reward that nobody meant, in words.

Each rule is a comparison of the same prompts and seeds at two times, so that what the noise of sampling does to both
does not count. The rules look at many numbers: where nothing has changed, all of them together say something in at most
`SIGNS` of runs (`claims` has the rest of what a page may be wrong in).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from vp_rl.evaluation.claims import SIGNS
from vp_rl.evaluation.compare import Change, scale_of
from vp_rl.evaluation.images import Evaluation
from vp_rl.visionprefer.estimates import paired

_LOOKS = 7  # that are looked at, in both directions; half of `SIGNS` is theirs
_LOST = 0.3  # share of the base's diversity or spread
_DRIFTED = 0.25  # share of the base's brightness, contrast, colour or sharpness
_REPEATED = 0.1  # more of an image's likeness to itself comes back when it is shifted
_FAR = 0.5  # KL of a step for each latent dimension: there a step's mean is one standard deviation off the base's
_JUMP = 10.0  # times the KL of the evaluation before
_JUDGE = "mean_rating"
_NAMES = {
    _JUDGE: "the held-out judge's mean rating",
    "look/brightness": "brightness",
    "look/contrast": "contrast",
    "look/colour": "colourfulness",
    "look/sharpness": "sharpness",
}


@dataclass(frozen=True)
class Sign:
    """Something in a run's numbers that its user should know of."""

    words: str
    epoch: int | None
    """Since when, in epochs done; None where it is of the finished run."""
    severity: Literal["warning", "note"]
    prompts: list[str] = field(default_factory=list)
    """Whose images show it, where it is of some prompts alone."""


@dataclass(frozen=True)
class Moment:
    """An evaluation while training: always of the same prompts and seeds."""

    epoch: int
    """Epochs done; 0 is the base."""
    values: dict[str, list[float]]
    """Every metric, of each prompt."""
    kl: float | None = None
    """The epoch's `train/kl`, where there is one."""

    def mean(self, name: str) -> float:
        """Over the prompts."""
        return float(np.mean(self.values[name]))

    def is_like(self, other: "Moment") -> bool:
        """Whether the two can be compared: the same metrics, of as many prompts."""
        one, two = ({name: len(values) for name, values in each.values.items()} for each in (self, other))
        return one == two

    def as_dict(self) -> dict[str, Any]:
        """For JSON and for checkpoints."""
        return asdict(self)


def moment(epoch: int, done: Evaluation, kl: float | None = None) -> Moment:
    """What is remembered of an evaluation."""
    each = np.bincount(done.prompt)
    metrics = done.metrics() | done.looks
    return Moment(epoch, {name: (np.bincount(done.prompt, v) / each).tolist() for name, v in metrics.items()}, kl)


def summary(history: Sequence[Moment]) -> list[dict[str, Any]]:
    """The history for people: of each metric the mean, and the change from the base with its 95% interval."""
    rows = []
    for each in history:
        row: dict[str, Any] = {"epoch": each.epoch, "kl": each.kl}
        for name, values in each.values.items():
            gain = np.subtract(values, history[0].values[name])
            low, high = paired(gain, scale=scale_of(name))
            row[name] = {"mean": each.mean(name), "difference": float(gain.mean()), "low": low, "high": high}
        rows.append(row)
    return rows


def signs(
    history: Sequence[Moment], final: Mapping[str, Change] | None = None, reward: str = "the trained reward"
) -> list[Sign]:
    """Everything that is to be said of a run, warnings first.

    Args:
        history: the base and the evaluations since, in order.
        final: the comparison of the finished run, on other prompts, decided; None: it is still running.
        reward: what the trained reward is called.
    """
    found = [] if len(history) < 2 else [*_over_optimised(history, reward), *_alike(history), *_far(history)]
    if final is not None:
        found += _of_the_end(final, reward)
    return sorted(found, key=lambda sign: sign.severity == "note")


def _over_optimised(history: Sequence[Moment], reward: str) -> list[Sign]:
    """The reward rises and one of those that it was not trained against falls, from its best evaluation to now.

    The best of several is better than it is by luck, and would seem to fall by that alone. So each half of the prompts
    is compared with the evaluation that the other half finds best, whose luck is its own: the difference has no bias,
    and the interval keeps its promise however many evaluations there are.
    """
    now, found = history[-1], []
    names = _independent(now.values) if "reward" in now.values else []
    if not names:
        return []
    sure = 1 - SIGNS / len(names)  # of which one side counts, the other half of `SIGNS`
    for name in names:
        best = max(history[:-1], key=lambda each: each.mean(name))
        fell, rose = (_since_the_best(history, name, each, sure) for each in (name, "reward"))
        if not fell[2] < 0 or rose[0] <= 0:
            continue
        words = (
            f"Since about epoch {best.epoch} {reward} went {rose[0]:+.2g} while {_name(name)} went {fell[0]:+.2g} "
            f"({100 * sure:.4g}% interval {fell[1]:+.2g} to {fell[2]:+.2g}): likely over-optimised; "
        )
        end = "the untrained model is the best by it." if best.epoch == 0 else f"the best by it is epoch {best.epoch}."
        found.append(Sign(words + end, best.epoch, "warning"))
    return found


def _alike(history: Sequence[Moment]) -> list[Sign]:
    """Images of a prompt, or of different prompts, have become alike; or all have drifted in what they look like.

    Without selection: each is the last evaluation against the first.
    """
    base, now, found = history[0], history[-1], []
    for name, what in (
        ("look/diversity", "Images of one prompt have become alike: their distance from each other"),
        ("look/spread", "Images of different prompts have become alike: their distance from each other"),
    ):
        if name in now.values and _share(base, now, name) <= -_LOST and _change(base, now, name)[2] < 0:
            since = next(each.epoch for each in history if _share(base, each, name) <= -_LOST)
            words = f"{what} is {-_share(base, now, name):.0%} below the base model's."
            found.append(Sign(words, since, "warning"))
    for name in ("look/brightness", "look/contrast", "look/colour", "look/sharpness"):
        share, (_, low, high) = _share(base, now, name), _change(base, now, name)
        if abs(share) >= _DRIFTED and (low > 0 or high < 0):
            since = next(each.epoch for each in history if abs(_share(base, each, name)) >= _DRIFTED)
            words = f"Images changed in {_NAMES[name]}, whatever their prompt: {share:+.0%} against the base model."
            found.append(Sign(words, since, "note"))
    return [*found, *_repeated(history)]


def _repeated(history: Sequence[Moment]) -> list[Sign]:
    """Images repeat textures or objects more than the base's do."""
    base, now, name = history[0], history[-1], "look/repetition"
    rose, low, _ = _change(base, now, name)
    if rose < _REPEATED or not low > 0:
        return []
    since = next(each.epoch for each in history if each.mean(name) - base.mean(name) >= _REPEATED)
    words = (
        f"Images repeat textures or objects more: shifted by some way, {now.mean(name):.0%} of an image's likeness to "
        f"itself comes back, {base.mean(name):.0%} of the base model's."
    )
    return [Sign(words, since, "note")]


def _far(history: Sequence[Moment]) -> list[Sign]:
    """The KL to the base has exploded."""
    known = [(each.epoch, each.kl) for each in history if each.kl is not None]
    if not known:
        return []
    (epoch, now), before = known[-1], known[-2][1] if len(known) > 1 else None
    if not math.isfinite(now) or now > _FAR:
        since = next(when for when, kl in known if not math.isfinite(kl) or kl > _FAR)
        words = f"The KL to the base model is {now:.3g} a step: no sampling step is anywhere near the base's any more."
        return [Sign(words, since, "warning")]
    if before is not None and before > 0 and now > _JUMP * before:
        return [Sign(f"The KL to the base model jumped from {before:.2g} to {now:.2g} a step.", epoch, "note")]
    return []


def _of_the_end(final: Mapping[str, Change], reward: str) -> list[Sign]:
    """On the final prompts the reward has risen and another has fallen."""
    if "reward" not in final:
        return []
    gain, found = final["reward"], []
    for name in _independent(final):
        if gain.direction == "up" and final[name].direction == "down":
            words = (
                f"On the final prompts {reward} went {gain.difference:+.2g} while {_name(name)} went "
                f"{final[name].difference:+.2g}: likely over-optimised."
            )
            found.append(Sign(words, None, "warning"))
    if gain.direction == "down":
        found.append(Sign(f"On the final prompts {reward} itself fell, by {-gain.difference:.2g}.", None, "warning"))
    return found


def _independent(metrics: Mapping[str, object]) -> list[str]:
    return [name for name in metrics if name == _JUDGE or name.startswith("panel/")]


def _name(name: str) -> str:
    return _NAMES.get(name, name.removeprefix("panel/"))


def _change(before: Moment, after: Moment, name: str) -> tuple[float, float, float]:
    """The mean difference, and its interval's ends."""
    gain = np.subtract(after.values[name], before.values[name])
    return float(gain.mean()), *paired(gain, 1 - SIGNS / 2 / _LOOKS, scale_of(name))


def _since_the_best(
    history: Sequence[Moment], by: str, name: str, confidence: float = 0.99
) -> tuple[float, float, float]:
    """`_change` of each half of the prompts from the evaluation that is the best one by the other half."""
    now = np.array(history[-1].values[name])
    values, judged = (np.array([each.values[one] for each in history[:-1]]) for one in (name, by))
    before, prompts = np.empty_like(now), np.arange(len(now))
    for half in (prompts % 2 == 0, prompts % 2 == 1):
        others = ~half if (~half).any() else half  # a single prompt has no other half
        before[half] = values[judged[:, others].mean(1).argmax()][half]
    gain = now - before
    return float(gain.mean()), *paired(gain, confidence, scale_of(name))


def _share(base: Moment, now: Moment, name: str) -> float:
    return now.mean(name) / base.mean(name) - 1 if base.mean(name) else 0.0
