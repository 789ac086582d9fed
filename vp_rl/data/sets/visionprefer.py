"""A VisionPrefer folder as a set of judgements: its own annotator's ratings, by the mean and by aspect."""

from collections.abc import Collection, Iterator, Sequence

import numpy as np

from vp_rl.configuration.kinds import Count, Text
from vp_rl.data.preferences import ratings_of
from vp_rl.data.sets.base import HumanSet, Judged, Protocol, shares_of
from vp_rl.data.sets.files import stamp
from vp_rl.files import parquet
from vp_rl.files.paths import user_path
from vp_rl.types import ASPECTS, Split
from vp_rl.visionprefer import schema

_AT_ONCE = 8  # prompts with all their images
_IMAGES = [f"images.list.element.{name}" for name in ("image_id", "generator")]
_ANNOTATIONS = [f"annotations.list.element.{name}" for name in ("image_id", "aspect", "rating", "annotator")]


class VisionPreferSet(HumanSet):
    """One split of a VisionPrefer dataset. Its judges are AI annotators: this is agreement with them, not with people.

    Args:
        folder: of the dataset.
        protocols: see `HumanSet`.
        split: train, validation or test.
        limit: only the first so many prompts.
        title: see `HumanSet`.
    """

    any_order = False

    def __init__(
        self,
        folder: Text,
        protocols: Sequence[Protocol],
        split: Split = "test",
        limit: Count | None = None,
        title: Text = "VisionPrefer",
    ) -> None:
        self.title, self.protocols = title, list(protocols)
        self.note = "Its judges are AI annotators: this is agreement with them, not with people."
        self._folder, self._limit = user_path(folder), limit
        self._split: Split = split

    def load(self) -> list[Judged]:
        """See `HumanSet`."""
        if not schema.exists(self._folder):
            raise FileNotFoundError(
                f"There is no VisionPrefer dataset in '{self._folder}': say where one is, or build it with "
                f"`python scripts/build_visionprefer.py folder={self._folder}`."
            )
        annotator = schema.about(self._folder)["annotator"]
        columns = ["prompt_id", "prompt", *_IMAGES, *_ANNOTATIONS]
        found = [
            _judged(row, annotator)
            for file in schema.shards(self._folder, self._split)
            for row in parquet.values(file, parquet.read(file, columns))
        ]
        return found[: self._limit]

    def read(self, wanted: Collection[str]) -> Iterator[tuple[str, bytes]]:
        """See `HumanSet`; the dataset's order."""
        for file in schema.shards(self._folder, self._split):
            for batch in parquet.batches(file, _AT_ONCE, ["prompt_id", "images"]):
                for row in parquet.values(file, batch):
                    for image in row["images"]:
                        name = _name(row, image["image_id"])
                        if name in wanted:
                            yield name, image["image"]["bytes"]

    def stamp(self) -> str:
        """See `HumanSet`."""
        return stamp(*schema.shards(self._folder, self._split))


def _name(row: schema.Row, image_id: str) -> str:
    return f"{row['prompt_id']}/{image_id}"


def _judged(row: schema.Row, annotator: str) -> Judged:
    ratings = ratings_of(row, annotator)
    ranks = {aspect: -np.array(ratings[aspect], float) for aspect in ASPECTS}
    mean = sum(ranks.values(), np.zeros(len(row["images"]))) / len(ASPECTS)  # quarters: equal ones are so exactly
    return Judged(
        prompt=row["prompt"],
        images=tuple(_name(row, image["image_id"]) for image in row["images"]),
        ranks=mean,
        shares=shares_of(mean[None]),
        generators=tuple(image["generator"] for image in row["images"]),
        aspects=ranks,
    )
