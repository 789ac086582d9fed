"""What was asked and what was answered, on disk before anything else happens: nothing paid is asked or lost twice."""

import asyncio
import hashlib
import json
import logging
import math
import shutil
import sqlite3
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

from vp_rl.files import sqlite
from vp_rl.secrets import mask
from vp_rl.text import storable
from vp_rl.types import Usage

log = logging.getLogger(__name__)

Outcome = Literal["accepted", "unreadable", "refused", "unanswered"]

_RESERVE = 64 * 2**20  # bytes that must be free on the disk before anything more is asked
_PATIENCE = 5.0  # seconds that SQLite itself waits for another program's lock, before we say so and wait on
_MOST = 2**62  # of an integer; SQLite's have 64 bits, and they are added up
_TABLE = """
CREATE TABLE IF NOT EXISTS answers (
    id INTEGER PRIMARY KEY,
    key BLOB NOT NULL,
    stage TEXT NOT NULL,
    subject TEXT NOT NULL,
    respondent TEXT NOT NULL,
    version TEXT NOT NULL,
    outcome TEXT NOT NULL,
    text TEXT NOT NULL,
    reason TEXT NOT NULL,
    input_tokens INTEGER NOT NULL,
    output_tokens INTEGER NOT NULL,
    usd REAL NOT NULL,
    seconds REAL NOT NULL,
    created REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS answers_key ON answers (key, outcome);
"""


class Entry(NamedTuple):
    """One call and what came of it."""

    key: bytes
    stage: str
    subject: str
    """What was asked, in words."""
    respondent: str
    version: str
    outcome: Outcome
    text: str
    """The answer as it came; a refusal's words; empty where none came."""
    reason: str
    """Why it is not accepted."""
    usage: Usage
    seconds: float


class Spent(NamedTuple):
    """What the calls of a stage came to."""

    stage: str
    respondent: str
    outcome: Outcome
    calls: int
    usage: Usage


