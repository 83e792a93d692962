"""One worker: asks for trials, sends heartbeats, trains, and reports the results (`tell`)."""

import logging
import socket
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import optuna
import torch
from optuna.trial import TrialState

from hpsearch.config.definition import StudyDefinition
from hpsearch.data.dataset import ImageData
from hpsearch.data.sets import DataSet
from hpsearch.errors import (
    BudgetInFlight,
    BudgetSpent,
    Drained,
    HpsearchError,
    RepeatedFailures,
    Stopped,
    StorageError,
    TrialLost,
    WorkerError,
)
from hpsearch.search.objective import Objective
from hpsearch.search.pruning import build_pruner
from hpsearch.search.samplers import build_sampler
from hpsearch.search.study import load_study
from hpsearch.search.trials import Emit, TrialEvent, make_event
from hpsearch.storage.artifacts import Folder
from hpsearch.storage.checkpoints import checkpoint_folder, sweep_checkpoints
from hpsearch.storage.rdb import Storage, open_storage, storage_of
from hpsearch.storage.tables import count_interruptions
from hpsearch.training.devices import list_devices, share_cores
from hpsearch.training.run import load_study_data
from hpsearch.training.tryout import try_network
from hpsearch.workers.cores import Neighbors
from hpsearch.workers.shutdown import Drain

logger = logging.getLogger(__name__)

RETRY_SECONDS = 600.0  # how long a worker retries when the database does not respond
REQUEUE_SECONDS = 15.0  # how long a worker that is stopping tries to re-queue its trial
_POLL = 0.25  # seconds between two checks for room in the budget
_TICK = 0.5  # seconds between two notes of the time
_MAX_FAILURES = 3  # failed trials in a row after which a worker gives up


@dataclass(frozen=True)
class WorkerExit:
    """How a worker exited: the reason, and the error, if any; `is_dead` if it could not say so itself."""

    reason: str
    error: HpsearchError | None = None
    is_dead: bool = False


