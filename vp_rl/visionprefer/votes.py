"""What people say of image pairs, kept in the same file as what annotators answered."""

import threading
import time
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from vp_rl.files import sqlite

Choice = Literal["left", "right", "tie"]
CHOICES: tuple[Choice, ...] = get_args(Choice)

OVERALL = "overall"
"""Asked in the place of an aspect: which image is better, all in all?"""

_LONGEST = 200  # characters of a name
_DAY = 86400.0
_WHAT = "a file of votes"
_TABLE = """
CREATE TABLE IF NOT EXISTS votes (
    voter TEXT NOT NULL,
    prompt_id INTEGER NOT NULL,
    "left" TEXT NOT NULL,
    "right" TEXT NOT NULL,
    aspect TEXT NOT NULL,
    choice TEXT NOT NULL,
    seconds REAL NOT NULL,
    created REAL NOT NULL
)
"""


class Vote(NamedTuple):
    """One person's choice between two images, in one aspect."""

    voter: str
    prompt_id: int
    left: str
    """Image shown on the left."""
    right: str
    aspect: str
    """One of `ASPECTS`, or `OVERALL`."""
    choice: Choice
    seconds: float = 0.0
    """From seeing to choosing."""
    created: float = 0.0
    """Unix time."""

    @property
    def question(self) -> tuple[int, frozenset[str], str]:
        """What was asked, whichever side was left."""
        return self.prompt_id, frozenset((self.left, self.right)), self.aspect


class Votes:
    """The table `votes` of an SQLite file. Votes are added, never changed: of one voter's on a question the last holds.

    Threads may add and read at once.

    Args:
        file: made if it is absent; others may have it open.

    Raises:
        OSError: it cannot be written, or is another kind of file.
    """

    def __init__(self, file: Path) -> None:
        self._file, self._one_at_a_time = file, threading.Lock()
        self._database = sqlite.opened(file, _WHAT, _TABLE)

    def add(self, vote: Vote) -> None:
        """Writes a vote to the disk; its time is now.

        Raises:
            ValueError: its parts make no sense.
            OSError: it cannot be written.
        """
        if not voter_is_named(vote.voter):
            raise ValueError(f"A voter's name is up to {_LONGEST} printable characters, not {vote.voter[:80]!r}.")
        if vote.choice not in CHOICES or vote.left == vote.right or not 0 <= vote.seconds <= _DAY:
            raise ValueError(f"No vote could be {vote}.")
        row = vote._replace(created=time.time())
        with sqlite.told(self._file, _WHAT), self._one_at_a_time, self._database:
            self._database.execute("INSERT INTO votes VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)

    def read(self) -> list[Vote]:
        """All votes that hold, oldest first.

        Raises:
            OSError: the file is damaged.
        """
        latest: dict[tuple, Vote] = {}
        with sqlite.told(self._file, _WHAT), self._one_at_a_time:
            rows = self._database.execute("SELECT * FROM votes ORDER BY rowid").fetchall()
        for row in rows:
            vote = Vote(*row)
            latest[vote.voter, *vote.question] = vote
        return list(latest.values())

    def close(self) -> None:
        """Lets go of the file."""
        self._database.close()


def voter_is_named(voter: str) -> bool:
    """Whether this can be a voter's name."""
    return voter == voter.strip() and 0 < len(voter) <= _LONGEST and voter.isprintable()
