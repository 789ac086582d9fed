"""SQLite files that several programs may have open, and whose troubles are said in one line.

`sqlite3.Error` is no `OSError`: whoever opens a file here and asks it within `told` has all of its errors as such, each
with the file's name and a way out.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PATIENCE = 60.0  # seconds that another program may hold the file
_BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
_PLACE = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_AUTH)


def opened(
    file: Path, what: str, layout: str, *, durable: bool = True, patience: float = PATIENCE
) -> sqlite3.Connection:
    """A connection to a file that has these tables, and may be used in any thread, in one at a time.

    What is written is kept at the end of a `with connection`.

    Args:
        file: made if it is absent, folders above it as well.
        what: it is to be, in an error: `a journal`.
        layout: `CREATE TABLE IF NOT EXISTS` and the like. What is there already must have the same columns.
        durable: a commit is on the disk before it returns, and readers do not wait for a writer (WAL, which needs a
            disk of this machine).
        patience: seconds to wait for another program that holds it.

    Raises:
        OSError: it cannot be used; says why, and what to do.
    """
    with told(file, what):
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_dir():
            raise OSError(f"'{file}' is a folder, and was to be {what}: name a file.")
        connection = sqlite3.connect(file, timeout=patience, check_same_thread=False)
        try:
            if durable:
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("PRAGMA synchronous=FULL")
            _check(connection, file, what, layout)
            connection.executescript(layout)
        except BaseException:
            connection.close()
            raise
    return connection


@contextmanager
def told(file: Path, what: str) -> Iterator[None]:
    """Errors of SQLite in here are said of the file.

    Raises:
        OSError: instead of them.
    """
    try:
        yield
    except sqlite3.ProgrammingError:  # ours
        raise
    except sqlite3.Error as error:
        raise OSError(_said(file, what, error)) from error
    except UnicodeDecodeError as error:
        raise OSError(_said(file, what, sqlite3.OperationalError("Could not decode to UTF-8"))) from error


def _check(connection: sqlite3.Connection, file: Path, what: str, layout: str) -> None:
    """Tables of the same name by another program would fail one statement after the other."""
    model = sqlite3.connect(":memory:")
    model.executescript(layout)
    for table, columns in _columns(model).items():
        present = _columns(connection).get(table)
        if present is not None and present != columns:
            raise OSError(
                f"'{file}' is not {what}: its table `{table}` has the columns {', '.join(present)}, not "
                f"{', '.join(columns)}. It is another program's, or of another version: name another file."
            )
    model.close()


def _columns(connection: sqlite3.Connection) -> dict[str, list[str]]:
    tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    return {
        name: [column for (column,) in connection.execute("SELECT name FROM pragma_table_info(?)", (name,))]
        for (name,) in tables
    }


def _said(file: Path, what: str, error: sqlite3.Error) -> str:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # without what SQLite calls the extended part
    if code in _BUSY:
        return f"'{file}' is held by another program ({error}): let it finish there, or close it, and start again."
    if code == sqlite3.SQLITE_FULL:
        return f"'{file}' cannot be written, as the disk is full: make room and start again; what is in it stays."
    if code == sqlite3.SQLITE_NOTADB:
        return f"'{file}' is not {what}, but another kind of file ({error}): name another, or move it away."
    if code == sqlite3.SQLITE_CORRUPT:
        return (
            f"'{file}' is damaged ({error}): put a copy in its place, or save what can be read of it with "
            f"`sqlite3 '{file}' .recover | sqlite3 new.sqlite` and move it away."
        )
    if code in _PLACE:
        return f"'{file}' cannot be opened or written ({error}): see to its permissions and its folder's."
    if "decode" in str(error):
        return f"'{file}' has text in it that is not UTF-8 ({error}): mend that row, or put a copy in its place."
    return f"'{file}' cannot be used as {what} ({error}). Is the disk failing, or is it another program's file?"