class Worker:
    """Runs trials of a study until the budget is used up, the worker is drained, or `max_trials` trials have run.

    `stream` numbers the workers of a study; it determines the worker's sampler and name. `count_threads` returns how
    many threads it should use now; by default it uses as many as before.
    """

    def __init__(
        self,
        definition: StudyDefinition,
        storage: Storage,
        stream: int,
        drain: Drain,
        *,
        data: ImageData | None = None,
        device: torch.device | str = "cpu",
        emit: Emit = lambda event: None,
        max_trials: int | None = None,
        count_threads: Callable[[], int] | None = None,
        node: str = "",
    ) -> None:
        self.count_threads, self.n_threads = count_threads, torch.get_num_threads()
        self.definition, self.storage, self.drain, self.emit = definition, storage, drain, emit
        self.max_trials = max_trials
        self.name = storage.worker = worker_name(stream, node)
        self.study = load_study(definition, storage)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of TPE's `group` and of GP
            self.study.sampler, self.study.pruner = build_sampler(definition, stream), build_pruner(definition)
        self.checkpoints = checkpoint_folder(definition, self.study)
        self.objective = Objective(definition, data, device=device, checkpoints=self.checkpoints)
        self.objective.fingerprint = self.study.user_attrs["fingerprint"]  # an older version's may differ
        self.objective.check_data(self.study)
        self._next_reap = time.monotonic()
        self._failures: list[str] = []  # in a row

    def run(self) -> str:
        """Return the reason it ended. Raises `Drained`, `StorageError`, `TooManyFailures` or `RepeatedFailures`."""
        try:
            return self._run()
        except (Drained, KeyboardInterrupt, StorageError) as error:
            if isinstance(error, StorageError) and not self.drain.event.is_set():
                raise
            self._requeue_own()
            self.drain.check()
            raise

    def _run(self) -> str:
        n_trials = 0
        while self.max_trials is None or n_trials < self.max_trials:
            self.drain.check()
            if time.monotonic() >= self._next_reap:
                self.reap()
            try:
                self.run_trial()
                n_trials += 1
                if len(self._failures) >= _MAX_FAILURES:
                    raise RepeatedFailures(
                        f"{self.name} gave up after {_MAX_FAILURES} failed trials in a row, most recently: "
                        f"{self._failures[-1]}; fix the cause, then start it again"
                    )
            except BudgetInFlight:
                self.drain.event.wait(_POLL)
            except BudgetSpent as spent:
                return str(spent)
        return f"--max-trials reached ({self.max_trials})"

    def run_trial(self) -> None:
        """Ask for a trial, run the objective with a heartbeat, and tell the result."""
        self.update_threads()
        self.apply_threads()
        trial = self._ask()
        value, state = None, TrialState.COMPLETE
        with Heartbeat(self, trial) as heartbeat:
            try:
                value = self.objective(trial, heartbeat.check)
            except optuna.TrialPruned:
                state = TrialState.PRUNED
            except TrialLost:
                return self._drop(trial)
            except (Drained, StorageError):
                raise
            except Exception as error:  # noqa: BLE001 - any error in a training fails only its trial
                if not self.storage.beat(trial._trial_id):
                    return self._drop(trial)
                kind = "out-of-memory" if _is_out_of_memory(error) else "exception"
                return self._fail(trial, kind, f"{self._describe(error)}; {self._keep_traceback(trial)}")
            return self._tell(trial, value, state)

    def _describe(self, error: Exception) -> str:
        """Return what failed a trial, with the line in the file of a network of the user's, if it was there."""
        code = self.definition.network.code
        return code.locate(error) if code and code.find_line(error) else f"{type(error).__name__}: {error}"

    def update_threads(self) -> None:
        """Note how many threads this worker should use now."""
        try:
            if self.count_threads:
                self.n_threads = self.count_threads()
        except OSError as error:  # such as too many open files, which must not end the heartbeats
            logger.debug("cannot count the workers of this machine: %s", error)

    def apply_threads(self) -> None:
        """Let torch use that many threads in the calling thread, to which the setting belongs."""
        if self.count_threads and torch.get_num_threads() != self.n_threads:
            torch.set_num_threads(self.n_threads)

    def _requeue_own(self) -> None:
        """Hand back this worker's running trial, if any."""
        self.drain.ignore_signals()
        self.storage.retry_for(REQUEUE_SECONDS)
        requeue(self.study, {self.name}, "interrupted", "worker stopped", self.emit)

    def reap(self) -> None:
        """Re-queue or fail the trials whose workers are not responding."""
        recovery = self.definition.recovery
        self._next_reap = time.monotonic() + recovery.heartbeat
        for trial in self.storage.reap(self.study._study_id, recovery.retries):
            self.emit(make_event(trial))

    def _ask(self) -> optuna.Trial:
        with warnings.catch_warnings():
            # The storage writes the first heartbeat, and `Heartbeat` the following ones.
            warnings.filterwarnings("ignore", "Heartbeat of storage is supposed to be used with Study.optimize")
            trial = self.study.ask()
        self.emit(TrialEvent(self.name, trial.number, "running"))
        return trial

    def _tell(self, trial: optuna.Trial, value: float | None, state: TrialState) -> None:
        try:
            told = self.study.tell(trial, value, state)
        except TrialLost:
            return self._drop(trial)
        self._failures.clear()
        self.emit(make_event(told))
        return sweep_checkpoints(self.checkpoints, self.study, self.definition.recovery.keep)

    def _fail(self, trial: optuna.Trial, kind: str, message: str) -> None:
        self._failures.append(" ".join(f"{kind}: {message}".split()))
        if ended := self.storage.end_attempt(trial._trial_id, count_interruptions(trial), kind, message):
            self.emit(make_event(ended))

    def _keep_traceback(self, trial: optuna.Trial) -> str:
        """Write the traceback of the current exception to the artifact store; return where it is."""
        folder, name = self.checkpoints, f"trial-{trial.number}.txt"
        try:
            folder.write(name, traceback.format_exc().encode())
        except OSError as error:
            return f"traceback could not be saved to {folder / name} ({error.strerror})"
        return f"traceback in {folder / name}"

    def _drop(self, trial: optuna.Trial) -> None:
        self.storage.release(trial._trial_id)
        self.emit(TrialEvent(self.name, trial.number, "dropped", message="ended by another worker"))


def requeue(study: optuna.Study, workers: set[str], kind: str, message: str, emit: Emit, *, retries: int = 0) -> None:
    """Re-queue or fail the running trials of workers that have ended: see `Storage.end_attempt`."""
    storage = storage_of(study)
    try:
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        ended = [
            storage.end_attempt(trial._trial_id, count_interruptions(trial), kind, message, retries=retries)
            for trial in running
            if trial.user_attrs.get("worker") in workers
        ]
    except StorageError as error:
        return logger.warning("could not re-queue trials now (%s); it will happen after the grace period", error)
    for trial in filter(None, ended):  # only after all are re-queued, since emitting may raise
        emit(make_event(trial))
    return None


