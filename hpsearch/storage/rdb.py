"""Optuna's RDBStorage, made safe and fast for parallel workers.

It differs in three ways: every SQLite transaction starts with `BEGIN IMMEDIATE`; the transaction that starts a trial
also checks the budget, assigns the worker and writes the first heartbeat; and the reports of a running trial are
buffered and flushed at most every 0.5 s.
"""

import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.distributions import BaseDistribution, check_distribution_compatibility
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.storages._rdb.storage import _create_scoped_session
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import URL
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from hpsearch.config.urls import parse_url, show_url
from hpsearch.errors import StorageError, StudyNotFound, UsageError
from hpsearch.storage import tables
from hpsearch.storage.budget import INDEXES, SearchTime, admit, is_stopped, lock_study
from hpsearch.storage.engine import check_location, check_tables, connect_arguments, creation_lock, harden, pool_options
from hpsearch.storage.retry import build_retrier, describe_cause, make_error, retry_on_outage
from hpsearch.storage.tables import BufferedTrial, Counts, read_counts

_TRIAL: Any = models.TrialModel


class _RetryingStorage(RDBStorage):
    """RDBStorage that retries its calls during an outage."""


# These are the methods of RDBStorage that Optuna calls directly.
for _name in (
    *("create_new_study", "delete_study", "get_all_studies", "get_study_id_from_name", "get_study_name_from_id"),
    *("get_study_directions", "get_study_user_attrs", "get_study_system_attrs", "set_study_user_attr"),
    *("set_study_system_attr", "_create_new_trial", "_set_trial_param", "set_trial_state_values"),
    *("set_trial_intermediate_value", "set_trial_user_attr", "set_trial_system_attr"),
    *("_get_best_trial_id", "record_heartbeat"),
):
    setattr(_RetryingStorage, _name, retry_on_outage(getattr(RDBStorage, _name)))


