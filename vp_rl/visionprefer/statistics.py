"""What an exported dataset holds and how its annotator rates, in one reading and bounded memory.

A win rate is that of a group of images (a generator's, say) against the prompt's images that are not of the group, over
the pairs that are not tied: 50% says nothing for or against. The win rates of an aspect are by that aspect's pairs,
those of `mean` by the mean over aspects.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow
from jaxtyping import Float, Int

from vp_rl.types import ASPECTS
from vp_rl.visionprefer import estimates
from vp_rl.visionprefer.estimates import Estimate
from vp_rl.visionprefer.pairs import Pairs, all_pairs
from vp_rl.visionprefer.ratings import REVERSED, Batch

Table = dict[str, Estimate]
"""An estimate for each aspect, and one for all: `mean` where images are ranked by the mean over aspects, `pooled` where
the aspects' ratings or pairs are thrown together."""

_LEVELS = 5


class Setting(NamedTuple):
    """A generator at a guidance scale."""

    generator: str
    guidance_scale: float


@dataclass(frozen=True)
class Positions:
    """What the place in the call, from 0, does to an image's ratings: nothing, if the annotator is fair."""

    ratings: dict[int, Table]
    """Mean rating, 1 to 5."""
    wins: dict[int, Table]
    """Win rate against the other places."""


@dataclass(frozen=True)
class BothOrders:
    """The same images shown twice, the second time in reversed order."""

    same: Table
    """Share of ratings that stay the same."""
    alike: Table
    """Share of image pairs ordered alike, of those that neither time were tied."""
    earlier: Table
    """How much higher an image is rated where it comes earlier: 0 for a fair annotator."""


@dataclass(frozen=True)
class Statistics:
    """Of one annotator's ratings, all but `annotators`. Intervals are of 95%, over prompts."""

    annotators: dict[str, int]
    """How many ratings each has given."""
    prompts: int
    images: int
    possible_pairs: int
    """Of images of one prompt; each aspect could give as many."""
    pairs: dict[str, int]
    """Without ties: of each aspect, `pooled` and by the `mean`."""
    histograms: dict[str, Int[np.ndarray, "aspects 5"]]
    """How often each rating was given to images of each generator."""
    correlation: Float[np.ndarray, "aspects aspects"]
    """Spearman's, over images; not a number where an aspect has one rating only."""
    generators: dict[str, Table]
    guidance: dict[float, Table]
    """Scales are rounded to a tenth."""
    steps: dict[int, Table]
    settings: dict[Setting, Table]
    positions: Positions
    both_orders: BothOrders

    @property
    def histogram(self) -> Int[np.ndarray, "aspects 5"]:
        """How often each rating was given."""
        return sum(self.histograms.values(), np.zeros((len(ASPECTS), _LEVELS), np.int64))

    @property
    def ratings(self) -> int:
        """How many."""
        return int(self.histogram.sum())


def measure(batches: Iterable[pyarrow.RecordBatch], annotator: str) -> Statistics:
    """The statistics of an annotator's ratings.

    Args:
        batches: see `ratings.batches`.
        annotator: whose ratings; those under its name with `REVERSED` are compared with them.

    Raises:
        ValueError: the annotator has rated nothing, or `Batch` finds fault with the data.
    """
    totals = _Totals()
    for rows in batches:
        totals.add(Batch(rows), annotator)
    if not totals.annotators[annotator]:
        raise ValueError(f"{annotator!r} has rated nothing here; these have: {', '.join(totals.annotators) or 'none'}.")
    return totals.statistics()


