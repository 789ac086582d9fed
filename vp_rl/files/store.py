"""Bytes by key on disk: what was costly to make, under a name that says what it follows from."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from vp_rl.files import sqlite

_AT_ONCE = 500  # keys in a question to SQLite
_TABLE = "CREATE TABLE IF NOT EXISTS kept (key TEXT PRIMARY KEY, value BLOB);"


class Store:
    """Bytes by key in one SQLite file, which no crash leaves half-written and several processes may use.

    So may several threads, one after the other: in a notebook answers come in another one (see `waiting.wait`).

    Args:
        file: None: nothing is kept.
        what: it is, in an error.

    Raises:
        OSError: the file is no such store, or cannot be used; here and later.
    """

    def __init__(self, file: Path | None, what: str = "a cache of evaluations") -> None:
        self._file, self._what = file, what
        self._connection = None if file is None else sqlite.opened(file, what, _TABLE, durable=False)

    def get(self, keys: Sequence[str]) -> dict[str, bytes]:
        """Those that are there."""
        if self._file is None or self._connection is None:
            return {}
        found: dict[str, bytes] = {}
        for start in range(0, len(keys), _AT_ONCE):
            some = keys[start : start + _AT_ONCE]
            marks = ", ".join("?" * len(some))
            with sqlite.told(self._file, self._what):
                found |= dict(self._connection.execute(f"SELECT key, value FROM kept WHERE key IN ({marks})", some))
        return found

    def put(self, items: Iterable[tuple[str, bytes]]) -> None:
        """All of them, or none if this is broken off."""
        if self._file is not None and self._connection is not None:
            with sqlite.told(self._file, self._what), self._connection:
                self._connection.executemany("INSERT OR REPLACE INTO kept VALUES (?, ?)", list(items))

    def close(self) -> None:
        """Lets go of the file."""
        if self._connection is not None:
            self._connection.close()