class Storage(_RetryingStorage):
    """Optuna's RDBStorage that checks the budget before it starts a trial, and buffers the trials of its `worker`.

    Buffered reports and attributes are written by `flush` when due, and in the transaction that ends the trial. In an
    outage, calls are retried for `patience` seconds or until `giving_up` is set; then they raise `StorageUnavailable`.
    """

    def __init__(self, url: URL, *, heartbeat: int, grace: int, creates: bool, reads_only: bool = False) -> None:
        self.worker: str | None = None
        self.is_stopped = False  # whether the study was stopped, as of the last flush or heartbeat
        self.patience = 0.0
        self.giving_up = threading.Event()
        self._buffered: dict[int, BufferedTrial] = {}
        self._ended: dict[int, BufferedTrial] = {}  # only the last one
        self._fresh_until = 0.0  # when to read the trials of other workers again
        self._searched = defaultdict[int, SearchTime](SearchTime)  # by study
        self._last_answer = time.time()
        self.trusts_heartbeats_from = 0.0  # seconds since 1970
        # Optuna formats the URL as a template, so braces in a password would break it.
        template = url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")
        arguments = connect_arguments(url)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # heartbeats
            super().__init__(
                template,
                {"poolclass": NullPool, "connect_args": arguments},
                heartbeat_interval=heartbeat,
                grace_period=grace,
                skip_table_creation=not creates,
                skip_compatibility_check=True,
            )
        versions = self._version_manager
        if versions.get_current_version() != versions.get_head_version():
            versions.check_table_schema_compatibility()  # needs two connections
        for index in INDEXES if creates else ():
            index.create(self.engine, checkfirst=True)  # also in tables that Optuna created
        # Optuna needs two connections to create tables; from now on one is enough.
        is_sqlite = url.get_backend_name() == "sqlite"
        options = {} if is_sqlite else pool_options(reads_only=reads_only)
        self.engine = sqlalchemy.create_engine(url, connect_args=arguments, **options)
        self.scoped_session.remove()
        self.scoped_session.configure(bind=self.engine)
        harden(self.engine, converts=creates, reads_only=reads_only)

    def __getstate__(self) -> dict[Any, Any]:
        raise TypeError("a storage cannot be pickled; open a new one in the other process")

    @retry_on_outage
    def join(self, study_id: int) -> int:
        """Register a worker and return its number in the study, from 0."""
        with _create_scoped_session(self.scoped_session) as session:
            study = models.StudyModel.find_or_raise_by_id(study_id, session, for_update=True)
            attribute = models.StudyUserAttributeModel.find_by_study_and_key(study, "workers", session)
            if attribute is None:
                attribute = models.StudyUserAttributeModel(study_id=study_id, key="workers", value_json="0")
                session.add(attribute)
            n_before = int(attribute.value_json)
            attribute.value_json = str(n_before + 1)
            return n_before

    def fail(self, trial_id: int, kind: str, message: str, *, retries: int = 0) -> bool:
        """Fail a running trial, with the reason in its user attribute `failure`; return whether it was running.

        The same transaction re-queues the parameters of a trial that was "interrupted", or "killed" at most `retries`
        times.
        """
        has_failed: bool = self._fail(trial_id, kind, message, retries)
        self._fresh_until = 0.0
        self.release(trial_id)
        return has_failed

    @retry_on_outage
    def _fail(self, trial_id: int, kind: str, message: str, retries: int) -> bool:
        with _create_scoped_session(self.scoped_session) as session:
            study_id = _TRIAL.find_or_raise_by_id(trial_id, session).study_id
            # Locking the study keeps trial numbers unique; it is always locked before a trial.
            models.StudyModel.find_or_raise_by_id(study_id, session, for_update=True)
            trial: Any = _TRIAL.find_or_raise_by_id(trial_id, session, for_update=True)
            session.refresh(trial)
            if trial.state != TrialState.RUNNING:
                return False
            if buffered := self._buffered.get(trial_id):
                buffered.write(session.connection())
            frozen = self._build_frozen_trial_from_trial_model(trial)
            kills = [*frozen.system_attrs.get("retry_history", []), *([frozen.number] if kind == "killed" else [])]
            is_retried = kind == "interrupted" or (kind == "killed" and len(kills) <= retries)
            failure = {"kind": kind, "message": message, "retried": is_retried}
            self._set_user_attr(session, trial_id, "failure", failure)
            trial.state = TrialState.FAIL
            trial.datetime_complete = datetime.now()
            if is_retried:
                # Otherwise ASHA and Hyperband would count one training twice.
                rungs = models.TrialSystemAttributeModel.key.startswith("completed_rung_")
                session.query(models.TrialSystemAttributeModel).filter_by(trial_id=trial_id).filter(rungs).delete(False)
                self._get_prepared_new_trial(study_id, _retry_of(frozen, kills), session)
            return True

    def retry_for(self, seconds: float) -> None:
        """From now on retry for `seconds`, even if `giving_up` was set, to re-queue trials before exiting."""
        self.patience, self.giving_up = seconds, threading.Event()

    def reap(self, study_id: int, retries: int) -> list[int]:
        """Fail running trials without a heartbeat for longer than the grace period; return their ids.

        After an outage of the database, or a suspend of this machine, no trial is failed for another grace period,
        because other workers could not send heartbeats either.
        """
        message = f"no heartbeat for {self.grace_period} s"
        stale = self._get_stale_trial_ids(study_id)
        if time.time() < self.trusts_heartbeats_from:
            return []
        return [trial_id for trial_id in stale if self.fail(trial_id, "killed", message, retries=retries)]

    def _note_answer(self) -> None:
        """After a long outage, declare no workers dead for one grace period (wall-clock time, so a suspend counts)."""
        now, interval, grace = time.time(), self.heartbeat_interval or 0, self.grace_period or 0
        if now - self._last_answer > max(1.5 * interval, (grace - interval) / 2):
            self.trusts_heartbeats_from = now + grace
        self._last_answer = now

    def _set_user_attr(self, session: Session, trial_id: int, key: str, value: Any) -> None:
        self._set_trial_attr_without_commit(session, models.TrialUserAttributeModel, trial_id, key, value)

    @retry_on_outage
    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        self._adopt_orphans(study_id)
        return super()._get_stale_trial_ids(study_id)

    @retry_on_outage
    def find_stale(self, study_id: int) -> list[int]:
        """Return the ids of stale running trials, also of those that never had a heartbeat; changes nothing."""
        with _create_scoped_session(self.scoped_session) as session:
            orphans = self._find_orphans(study_id, session)
        return [*super()._get_stale_trial_ids(study_id), *orphans]

    def _adopt_orphans(self, study_id: int) -> None:
        """Write a heartbeat for running trials that have none, so that they become stale after a grace period."""
        with _create_scoped_session(self.scoped_session, ignore_integrity_error=True) as session:
            orphans = self._find_orphans(study_id, session)
            session.add_all([models.TrialHeartbeatModel(trial_id=trial_id) for trial_id in orphans])

    def _find_orphans(self, study_id: int, session: Session) -> list[int]:
        query = session.query(_TRIAL.trial_id).filter(
            _TRIAL.study_id == study_id, _TRIAL.state == TrialState.RUNNING, ~_TRIAL.heartbeats.any()
        )
        return [trial_id for (trial_id,) in query]

    def flush(self, trial_id: int) -> None:
        """Write a trial's buffered reports if due. Raises `UpdateFinishedTrialError` if another worker failed it."""
        buffered = self._buffered.get(trial_id)
        if buffered and time.monotonic() >= buffered.is_due_at:
            self._flush(buffered)

    @retry_on_outage
    def beat(self, trial_id: int) -> bool:
        """Write a heartbeat if the trial is still running; return whether it is."""
        with _create_scoped_session(self.scoped_session) as session:
            is_running = tables.lock_trial(session.connection(), trial_id) == TrialState.RUNNING
            self.is_stopped = is_stopped(session, trial_id)
            if is_running:
                tables.beat(session.connection(), trial_id)
            return is_running

    def release(self, trial_id: int) -> None:
        """Discard a buffered trial and its unwritten rows."""
        self._buffered.pop(trial_id, None)

    def get_trial(self, trial_id: int) -> FrozenTrial:
        if buffered := self._buffered.get(trial_id) or self._ended.get(trial_id):
            return buffered.snapshot()
        trial: FrozenTrial = self._read_trial(trial_id)
        return trial

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Any = None) -> bool:
        if state == TrialState.RUNNING and self.worker:
            return bool(self._claim(trial_id))
        if buffered := self._buffered.get(trial_id):
            self._end(buffered, state, values)
            return True
        return super().set_trial_state_values(trial_id, state, values)

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        if buffered := self._buffered.get(trial_id):
            buffered.report(step, intermediate_value)
            return self.flush(trial_id)
        return super().set_trial_intermediate_value(trial_id, step, intermediate_value)

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        if buffered := self._buffered.get(trial_id):
            return buffered.set_user_attr(key, value)
        return super().set_trial_user_attr(trial_id, key, value)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        if buffered := self._buffered.get(trial_id):
            return buffered.set_system_attr(key, value)
        return super().set_trial_system_attr(trial_id, key, value)

    def _set_trial_param(
        self,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
        previous_distribution: BaseDistribution | None,
    ) -> None:
        if buffered := self._buffered.get(trial_id):
            if previous_distribution is not None:
                check_distribution_compatibility(previous_distribution, distribution)
            return buffered.set_param(param_name, param_value_internal, distribution)
        return super()._set_trial_param(trial_id, param_name, param_value_internal, distribution, previous_distribution)

    def _create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> FrozenTrial:
        if template_trial is None and self.worker:
            trial: FrozenTrial = self._start(study_id)
            return trial
        return super()._create_new_trial(study_id, template_trial)

    @retry_on_outage
    def _get_trials(
        self, study_id: int, states: Any, included_trial_ids: set[int], trial_id_greater_than: int
    ) -> list[FrozenTrial]:
        ids = {trial_id for trial_id in included_trial_ids if trial_id <= trial_id_greater_than}
        if self._buffered and time.monotonic() < self._fresh_until:  # other workers flush no more often
            return [buffered.snapshot() for buffered in self._buffered.values()]
        known = self._buffered | self._ended
        with _create_scoped_session(self.scoped_session) as session:
            trials = tables.read_trials(
                session.connection(), study_id=study_id, above=trial_id_greater_than, ids=ids, known=known
            )
        self._fresh_until = time.monotonic() + tables.WRITE_INTERVAL
        return [trial for trial in trials if states is None or trial.state in states]

    @retry_on_outage
    def read_counts(self, study_id: int) -> Counts:
        """Return the counts that `status` shows."""
        with _create_scoped_session(self.scoped_session) as session:
            return read_counts(session.connection(), study_id)

    @retry_on_outage
    def _read_trial(self, trial_id: int) -> FrozenTrial:
        with _create_scoped_session(self.scoped_session) as session:
            return tables.read_trial(session.connection(), trial_id)

    @retry_on_outage
    def _start(self, study_id: int) -> FrozenTrial:
        """Start a new buffered trial: check the budget, assign the worker, write a heartbeat."""
        with _create_scoped_session(self.scoped_session) as session:
            number, connection = admit(session, study_id, self._searched[study_id]), session.connection()
            buffered = BufferedTrial(tables.insert_trial(connection, study_id, number, datetime.now(), self.worker))
        self._buffer(buffered)
        return buffered.snapshot()

    @retry_on_outage
    def _claim(self, trial_id: int) -> bool:
        """Start a waiting trial like a new one; return False if another worker has it."""
        with _create_scoped_session(self.scoped_session) as session:
            connection = session.connection()
            study_id = tables.find_study(connection, trial_id)
            lock_study(session, study_id)
            buffered = BufferedTrial(tables.read_trial(connection, trial_id))
            trial = buffered.trial
            self.check_trial_is_updatable(trial_id, trial.state)
            if trial.state == TrialState.WAITING:
                admit(session, study_id, self._searched[study_id])
                trial.state, trial.datetime_start = TrialState.RUNNING, datetime.now()
                tables.change_state(connection, trial, before=TrialState.WAITING)
                tables.assign_worker(connection, trial_id, str(self.worker))
                trial.user_attrs["worker"] = self.worker
            elif trial.user_attrs.get("worker") != self.worker:
                return False
            # Otherwise an earlier attempt to claim it succeeded, but its response was lost.
        self._buffer(buffered)
        return True

    def _buffer(self, buffered: BufferedTrial) -> None:
        buffered.clear_rows()
        self.is_stopped = False  # a stopped study starts no trial
        self._buffered[buffered.trial._trial_id] = buffered
        self._ended = {}

    @retry_on_outage
    def _flush(self, buffered: BufferedTrial) -> None:
        with self._writing(buffered) as session:
            state = tables.lock_trial(session.connection(), buffered.trial._trial_id)
            self.check_trial_is_updatable(buffered.trial._trial_id, state)
            buffered.write(session.connection())
            self.is_stopped = is_stopped(session, buffered.trial._trial_id)

    @retry_on_outage
    def _end(self, buffered: BufferedTrial, state: TrialState, values: Any) -> None:
        """Write the trial's buffered rows, its values and its final state."""
        ended = buffered.snapshot()
        ended.state, ended.values, ended.datetime_complete = state, values, datetime.now()
        with self._writing(buffered) as session:
            connection = session.connection()
            if not tables.change_state(connection, ended, before=TrialState.RUNNING):
                self.check_trial_is_updatable(ended._trial_id, tables.lock_trial(connection, ended._trial_id))
            buffered.write(connection)
            tables.write_values(connection, ended._trial_id, values or ())
        buffered.trial = ended
        del self._buffered[ended._trial_id]
        self._ended = {ended._trial_id: buffered}

    @contextmanager
    def _writing(self, buffered: BufferedTrial) -> Iterator[Session]:
        """Open a transaction that writes a buffered trial; discard the trial if another worker has failed it."""
        try:
            with _create_scoped_session(self.scoped_session) as session:
                yield session
        except UpdateFinishedTrialError:
            self.release(buffered.trial._trial_id)
            raise
        buffered.clear_rows()