def key_of(*parts: object) -> bytes:
    """What identifies a question: the same for the same parts, whenever and wherever it is asked."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).digest()[:16]


class Journal:
    """An SQLite file in WAL mode. Open it in one process at a time, or read it from several.

    Args:
        file: made if it is absent.

    Raises:
        OSError: it cannot be written, or is no journal.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        self._waiting: list[tuple[Entry, asyncio.Future[None]]] = []
        self._writer: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="journal")
        # Each answer is paid for: it must outlive a power cut.
        self._database = sqlite.opened(file, "a journal of answers", _TABLE, patience=_PATIENCE)

    def close(self) -> None:
        """Everything written is on disk already; this lets the file go."""
        self._thread.shutdown()
        self._database.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def write(self, entry: Entry) -> None:
        """Returns when the entry is on disk. What arrives while another commit runs shares the next one.

        A program that holds the file is waited for.

        Raises:
            OSError: the disk is full, or has failed.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((entry, done))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._drain())
        await done

    def check_room(self) -> None:
        """Refuses to go on while the disk is nearly full: better to stop before an answer than after it.

        Raises:
            OSError: less than 64 MiB are free.
        """
        free = shutil.disk_usage(self.file.parent).free
        if free < _RESERVE:
            raise OSError(
                f"Only {free / 2**20:.0f} MiB are free where {self.file} is, so nothing more is asked: "
                "make room and start again; everything answered is kept."
            )

    def accepted(self) -> set[bytes]:
        """Keys of all questions that have an accepted answer."""
        return {key for (key,) in self._database.execute("SELECT key FROM answers WHERE outcome = 'accepted'")}

    def has_accepted(self, stage: str, respondent: str) -> bool:
        """Whether anything that this one said could ever be read."""
        query = "SELECT 1 FROM answers WHERE stage = ? AND respondent = ? AND outcome = 'accepted' LIMIT 1"
        return self._database.execute(query, (stage, respondent)).fetchone() is not None

    def commonest_reason(self, respondent: str) -> str | None:
        """Why most answers of this one were not accepted; None: they were."""
        query = (
            "SELECT outcome, reason FROM answers WHERE respondent = ? AND outcome != 'accepted' "
            "GROUP BY outcome, reason ORDER BY count(*) DESC LIMIT 1"
        )
        row = self._database.execute(query, (respondent,)).fetchone()
        return None if row is None else f"{row[0]}: {row[1]}"

    def failures(self) -> dict[bytes, list[tuple[Outcome, str]]]:
        """Outcome and text of every call whose answer was not accepted, by key; without those that had no answer."""
        found: dict[bytes, list[tuple[Outcome, str]]] = {}
        query = "SELECT key, outcome, text FROM answers WHERE outcome IN ('unreadable', 'refused') ORDER BY id"
        for key, outcome, text in self._database.execute(query):
            found.setdefault(key, []).append((outcome, text))
        return found

    def texts(self, keys: Iterable[bytes]) -> Iterator[str | None]:
        """The accepted answer to each question as it came, or None."""
        query = "SELECT text FROM answers WHERE key = ? AND outcome = 'accepted' LIMIT 1"
        for key in keys:
            row = self._database.execute(query, (key,)).fetchone()
            yield None if row is None else row[0]

    def unreadable_now(self, key: bytes, subject: str, respondent: str, why: ValueError) -> ValueError:
        """What to say of an accepted answer that nobody can read any more: which row it is, and what to do with it."""
        return ValueError(
            f"{self.file} has an accepted answer of {respondent} that cannot be read any more, to {subject!r}: {why}. "
            f"To have it asked again, delete it: DELETE FROM answers WHERE hex(key) = '{key.hex().upper()}'"
        )

    def reasons(self, keys: Iterable[bytes]) -> Iterator[str]:
        """Why each question has no accepted answer: what was said of the last call."""
        query = "SELECT outcome, reason FROM answers WHERE key = ? ORDER BY id DESC LIMIT 1"
        for key in keys:
            row = self._database.execute(query, (key,)).fetchone()
            yield "never asked" if row is None else f"{row[0]}: {row[1]}"

    def usd(self) -> float:
        """What all calls have cost."""
        return float(self._database.execute("SELECT coalesce(sum(usd), 0) FROM answers").fetchone()[0])

    def spent(self) -> list[Spent]:
        """Calls, tokens and money by stage, respondent and outcome."""
        query = (
            "SELECT stage, respondent, outcome, count(*), sum(input_tokens), sum(output_tokens), sum(usd) "
            "FROM answers GROUP BY stage, respondent, outcome ORDER BY stage DESC, respondent, outcome"
        )
        return [
            Spent(stage, respondent, outcome, calls, Usage(*usage))
            for stage, respondent, outcome, calls, *usage in self._database.execute(query)
        ]

    async def _drain(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            problem = await self._try([entry for entry, _ in batch])
            for entry, done in batch:
                # One entry that cannot be written must not take the others with it.
                alone = problem if problem is None or len(batch) == 1 else await self._try([entry])
                if done.done():  # whoever waited was cancelled
                    continue
                if alone is None:
                    done.set_result(None)
                else:
                    done.set_exception(
                        OSError(f"The journal {self.file} cannot be written ({alone}): make room and start again.")
                    )

    async def _try(self, entries: list[Entry]) -> Exception | None:
        """Writes them, all or none, when nobody else does: what went wrong."""
        loop, warned = asyncio.get_running_loop(), -math.inf
        while True:
            try:
                await loop.run_in_executor(self._thread, self._commit, entries)
            except Exception as error:  # whatever it is, somebody waits for it
                if not _is_locked(error):
                    return error
            else:
                return None
            if loop.time() - warned > 60:
                warned = loop.time()
                log.warning("%s is locked: waiting for the program that has it open to let it go", self.file)
            await asyncio.sleep(0.05)

    def _commit(self, entries: list[Entry]) -> None:
        now = time.time()
        rows = [(*_storable(entry), now) for entry in entries]
        with self._database:
            self._database.executemany(
                "INSERT INTO answers (key, stage, subject, respondent, version, outcome, text, reason, input_tokens, "
                f"output_tokens, usd, seconds, created) VALUES ({', '.join('?' * 13)})",
                rows,
            )


def _is_locked(error: Exception) -> bool:
    code = getattr(error, "sqlite_errorcode", None)
    return code is not None and code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _storable(entry: Entry) -> tuple[object, ...]:
    """The entry's fields as SQLite takes them, whatever servers and users put into them: this is the one way in."""
    texts = (mask(storable(str(text))) for text in entry[1:8])
    tokens = (min(max(0, int(number)), _MOST) if math.isfinite(number) else 0 for number in entry.usage[:2])
    reals = (number if math.isfinite(number) else 0.0 for number in (entry.usage.usd, entry.seconds))
    return entry.key, *texts, *tokens, *reals
