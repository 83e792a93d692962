"""The process from which workers are forked, with everything imported that they need."""

import atexit
import multiprocessing
import os
import signal
import threading
from multiprocessing import forkserver

_PRELOADED = [
    "hpsearch.workers.worker",
    "torch._dynamo",  # which the first optimizer imports, and which takes as long as torch itself
    *("alembic.command", "alembic.script"),  # and these the first RDBStorage
]


def start_fork_server() -> None:
    """Start that process, if it is not there yet; its imports go on beside those of this process."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOADED)
    # Ctrl-C reaches the whole group; it is ignored from birth on, since the supervisor passes it on.
    if threading.current_thread() is not threading.main_thread():
        return forkserver.ensure_running()
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, previous)


@atexit.register
def _stop_fork_server() -> None:
    """WorkerExit that process with this one; by itself it would notice that only after its imports."""
    pid = getattr(forkserver, "_forkserver")._forkserver_pid  # noqa: B009 - not in the types of the standard library
    if pid is not None:
        try:
            os.kill(pid, signal.SIGTERM)
        except ProcessLookupError:
            return
