"""The fork server: a process that has imported what workers need, and from which they are forked."""

import atexit
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import chdir, contextmanager, nullcontext, suppress
from multiprocessing import forkserver, process
from pathlib import Path
from types import ModuleType
from typing import Any

from hpsearch.errors import WorkerError

_PRELOADED = [
    "hpsearch.workers.worker",
    "torch._dynamo",  # imported by the first optimizer; takes as long as torch itself
    *("alembic.command", "alembic.script"),  # imported by the first RDBStorage
]
_server: Any = getattr(forkserver, "_forkserver")  # noqa: B009 - not in the types of the standard library
_folders: list[str] = []  # temporary, for its sockets


def start_fork_server() -> None:
    """Start the fork server unless it is running; it imports in parallel with this process. Raises `WorkerError`."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOADED)
    reasons: dict[str, str] = {}
    # The path of a socket has at most 107 characters, so TMPDIR may be too long for it.
    for place in dict.fromkeys((tempfile.gettempdir(), "/tmp", "/var/tmp")):  # noqa: S108 - mkdtemp is safe
        try:
            if not _folders or reasons or not Path(_folders[-1]).is_dir():
                _folders.append(tempfile.mkdtemp(prefix="hpsearch-", dir=place))
                process.current_process()._config["tempdir"] = _folders[-1]  # type: ignore[attr-defined]
            with signals_ignored(signal.SIGINT, signal.SIGHUP), _imports_restricted():
                return forkserver.ensure_running()
        except OSError as error:
            reasons[place] = error.strerror or str(error)
    tried = "; ".join(f"{place}: {reason}" for place, reason in reasons.items())
    raise WorkerError(
        f"cannot start processes with a socket in a temporary folder ({tried}); check TMPDIR and ulimit -n"
    )


def start_process(new: process.BaseProcess) -> None:
    """Start a process in the fork server, or in a new one if it was killed or its socket removed; workers live on.

    It does not import the program that this process runs. Raises `WorkerError`.
    """
    start_fork_server()
    try:
        return _start(new)
    except (OSError, EOFError):
        _kill_fork_server()
    start_fork_server()
    try:
        return _start(new)
    except (OSError, EOFError) as error:
        _kill_fork_server()
        reason = getattr(error, "strerror", None) or "the process from which it is forked was killed"
        raise WorkerError(f"cannot start a process: {reason}; check memory, ulimit -n and ulimit -u") from error


def _start(new: process.BaseProcess) -> None:
    """Start a process that imports neither `__main__`, which would run again in it, nor what is in the current folder.

    See `multiprocessing.spawn.get_preparation_data`.
    """
    main, path = sys.modules["__main__"], sys.path
    sys.modules["__main__"] = ModuleType("__main__")  # has no file
    sys.path = [*filter(os.path.isabs, path)]
    try:
        new.start()
    finally:
        sys.modules["__main__"], sys.path = main, path


def import_path() -> dict[str, str]:
    """Return the environment variables with which a new Python process imports what this one can.

    Without them, `python -c` imports the user's torch.py from the current folder, and not what only `sys.path` has.
    """
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(filter(os.path.isabs, sys.path))}


@contextmanager
def _imports_restricted() -> Iterator[None]:
    """Give new processes the variables of `import_path`, and under `python -E`, which ignores them, another folder."""
    variables = import_path()
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        with chdir(sys.prefix) if sys.flags.ignore_environment else nullcontext():
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@contextmanager
def signals_ignored(*signals: signal.Signals) -> Iterator[None]:
    """Let new processes ignore signals that a terminal sends to the whole group; the supervisor stops workers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _kill_fork_server() -> None:
    if _server._forkserver_pid is not None:
        os.kill(_server._forkserver_pid, signal.SIGKILL)
        with suppress(FileNotFoundError):  # its socket
            _server._stop()


@atexit.register
def _stop_fork_server() -> None:
    """Stop the fork server when this process exits; on its own it would notice only after its imports."""
    if _server._forkserver_pid is not None:
        with suppress(ProcessLookupError):
            os.kill(_server._forkserver_pid, signal.SIGTERM)
    for folder in _folders:
        shutil.rmtree(folder, ignore_errors=True)
