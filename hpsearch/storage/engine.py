"""SQLite and PostgreSQL made safe for workers: creation, locks, transactions and connections."""

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
from hpsearch.storage.retry import failure

LOCK_TIMEOUT = 60.0  # seconds in which another process may create a database or a study
BUSY_TIMEOUT = 15.0  # seconds in which SQLite itself waits for a lock
_NETWORK_FILE_SYSTEMS = {
    *("nfs", "nfs4", "cifs", "smb2", "smb3", "smbfs", "sshfs", "afs", "afpfs", "davfs", "webdav", "glusterfs"),
    *("ceph", "lustre", "beegfs", "s3fs", "rclone", "gcsfuse"),
}
_WAL_IS_SAFE_FROM = (3, 51, 3)  # before, SQLite's "WAL-reset" bug can corrupt a database
_POOL_TIMEOUT = 60  # seconds in which one thread waits for the connection that another one uses
_N_READERS = 5  # connections of a process that only reads; those that are not used are closed
_LOCK_POLL = 0.1  # seconds
# After them a server that vanished is noticed, in seconds; the last one in milliseconds.
_TIMEOUTS = {"connect_timeout": 10, "keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}
_TIMEOUTS |= {"tcp_user_timeout": 60_000}
_TRY_LOCK = sqlalchemy.text("SELECT pg_try_advisory_xact_lock(hashtext('hpsearch'))")


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
            stack.enter_context(server_lock(engine, LOCK_TIMEOUT))
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
    return {"timeout": BUSY_TIMEOUT} if is_sqlite else _postgresql_arguments(url)


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


def pool_options(*, reads_only: bool) -> dict[str, Any]:
    """The pool of an engine: one connection for all threads of a process, or some that are only read from."""
    n_more = _N_READERS - 1 if reads_only else 0
    return {"pool_size": 1, "max_overflow": n_more, "pool_timeout": _POOL_TIMEOUT, "pool_pre_ping": True}


def _postgresql_arguments(url: URL) -> dict[str, Any]:
    """What psycopg needs beside the URL, where neither that nor the environment says otherwise.

    Without prepared statements PgBouncer may give each transaction another connection.
    """
    given = {*url.query, *(["connect_timeout"] if "PGCONNECT_TIMEOUT" in os.environ else [])}
    timeouts = {name: value for name, value in _TIMEOUTS.items() if name not in given}
    return {"prepare_threshold": None, "fallback_application_name": "hpsearch", **timeouts}


@contextmanager
def server_lock(engine: sqlalchemy.Engine, patience: float) -> Iterator[None]:
    """Held by one process at a time; raises `StorageUnavailable` after `patience` seconds.

    Who waits is in no transaction meanwhile, so that PgBouncer can give its connection to the one who has the lock.
    """
    deadline = time.monotonic() + patience
    with engine.connect() as connection:
        while not connection.execute(_TRY_LOCK).scalar():
            connection.rollback()
            if time.monotonic() >= deadline:
                raise StorageUnavailable("another process has been creating the database or a study for too long")
            time.sleep(_LOCK_POLL * random.uniform(0.5, 1.5))  # noqa: S311 - no secret
        yield
