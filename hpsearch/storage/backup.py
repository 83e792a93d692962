"""Backs up a SQLite database while it is in use."""

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from sqlalchemy.engine import URL

from hpsearch.config.urls import show_url
from hpsearch.errors import StorageError, UsageError
from hpsearch.storage.artifacts import replace_file
from hpsearch.storage.engine import LOCK_TIMEOUT


def backup(url: URL, file: Path) -> None:
    """Copy a SQLite database to a new file, which appears after an integrity check; the database may be in use.

    SQLite's online backup makes a consistent snapshot. Raises `UsageError` and `StorageError`.
    """
    if url.get_backend_name() != "sqlite":
        raise UsageError(f"`hpsearch backup` only supports SQLite; back up {show_url(url)} with pg_dump")
    if file.exists():
        raise UsageError(f"{file} already exists; choose another file name")
    if not file.parent.is_dir():
        raise UsageError(f"folder {file.parent} does not exist; create it first")
    location = f"file:{quote(url.database or '')}?mode=rw"
    try:
        with replace_file(file) as temporary:
            with (
                closing(sqlite3.connect(location, timeout=LOCK_TIMEOUT, uri=True)) as source,
                closing(sqlite3.connect(temporary)) as target,
            ):
                source.backup(target)
                problems = check_integrity(target)
            if problems:
                raise StorageError(f"{url.database} is corrupt, no backup written: {problems}")
    except (sqlite3.Error, OSError) as error:
        raise StorageError(f"could not back up {url.database} to {file}: {error}") from error


def check_integrity(connection: sqlite3.Connection) -> str:
    """Return the problems that SQLite's integrity check finds, or an empty string."""
    found = [row[0] for row in connection.execute("PRAGMA integrity_check")]
    return "" if found == ["ok"] else "; ".join(found)
