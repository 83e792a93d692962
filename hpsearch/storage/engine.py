"""What is particular about SQLite and PostgreSQL: URLs, creation, transactions, and errors that pass."""

import logging
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import sqlalchemy
import tenacity
from filelock import FileLock, Timeout
from optuna.exceptions import StorageInternalError
from optuna.storages._rdb.models import BaseModel
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import NullPool

from hpsearch.errors import StorageError, StorageUnavailable, UsageError
from hpsearch.storage import postgresql

logger = logging.getLogger(__name__)

_MESSAGE_INTERVAL = 30.0  # seconds between two messages about a storage that does not answer
_next_message = 0.0

LOCK_TIMEOUT = 60.0  # seconds in which another process may create a database or a study
BUSY_TIMEOUT = 15.0  # seconds in which SQLite itself waits for a lock
_PASSING_CODES = {
    *(sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL),
    *(sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PROTOCOL),
}
_NETWORK_FILE_SYSTEMS = {
    *("nfs", "nfs4", "cifs", "smb2", "smb3", "smbfs", "sshfs", "afs", "afpfs", "davfs", "webdav", "glusterfs"),
    *("ceph", "lustre", "beegfs", "s3fs", "rclone", "gcsfuse"),
}
_WAL_IS_SAFE_FROM = (3, 51, 3)  # before, SQLite's "WAL-reset" bug can corrupt a database


def show_url(url: URL | str) -> str:
    """The URL as it may be printed, its passwords hidden."""
    parsed = make_url(url)
    hidden = dict.fromkeys(filter(_is_secret, parsed.query), "hidden")
    return parsed.update_query_dict(hidden).render_as_string(hide_password=True)


def find_secrets(url: URL | str) -> list[str]:
    """The passwords in a URL."""
    parsed = make_url(url)
    found = [parsed.password, *(value for key, value in parsed.query.items() if _is_secret(key))]
    return [str(secret) for secret in found if secret]


def remove_secrets(url: str) -> str:
    """The URL without its passwords."""
    parsed = make_url(url)
    parsed = parsed.difference_update_query(filter(_is_secret, parsed.query))
    return parsed._replace(password=None).render_as_string()


def _is_secret(key: str) -> bool:
    return "pass" in key and key != "passfile"


def parse_url(url: str) -> URL:
    """The URL of a database that workers can share; raises `UsageError` for any other."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        # Neither the URL nor SQLAlchemy's error is repeated: a part of a password may stand anywhere in them.
        raise UsageError(
            "the storage must be a URL such as sqlite:///study.db or postgresql://user@host/name"
        ) from None
    backend = parsed.get_backend_name()
    if "@" in (parsed.host or ""):
        raise UsageError("the storage's URL has more than one @; write one in a password as %40")
    if backend == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    if backend != "sqlite":
        raise UsageError(f"{show_url(parsed)}: use SQLite or PostgreSQL, not {backend}")
    if parsed.database in (None, "", ":memory:"):
        raise UsageError("a SQLite database in memory cannot be shared by workers; name a file: sqlite:///study.db")
    return parsed


@contextmanager
def creation_lock(url: URL) -> Iterator[None]:
    """One process at a time creates tables or a study; the others wait."""
    if url.get_backend_name() == "sqlite":
        lock = FileLock(f"{url.database}.lock")
        try:
            lock.acquire(timeout=LOCK_TIMEOUT)
        except Timeout as error:
            raise StorageUnavailable(f"another process holds {url.database}.lock") from error
        try:
            yield
        finally:
            lock.release()
        return
    engine = sqlalchemy.create_engine(url, poolclass=NullPool, connect_args=connect_arguments(url))
    with ExitStack() as stack:
        try:
            stack.enter_context(postgresql.server_lock(engine, LOCK_TIMEOUT))
        except SQLAlchemyError as error:
            raise failure(url, error) from error
        yield


def network_file_system(path: Path) -> str | None:
    """The kind of the network file system that a path is on; its locks cannot be trusted with a database."""
    path = path.resolve()
    mounts = [part for part in psutil.disk_partitions(all=True) if path.is_relative_to(part.mountpoint)]
    kind: str = max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else ""
    return kind if kind.removeprefix("fuse.") in _NETWORK_FILE_SYSTEMS else None


def check_place(url: URL) -> None:
    """Raise `UsageError` where workers must not write a SQLite database."""
    if url.get_backend_name() == "sqlite" and (kind := network_file_system(Path(url.database or ""))):
        raise UsageError(
            f"{url.database} is on a network file system ({kind}), where SQLite's locks fail and studies get damaged; "
            "use a folder on this machine's disk, or PostgreSQL for many machines"
        )


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


def safe_journal() -> str:
    """The journal mode that this SQLite cannot lose data in."""
    return "wal" if sqlite3.sqlite_version_info >= _WAL_IS_SAFE_FROM else "truncate"


def check_tables(url: URL) -> None:
    """Raise `StorageError` for a database of something else, before any table is created in it."""
    engine = sqlalchemy.create_engine(url, poolclass=NullPool, connect_args=connect_arguments(url))
    with engine.connect() as connection:
        found = sqlalchemy.inspect(connection)
        names = found.get_table_names()
        if "version_info" in names:
            return
        # Tables of Optuna's without a version are from a creation that was killed; it is gone on with.
        ours: dict[str, sqlalchemy.Table] = dict(BaseModel.metadata.tables)
        foreign = [name for name in names if name not in (*ours, "alembic_version") and engine.name == "sqlite"]
        for name in ours.keys() & {*names}:
            if {column["name"] for column in found.get_columns(name)} != {*ours[name].columns.keys()}:
                foreign.append(name)
    if foreign:
        raise StorageError(
            f"{show_url(url)} is a database of something else, with the tables {', '.join(sorted(foreign))}; "
            "name a new one"
        )


def connect_arguments(url: URL) -> dict[str, Any]:
    """What the database's driver needs beside the URL."""
    is_sqlite = url.get_backend_name() == "sqlite"
    return {"timeout": BUSY_TIMEOUT} if is_sqlite else postgresql.connect_arguments(url)


