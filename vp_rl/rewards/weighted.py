"""Several rewards as one: each standardised, times its weight, summed.

Rewards differ in scale (VP-Score is standardised, an aesthetic score goes from 1 to 10, compressibility is in
kilobytes), so weights would mean little without it. Mean and standard deviation run over the first `warmup` images that
are scored, and then stay. They must: with a scale that follows the policy, the objective would drift while the policy
is trained on it, ReFL's `target` would move, and the base and the trained policy would be compared by different
measures. As a run begins with images of the untrained model, 1.0 is one of *its* standard deviations above its mean.
"""

import itertools
import json
import logging
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import distributed, nn

from vp_rl.configuration.kinds import Several
from vp_rl.interfaces import Reward
from vp_rl.types import Images, Scores

log = logging.getLogger(__name__)

_numbers = itertools.count()  # of instances: the same on every rank, as all of them build the same objects


class Moments(NamedTuple):
    """Of numbers that were seen so far, in double precision."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of squared distances to the mean."""

    def plus(self, scores: Scores) -> "Moments":
        """With more numbers: Chan, Golub and LeVeque (1979), which does not cancel where the mean is far from 0."""
        new = scores.detach().double().cpu()
        mean = new.mean().item()
        count, shift = self.count + len(new), mean - self.mean
        squares = self.squares + (new - mean).square().sum().item() + shift**2 * self.count * len(new) / count
        return Moments(count, self.mean + shift * len(new) / count, squares)

    @property
    def std(self) -> float:
        """The sample's; 0 of a single number."""
        return math.sqrt(self.squares / max(1, self.count - 1))

    def standardise(self, scores: Scores) -> Scores:
        """Zeros where nothing has varied yet."""
        return (scores - self.mean) / (self.std or math.inf)


class WeightedReward(Reward):
    """sum over names of weight * (score - mean) / std.

    While statistics run, they include the batch at hand, so that the first one has some; a batch is never split. From
    then on rows are independent. They are part of checkpoints. With several processes all use those of the main one,
    whose first batch must therefore be enough for them.

    Args:
        rewards: by name. It is differentiable if all of them are.
        weights: by the same names; negative ones punish, and a weight of 0 keeps a reward in `parts` only.
        warmup: images that statistics are taken of, at least 2. The standard deviation of 64 is within 9 % (one sigma).
        statistics: (mean, standard deviation) by name, from another run's log for instance, so that runs can be
            compared; None: of the first images.

    Raises:
        ValueError: names do not fit each other, or a number makes no sense.
    """

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        weights: Mapping[str, float],
        warmup: Several = 64,
        statistics: Mapping[str, tuple[float, float]] | None = None,
    ) -> None:
        super().__init__()
        _check(rewards, weights, warmup)
        self.rewards, self.weights = nn.ModuleDict(rewards), dict(weights)
        self.differentiable = all(reward.differentiable for reward in rewards.values())
        self.elsewhere = all(reward.elsewhere for reward in rewards.values())
        self._warmup, self._number = warmup, next(_numbers)
        self._moments = dict.fromkeys(rewards, Moments()) if statistics is None else _given(statistics, rewards, warmup)

    @property
    def statistics(self) -> dict[str, tuple[float, float]]:
        """Mean and standard deviation by name, as they are now."""
        return {name: (moments.mean, moments.std) for name, moments in self._moments.items()}

    def forward(self, images: Images, prompts: list[str]) -> Scores:
        """The weighted sum; gradients flow if they do in every part.

        Raises:
            ValueError: see `parts` and `total`.
        """
        return self.total(self.parts(images, prompts))

    def total(self, parts: Mapping[str, Scores]) -> Scores:
        """The weighted sum of what `parts` gave; while statistics run, they take it in.

        Raises:
            ValueError: a part is equal for all images that statistics were taken of.
        """
        if self._running() and len(next(iter(parts.values()))):
            self._take_in(parts)
        standardised = [self.weights[name] * self._moments[name].standardise(parts[name]) for name in parts]
        return torch.stack(standardised).sum(0)

    def parts(self, images: Images, prompts: list[str]) -> dict[str, Scores]:
        """Each reward's own scores by name, as they are; statistics do not change.

        Raises:
            ValueError: one is not finite; names the reward and the prompt.
        """
        parts = {}
        for name, reward in self.rewards.items():
            scores = parts[name] = reward(images, prompts)
            bad = ~torch.isfinite(scores)
            if bad.any():
                row = int(bad.nonzero()[0])
                raise ValueError(
                    f"reward.rewards.{name} ({type(reward).__name__}) gave {scores[row].item()} for the image of "
                    f"{prompts[row]!r} ({int(bad.sum())} of {len(scores)} scores are not finite). Look at that image, "
                    f"try trainer.precision=32-true, or leave {name} out."
                )
        return parts

    def get_extra_state(self) -> dict[str, tuple[int, float, float]]:
        """The statistics: in `state_dict`, but never cast to a module's precision or moved to its device."""
        return {name: (moments.count, moments.mean, moments.squares) for name, moments in self._moments.items()}

    def set_extra_state(self, state: dict[str, tuple[int, float, float]]) -> None:
        """Reads what `get_extra_state` gave.

        Raises:
            ValueError: it is of other rewards.
        """
        if state.keys() != self._moments.keys():
            raise ValueError(
                f"The checkpoint has statistics of {', '.join(state)}, and reward.rewards are "
                f"{', '.join(self._moments)}. Resume with the settings of the run that wrote it."
            )
        self._moments = {name: Moments(*moments) for name, moments in state.items()}

    def _running(self) -> bool:
        return next(iter(self._moments.values())).count < self._warmup

    def _take_in(self, parts: Mapping[str, Scores]) -> None:
        if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
            self._update(parts)
            return
        # No collective: the main process may be evaluating while the others wait for it to begin with training.
        store = distributed.PrefixStore(
            f"vp_rl.weighted.{self._number}", distributed.distributed_c10d._get_default_store()
        )
        if distributed.get_rank() == 0:
            try:
                self._update(parts)
                if self._running():
                    raise ValueError(
                        f"With several processes, reward.warmup={self._warmup} images must come in the first batch, "
                        f"which has {len(next(iter(parts.values())))}. Lower it, raise evaluation.batch_size and "
                        "algorithm.sample_batch, or give reward.statistics."
                    )
            except ValueError as error:
                store.set("statistics", json.dumps({"error": str(error)}))
                raise
            store.set("statistics", json.dumps(self.get_extra_state()))
            return
        found = json.loads(store.get("statistics"))  # waits for it
        if "error" in found:
            raise ValueError(found["error"])
        self.set_extra_state(found)

    def _update(self, parts: Mapping[str, Scores]) -> None:
        self._moments = {name: moments.plus(parts[name]) for name, moments in self._moments.items()}
        if self._running():
            return
        for name, moments in self._moments.items():
            if not moments.std > 0:
                raise ValueError(
                    f"reward.rewards.{name} gave all of the first {moments.count} images the score {moments.mean:.4g}, "
                    f"which is no scale. Raise reward.warmup, give reward.statistics, or leave {name} out."
                )
        found = ", ".join(f"{name}: [{mean:.6g}, {std:.6g}]" for name, (mean, std) in self.statistics.items())
        log.info("reward.statistics={%s} from now on", found)


