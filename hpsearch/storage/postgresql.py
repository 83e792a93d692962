"""What is particular about PostgreSQL: connections that hundreds of workers share a server with, and its refusals."""

import os
import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy
from sqlalchemy.engine import URL
from sqlalchemy.exc import OperationalError

from hpsearch.errors import StorageUnavailable

_POOL_TIMEOUT = 60  # seconds in which one thread waits for the connection that another one uses
_N_READERS = 5  # connections of a process that only reads; those that are not used are closed
_LOCK_POLL = 0.1  # seconds
# After them a server that vanished is noticed, in seconds; the last one in milliseconds.
_TIMEOUTS = {"connect_timeout": 10, "keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}
_TIMEOUTS |= {"tcp_user_timeout": 60_000}
_TRY_LOCK = sqlalchemy.text("SELECT pg_try_advisory_xact_lock(hashtext('hpsearch'))")
_PASSWORD = "set PGPASSWORD, or write the password into ~/.pgpass (PGPASSFILE names another file)"  # noqa: S105
_REFUSALS = {  # psycopg gives no SQLSTATE of an error in connecting
    r"password authentication failed|no password supplied|empty password": _PASSWORD,
    r"certificate|does not support SSL|no encryption": "see sslmode and sslrootcert in the URL, or PGSSLMODE",
    r'role ".*" does not exist|authentication failed|no pg_hba\.conf entry': "see the user in the URL, or PGUSER",
    r'database ".*" does not exist': "create it with: createdb",
}


def pool_options(*, reads_only: bool) -> dict[str, Any]:
    """The pool of an engine: one connection for all threads of a process, or some that are only read from."""
    n_more = _N_READERS - 1 if reads_only else 0
    return {"pool_size": 1, "max_overflow": n_more, "pool_timeout": _POOL_TIMEOUT, "pool_pre_ping": True}


def connect_arguments(url: URL) -> dict[str, Any]:
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


def advise(error: BaseException) -> str | None:
    """What to do about a server that has refused a connection and will go on to, else None."""
    original: Any = getattr(error, "orig", None)
    if not isinstance(error, OperationalError) or not hasattr(original, "pgconn"):
        return None
    if getattr(original.pgconn, "needs_password", False):
        return _PASSWORD
    return next((advice for pattern, advice in _REFUSALS.items() if re.search(pattern, str(original))), None)
