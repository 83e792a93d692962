"""Optuna's RDBStorage, made safe and fast for parallel workers.

It differs in four ways: every SQLite transaction starts with `BEGIN IMMEDIATE`; the transaction that starts a trial
also checks the budget, assigns the worker and writes the first heartbeat; the reports of a running trial are buffered
and flushed at most every 0.5 s; and an interrupted trial waits on its own row, where only its latest attempt may write.
"""

import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, cast

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Connection
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from hpsearch.config.urls import parse_url, show_url
from hpsearch.errors import StorageError, StudyNotFound, TrialLost, UsageError
from hpsearch.storage import tables
from hpsearch.storage.budget import Past, admit, read_seconds_searched
from hpsearch.storage.engine import (
    check_location,
    check_tables,
    connect_arguments,
    create_engine,
    creation_lock,
    is_created,
)
from hpsearch.storage.retry import build_retrier, make_error, repeat_creation, retry_on_outage
from hpsearch.storage.tables import BufferedTrial


def _buffer_or_write(buffer: Callable[..., None], write: Callable[..., None]) -> Callable[..., None]:
    """Return a method of `Storage` that calls `buffer` on a trial that is buffered, and `write` on any other."""
    write = retry_on_outage(write)

    def call(self: "Storage", trial_id: int, *args: Any, **kwargs: Any) -> None:
        if buffered := self._find_buffered(trial_id):
            buffer(buffered, *args, **kwargs)
        else:
            write(self, trial_id, *args, **kwargs)

    return call