def _check(rewards: Mapping[str, Reward], weights: Mapping[str, float], warmup: int) -> None:
    unknown, missing = weights.keys() - rewards.keys(), rewards.keys() - weights.keys()
    if unknown:
        raise ValueError(
            f"reward.weights has {', '.join(sorted(unknown))}, and reward.rewards has {', '.join(rewards) or 'none'}: "
            "correct the name, or add the reward by +reward@reward.rewards.NAME=OPTION."
        )
    if missing:
        name = min(missing)
        raise ValueError(f"reward.rewards.{name} has no weight: add +reward.weights.{name}=1.0.")
    bad = [name for name, weight in weights.items() if not math.isfinite(weight)]
    if bad:
        raise ValueError(f"reward.weights.{bad[0]}={weights[bad[0]]} must be a finite number.")
    if not any(weights.values()):
        raise ValueError("All of reward.weights are 0, so that every image would score 0: raise one.")
    if warmup < 2:
        raise ValueError(f"reward.warmup={warmup} must be at least 2: one image has no standard deviation.")


def _given(
    statistics: Mapping[str, tuple[float, float]], rewards: Mapping[str, Reward], warmup: int
) -> dict[str, Moments]:
    if statistics.keys() != rewards.keys():
        raise ValueError(
            f"reward.statistics are of {', '.join(statistics) or 'nothing'}, and reward.rewards are "
            f"{', '.join(rewards)}: give [mean, std] for each of these, or null."
        )
    for name, (mean, std) in statistics.items():
        if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
            raise ValueError(
                f"reward.statistics.{name}=[{mean}, {std}] must be a mean and a standard deviation above 0."
            )
    return {name: Moments(warmup, mean, std**2 * (warmup - 1)) for name, (mean, std) in statistics.items()}
