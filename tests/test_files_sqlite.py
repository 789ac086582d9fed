"""One opener of SQLite files: what is wrong with one is said in a line with its name; who holds it is waited for."""

import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import pytest

from vp_rl.evaluation.store import Store
from vp_rl.files import sqlite
from vp_rl.visionprefer.journal import Journal
from vp_rl.visionprefer.votes import Vote, Votes

OPENERS: dict[str, Callable[[Path], object]] = {"votes": Votes, "kept evaluations": Store, "answers": Journal}
TABLES = {"votes": "votes", "kept evaluations": "kept", "answers": "answers"}
TABLE = "CREATE TABLE IF NOT EXISTS notes (number INTEGER, said TEXT);"


def vote(number: int = 1) -> Vote:
    return Vote("ann", number, "a", "b", "fidelity", "left")


def foreign(file: Path, table: str) -> None:
    with sqlite3.connect(file) as other:
        other.execute(f"CREATE TABLE {table} (date TEXT, amount REAL)")
    other.close()


def damaged(file: Path) -> None:
    with sqlite3.connect(file) as whole:
        whole.execute("CREATE TABLE other (text)")
        whole.executemany("INSERT INTO other VALUES (?)", [("x" * 999,)] * 99)
    whole.close()
    content = bytearray(file.read_bytes())
    content[100:4096] = b"\x55" * 3996  # the table of tables
    file.write_bytes(content)


@pytest.mark.parametrize("name", OPENERS)
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda file, table: file.mkdir(), r"is a folder, and was to be .*: name a file"),
        (lambda file, table: file.write_text("date,amount\n" * 100), r"is not .*, but another kind of file"),
        (lambda file, table: damaged(file), r"is damaged .*\.recover"),
        (foreign, r"is not .*: its table `\w+` has the columns date, amount, not .*another program's"),
    ],
    ids=["a folder", "text", "damaged", "another program's"],
)
def test_a_file_that_cannot_be_used_is_named_with_the_way_out(
    name: str, make: Callable[[Path, str], object], said: str, tmp_path: Path
) -> None:
    file = tmp_path / "it.sqlite"
    make(file, TABLES[name])
    with pytest.raises(OSError, match=rf"it\.sqlite' {said}"):
        OPENERS[name](file)


def test_a_file_without_its_folder_is_made_and_one_below_a_file_is_refused(tmp_path: Path) -> None:
    Votes(tmp_path / "new" / "folder" / "votes.sqlite").add(vote())
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Votes(tmp_path / "file" / "votes.sqlite")


def full(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA max_page_count = 1")  # SQLite's own way to have no room: it is raised to what there is


def read_only(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA query_only = on")


@pytest.mark.parametrize(("make", "said"), [(full, "disk is full: make room"), (read_only, "see to its permissions")])
def test_what_cannot_be_written_is_said_and_works_again_later(
    make: Callable[[sqlite3.Connection], None], said: str, tmp_path: Path
) -> None:
    votes, store = Votes(tmp_path / "votes.sqlite"), Store(tmp_path / "kept.sqlite")
    assert store._connection is not None
    make(votes._database)
    make(store._connection)
    with pytest.raises(OSError, match=rf"votes\.sqlite' .*{said}"):
        deque(map(votes.add, map(vote, range(5000))), maxlen=0)
    with pytest.raises(OSError, match=rf"kept\.sqlite' .*{said}"):
        store.put([("key", b"x" * 10**6)])
    for connection in (votes._database, store._connection):
        connection.execute("PRAGMA max_page_count = 1000000")
        connection.execute("PRAGMA query_only = off")
    before = len(votes.read())
    votes.add(vote(10**6))
    assert len(votes.read()) == before + 1
    assert store.get(["key"]) == {}


def test_a_row_that_is_no_text_is_said_of_the_file(tmp_path: Path) -> None:
    votes = Votes(tmp_path / "votes.sqlite")
    votes.add(vote())
    with sqlite3.connect(tmp_path / "votes.sqlite") as other:
        other.execute("UPDATE votes SET voter = CAST(x'ff80' AS TEXT)")
    with pytest.raises(OSError, match=r"votes\.sqlite' has text in it that is not UTF-8"):
        votes.read()


def test_who_holds_the_file_is_waited_for(tmp_path: Path) -> None:
    file = tmp_path / "votes.sqlite"
    votes = Votes(file)
    other = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    release = threading.Timer(0.5, lambda: other.execute("ROLLBACK"))
    began = time.monotonic()
    release.start()
    votes.add(vote())
    assert time.monotonic() - began >= 0.5
    release.join()
    assert votes.read()[0].prompt_id == 1


def test_who_never_lets_go_is_named_after_the_patience(tmp_path: Path) -> None:
    file = tmp_path / "notes.sqlite"
    own = sqlite.opened(file, "notes", TABLE, patience=0.1)
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(OSError, match=r"notes\.sqlite' is held by another program"), sqlite.told(file, "notes"), own:
        own.execute("INSERT INTO notes VALUES (1, 'a')")
    other.execute("ROLLBACK")
    with sqlite.told(file, "notes"), own:
        own.execute("INSERT INTO notes VALUES (1, 'a')")
    assert own.execute("SELECT count(*) FROM notes").fetchone() == (1,)


def test_mistakes_of_the_program_are_not_said_of_the_file(tmp_path: Path) -> None:
    own = sqlite.opened(tmp_path / "notes.sqlite", "notes", TABLE)
    with pytest.raises(sqlite3.ProgrammingError), sqlite.told(tmp_path / "notes.sqlite", "notes"):
        own.execute("INSERT INTO notes VALUES (?, ?)", (1, object()))


def test_threads_may_vote_at_once(tmp_path: Path) -> None:
    votes = Votes(tmp_path / "votes.sqlite")
    threads = [threading.Thread(target=votes.add, args=(vote(number),)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {each.prompt_id for each in votes.read()} == set(range(16))