class Storage(RDBStorage):
    """Optuna's RDBStorage that checks the budget before it starts a trial, and buffers the trials of its `worker`.

    Buffered reports and attributes are written by `flush` when due, and in the transaction that ends the trial. With a
    `worker`, every write to a trial raises `TrialLost` once the trial is not running any more, or in another attempt.
    In an outage, calls are retried for `patience` seconds or until `giving_up` is set; then they raise
    `StorageUnavailable`.
    """

    # What Optuna calls, retried in an outage.
    create_new_study = retry_on_outage(RDBStorage.create_new_study)
    delete_study = retry_on_outage(RDBStorage.delete_study)
    get_all_studies = retry_on_outage(RDBStorage.get_all_studies)
    get_study_id_from_name = retry_on_outage(RDBStorage.get_study_id_from_name)
    get_study_name_from_id = retry_on_outage(RDBStorage.get_study_name_from_id)
    get_study_directions = retry_on_outage(RDBStorage.get_study_directions)
    get_study_user_attrs = retry_on_outage(RDBStorage.get_study_user_attrs)
    get_study_system_attrs = retry_on_outage(RDBStorage.get_study_system_attrs)
    set_study_user_attr = retry_on_outage(RDBStorage.set_study_user_attr)
    set_study_system_attr = retry_on_outage(RDBStorage.set_study_system_attr)
    _get_best_trial_id = retry_on_outage(RDBStorage._get_best_trial_id)
    record_heartbeat = retry_on_outage(RDBStorage.record_heartbeat)
    # The same for trials that are not buffered: Optuna's own methods.
    _add_trial = retry_on_outage(RDBStorage._create_new_trial)
    _write_state = retry_on_outage(RDBStorage.set_trial_state_values)
    # Writes to a trial, buffered or not.
    _report = _buffer_or_write(BufferedTrial.report, RDBStorage.set_trial_intermediate_value)
    set_trial_user_attr = _buffer_or_write(BufferedTrial.set_user_attr, RDBStorage.set_trial_user_attr)
    set_trial_system_attr = _buffer_or_write(BufferedTrial.set_system_attr, RDBStorage.set_trial_system_attr)
    _set_trial_param = _buffer_or_write(BufferedTrial.set_param, RDBStorage._set_trial_param)

    def __init__(self, url: URL, *, heartbeat: int, grace: int, creates: bool, reads_only: bool = False) -> None:
        self.worker: str | None = None
        self.is_stopped = False  # whether the study was stopped, as of the last flush or heartbeat
        self.patience = 0.0
        self.giving_up = threading.Event()
        self._buffered: dict[int, BufferedTrial] = {}
        self._ended: dict[int, BufferedTrial] = {}  # only the last one
        self._fresh_until = 0.0  # when to read the trials of other workers again
        self._past = defaultdict[int, Past](Past)  # by study
        self._last_answer = time.time(), time.monotonic()
        self.trusts_heartbeats_from = 0.0  # on the monotonic clock
        # Optuna formats the URL as a template, so braces in a password would break it.
        template = url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # heartbeats
            super().__init__(
                template,
                {"poolclass": NullPool, "connect_args": connect_arguments(url)},
                heartbeat_interval=heartbeat,
                grace_period=grace,
                skip_table_creation=not creates,
                skip_compatibility_check=True,
            )
        versions = self._version_manager
        if versions.get_current_version() != versions.get_head_version():
            versions.check_table_schema_compatibility()  # needs two connections
        for index in tables.INDEXES if creates else ():
            index.create(self.engine, checkfirst=True)  # also in tables that Optuna created
        # Optuna needs two connections to create tables; from now on one is enough.
        self.engine = create_engine(url, converts=creates, reads_only=reads_only)
        self.scoped_session.remove()
        self.scoped_session.configure(bind=self.engine)

    def __getstate__(self) -> dict[Any, Any]:
        raise TypeError("a storage cannot be pickled; open a new one in the other process")

    def change_study_attrs(self, study_id: int, change: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
        """Change user attributes of a study in one transaction.

        `change` gets all attributes and returns the new values of some; they are written and returned.
        """
        changed: dict[str, Any] = self.change_budget(study_id, lambda attributes, n_started: change(attributes))
        return changed

    @retry_on_outage
    def change_budget(self, study_id: int, change: Callable[[dict[str, Any], int], dict[str, Any]]) -> dict[str, Any]:
        """Change user attributes by the number of trials that count against the budget, which none joins meanwhile."""
        with self.engine.begin() as connection:
            tables.lock_study(connection, study_id)
            attributes = tables.read_study_attrs(connection, study_id)
            changed = change(attributes, tables.count_started(connection, study_id))
            for key, value in changed.items():
                tables.write_study_attr(connection, study_id, key, value)
        return changed

    def join(self, study_id: int) -> int:
        """Register a worker and return its number in the study, from 0."""
        changed = self.change_study_attrs(study_id, lambda attrs: {"workers": attrs.get("workers", 0) + 1})
        return int(changed["workers"]) - 1

    @retry_on_outage
    def check_budget(self, study_id: int) -> None:
        """Raise what `admit` raises if no other trial of the study may start now."""
        with self.engine.begin() as connection:
            admit(connection, study_id, self._past[study_id], is_new=False)

    @retry_on_outage
    def seconds_searched(self, study_id: int) -> float:
        """Return the seconds in which at least one trial of the study ran."""
        with self.engine.begin() as connection:
            return read_seconds_searched(connection, study_id, self._past[study_id].time)

    @retry_on_outage
    def end_attempt(
        self,
        trial_id: int,
        attempt: int,
        kind: str,
        message: str,
        *,
        retries: int = 0,
        silence: timedelta = timedelta(),
    ) -> FrozenTrial | None:
        """End an attempt at a trial, `silence` ago; return the trial, or None if the attempt has already ended.

        A trial that was "interrupted", or "killed" at most `retries` times, waits for another attempt on its own row:
        it keeps its number, parameters and reports, and the reason is added to its user attribute `interruptions`.
        Otherwise it fails, with the reason in its user attribute `failure`.
        """
        trial = None
        with self.engine.begin() as connection:
            if tables.lock_trial(connection, trial_id)[:2] == (TrialState.RUNNING, attempt):
                if buffered := self._buffered.get(trial_id):
                    buffered.note_time()
                    buffered.write(connection)
                trial = tables.read_trial(connection, trial_id)
                end = datetime.fromtimestamp(time.time() - silence.total_seconds())  # local, and it sets `fold`
                interruptions = trial.user_attrs.get("interruptions", [])
                n_kills = sum(earlier["kind"] == "killed" for earlier in interruptions)
                n_kills += len(trial.system_attrs.get("retry_history", ()))  # of an older study
                if kind == "interrupted" or (kind == "killed" and n_kills < retries):
                    tables.requeue(connection, trial, kind, message, end)
                else:
                    tables.write_user_attr(connection, trial, "failure", {"kind": kind, "message": message})
                    trial.state, trial.datetime_complete = TrialState.FAIL, end
                    tables.write_state(connection, trial)
        self._fresh_until = 0.0
        self.release(trial_id)
        return trial

    def retry_for(self, seconds: float) -> None:
        """From now on retry for `seconds`, even if `giving_up` was set, to re-queue trials before exiting."""
        self.patience, self.giving_up = seconds, threading.Event()

    def reap(self, study_id: int, retries: int) -> list[FrozenTrial]:
        """End the attempts without a heartbeat for longer than the grace period; return their trials.

        After an outage of the database, or a suspend of this machine, no attempt is ended for another grace period,
        because other workers could not send heartbeats either.
        """
        stale = self._find_stale(study_id, adopts=True)
        if time.monotonic() < self.trusts_heartbeats_from:
            return []
        message = f"no heartbeat for {self.grace_period} s"
        ended = [
            self.end_attempt(trial_id, attempt, "killed", message, retries=retries, silence=age)
            for trial_id, attempt, age in stale
        ]
        return [trial for trial in ended if trial]

    def _note_answer(self) -> None:
        """After a long outage, declare no workers dead for one grace period.

        Only the wall clock sees a suspend, and only the monotonic one an outage in which the wall clock was set back.
        """
        before, self._last_answer = self._last_answer, (time.time(), time.monotonic())
        silence = max(now - then for now, then in zip(self._last_answer, before, strict=True))
        interval, grace = self.heartbeat_interval or 0, self.grace_period or 0
        if silence > max(1.5 * interval, (grace - interval) / 2):
            self.trusts_heartbeats_from = time.monotonic() + grace

    def find_stale(self, study_id: int) -> list[int]:
        """Return the ids of stale running trials; changes nothing."""
        return [trial_id for trial_id, *_ in self._find_stale(study_id)]

    @retry_on_outage
    def _find_stale(self, study_id: int, *, adopts: bool = False) -> list[tuple[int, int, timedelta]]:
        """Return the id and attempt of each stale running trial, and the age of its heartbeat.

        A trial without a heartbeat is stale, and so is one whose heartbeat lies in the future, because a clock was set
        back. With `adopts`, it gets one of now and becomes stale after a grace period, unless its worker is alive.
        """
        interval, grace = (timedelta(seconds=limit or 0) for limit in (self.heartbeat_interval, self.grace_period))
        stale: list[tuple[int, int, timedelta]] = []
        with self.engine.begin() as connection:
            for trial_id, attempt, age in tables.read_running(connection, study_id):
                is_orphan = age is None or age < -interval
                if is_orphan and adopts:
                    tables.adopt(connection, trial_id, age)
                elif age is None or is_orphan or age > grace:
                    stale.append((trial_id, attempt, age or timedelta.max))
        return stale

    def note_time(self, trial_id: int) -> None:
        """Note that a buffered trial is running: see `BufferedTrial.note_time`."""
        if buffered := self._buffered.get(trial_id):
            buffered.note_time()

    def flush(self, trial_id: int) -> None:
        """Write a trial's buffered reports if due. Raises `TrialLost` if it is another worker's now."""
        self.note_time(trial_id)
        buffered = self._buffered.get(trial_id)
        if buffered and time.monotonic() >= buffered.is_due_at:
            self._flush(buffered)

    @retry_on_outage
    def beat(self, trial_id: int) -> bool:
        """Write a heartbeat if the buffered trial is still this worker's; return whether it is."""
        buffered = self._buffered.get(trial_id)
        if buffered is None:
            return False
        buffered.note_time()
        with self.engine.begin() as connection:
            is_own = self._owns(connection, buffered)
            if is_own:
                tables.beat(connection, trial_id)
                buffered.write_pauses(connection)
        return is_own

    def _owns(self, connection: Connection, buffered: BufferedTrial) -> bool:
        """Lock a trial; return whether it is running in the attempt of this worker. Also notes `is_stopped`."""
        state, attempt, self.is_stopped = tables.lock_trial(connection, buffered.trial._trial_id)
        return state == TrialState.RUNNING and attempt == buffered.attempt

    def release(self, trial_id: int) -> None:
        """Discard a buffered trial and its unwritten rows."""
        self._buffered.pop(trial_id, None)

    def _find_buffered(self, trial_id: int) -> BufferedTrial | None:
        """Return the buffered trial to write to; None without a worker. Raises `TrialLost` if it was released."""
        buffered = self._buffered.get(trial_id)
        if self.worker and buffered is None:
            raise TrialLost
        return buffered

    def get_trial(self, trial_id: int) -> FrozenTrial:
        if buffered := self._buffered.get(trial_id) or self._ended.get(trial_id):
            return buffered.snapshot()
        trial: FrozenTrial = self._read_trial(trial_id)
        return trial

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Any = None) -> bool:
        if state == TrialState.RUNNING and self.worker:
            return bool(self._claim(trial_id))
        if buffered := self._find_buffered(trial_id):
            self._end(buffered, state, values)
            return True
        return bool(self._write_state(trial_id, state, values))

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        self._report(trial_id, step, intermediate_value)
        self.flush(trial_id)

    def _create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> FrozenTrial:
        is_own = template_trial is None and self.worker
        trial: FrozenTrial = self._start(study_id) if is_own else self._add_trial(study_id, template_trial)
        return trial

    @retry_on_outage
    def _get_trials(
        self, study_id: int, states: Any, included_trial_ids: set[int], trial_id_greater_than: int
    ) -> list[FrozenTrial]:
        ids = {trial_id for trial_id in included_trial_ids if trial_id <= trial_id_greater_than}
        if self._buffered and time.monotonic() < self._fresh_until:  # other workers flush no more often
            return [buffered.snapshot() for buffered in self._buffered.values()]
        known = self._buffered | self._ended
        with self.engine.begin() as connection:
            trials = tables.read_trials(
                connection, study_id=study_id, above=trial_id_greater_than, ids=ids, known=known
            )
        self._fresh_until = time.monotonic() + tables.WRITE_INTERVAL
        return [trial for trial in trials if states is None or trial.state in states]

    @retry_on_outage
    def _read_trial(self, trial_id: int) -> FrozenTrial:
        with self.engine.begin() as connection:
            return tables.read_trial(connection, trial_id)

    @retry_on_outage
    def _start(self, study_id: int) -> FrozenTrial:
        """Start a new buffered trial: check the budget, assign the worker, write a heartbeat."""
        with self.engine.begin() as connection:
            number = admit(connection, study_id, self._past[study_id], is_new=True)
            trial = tables.insert_trial(connection, study_id, number, datetime.now(), self.worker)
        return self._buffer(trial).snapshot()

    @retry_on_outage
    def _claim(self, trial_id: int) -> bool:
        """Start a waiting trial like a new one; return False if another worker has it."""
        with self.engine.begin() as connection:
            study_id = tables.find_study(connection, trial_id)
            tables.lock_study(connection, study_id)
            tables.lock_trial(connection, trial_id)  # so that all of it is read in the same attempt
            trial = tables.read_trial(connection, trial_id)
            if trial.state == TrialState.WAITING:
                admit(connection, study_id, self._past[study_id], is_new=False)
                trial.state, trial.datetime_start = TrialState.RUNNING, datetime.now()
                tables.write_state(connection, trial)
                tables.assign_worker(connection, trial, str(self.worker))
            elif trial.state != TrialState.RUNNING or trial.user_attrs.get("worker") != self.worker:
                return False
            # Otherwise an earlier call has claimed it, but its response was lost.
        self._buffer(trial)
        return True

    def _buffer(self, trial: FrozenTrial) -> BufferedTrial:
        self.is_stopped = False  # a stopped study starts no trial
        self._ended = {}
        buffered = self._buffered[trial._trial_id] = BufferedTrial(trial)
        return buffered

    @retry_on_outage
    def _flush(self, buffered: BufferedTrial) -> None:
        with self._writing(buffered) as connection:
            if not self._owns(connection, buffered):
                raise TrialLost
            buffered.write(connection)

    @retry_on_outage
    def _end(self, buffered: BufferedTrial, state: TrialState, values: Any) -> None:
        """Write the trial's buffered rows, its values and its final state."""
        buffered.note_time()
        ended = buffered.snapshot()
        ended.state, ended.values, ended.datetime_complete = state, values, datetime.now()
        with self._writing(buffered) as connection:
            stored, attempt, _ = tables.lock_trial(connection, ended._trial_id)
            if attempt != buffered.attempt or stored not in (TrialState.RUNNING, state):
                raise TrialLost
            if stored == TrialState.RUNNING:  # otherwise it was ended by a call whose response was lost
                tables.write_state(connection, ended)
                buffered.write(connection)
                tables.write_values(connection, ended._trial_id, values or ())
        buffered.trial = ended
        del self._buffered[ended._trial_id]
        self._ended = {ended._trial_id: buffered}

    @contextmanager
    def _writing(self, buffered: BufferedTrial) -> Iterator[Connection]:
        """Open a transaction that writes a buffered trial; discard the trial if it is lost."""
        try:
            with self.engine.begin() as connection:
                yield connection
        except TrialLost:
            self.release(buffered.trial._trial_id)
            raise
        buffered.clear_rows()


