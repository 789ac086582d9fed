"""Prompts whose images people ranked, with the images in files: ImageRewardDB, HPD v2, and what is stored like them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vp_rl.configuration.kinds import Text
from vp_rl.data.sets.base import Judged, shares_of
from vp_rl.data.sets.files import Row, rows
from vp_rl.data.sets.table import TableSet


class RankingColumns(NamedTuple):
    """What the columns of a table of rankings are."""

    prompt: Text = "prompt"
    images: Text = "images"
    """Names of the images' files: a list, or one if `group` says which rows belong together."""
    ranks: Text = "ranking"
    """As the images; lower is better, equal is a tie."""
    group: Text | None = None
    """What the rows of one prompt have in common; None: each row has all images of its prompt."""
    people: Text | None = None
    """A list of the single people's rankings, each as the images, or in an object under `rank`."""
    generators: Text | None = None
    aspects: Mapping[str, str] = {}  # noqa: RUF012  # never changed
    """Columns of ratings in single aspects, higher is better, by the aspect's name."""
    higher_is_better: bool = False
    """Of `ranks`: what they are is no ranking but a choice, or ratings."""

    def names(self) -> set[str]:
        """All of them."""
        single = (self.prompt, self.images, self.ranks, self.group, self.people, self.generators)
        return {name for name in single if name is not None} | set(self.aspects.values())


class Rankings(TableSet[RankingColumns]):
    """A row, or a group of rows, for each prompt with its images; `limit` is of prompts."""

    def _parse(self, file: Path) -> list[Judged]:
        found = rows(file, self._columns.names())
        if self._columns.group is not None:
            found = _grouped(found, self._columns)
        judged = []
        for place, row in enumerate(found[: self._limit], start=1):
            try:
                judged.append(_judged(row, self._columns))
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"Prompt {place} of '{file}' has no ranking of its images: {error}") from error
        return judged


def _grouped(found: list[Row], columns: RankingColumns) -> list[Row]:
    """One row of lists for each prompt, in the order in which they first come."""
    assert columns.group is not None
    groups: dict[Any, Row] = {}
    lists = {columns.images, columns.ranks, columns.generators, *columns.aspects.values()} - {None}
    for row in found:
        group = groups.setdefault(row[columns.group], {**row, **{name: [] for name in lists}})
        for name in lists:
            group[name].append(row[name])
    return list(groups.values())


def _judged(row: Row, columns: RankingColumns) -> Judged:
    """One prompt's images.

    Raises:
        ValueError: the lists are of different lengths, or not of numbers.
    """
    images = tuple(str(name) for name in row[columns.images])
    if len(set(images)) != len(images):
        raise ValueError(f"an image is there twice: {images}")
    ranks = _numbers(row[columns.ranks], images) * (-1 if columns.higher_is_better else 1)
    people = [] if columns.people is None else row[columns.people]
    opinions = [_numbers(one["rank"] if isinstance(one, Mapping) else one, images) for one in people or []]
    generators = () if columns.generators is None else tuple(map(str, row[columns.generators]))
    aspects = {name: -_numbers(row[column], images) for name, column in columns.aspects.items()}
    return Judged(
        str(row[columns.prompt]), images, ranks, shares_of(np.stack(opinions or [ranks])), generators, aspects
    )


def _numbers(values: Any, images: Sequence[str]) -> np.ndarray:
    numbers = np.asarray(values, dtype=float)
    if numbers.shape != (len(images),) or not np.isfinite(numbers).all():
        raise ValueError(f"{values!r:.200} are not {len(images)} numbers, one for each image")
    return numbers
