"""Workers on this machine and their supervisor, which shares the data with them and replaces those that die."""

import logging
import multiprocessing
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from logging.handlers import QueueHandler
from multiprocessing import connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import torch
from optuna.trial import TrialState

from hpsearch.config.definition import StudyDefinition, evolve
from hpsearch.data.dataset import ImageData
from hpsearch.errors import Drained, RepeatedFailures, Stopped, StorageUnavailable, WorkerError
from hpsearch.search.study import load_study
from hpsearch.search.trials import Emit, TrialEvent, make_event
from hpsearch.storage.rdb import Storage
from hpsearch.storage.tables import count_interruptions
from hpsearch.training.devices import count_cores, default_workers, list_devices
from hpsearch.training.run import load_study_data
from hpsearch.workers.forkserver import start_fork_server
from hpsearch.workers.shutdown import Drain
from hpsearch.workers.worker import REQUEUE_SECONDS, Worker, WorkerExit, capture_exit, open_worker_storage, worker_name

logger = logging.getLogger(__name__)

_POLL = 0.2  # seconds within which the supervisor reacts to a signal
_MAX_FAILED_STARTS = 3  # in a row, per worker


@dataclass
class WorkerProcess:
    """A worker's process, the pipe for its messages, and whether it has started a trial."""

    name: str
    process: Any
    messages: connection.Connection
    has_begun: bool = False
    is_asked_to_stop: bool = False
    exit: WorkerExit | None = None


def run_pool(
    definition: StudyDefinition,
    drain: Drain,
    *,
    n_workers: int | None = None,
    folder: Path | str | None = None,
    emit: Emit = lambda event: None,
    on_start: Callable[[int, int], None] = lambda n_finished, n_workers: None,
) -> str:
    """Run the study, which must exist, with `n_workers` processes until its budget is used up.

    Returns the reason it ended. The default is one worker per GPU, else one per core; the cores are divided among the
    workers. A worker that dies is replaced and its trial re-queued. When drained, all workers re-queue their trials,
    and `Drained` or `Interrupted` is raised. No process outlives the call.
    """
    start_fork_server()
    storage = open_worker_storage(definition, drain, must_exist=True)
    study = load_study(definition, storage)
    data = _share(load_study_data(definition, folder))
    drain.check()
    n_finished = len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)))
    n_workers = n_workers or default_workers()
    on_start(n_finished, n_workers)
    return _Pool(definition, storage, study, data, folder, drain, emit).run(n_workers)