def storage_of(study: optuna.Study) -> Storage:
    """Return the `Storage` of a study. Raises `UsageError` if it was opened otherwise than with `open_storage`."""
    storage = getattr(study._storage, "_backend", None)
    if not isinstance(storage, Storage):
        raise UsageError(f"study '{study.study_name}' must be opened with hpsearch.open_storage and open_study")
    return storage


def open_storage(
    url: str,
    *,
    heartbeat: int = 10,
    grace: int = 60,
    patience: float = 0.0,
    giving_up: threading.Event | None = None,
    must_exist: bool = False,
    reads_only: bool = False,
) -> Storage:
    """Open the storage at a SQLAlchemy URL of SQLite or PostgreSQL, and create missing tables.

    With `reads_only`, it blocks workers for no longer than one read, and the database must exist. `heartbeat`, `grace`
    and `patience` are in seconds. Raises `UsageError` for an invalid URL, `StudyNotFound` if the database must exist
    but does not, `StorageUnavailable` if it cannot be reached, and `StorageError` if it is not an hpsearch database.
    """
    parsed, giving_up, must_exist = parse_url(url), giving_up or threading.Event(), must_exist or reads_only
    if parsed.get_backend_name() == "sqlite":
        file = Path(parsed.database or "")
        if not file.parent.is_dir():
            raise UsageError(f"folder {file.parent} for the database {file.name} does not exist; create it first")
        if must_exist and not file.exists():
            raise StudyNotFound(f"no search found: {file} does not exist; start one with: hpsearch run STUDY")

    options: dict[str, Any] = {"heartbeat": heartbeat, "grace": grace, "reads_only": reads_only}

    def create() -> Storage:
        check_tables(parsed)
        return Storage(parsed, creates=True, **options)

    def connect() -> Storage:
        if not must_exist:
            check_location(parsed)
            with creation_lock(parsed):
                return cast(Storage, repeat_creation(create))
        if not is_created(parsed):  # Optuna would create the rest, although another process may be doing so
            raise StudyNotFound(f"{show_url(parsed)} contains no study; start one with: hpsearch run STUDY")
        return Storage(parsed, creates=False, **options)

    try:
        storage = build_retrier(parsed, patience, heartbeat, giving_up)(connect)
    except (StorageInternalError, SQLAlchemyError) as error:
        raise make_error(parsed, error) from error
    except RuntimeError as error:  # from another version of Optuna
        raise StorageError(f"{show_url(parsed)}: {error}") from error
    except ImportError as error:
        raise UsageError("the PostgreSQL driver is not installed; run: pip install 'hpsearch[postgres]'") from error
    except OSError as error:
        raise StorageError(f"cannot open the database {show_url(parsed)}: {error.strerror}") from error
    storage.patience, storage.giving_up = patience, giving_up
    return storage
