"""The fork server: a process that has imported what workers need, and from which they are forked."""

import atexit
import multiprocessing
import os
import signal
import threading
from multiprocessing import forkserver

_PRELOADED = [
    "hpsearch.workers.worker",
    "torch._dynamo",  # imported by the first optimizer; takes as long as torch itself
    *("alembic.command", "alembic.script"),  # imported by the first RDBStorage
]


def start_fork_server() -> None:
    """Start the fork server unless it is running; it imports in parallel with this process."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOADED)
    # Ctrl-C reaches the whole process group; the fork server ignores it, since the supervisor stops the workers.
    if threading.current_thread() is not threading.main_thread():
        return forkserver.ensure_running()
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, previous)


@atexit.register
def _stop_fork_server() -> None:
    """Stop the fork server when this process exits; on its own it would notice only after its imports."""
    pid = getattr(forkserver, "_forkserver")._forkserver_pid  # noqa: B009 - not in the types of the standard library
    if pid is not None:
        try:
            os.kill(pid, signal.SIGTERM)
        except ProcessLookupError:
            return
