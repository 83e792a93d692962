"""Database errors: which of them pass, how long to retry, and what to tell the user."""

import logging
import re
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import tenacity
from optuna.exceptions import StorageInternalError
from sqlalchemy.engine import URL
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from hpsearch.config.urls import find_secrets, show_url
from hpsearch.errors import StorageError, StorageUnavailable

logger = logging.getLogger(__name__)

_MESSAGE_INTERVAL = 30.0  # seconds between two messages about a storage that does not answer
_next_message = 0.0
_TRANSIENT_CODES = {
    *(sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL),
    *(sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PROTOCOL),
}
_PASSWORD = "set PGPASSWORD, or write the password into ~/.pgpass (PGPASSFILE names another file)"  # noqa: S105
_REFUSALS = {  # psycopg gives no SQLSTATE of an error in connecting
    r"password authentication failed|no password supplied|empty password": _PASSWORD,
    r"certificate|does not support SSL|no encryption": "see sslmode and sslrootcert in the URL, or PGSSLMODE",
    r'role ".*" does not exist|authentication failed|no pg_hba\.conf entry': "see the user in the URL, or PGUSER",
    r'database ".*" does not exist': "create it with: createdb",
}


def retry_on_outage(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, repeated with growing pauses while the database is locked, full or cannot be reached."""

    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        url, start = self.engine.url, time.monotonic()
        try:
            try:
                answer = method(self, *args, **kwargs)
            except (StorageInternalError, SQLAlchemyError) as error:
                patience = self.patience - (time.monotonic() - start)
                if not is_transient(error) or patience <= 0 or self.giving_up.is_set():
                    raise
                again = retrying(url, patience, self.heartbeat_interval or 1, self.giving_up)
                answer = again(method, self, *args, **kwargs)
        except (StorageInternalError, SQLAlchemyError) as error:
            raise failure(url, error) from error
        self._note_answer()
        return answer

    return call


def retrying(url: URL, patience: float, longest_pause: int, giving_up: threading.Event) -> tenacity.Retrying:
    """Calls a function until it raises no error that can pass, for `patience` seconds or until `giving_up` is set.

    The pauses grow up to `longest_pause` seconds, and it is said now and then why.
    """

    def log_retry(state: tenacity.RetryCallState) -> None:
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
        before_sleep=log_retry,
        reraise=True,
    )


def is_transient(error: BaseException) -> bool:
    """Whether the database may answer later: locked, full, restarting, busy or unreachable."""
    if isinstance(error, StorageUnavailable):
        return True
    cause, code = _cause(error), _sqlite_code(error)
    if isinstance(cause, OperationalError | InterfaceError):
        return (code is None or code in _TRANSIENT_CODES) and not advise(cause)
    return isinstance(cause, PoolTimeout)


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
    if advice := advise(cause):
        text += f"; {advice}"
    return text


def advise(error: BaseException) -> str | None:
    """What to do about a server that has refused a connection and will go on to, else None."""
    original: Any = getattr(error, "orig", None)
    if not isinstance(error, OperationalError) or not hasattr(original, "pgconn"):
        return None
    if getattr(original.pgconn, "needs_password", False):
        return _PASSWORD
    return next((advice for pattern, advice in _REFUSALS.items() if re.search(pattern, str(original))), None)


def _cause(error: BaseException) -> Any:
    return error.__cause__ if isinstance(error, StorageInternalError) else error


def _sqlite_code(error: BaseException) -> int | None:
    code = getattr(getattr(_cause(error), "orig", None), "sqlite_errorcode", None)
    return None if code is None else code & 0xFF  # the primary one of an extended code