class _Totals:
    """Everything that is added up. Tables hold sums (see `estimates.sums`) by label, for each aspect and for all."""

    def __init__(self) -> None:
        self.annotators: Counter[str] = Counter()
        self.prompts = self.images = self.possible = 0
        self.pairs = np.zeros(len(ASPECTS) + 1, np.int64)  # the last one: by the mean
        self.joint = np.zeros((len(ASPECTS) * _LEVELS,) * 2)
        self.histograms = defaultdict(lambda: np.zeros((len(ASPECTS), _LEVELS), np.int64))
        self.tables = defaultdict(lambda: defaultdict(lambda: np.zeros((6, len(ASPECTS) + 1))))

    def add(self, batch: Batch, annotator: str) -> None:
        ratings, places = batch.ratings(annotator)
        pooled, by_mean = all_pairs(ratings), all_pairs(ratings, "mean")
        self.annotators.update(batch.annotators())
        self.prompts += len(batch.counts)
        self.images += int(batch.counts.sum())
        self.possible += int((batch.counts * (batch.counts - 1) // 2).sum())
        self.pairs += np.bincount(np.append(pooled.aspect, by_mean.aspect) % len(self.pairs), minlength=len(self.pairs))
        self._add_settings(batch, ratings, Pairs(*map(np.append, pooled, by_mean)))
        self._add_places(ratings, places, pooled)
        self._add_orders(ratings, places, *batch.ratings(annotator + REVERSED))

    def _add_settings(self, batch: Batch, ratings: Int[np.ndarray, "prompts images aspects"], decided: Pairs) -> None:
        given = (ratings[..., None] == np.arange(1, _LEVELS + 1)).reshape(-1, len(self.joint)).astype(float)
        self.joint += given.T @ given
        names, generator = batch.setting("generator")
        for code, name in enumerate(names):
            self.histograms[name] += given[generator.ravel() == code].sum(0).reshape(-1, _LEVELS).astype(np.int64)
        exact, index = batch.setting("guidance_scale")
        scales, rounded = np.unique(np.round(np.array(exact, float), 1), return_inverse=True)
        guidance = np.append(rounded, -1)[index]
        cells = [Setting(name, scale) for name in names for scale in scales.tolist()]
        for table, labels, codes in (
            ("generators", names, generator),
            ("guidance", scales.tolist(), guidance),
            ("steps", *batch.setting("steps")),
            ("settings", cells, np.where(guidance < 0, -1, generator * len(scales) + guidance)),
        ):
            won, lost = codes[decided.prompt, decided.better], codes[decided.prompt, decided.worse]
            self._add(table, labels, *_matches(decided, won, lost, (len(codes), len(labels))))

    def _add_places(
        self,
        ratings: Int[np.ndarray, "prompts images aspects"],
        places: Int[np.ndarray, "prompts images aspects"],
        pooled: Pairs,
    ) -> None:
        labels = range(int(places.max(initial=-1)) + 1)
        at = places[:, :, None] == np.array(labels)[:, None]  # prompts, images, places, aspects
        self._add("place_ratings", labels, _with_all((ratings[:, :, None] * at).sum(1)), _with_all(at.sum(1)))
        won, lost = (places[pooled.prompt, image, pooled.aspect] for image in (pooled.better, pooled.worse))
        wins, made = _matches(pooled, won, lost, (len(places), len(labels)))
        self._add("place_wins", labels, _with_all(wins[..., :-1]), _with_all(made[..., :-1]))

    def _add_orders(
        self,
        ratings: Int[np.ndarray, "prompts images aspects"],
        places: Int[np.ndarray, "prompts images aspects"],
        again: Int[np.ndarray, "prompts images aspects"],
        places_again: Int[np.ndarray, "prompts images aspects"],
    ) -> None:
        both = (ratings > 0) & (again > 0)
        i, j = np.triu_indices(ratings.shape[1], 1)
        gap, gap_again = (np.sign(each[:, i] - each[:, j]) * (both[:, i] & both[:, j]) for each in (ratings, again))
        moved = np.sign(places_again - places) * both  # 1 where it came earlier the first time
        for table, y, n in (
            ("same", (ratings == again) & both, both),
            ("alike", gap * gap_again > 0, gap * gap_again != 0),
            ("earlier", moved * (ratings - again), moved != 0),
        ):
            self._add(table, [0], _with_all(y.sum(1))[:, None], _with_all(n.sum(1))[:, None])

    def _add(self, table: str, labels: Iterable[Hashable], y: np.ndarray, n: np.ndarray) -> None:
        added = estimates.sums(y, n)
        for index, label in enumerate(labels):
            self.tables[table][label] += added[:, index]

    def statistics(self) -> Statistics:
        pairs = dict(zip(ASPECTS, self.pairs.tolist(), strict=False))
        return Statistics(
            annotators=dict(self.annotators),
            prompts=self.prompts,
            images=self.images,
            possible_pairs=self.possible,
            pairs={**pairs, "pooled": sum(pairs.values()), "mean": int(self.pairs[-1])},
            histograms=dict(sorted(self.histograms.items())),
            correlation=correlation(self.joint),
            generators=self._estimates("generators", estimates.share, "mean"),
            guidance=self._estimates("guidance", estimates.share, "mean"),
            steps=self._estimates("steps", estimates.share, "mean"),
            settings=self._estimates("settings", estimates.share, "mean"),
            positions=Positions(
                ratings=self._estimates("place_ratings", estimates.mean),
                wins=self._estimates("place_wins", estimates.share),
            ),
            both_orders=BothOrders(
                same=self._estimates("same", estimates.share)[0],
                alike=self._estimates("alike", estimates.share)[0],
                earlier=self._estimates("earlier", estimates.mean)[0],
            ),
        )

    def _estimates(self, table: str, estimate: Callable[[np.ndarray], Estimate], last: str = "pooled") -> dict:
        return {
            label: {name: estimate(own[:, column]) for column, name in enumerate((*ASPECTS, last))}
            for label, own in sorted(self.tables[table].items())
        }


def _matches(
    pairs: Pairs, won: Int[np.ndarray, " pairs"], lost: Int[np.ndarray, " pairs"], shape: tuple[int, int]
) -> tuple[Int[np.ndarray, "prompts labels columns"], Int[np.ndarray, "prompts labels columns"]]:
    """Of each prompt and label, pairs won and made against other labels; by aspect, the last column by the mean.

    Args:
        pairs: of these prompts.
        won, lost: the labels of each pair's images, as numbers.
        shape: how many prompts and labels there are.
    """
    full = (*shape, len(ASPECTS) + 1)
    apart = won != lost
    prompt, column = pairs.prompt[apart], pairs.aspect[apart] % full[-1]
    wins, losses = (
        np.bincount(np.ravel_multi_index((prompt, label[apart], column), full), minlength=int(np.prod(full)))
        for label in (won, lost)
    )
    return wins.reshape(full), (wins + losses).reshape(full)


def _with_all(counted: Int[np.ndarray, "*prompts aspects"]) -> Int[np.ndarray, "*prompts columns"]:
    """With the sum over aspects as a column of its own."""
    return np.concatenate([counted, counted.sum(-1, keepdims=True)], -1)


def correlation(joint: Float[np.ndarray, "all all"]) -> Float[np.ndarray, "aspects aspects"]:
    """Spearman's rank correlation between aspects, ties at their mean rank.

    Args:
        joint: how many images have each pair of ratings; a row and a column for each aspect and rating, aspects first.
    """
    blocks = joint.reshape(len(ASPECTS), _LEVELS, len(ASPECTS), _LEVELS).swapaxes(1, 2)
    found = np.full((len(ASPECTS),) * 2, np.nan)
    for a, b in np.ndindex(*found.shape):
        counts = blocks[a, b]
        x, y = (_centred_ranks(counts.sum(axis)) for axis in (1, 0))
        spread = (counts.sum(1) @ x**2) * (counts.sum(0) @ y**2)
        if spread > 0:
            found[a, b] = x @ counts @ y / np.sqrt(spread)
    return found


def _centred_ranks(counts: Float[np.ndarray, " levels"]) -> Float[np.ndarray, " levels"]:
    """The mean rank of each level's members, less the mean of all ranks."""
    return np.cumsum(counts) - counts / 2 - counts.sum() / 2
