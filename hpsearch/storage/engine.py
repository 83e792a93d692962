"""Makes SQLite and PostgreSQL safe for parallel workers: creation, locks, transactions and connections."""

import os
import random
import sqlite3
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy
from filelock import FileLock, Timeout
from optuna.storages._rdb.models import BaseModel
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from hpsearch.config.urls import show_url
from hpsearch.errors import StorageError, StorageUnavailable, UsageError
from hpsearch.storage.retry import make_error

LOCK_TIMEOUT = 60.0  # seconds to wait while another process creates a database or a study
BUSY_TIMEOUT = 15.0  # seconds that SQLite itself waits for a lock
_NETWORK_FILE_SYSTEMS = {
    *("nfs", "nfs4", "cifs", "smb2", "smb3", "smbfs", "sshfs", "afs", "afpfs", "davfs", "webdav", "glusterfs"),
    *("ceph", "lustre", "beegfs", "s3fs", "rclone", "gcsfuse"),
}
_WAL_IS_SAFE_FROM = (3, 51, 3)  # earlier versions can corrupt a database ("WAL-reset" bug)
_POOL_TIMEOUT = 60  # seconds that a thread waits for a connection that another thread uses
_N_READERS = 5  # maximum connections of a process that only reads
_LOCK_POLL = 0.1  # seconds
# Timeouts to detect a lost server, in seconds; tcp_user_timeout is in milliseconds.
_TIMEOUTS = {"connect_timeout": 10, "keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}
_TIMEOUTS |= {"tcp_user_timeout": 60_000}
_VERSIONS = ("version_info", "alembic_version")  # tables of Optuna, which it fills last
_TRY_LOCK = sqlalchemy.text("SELECT pg_try_advisory_xact_lock(hashtext('hpsearch'))")


@contextmanager
def creation_lock(url: URL) -> Iterator[None]:
    """Let only one process at a time create tables or a study; others wait up to `LOCK_TIMEOUT`."""
    with ExitStack() as stack:
        try:
            if url.get_backend_name() == "sqlite":
                stack.enter_context(FileLock(f"{url.database}.lock", timeout=LOCK_TIMEOUT))
            else:
                engine = sqlalchemy.create_engine(url, poolclass=NullPool, connect_args=connect_arguments(url))
                stack.enter_context(server_lock(engine, LOCK_TIMEOUT))
        except Timeout as error:
            raise StorageUnavailable(f"another process is holding the lock {url.database}.lock") from error
        except SQLAlchemyError as error:
            raise make_error(url, error) from error
        yield


def network_file_system(path: Path) -> str | None:
    """Return the type of the network file system that a path is on, or None if it is on a local one."""
    path = path.resolve()
    mounts = [part for part in psutil.disk_partitions(all=True) if path.is_relative_to(part.mountpoint)]
    kind: str = max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else ""
    return kind if kind.removeprefix("fuse.") in _NETWORK_FILE_SYSTEMS else None


def check_location(url: URL) -> None:
    """Raise `UsageError` if the URL is a SQLite database on a network file system, whose locks are unreliable."""
    if url.get_backend_name() == "sqlite" and (kind := network_file_system(Path(url.database or ""))):
        raise UsageError(
            f"{url.database} is on a network file system ({kind}), where SQLite can corrupt data; use a local disk, "
            "or PostgreSQL for several machines"
        )


def safe_journal() -> str:
    """Return the journal mode in which this version of SQLite does not lose data."""
    return "wal" if sqlite3.sqlite_version_info >= _WAL_IS_SAFE_FROM else "truncate"


def check_tables(url: URL) -> None:
    """Raise `StorageError` if the database belongs to another program, before any table is created in it."""
    engine = sqlalchemy.create_engine(url, poolclass=NullPool, connect_args=connect_arguments(url))
    with engine.connect() as connection:
        found = sqlalchemy.inspect(connection)
        names = found.get_table_names()
        if "version_info" in names:
            return
        # Optuna's tables without a version are from a process killed while creating them; continue with them.
        ours: dict[str, sqlalchemy.Table] = dict(BaseModel.metadata.tables)
        foreign = [name for name in names if name not in (*ours, "alembic_version") and engine.name == "sqlite"]
        for name in ours.keys() & {*names}:
            if {column["name"] for column in found.get_columns(name)} != {*ours[name].columns.keys()}:
                foreign.append(name)
    if foreign:
        raise StorageError(
            f"{show_url(url)} is not an Optuna/hpsearch database (it has the tables {', '.join(sorted(foreign))}); "
            "choose another one"
        )


def is_created(url: URL) -> bool:
    """Return whether Optuna has finished creating its tables in the database. Changes nothing, as Optuna would."""
    engine = sqlalchemy.create_engine(url, poolclass=NullPool, connect_args=connect_arguments(url))
    with engine.connect() as connection:
        names = {*sqlalchemy.inspect(connection).get_table_names()}
        queries = (sqlalchemy.text(f"SELECT 1 FROM {name}") for name in _VERSIONS if name in names)  # noqa: S608
        return sum(connection.execute(query).first() is not None for query in queries) == len(_VERSIONS)


def connect_arguments(url: URL) -> dict[str, Any]:
    """Return the arguments that the database driver needs besides the URL.

    For PostgreSQL, these are psycopg's defaults for everything that neither the URL nor the environment sets. Prepared
    statements are off, because PgBouncer may run each transaction on another connection.
    """
    if url.get_backend_name() == "sqlite":
        return {"timeout": BUSY_TIMEOUT}
    given = {*url.query, *(["connect_timeout"] if "PGCONNECT_TIMEOUT" in os.environ else [])}
    timeouts = {name: value for name, value in _TIMEOUTS.items() if name not in given}
    return {"prepare_threshold": None, "fallback_application_name": "hpsearch", **timeouts}


def create_engine(url: URL, *, converts: bool, reads_only: bool) -> sqlalchemy.Engine:
    """Return an engine whose SQLite transactions lock the database at their start, and sync it to disk at their end.

    `converts` changes the journal mode of the database to the safe one. With `reads_only`, the engine cannot write, and
    SQLite takes only read locks, for the duration of a read. On PostgreSQL, it has one connection per process, or up to
    `_N_READERS` if it only reads; its clock is read and written in UTC, whatever the time zones of server and clients.
    """
    if url.get_backend_name() == "sqlite":
        engine = sqlalchemy.create_engine(url, connect_args=connect_arguments(url))
        sqlalchemy.event.listen(engine, "connect", partial(_configure_sqlite, converts))
        sqlalchemy.event.listen(engine, "begin", _begin if reads_only else _begin_immediate)
        return engine
    pool = {"pool_size": 1, "max_overflow": _N_READERS - 1 if reads_only else 0, "pool_timeout": _POOL_TIMEOUT}
    engine = sqlalchemy.create_engine(url, connect_args=connect_arguments(url), pool_pre_ping=True, **pool)
    sqlalchemy.event.listen(engine, "connect", partial(_configure_postgresql, reads_only))
    return engine


def _configure_sqlite(converts: bool, connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # SQLAlchemy's `begin` event starts the transactions
    # WAL is a property of the file; other modes are properties of the connection.
    is_wal = "wal" in (safe_journal(), connection.execute("PRAGMA journal_mode").fetchone()[0])
    if converts or not is_wal:
        connection.execute(f"PRAGMA journal_mode = {safe_journal()}")
    connection.execute("PRAGMA synchronous = FULL")


def _configure_postgresql(reads_only: bool, connection: Any, _record: object) -> None:
    connection.execute("SET TIME ZONE 'UTC'")
    connection.commit()
    if reads_only:
        connection.read_only = True


def _begin(connection: sqlalchemy.Connection) -> None:
    connection.exec_driver_sql("PRAGMA query_only = ON")
    connection.exec_driver_sql("BEGIN")


def _begin_immediate(connection: sqlalchemy.Connection) -> None:
    # A read-only database can still be read.
    is_writable = os.access(connection.engine.url.database or "", os.W_OK)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if is_writable else "BEGIN")


@contextmanager
def server_lock(engine: sqlalchemy.Engine, patience: float) -> Iterator[None]:
    """Hold a lock of the server inside the `with` block. Raises `StorageUnavailable` after `patience` seconds.

    While waiting, no transaction is open, so that PgBouncer can give the connection to the lock's holder.
    """
    deadline = time.monotonic() + patience
    with engine.connect() as connection:
        while not connection.execute(_TRY_LOCK).scalar():
            connection.rollback()
            if time.monotonic() >= deadline:
                raise StorageUnavailable("timed out waiting for the process that is creating the database or a study")
            time.sleep(_LOCK_POLL * random.uniform(0.5, 1.5))  # noqa: S311 - no secret
        yield
