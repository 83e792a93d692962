"""The loop that starts workers, watches them, replaces those that die, and stops them, wherever they run."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import optuna
from optuna.trial import TrialState

from hpsearch.config.definition import StudyDefinition
from hpsearch.errors import Drained, Stopped, StorageError, StorageUnavailable, TooManyFailures, WorkerError
from hpsearch.search.trials import Emit, TrialEvent
from hpsearch.storage.rdb import Storage
from hpsearch.workers.shutdown import Drain
from hpsearch.workers.worker import REQUEUE_SECONDS, WorkerExit, requeue

logger = logging.getLogger(__name__)

_MAX_FAILED_STARTS = 3  # in a row, per worker


@dataclass(eq=False)
class Handle:
    """A worker that was started: its slot, its name if the executor knows it, and whether it has begun a trial."""

    slot: int
    name: str = ""
    has_begun: bool = False


class Executor(Protocol):
    """A place where workers run. A worker has a slot, a number from 0; its successor has the same."""

    running: Any
    """A collection, empty when no worker runs."""

    def start(self, slot: int) -> Handle:
        """Start a worker."""

    def wait(self) -> Iterable[tuple[Handle, Any]]:
        """Wait for messages, about a second at most, and yield each with the handle of its worker.

        A message is a `TrialEvent`, and the last one of each worker its `WorkerExit`, once it has ended.
        """

    def stop(self) -> None:
        """Ask all workers to stop."""

    def kill(self) -> None:
        """End all workers that are still running."""


@dataclass
class Supervisor:
    """Runs `n_workers` workers of a study in an executor until the budget is used up.

    A worker that died, or was drained alone, is replaced. An error of a worker does not end the others.
    """

    executor: Executor
    n_workers: int
    definition: StudyDefinition
    study: optuna.Study
    storage: Storage
    drain: Drain
    emit: Emit = lambda event: None
    on_poll: Callable[[], None] = lambda: None
    names: set[str] = field(default_factory=set)  # of all workers that were started
    exits: list[WorkerExit] = field(default_factory=list)
    n_failed_starts: int = 0  # in a row
    is_stopping: bool = False

    def run(self) -> str:
        """Return the reason the search ended.

        When drained, all workers are asked to stop, and `Drained` or `Interrupted` is raised. If all workers ended with
        errors, the first one is raised, and `WorkerError` if workers keep dying before their first trial. No worker
        outlives the call; their trials are re-queued, or will be after the grace period.
        """
        try:
            for slot in range(self.n_workers):
                self._start(slot)
            while self.executor.running:
                for handle, message in self.executor.wait():
                    self._receive(handle, message)
                if not self.is_stopping and (self.drain.event.is_set() or self._is_over()):
                    self.is_stopping = True  # each is asked once: a second signal would stop it immediately
                    self.executor.stop()
                self.on_poll()
        except KeyboardInterrupt:
            self.drain.check()
            raise
        finally:
            self.drain.ignore_signals()
            self.executor.kill()
            self.storage.retry_for(REQUEUE_SECONDS)
            self._requeue(self.names, "interrupted", "worker stopped")
        for each in self.exits:
            if each.error is None:  # this worker saw the budget used up, so the search is over
                return each.reason
        self.drain.check()
        raise self.exits[0].error or WorkerError

    def _start(self, slot: int) -> None:
        try:
            self.names.add(self.executor.start(slot).name)
        except StorageUnavailable:
            if not self.drain.event.is_set():  # in an outage, a signal ends the wait for the storage
                raise

    def _receive(self, handle: Handle, message: TrialEvent | WorkerExit) -> None:
        """Forward an event; record the exit of a worker, or replace it if it died or was drained alone."""
        if isinstance(message, TrialEvent):
            handle.has_begun, self.n_failed_starts = True, 0
            return self.emit(message)
        is_drained = isinstance(message.error, Drained) and not isinstance(message.error, Stopped)
        if not message.is_dead and not is_drained:
            if message.error:
                self._requeue({handle.name}, "interrupted", "worker stopped")
            return self._record(message)
        if self.is_stopping or self.drain.event.is_set():
            return None  # its trial is re-queued at the end
        if message.is_dead:
            self._requeue({handle.name}, "killed", f"worker {handle.name} {message.reason}")
            self.n_failed_starts += not handle.has_begun
            if (n := self.n_failed_starts) >= _MAX_FAILED_STARTS * self.n_workers:
                raise WorkerError(f"{n} workers in a row died before their first trial; the last {message.reason}")
        if not self.drain.event.is_set():  # as it may be after an outage of the storage
            self._start(handle.slot)
        return None

    def _record(self, end: WorkerExit) -> None:
        """Record how a worker ended; log each distinct error that does not end the search."""
        is_new = end.reason not in {other.reason for other in self.exits}
        self.exits.append(end)
        if end.error and is_new and self.executor.running and not isinstance(end.error, Stopped | TooManyFailures):
            logger.warning("%s; the other workers continue", end.error)

    def _is_over(self) -> bool:
        """Return whether a worker has seen the budget used up and no trial is running; others may still be starting."""
        if all(end.error for end in self.exits):
            return False
        try:
            return not self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        except StorageError:  # the workers retry as well
            return False

    def _requeue(self, workers: set[str], kind: str, message: str) -> None:
        requeue(self.study, workers, kind, message, self.emit, retries=self.definition.recovery.retries)
