"""Processes on this machine, and the workers in them, which share the data."""

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from logging.handlers import QueueHandler
from multiprocessing import connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna

from hpsearch.config.definition import StudyDefinition, evolve
from hpsearch.data.dataset import ImageData
from hpsearch.data.sets import DataSet
from hpsearch.errors import Drained
from hpsearch.search.study import check_data, load_study
from hpsearch.search.trials import Emit
from hpsearch.training.devices import list_devices
from hpsearch.training.run import load_study_data
from hpsearch.workers.executor import Handle, Supervisor
from hpsearch.workers.forkserver import start_fork_server, start_process
from hpsearch.workers.shutdown import Drain
from hpsearch.workers.worker import WorkerExit, capture_exit, open_worker_storage, run_worker, worker_name

logger = logging.getLogger(__name__)

_POLL = 0.2  # seconds within which the supervisor reacts to a signal
_UNKNOWN = 255  # what multiprocessing reports once the fork server is dead, even for a running process

Send = Callable[[Any], None]
Task = Callable[[Drain, Send], str]  # sends messages, and returns the reason it ended


def run_pool(
    definition: StudyDefinition,
    drain: Drain,
    n_workers: int,
    *,
    folder: DataSet | Path | str | None = None,
    n_threads: int | None = None,
    emit: Emit = lambda event: None,
) -> str:
    """Run the study, which must exist, with `n_workers` processes, which share the devices and cores.

    Each uses `n_threads` threads, by default its share of the cores: see `run_worker`.
    Returns and raises what `Supervisor.run` does.
    """
    storage = open_worker_storage(definition, drain)
    study = load_study(definition, storage)
    images = load_study_data(definition, folder)
    check_data(definition, study, images, stores=True)
    data = share(images, folder)
    drain.check()
    devices = list_devices()
    options: dict[str, Any] = {"data": data, "n_threads": n_threads, "n_workers": n_workers, "waits": True}

    def prepare(slot: int) -> tuple[str, Task]:
        stream, device = storage.join(study._study_id), devices[slot % len(devices)]
        work = partial(_work, definition, definition.study.storage, stream=stream, device=device, **options)
        return worker_name(stream), work

    return Supervisor(Processes(prepare), n_workers, definition, study, storage, drain, emit).run()


def share(data: ImageData, folder: DataSet | Path | str | None) -> ImageData | Path | str | None:
    """Move the data to shared memory, and return them.

    If that is too small, as with Docker's defaults, return the folder that they were loaded from, with a warning.
    """
    try:
        return data.share_memory()
    except RuntimeError as error:
        logger.warning("not enough shared memory; each worker loads its own copy of the data (%s)", error)
        return folder.folder if isinstance(folder, DataSet) else folder


def _work(definition: StudyDefinition, url: str, drain: Drain, send: Send, **options: Any) -> str:
    """Run a worker; `url` is the storage URL, since a definition loses its password on the way to another process."""
    return run_worker(evolve(definition, "study", storage=url), drain, send, **options)


@dataclass(eq=False, kw_only=True)
class ProcessHandle(Handle):
    """A process, the pipe for its messages, and the `WorkerExit` that it sent.

    The pipe is open as long as the process lives, and that is better evidence than its exit status: the fork server,
    which reports it, may have been killed.
    """

    process: Any
    pipe: connection.Connection
    is_open: bool = True
    exit: WorkerExit | None = None

    @property
    def status(self) -> int | None:
        """The exit status; None while the process runs."""
        code: int | None = self.process.exitcode
        return None if code == _UNKNOWN and self.is_open else code

    @property
    def ends(self) -> list[Any]:
        """What to wait for: a message or the end of the process."""
        is_known = self.process.exitcode != _UNKNOWN
        return [*([self.pipe] if self.is_open else []), *([self.process.sentinel] if is_known else [])]

    def send_signal(self, number: signal.Signals) -> None:
        if self.status is None:
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, number)


class Processes:
    """Runs tasks in processes forked from the fork server; an `Executor`.

    `prepare` returns the name and the task, which is pickled, for the process of a slot. The task gets a `Drain`, set
    by SIGTERM or the end of this process, and a function that sends a message. Its log messages are handled here.
    """

    def __init__(self, prepare: Callable[[int], tuple[str, Task]]) -> None:
        start_fork_server()
        self._prepare = prepare
        self.running: list[ProcessHandle] = []

    def start(self, slot: int) -> ProcessHandle:
        name, task = self._prepare(slot)
        context = multiprocessing.get_context("forkserver")
        receiver, sender = context.Pipe(duplex=False)
        arguments = (task, sender, logging.getLogger().getEffectiveLevel())
        process = context.Process(target=_run_task, args=arguments, name=name)
        with sender:
            start_process(process)
        handle = ProcessHandle(slot, name, process=process, pipe=receiver)
        self.running.append(handle)
        return handle

    def wait(self) -> Iterator[tuple[ProcessHandle, Any]]:
        connection.wait([end for each in self.running for end in each.ends], _POLL)
        for each in list(self.running):
            status = each.status  # checked before reading the pipe, so no message is missed
            for message in _read(each):
                yield each, message
            if status is not None:
                self.running.remove(each)
                yield each, each.exit or WorkerExit(_describe(status), is_dead=True)

    def stop(self) -> None:
        for each in self.running:
            each.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        for each in self.running:
            each.send_signal(signal.SIGKILL)
        for each in self.running:
            while each.status is None:
                connection.wait(each.ends)
                for _ in _read(each):
                    pass


def _describe(status: int) -> str:
    if status == _UNKNOWN:
        return "ended with an unknown status, because the fork server was killed"
    return f"was killed ({signal.Signals(-status).name})" if status < 0 else f"exited with status {status}"


def _read(handle: ProcessHandle) -> Iterator[Any]:
    """Yield the messages of a process; handle its log messages, and keep the `WorkerExit` that it sends last."""
    try:
        while handle.is_open and handle.pipe.poll():
            message = handle.pipe.recv()
            if isinstance(message, WorkerExit):
                handle.exit = message
            elif isinstance(message, logging.LogRecord):
                logging.getLogger(message.name).handle(message)
            else:
                yield message
    except (EOFError, OSError):  # it has ended, or was killed in the middle of a message
        handle.is_open = False


def _run_task(task: Task, pipe: connection.Connection, log_level: int) -> None:
    """Run a task in this process; send its messages and its `WorkerExit`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # multiprocessing installs Python's own handler in its children
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the supervisor decides, as for Ctrl-C
    drain = Drain().listen(signal.SIGTERM)
    threading.Thread(target=_watch_parent, args=(drain,), daemon=True).start()
    lock = threading.Lock()  # the heartbeat thread sends, too

    def send(message: Any) -> None:
        try:
            with lock:
                pipe.send(message)
        except BrokenPipeError:
            drain.set(Drained("the supervisor has exited"))

    # The supervisor prints log messages, so that they do not break the live table.
    queue: Any = SimpleNamespace(put_nowait=send)
    logging.basicConfig(level=log_level, format="%(message)s", handlers=[QueueHandler(queue)])
    logging.captureWarnings(True)
    optuna.logging.disable_default_handler()
    optuna.logging.enable_propagation()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    send(capture_exit(lambda: task(drain, send)))


def _watch_parent(drain: Drain) -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        drain.set(Drained("the supervisor has exited"))
