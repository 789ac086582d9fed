"""Prompts whose images people ranked, with the images in files: ImageRewardDB, HPD v2, and what is stored like them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vp_rl.configuration.kinds import Text
from vp_rl.data.sets.base import Judged, shares_of
from vp_rl.data.sets.files import Placed, Row, name_of, rows, without_nulls
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
    aspects: Mapping[str, str] | None = None
    """Columns of ratings in single aspects, higher is better, by the aspect's name. None: there are none."""
    higher_is_better: bool = False
    """Of `ranks`: what they are is no ranking but a choice, or ratings."""

    def names(self) -> set[str]:
        """All of them."""
        single = (self.prompt, self.images, self.ranks, self.group, self.people, self.generators)
        return {name for name in single if name is not None} | set((self.aspects or {}).values())


class Rankings(TableSet[RankingColumns]):
    """A row, or a group of rows, for each prompt with its images; `limit` is of prompts."""

    def _parse(self, file: Path) -> list[Judged]:
        columns = self._columns
        named = (
            {columns.prompt, columns.images}
            if columns.group is None
            else {columns.prompt, columns.images, columns.group}
        )
        found, self.note = without_nulls(rows(file, columns.names()), named)
        if columns.group is not None:
            found = _grouped(found, columns)
        judged = []
        for place, row in found[: self._limit]:
            try:
                judged.append(_judged(row, columns))
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{place} has no ranking of its images: {error}") from error
        return judged


def _grouped(found: list[Placed], columns: RankingColumns) -> list[Placed]:
    """One row of lists for each prompt, in the order in which they first come."""
    assert columns.group is not None
    groups: dict[str, Placed] = {}
    lists = {columns.images, columns.ranks, columns.generators, *(columns.aspects or {}).values()} - {None}
    for place, row in found:
        empty = (f"The prompt that begins in {place}", {**row, **{name: [] for name in lists}})
        _, group = groups.setdefault(name_of(row[columns.group]), empty)
        for name in lists:
            group[name].append(row[name])
    return list(groups.values())


def _judged(row: Row, columns: RankingColumns) -> Judged:
    """One prompt's images.

    Raises:
        ValueError: the lists are of different lengths, or not of numbers.
    """
    images = tuple(name_of(name) for name in row[columns.images])
    if len(set(images)) != len(images):
        raise ValueError(f"an image is there twice: {images}")
    ranks = _numbers(row[columns.ranks], images) * (-1 if columns.higher_is_better else 1)
    people = [] if columns.people is None else row[columns.people]
    opinions = [_numbers(one["rank"] if isinstance(one, Mapping) else one, images) for one in people or []]
    generators = (
        ()
        if columns.generators is None
        else tuple("unknown" if name is None else name_of(name) for name in row[columns.generators])
    )
    aspects = {name: -_numbers(row[column], images) for name, column in (columns.aspects or {}).items()}
    return Judged(
        str(row[columns.prompt]), images, ranks, shares_of(np.stack(opinions or [ranks])), generators, aspects
    )


def _numbers(values: Any, images: Sequence[str]) -> np.ndarray:
    numbers = np.asarray(values, dtype=float)
    if numbers.shape != (len(images),) or not np.isfinite(numbers).all():
        raise ValueError(f"{values!r:.200} are not {len(images)} numbers, one for each image")
    return numbers
