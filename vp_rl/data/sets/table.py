"""What sets that are a table beside a folder of images have in common."""

from abc import abstractmethod
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from vp_rl.configuration.kinds import Count, Text
from vp_rl.data.sets.base import HumanSet, Judged, Protocol
from vp_rl.data.sets.files import Hub, Pictures, fetch, require, stamp
from vp_rl.files.paths import user_path

Columns = TypeVar("Columns")


class TableSet(HumanSet, Generic[Columns]):
    """A table of judgements beside a folder of images.

    Args:
        title: see `HumanSet`.
        folder: of the set; downloaded there if the table is absent.
        table: its file in the folder; its ending says what it is, see `tables.rows`.
        columns: of the table.
        protocols: see `HumanSet`.
        images: the folder, in `folder`, that the images' names start from.
        hub: where the set can be downloaded.
        limit: only the first so many judgements.
    """

    any_order = True

    def __init__(
        self,
        title: Text,
        folder: Text,
        table: Text,
        columns: Columns,
        protocols: Sequence[Protocol],
        images: Text = ".",
        hub: Hub | None = None,
        limit: Count | None = None,
    ) -> None:
        self.title, self.protocols = title, list(protocols)
        self._folder, self._table, self._columns, self._hub, self._limit = user_path(folder), table, columns, hub, limit
        self._pictures = Pictures(self._folder / user_path(images))

    def load(self) -> list[Judged]:
        """See `HumanSet`."""
        judged = self.judgements()
        require(self._pictures, _names(judged), self.title)
        return judged

    def judgements(self) -> list[Judged]:
        """What `load` gives, whether the images are there or not."""
        fetch(self._folder, self._table, self._hub)
        return self._parse(self._folder / self._table)

    @abstractmethod
    def _parse(self, file: Path) -> list[Judged]:
        """The judgements in the table."""

    def read(self, wanted: Collection[str]) -> Iterator[tuple[str, bytes]]:
        """See `HumanSet`."""
        return self._pictures.read(wanted)

    def stamp(self) -> str:
        """See `HumanSet`."""
        return f"{stamp(self._folder / self._table)}|{self._pictures.stamp(_names(self.judgements()))}"


def _names(judged: Sequence[Judged]) -> list[str]:
    """Of all images, each once."""
    return list(dict.fromkeys(name for each in judged for name in each.images))