def harden(engine: sqlalchemy.Engine, *, converts: bool, reads_only: bool) -> None:
    """Make every SQLite transaction of the engine take the lock when it starts, and be on disk when it ends.

    Where it `converts`, a database in another journal mode is changed to the safe one. With an engine that `reads_only`
    nothing can be written, and no lock is taken but for the time of a read.
    """
    if engine.name == "sqlite":
        sqlalchemy.event.listen(engine, "connect", partial(_configure_sqlite, converts))
        sqlalchemy.event.listen(engine, "begin", _begin if reads_only else _begin_immediate)
    elif reads_only:
        sqlalchemy.event.listen(engine, "connect", lambda connection, _: setattr(connection, "read_only", True))


def is_transient(error: BaseException) -> bool:
    """Whether the database may answer later: locked, full, restarting, busy or unreachable."""
    if isinstance(error, StorageUnavailable):
        return True
    cause, code = _cause(error), _sqlite_code(error)
    if isinstance(cause, OperationalError | InterfaceError):
        return (code is None or code in _PASSING_CODES) and not postgresql.advise(cause)
    return isinstance(cause, PoolTimeout)


def _cause(error: BaseException) -> Any:
    return error.__cause__ if isinstance(error, StorageInternalError) else error


def _sqlite_code(error: BaseException) -> int | None:
    code = getattr(getattr(_cause(error), "orig", None), "sqlite_errorcode", None)
    return None if code is None else code & 0xFF  # the primary one of an extended code


def retrying(url: URL, patience: float, longest_pause: int, giving_up: threading.Event) -> tenacity.Retrying:
    """Calls a function until it raises no error that can pass, for `patience` seconds or until `giving_up` is set.

    The pauses grow up to `longest_pause` seconds, and it is said now and then why.
    """

    def say_waiting(state: tenacity.RetryCallState) -> None:
        global _next_message
        # The threads of a process wait for the same thing, so one of them says so, and not at each try.
        if time.monotonic() >= _next_message and state.outcome and (error := state.outcome.exception()):
            _next_message = time.monotonic() + _MESSAGE_INTERVAL
            minutes = (patience - (state.seconds_since_start or 0)) / 60
            why = reason(url, error)
            logger.warning("the storage does not answer (%s); trying again for %.0f minutes", why, minutes)

    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(is_transient),
        wait=tenacity.wait_random_exponential(multiplier=0.5, max=longest_pause),
        stop=tenacity.stop_after_delay(patience) | tenacity.stop_when_event_set(giving_up),
        sleep=tenacity.sleep_using_event(giving_up),
        before_sleep=say_waiting,
        reraise=True,
    )


def failure(url: URL, error: BaseException) -> StorageError:
    """The error that says that the database cannot be reached or cannot be used, and why."""
    if is_transient(error):
        return StorageUnavailable(f"the storage {show_url(url)} cannot be reached: {reason(url, error)}")
    return StorageError(f"{show_url(url)} cannot be used: {reason(url, error)}")


def reason(url: URL, error: BaseException) -> str:
    """What the database's driver said, on one line, without the password, and what to do about it."""
    cause = _cause(error)
    text = " ".join(str(getattr(cause, "orig", cause)).split())
    for secret in find_secrets(url):
        text = text.replace(secret, "***")
    if _sqlite_code(error) in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
        folder = Path(url.database or "").parent
        text += f"; {shutil.disk_usage(folder).free / 1e6:.1f} MB are free in {folder}: make room there"
    if advice := postgresql.advise(cause):
        text += f"; {advice}"
    return text


def _configure_sqlite(converts: bool, connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # SQLAlchemy's `begin` event starts the transactions
    # WAL is a property of the file; the other modes are of the connection.
    is_wal = "wal" in (safe_journal(), connection.execute("PRAGMA journal_mode").fetchone()[0])
    if converts or not is_wal:
        connection.execute(f"PRAGMA journal_mode = {safe_journal()}")
    connection.execute("PRAGMA synchronous = FULL")


def _begin(connection: sqlalchemy.Connection) -> None:
    connection.exec_driver_sql("PRAGMA query_only = ON")
    connection.exec_driver_sql("BEGIN")


def _begin_immediate(connection: sqlalchemy.Connection) -> None:
    # A database that may only be read can still be looked at.
    is_writable = os.access(connection.engine.url.database or "", os.W_OK)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if is_writable else "BEGIN")
