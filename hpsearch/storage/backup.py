"""Backs up a SQLite database while it is in use."""

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from sqlalchemy.engine import URL

from hpsearch.errors import StorageError, UsageError
from hpsearch.storage.artifacts import replace_file
from hpsearch.storage.engine import LOCK_TIMEOUT, safe_journal


def backup(url: URL, file: Path, *, force: bool = False) -> None:
    """Copy a SQLite database to a new file, which appears after an integrity check; the database may be in use.

    SQLite's online backup makes a consistent snapshot. With `force`, it replaces another SQLite database, but
    never this one, a file that belongs to a database, or any other file. Raises `UsageError` and `StorageError`.
    """
    check_backup(url, file, force=force)
    database = Path(url.database or "")
    location = f"file:{quote(str(database))}?mode=rw"
    try:
        with replace_file(file) as temporary:
            with (
                closing(sqlite3.connect(location, timeout=LOCK_TIMEOUT, uri=True)) as source,
                closing(sqlite3.connect(temporary)) as target,
            ):
                source.backup(target)
                problems = check_integrity(target)
            if problems:
                raise StorageError(f"{database} is corrupt, no backup written: {problems}")
    except (sqlite3.Error, OSError) as error:
        raise StorageError(f"could not back up {database} to {file}: {error}") from error


def check_backup(url: URL, file: Path, *, force: bool = False) -> None:
    """Raise `UsageError` if `backup` may not write the file."""
    database = Path(url.database or "")
    for suffix in ("-journal", "-wal", "-shm", ".lock"):
        owner = Path(str(file.resolve()).removesuffix(suffix))
        if owner != file.resolve() and owner.is_file():
            raise UsageError(
                f"{file} would be taken for the {suffix[1:]} file of {owner.name}; choose another file name"
            )
    may_replace = _is_database(file) and not (database.exists() and file.samefile(database))
    if file.exists() and not (force and may_replace):
        advice = ", or replace it with --force" if may_replace else ""
        raise UsageError(f"{file} already exists; choose another file name{advice}")
    if not file.parent.is_dir():
        raise UsageError(f"folder {file.parent} does not exist; create it first")
    for rest in (file.with_name(f"{file.name}{suffix}") for suffix in ("-journal", "-wal")):
        if rest.exists() and rest.stat().st_size:  # SQLite would apply it to the copy
            raise UsageError(f"{rest} belongs to another database; choose another file name")


def _is_database(file: Path) -> bool:
    """Return whether a file is empty or a SQLite database (https://www.sqlite.org/fileformat.html)."""
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return stream.read(16) in (b"", b"SQLite format 3\0")


def find_journal(connection: sqlite3.Connection, *, repairs: bool) -> str:
    """Return the journal mode of a database; with `repairs`, WAL is changed first where it is not safe."""
    [journal] = connection.execute("PRAGMA journal_mode").fetchone()
    if repairs and journal == "wal" != safe_journal():
        [journal] = connection.execute(f"PRAGMA journal_mode = {safe_journal()}").fetchone()
    return str(journal)


def check_integrity(connection: sqlite3.Connection) -> str:
    """Return the problems that SQLite's integrity check finds, or an empty string."""
    found = [row[0] for row in connection.execute("PRAGMA integrity_check")]
    return "" if found == ["ok"] else "; ".join(found)