def _retry_of(trial: FrozenTrial, kills: list[int]) -> FrozenTrial:
    """Return a waiting trial with the parameters of a killed or interrupted one, linked to it as in Optuna."""
    attempts = [*trial.user_attrs.get("attempts", []), trial.number]
    system_attrs: dict[str, Any] = {"failed_trial": attempts[0], "retry_history": kills}
    if "fixed_params" in trial.system_attrs:
        system_attrs["fixed_params"] = trial.system_attrs["fixed_params"]
    return optuna.trial.create_trial(
        state=TrialState.WAITING,
        params=trial.params,
        distributions=trial.distributions,
        user_attrs={"attempts": attempts},
        system_attrs=system_attrs,
    )


def storage_of(study: optuna.Study) -> Storage | None:
    """Return the `Storage` of a study, or None if its storage is of another class."""
    storage = getattr(cache_of(study), "_backend", None)
    return storage if isinstance(storage, Storage) else None


def cache_of(study: optuna.Study) -> Any:
    """Return Optuna's cache around the study's storage, which reads only new trials from the database."""
    return study._storage


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

    def open_with(*, creates: bool) -> Storage:
        options: dict[str, Any] = {"heartbeat": heartbeat, "grace": grace, "creates": creates, "reads_only": reads_only}
        try:
            return Storage(parsed, **options)
        except IntegrityError:  # a reader and a creator make Optuna's version table at the same moment
            return Storage(parsed, **options)

    def connect() -> Storage:
        if must_exist:
            return open_with(creates=False)
        check_location(parsed)
        with creation_lock(parsed):
            check_tables(parsed)
            return open_with(creates=True)

    try:
        storage = build_retrier(parsed, patience, heartbeat, giving_up)(connect)
    except (StorageInternalError, SQLAlchemyError) as error:
        if must_exist and "version_info" in describe_cause(parsed, error):
            raise StudyNotFound(f"{show_url(parsed)} contains no study; start one with: hpsearch run STUDY") from error
        raise make_error(parsed, error) from error
    except RuntimeError as error:  # from another version of Optuna
        raise StorageError(f"{show_url(parsed)}: {error}") from error
    except ImportError as error:
        raise UsageError("the PostgreSQL driver is not installed; run: pip install 'hpsearch[postgres]'") from error
    except OSError as error:
        raise StorageError(f"cannot open the database {show_url(parsed)}: {error.strerror}") from error
    storage.patience, storage.giving_up = patience, giving_up
    return storage