class Heartbeat(threading.Thread):
    """Context manager that sends heartbeats for a running trial, detects its loss, and reaps stale trials.

    It also counts the workers that share the cores.
    """

    def __init__(self, worker: "Worker", trial: optuna.Trial) -> None:
        super().__init__(name=f"heartbeat of trial {trial.number}", daemon=True)
        self.worker, self.trial_id = worker, trial._trial_id
        self.ended, self.lost = threading.Event(), threading.Event()

    def check(self, *, between_epochs: bool = False) -> None:
        """Flush buffered reports. Raises if a stop was requested or the trial belongs to another worker now.

        Changes the number of threads if workers have joined or left. A request to stop the study takes effect between
        epochs.
        """
        self.worker.drain.check()
        if self.lost.is_set():
            raise TrialLost
        self.worker.apply_threads()
        self.worker.storage.flush(self.trial_id)
        if between_epochs and self.worker.storage.is_stopped:
            raise Stopped

    def run(self) -> None:
        storage, interval = self.worker.storage, self.worker.definition.recovery.heartbeat
        is_due_at = time.monotonic() + interval
        while not self.ended.wait(_TICK):
            storage.note_time(self.trial_id)
            self.worker.update_threads()
            if time.monotonic() < is_due_at:
                continue
            is_due_at = time.monotonic() + interval
            try:
                if not storage.beat(self.trial_id):
                    self.lost.set()
                    return
                self.worker.reap()
            except StorageError as error:  # the worker's own calls raise it as well, and end the worker
                logger.warning("%s", error)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.join()


def run_worker(
    definition: StudyDefinition,
    drain: Drain,
    emit: Emit = lambda event: None,
    *,
    data: ImageData | DataSet | Path | str | None = None,
    device: str | None = None,
    n_threads: int | None = None,
    n_workers: int = 1,
    neighbors: Neighbors | None = None,
    stream: int | None = None,
    node: str = "",
    max_trials: int | None = None,
    waits: bool = False,
) -> str:
    """Run a worker in this process on a study, which must exist. Returns and raises what `Worker.run` does.

    `data` is the data, or the folder to load them from. The default is the first device of this machine, and as many
    threads as there are cores per worker of the study on this machine: at least `n_workers`, and those that join while
    it runs. A worker without a `stream` joins the study, and first checks that it reaches the artifact store. Pass
    `neighbors` if this process has joined them.
    """
    if stream is None:
        Folder(definition.study.artifacts).check()
    storage = open_worker_storage(definition, drain, waits=waits)
    study = load_study(definition, storage)  # fails before the data are loaded
    others = neighbors or Neighbors(study)

    def count_threads() -> int:
        return n_threads or share_cores(max(n_workers, others.count()))

    torch.set_num_threads(count_threads())  # torch itself ignores a container's CPU quota
    images = data if isinstance(data, ImageData) else load_study_data(definition, data)
    if stream is None:
        _try_first(definition, study, images)
        stream = storage.join(study._study_id)
    options: dict[str, Any] = {"emit": emit, "max_trials": max_trials, "node": node, "count_threads": count_threads}
    device = device or list_devices()[0]
    worker = Worker(definition, storage, stream, drain, data=images, device=device, **options)
    with nullcontext() if neighbors else others.joined():
        return worker.run()


def _try_first(definition: StudyDefinition, study: optuna.Study, data: ImageData) -> None:
    """Try a network of the user's as `start_study` does, unless a trial has finished: this may be another machine."""
    finished = (TrialState.COMPLETE, TrialState.PRUNED)
    if definition.network.code and not study.get_trials(deepcopy=False, states=finished):
        try_network(definition, data.image_shape, len(data.class_names))


def open_worker_storage(definition: StudyDefinition, drain: Drain, *, waits: bool = False) -> Storage:
    """Open the definition's storage for a worker: with its recovery times, retrying until the worker is drained.

    The database must exist. Opening itself retries only if `waits` is true, so that a command with a wrong URL
    fails immediately.
    """
    storage = open_storage(
        definition.study.storage,
        heartbeat=definition.recovery.heartbeat,
        grace=definition.recovery.grace,
        patience=RETRY_SECONDS if waits else 0.0,
        giving_up=drain.event,
        must_exist=True,
    )
    storage.patience = RETRY_SECONDS
    # After an outage for all, every running worker sends a heartbeat within the grace period.
    storage.trusts_heartbeats_from = time.monotonic() + definition.recovery.grace
    return storage


def _is_out_of_memory(error: Exception) -> bool:
    # PyTorch's CPU allocator raises a plain RuntimeError.
    is_on_cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return is_on_cpu or isinstance(error, MemoryError | torch.OutOfMemoryError)


def worker_name(stream: int, node: str = "") -> str:
    """Return a worker's name: host, cluster node (if any), and its number in the study, joined by dashes."""
    return "-".join(filter(None, (socket.gethostname(), node, str(stream))))


def capture_exit(run: Callable[[], str]) -> WorkerExit:
    """Call `run`, which runs a worker and returns the reason it ended; return the `WorkerExit`, never raise."""
    try:
        return WorkerExit(run())
    except KeyboardInterrupt:
        return WorkerExit("stopped", Drained())
    except HpsearchError as error:
        return WorkerExit(str(error), error)
    except Exception as error:
        logger.debug("the worker failed", exc_info=True)
        reason = f"a worker failed: {type(error).__name__}: {error}"
        return WorkerExit(reason, WorkerError(reason))