@dataclass
class _Pool:
    definition: StudyDefinition
    storage: Storage
    study: optuna.Study
    data: ImageData | None
    folder: Path | str | None
    drain: Drain
    emit: Emit
    workers: list[WorkerProcess] = field(default_factory=list)
    not_requeued: list[WorkerProcess] = field(default_factory=list)  # exited without re-queuing their trials
    exits: list[WorkerExit] = field(default_factory=list)
    n_failed_starts: int = 0

    def run(self, n_workers: int) -> str:
        try:
            for i in range(n_workers):
                self._start(i, n_workers)
            while self.workers:
                self._step(n_workers)
        except KeyboardInterrupt:
            self.drain.check()
            raise
        finally:
            self.drain.ignore_signals()
            for worker in self.workers:
                worker.process.kill()
            for worker in self.workers:
                worker.process.join()
            self._requeue_own()
        for each in self.exits:
            if each.error is None:  # this worker saw the budget used up, so the search is over
                return each.reason
        self.drain.check()
        raise self.exits[0].error or WorkerError

    def _step(self, n_workers: int) -> None:
        """Forward the workers' messages, replace workers that died, and stop them when drained."""
        ends = [end for worker in self.workers for end in (worker.messages, worker.process.sentinel)]
        connection.wait(ends, _POLL)
        for i, worker in enumerate(list(self.workers)):
            is_dead = worker.process.exitcode is not None  # checked before reading the pipe, so no message is missed
            self._read(worker)
            if not is_dead:
                continue
            worker.process.join()
            self.workers.remove(worker)
            error = worker.exit and worker.exit.error
            was_drained = isinstance(error, Drained) and not isinstance(error, Stopped)
            if worker.exit and not was_drained and not isinstance(error, WorkerError):
                self.exits.append(worker.exit)
                if isinstance(error, StorageUnavailable):
                    self.not_requeued.append(worker)
                if isinstance(error, RepeatedFailures | StorageUnavailable) and self.workers:
                    logger.warning("%s; the other workers continue", error)
                continue
            self._handle_exit(worker, n_workers)
            if isinstance(error, WorkerError):
                raise error
            if not self.drain.event.is_set():  # it was killed, or only this worker was drained
                self._start(i, n_workers)
        if self.drain.event.is_set():
            for worker in self.workers:
                if not worker.is_asked_to_stop:  # a second signal would stop it immediately
                    worker.process.terminate()
                    worker.is_asked_to_stop = True

    def _start(self, slot: int, n_workers: int) -> None:
        context = multiprocessing.get_context("forkserver")
        stream = self.storage.join(self.study._study_id)
        devices = list_devices()
        receiver, sender = context.Pipe(duplex=False)
        url, url_sender = context.Pipe(duplex=False)
        url_sender.send_bytes(self.definition.study.storage.encode())  # pickling a definition removes the password
        process = context.Process(
            target=_work,
            args=(
                self.definition,
                self.data or self.folder,
                stream,
                devices[slot % len(devices)],
                max(1, count_cores() // n_workers),
                logging.getLogger().getEffectiveLevel(),
                sender,
                url,
            ),
            name=worker_name(stream),
        )
        process.start()
        for end in (sender, url, url_sender):
            end.close()
        self.workers.insert(slot, WorkerProcess(worker_name(stream), process, receiver))

    def _read(self, worker: WorkerProcess) -> None:
        """Forward the worker's messages; keep the `WorkerExit` that it sends last."""
        while worker.exit is None:
            try:
                message = worker.messages.recv() if worker.messages.poll() else None
            except (EOFError, OSError):  # killed, possibly in the middle of a message
                return
            if message is None:
                return
            if isinstance(message, WorkerExit):
                worker.exit = message
            elif isinstance(message, logging.LogRecord):
                logging.getLogger(message.name).handle(message)
            else:
                worker.has_begun = True
                self.n_failed_starts = 0
                self.emit(message)

    def _handle_exit(self, worker: WorkerProcess, n_workers: int) -> None:
        """Re-queue the trial of a worker that died; raise if workers keep dying before their first trial."""
        code = worker.process.exitcode
        how = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"exited with status {code}"
        is_drained = self.drain.event.is_set()
        self._requeue([worker], "interrupted" if is_drained else "killed", f"worker {worker.name} {how}")
        self.n_failed_starts += not worker.has_begun
        if self.n_failed_starts >= _MAX_FAILED_STARTS * n_workers and not is_drained:
            raise WorkerError(f"{self.n_failed_starts} workers in a row died before their first trial; the last {how}")

    def _requeue_own(self) -> None:
        self.storage.retry_for(REQUEUE_SECONDS)
        try:
            self._requeue([*self.workers, *self.not_requeued], "interrupted", "worker stopped")
        except StorageUnavailable as error:
            logger.warning("could not re-queue trials now (%s); it will happen after the grace period", error)

    def _requeue(self, workers: list[WorkerProcess], kind: str, message: str) -> None:
        """Re-queue or fail the running trials of workers that have exited."""
        names, retries = {worker.name for worker in workers}, self.definition.recovery.retries
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)) if names else []
        theirs = [trial for trial in running if trial.user_attrs.get("worker") in names]
        ended = [
            self.storage.end_attempt(trial._trial_id, count_interruptions(trial), kind, message, retries=retries)
            for trial in theirs
        ]
        for trial in filter(None, ended):  # only after all are re-queued, since emitting may raise
            self.emit(make_event(trial))


def _share(data: ImageData) -> ImageData | None:
    """Move the data to shared memory. Returns None if that is too small, as with Docker's defaults."""
    try:
        return data.share_memory()
    except RuntimeError as error:
        logger.warning("not enough shared memory; each worker loads its own copy of the data (%s)", error)
        return None


def _work(
    definition: StudyDefinition,
    data: ImageData | Path | str | None,
    stream: int,
    device: str,
    n_threads: int,
    log_level: int,
    messages: connection.Connection,
    url: connection.Connection,
) -> None:
    """Run a worker process; `data` is the shared data or the folder to load it from, `url` yields the storage URL."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # multiprocessing installs Python's own handler in its children
    drain = Drain().listen(signal.SIGTERM)
    threading.Thread(target=_watch_supervisor, args=(drain,), daemon=True).start()
    torch.set_num_threads(n_threads)

    lock = threading.Lock()  # the heartbeat thread sends, too

    def send(message: TrialEvent | WorkerExit | logging.LogRecord) -> None:
        try:
            with lock:
                messages.send(message)
        except BrokenPipeError:
            drain.set(Drained("the supervisor has exited"))

    # The supervisor prints log messages, so that they do not break the live table.
    queue: Any = SimpleNamespace(put_nowait=send)
    logging.basicConfig(level=log_level, handlers=[QueueHandler(queue)])
    logging.captureWarnings(True)
    optuna.logging.disable_default_handler()
    optuna.logging.enable_propagation()
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def run() -> str:
        complete = evolve(definition, "study", storage=url.recv_bytes().decode())
        storage = open_worker_storage(complete, drain, must_exist=True, waits=True)
        images = data if isinstance(data, ImageData) else load_study_data(definition, data)
        return Worker(complete, storage, stream, drain, data=images, device=device, emit=send).run()

    send(capture_exit(run))


def _watch_supervisor(drain: Drain) -> None:
    supervisor = multiprocessing.parent_process()
    if supervisor is not None:
        supervisor.join()
        drain.set(Drained("the supervisor has exited"))
