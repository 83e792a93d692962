"""A SQLite database copied while it is in use."""

import os
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from sqlalchemy.engine import URL

from hpsearch.config.urls import show_url
from hpsearch.errors import StorageError, UsageError
from hpsearch.storage.engine import LOCK_TIMEOUT


def backup(url: URL, file: Path) -> None:
    """Copy a SQLite database that may be in use to a new file, which appears once its copy is checked.

    SQLite's online backup: one consistent moment of the database. Raises `UsageError` and `StorageError`.
    """
    if url.get_backend_name() != "sqlite":
        raise UsageError(f"{show_url(url)} is no SQLite file; back it up with pg_dump")
    if file.exists():
        raise UsageError(f"{file} is there already; name a new file")
    if not file.parent.is_dir():
        raise UsageError(f"no folder {file.parent} for the backup; create it first")
    temporary = file.with_name(f"{file.name}.tmp")
    try:
        with (
            closing(
                sqlite3.connect(f"file:{quote(url.database or '')}?mode=rw", timeout=LOCK_TIMEOUT, uri=True)
            ) as source,
            closing(sqlite3.connect(temporary)) as target,
        ):
            source.backup(target)
            problems = check_integrity(target)
        if problems:
            raise StorageError(f"{url.database} is damaged, so nothing was written: {problems}")
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.rename(file)
    except (sqlite3.Error, OSError) as error:
        raise StorageError(f"{url.database} cannot be copied to {file}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def check_integrity(connection: sqlite3.Connection) -> str:
    """What SQLite finds wrong with a database, or nothing."""
    found = [row[0] for row in connection.execute("PRAGMA integrity_check")]
    return "" if found == ["ok"] else "; ".join(found)
