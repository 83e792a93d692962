"""What is particular about SQLite and PostgreSQL: URLs, creation, transactions, and errors that pass."""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy
from filelock import FileLock, Timeout
from optuna.exceptions import StorageInternalError
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, InterfaceError, OperationalError

from hpsearch.errors import StorageUnavailable, UsageError

LOCK_TIMEOUT = 60.0  # seconds
_PASSING_CODES = {
    *(sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL),
    *(sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PROTOCOL),
}
_WAL_IS_SAFE_FROM = (3, 51, 3)  # before, SQLite's "WAL-reset" bug can corrupt a database


def show_url(url: URL | str) -> str:
    """The URL as it may be printed, its passwords hidden."""
    parsed = make_url(url)
    hidden = {key: "hidden" for key in parsed.query if "pass" in key}
    return parsed.update_query_dict(hidden).render_as_string(hide_password=True)


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
def creation_lock(url: URL, *, is_reader: bool = False) -> Iterator[None]:
    """One process at a time creates tables or a study; the others wait.

    A reader may go on where it cannot lock: in a folder that may only be read nothing is created.
    """
    if url.get_backend_name() == "sqlite":
        lock = FileLock(f"{url.database}.lock")
        try:
            lock.acquire(timeout=LOCK_TIMEOUT)
        except Timeout as error:
            raise StorageUnavailable(f"another process holds {url.database}.lock") from error
        except PermissionError:
            if not is_reader:
                raise
        try:
            yield
        finally:
            lock.release()
        return
    try:
        connection = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool).connect()
        connection.execute(sqlalchemy.text("SELECT pg_advisory_lock(hashtext('hpsearch'))"))
    except (OperationalError, InterfaceError) as error:
        raise unavailable(url, error) from error
    with connection:
        yield


def connect_options(url: URL) -> dict[str, Any]:
    """What `sqlalchemy.create_engine` needs beside the URL."""
    is_sqlite = url.get_backend_name() == "sqlite"
    return {"connect_args": {"timeout": LOCK_TIMEOUT}} if is_sqlite else {"pool_pre_ping": True}


def harden(engine: sqlalchemy.Engine) -> None:
    """Make every SQLite transaction of the engine take the lock when it starts, and be on disk when it ends."""
    if engine.name == "sqlite":
        sqlalchemy.event.listen(engine, "connect", _configure_sqlite)
        sqlalchemy.event.listen(engine, "begin", _begin_immediate)
        engine.dispose()  # connections from before do not have the listeners


def is_transient(error: BaseException) -> bool:
    """Whether the database may answer later: locked, full, restarting or unreachable."""
    cause = _cause(error)
    code = getattr(getattr(cause, "orig", None), "sqlite_errorcode", None)
    return isinstance(cause, OperationalError | InterfaceError) and (code is None or code & 0xFF in _PASSING_CODES)


def _cause(error: BaseException) -> Any:
    return error.__cause__ if isinstance(error, StorageInternalError) else error


def unavailable(url: URL, error: BaseException) -> StorageUnavailable:
    """The error that says that the database cannot be reached, and why."""
    return StorageUnavailable(f"the storage {show_url(url)} cannot be reached: {reason(url, error)}")


def reason(url: URL, error: BaseException) -> str:
    """What the database's driver said, on one line, without the password."""
    cause = _cause(error)
    text = " ".join(str(getattr(cause, "orig", cause)).split())
    secrets = [url.password, *(value for key, value in url.query.items() if "pass" in key)]
    for secret in filter(None, secrets):
        text = text.replace(str(secret), "***")
    return text


def _configure_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # SQLAlchemy's `begin` event starts the transactions
    journal = "WAL" if sqlite3.sqlite_version_info >= _WAL_IS_SAFE_FROM else "TRUNCATE"
    connection.execute(f"PRAGMA journal_mode = {journal}")
    connection.execute("PRAGMA synchronous = FULL")


def _begin_immediate(connection: sqlalchemy.Connection) -> None:
    # A database that may only be read can still be looked at.
    is_writable = os.access(connection.engine.url.database or "", os.W_OK)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if is_writable else "BEGIN")
