"""Database errors: which of them are transient, how long to retry, and what to show the user."""

import logging
import random
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
from sqlalchemy.exc import IntegrityError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from hpsearch.config.urls import find_secrets, show_url
from hpsearch.errors import StorageError, StorageUnavailable

logger = logging.getLogger(__name__)

_MESSAGE_INTERVAL = 30.0  # seconds between two messages about a database that does not respond
_next_message = 0.0
_system_random = random.SystemRandom()
_MAX_CREATIONS = 10
_TRANSIENT_CODES = {
    *(sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL),
    *(sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PROTOCOL),
}
_PASSWORD = "set PGPASSWORD or add the password to ~/.pgpass (or the file named by PGPASSFILE)"  # noqa: S105
_REFUSALS = {  # psycopg has no SQLSTATE for connection errors
    r"password authentication failed|no password supplied|empty password": _PASSWORD,
    r"certificate|does not support SSL|no encryption": "check sslmode and sslrootcert in the URL (or PGSSLMODE)",
    r'role ".*" does not exist|authentication failed|no pg_hba\.conf': "check the user name in the URL (or PGUSER)",
    r'database "(.*)" does not exist': r"create it with: createdb \1",
}


def retry_on_outage(method: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a method to retry with growing pauses while the database is locked, full or unreachable."""

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
                again = build_retrier(url, patience, self.heartbeat_interval or 1, self.giving_up)
                answer = again(method, self, *args, **kwargs)
        except (StorageInternalError, SQLAlchemyError) as error:
            raise make_error(url, error) from error
        self._note_answer()
        return answer

    return call


def build_retrier(url: URL, patience: float, longest_pause: int, giving_up: threading.Event) -> tenacity.Retrying:
    """Return a retrier that repeats a call on transient errors, for `patience` seconds or until `giving_up` is set.

    The pauses grow up to `longest_pause` seconds. A warning with the reason is logged now and then.
    """

    def log_retry(state: tenacity.RetryCallState) -> None:
        global _next_message
        # All threads of a process wait for the same database, so one message for all is enough.
        if time.monotonic() >= _next_message and state.outcome and (error := state.outcome.exception()):
            _next_message = time.monotonic() + _MESSAGE_INTERVAL
            minutes = (patience - (state.seconds_since_start or 0)) / 60
            why = describe_cause(url, error)
            logger.warning("database not responding (%s); retrying for up to %.0f minutes", why, minutes)

    def draw_pause(state: tenacity.RetryCallState) -> float:
        # Not from the global generator, from which a network of the user's may draw in the training thread.
        return _system_random.uniform(0, min(0.5 * 2 ** min(state.attempt_number - 1, 10), longest_pause))

    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(is_transient),
        wait=draw_pause,
        stop=tenacity.stop_after_delay(patience) | tenacity.stop_when_event_set(giving_up),
        sleep=tenacity.sleep_using_event(giving_up),
        before_sleep=log_retry,
        reraise=True,
    )


def is_transient(error: BaseException) -> bool:
    """Return whether the database may respond later: it is locked, full, restarting, busy or unreachable."""
    if isinstance(error, StorageUnavailable):
        return True
    cause, code = _cause(error), _sqlite_code(error)
    if isinstance(cause, OperationalError | InterfaceError):
        return (code is None or code in _TRANSIENT_CODES) and not advise(cause)
    return isinstance(cause, PoolTimeout)


def repeat_creation(create: Callable[[], Any]) -> Any:
    """Call `create`, and repeat it while another program, such as Optuna itself, creates the same tables."""
    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(_is_collision),
        wait=tenacity.wait_random(max=0.5),
        stop=tenacity.stop_after_attempt(_MAX_CREATIONS),
        reraise=True,
    )(create)


def _is_collision(error: BaseException) -> bool:
    return isinstance(_cause(error), IntegrityError) or "already exists" in str(_cause(error))


def make_error(url: URL, error: BaseException) -> StorageError:
    """Return the error to raise for a database that cannot be reached or used, with the reason."""
    if is_transient(error):
        return StorageUnavailable(f"cannot reach the database {show_url(url)}: {describe_cause(url, error)}")
    return StorageError(f"cannot use the database {show_url(url)}: {describe_cause(url, error)}")


def describe_cause(url: URL, error: BaseException) -> str:
    """Return the driver's message on one line, without the password, and advice on what to do."""
    cause = _cause(error)
    text = " ".join(str(getattr(cause, "orig", cause)).split())
    for secret in find_secrets(url):
        text = text.replace(secret, "***")
    if _sqlite_code(error) in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
        folder = Path(url.database or "").parent
        text += f"; {shutil.disk_usage(folder).free / 1e6:.1f} MB free in {folder}; free some disk space"
    if advice := advise(cause):
        text += f"; {advice}"
    return text


def advise(error: BaseException) -> str | None:
    """Return advice if a server refused the connection for a lasting reason, else None."""
    original: Any = getattr(error, "orig", None)
    if not isinstance(error, OperationalError) or not hasattr(original, "pgconn"):
        return None
    if getattr(original.pgconn, "needs_password", False):
        return _PASSWORD
    matches = ((re.search(pattern, str(original)), advice) for pattern, advice in _REFUSALS.items())
    return next((match.expand(advice) for match, advice in matches if match), None)


def _cause(error: BaseException) -> Any:
    return error.__cause__ if isinstance(error, StorageInternalError) else error


def _sqlite_code(error: BaseException) -> int | None:
    code = getattr(getattr(_cause(error), "orig", None), "sqlite_errorcode", None)
    return None if code is None else code & 0xFF  # the primary result code
