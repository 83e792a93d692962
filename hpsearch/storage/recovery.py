"""Optuna's RDBStorage made to outlast outages, and the ends of workers.

Its calls are repeated while the database does not answer; a trial whose worker is gone fails and is queued again in
one transaction.
"""

import threading
import time
import warnings
from collections.abc import Callable
from datetime import datetime
from functools import wraps
from typing import Any

import optuna
import sqlalchemy
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.storages._rdb.storage import _create_scoped_session
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from hpsearch.storage import postgresql
from hpsearch.storage.budget import INDEXES
from hpsearch.storage.engine import connect_arguments, failure, harden, is_transient, retrying

_TRIAL: Any = models.TrialModel


def patiently(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, repeated with growing pauses while the database is locked, full or cannot be reached."""

    @wraps(method)
    def call(self: "RecoveringStorage", *args: Any, **kwargs: Any) -> Any:
        url, start = self.engine.url, time.monotonic()
        try:
            try:
                answer = method(self, *args, **kwargs)
            except (StorageInternalError, SQLAlchemyError) as error:
                patience = self.patience - (time.monotonic() - start)
                if not is_transient(error) or patience <= 0 or self.giving_up.is_set():
                    raise
                again = retrying(url, patience, self.heartbeat_interval or 1, self.giving_up)
                answer = again(method, self, *args, **kwargs)
        except (StorageInternalError, SQLAlchemyError) as error:
            raise failure(url, error) from error
        self._note_answer()
        return answer

    return call


class RecoveringStorage(RDBStorage):
    """RDBStorage whose calls are repeated for `patience` seconds, or until `giving_up` is set.

    Then they raise `StorageUnavailable`.
    """

    def __init__(self, url: URL, *, heartbeat: int, grace: int, creates: bool, reads_only: bool = False) -> None:
        self.patience = 0.0
        self.giving_up = threading.Event()
        self._last_answer = time.time()
        self.trusts_heartbeats_from = 0.0  # seconds since 1970
        # Optuna formats the URL as a template, so braces in a password would break it.
        template = url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")
        arguments = connect_arguments(url)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # of the heartbeat
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
            versions.check_table_schema_compatibility()  # on two connections at once
        for index in INDEXES if creates else ():
            index.create(self.engine, checkfirst=True)  # of tables that were created before there were these
        # To create tables Optuna needs two connections at once; from now on one will do.
        is_sqlite = url.get_backend_name() == "sqlite"
        options = {} if is_sqlite else postgresql.pool_options(reads_only=reads_only)
        self.engine = sqlalchemy.create_engine(url, connect_args=arguments, **options)
        self.scoped_session.remove()
        self.scoped_session.configure(bind=self.engine)
        harden(self.engine, converts=creates, reads_only=reads_only)

    def __getstate__(self) -> dict[Any, Any]:
        raise TypeError("a storage cannot be pickled; open it again in the other process")

    def join(self, study_id: int) -> int:
        """How many workers joined the study before this one; no two get the same number."""
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
        """Whether the trial was running and has failed now, with the reason in its user attribute `failure`.

        In the same transaction a trial of the kind "interrupted", or of the kind "killed" that was killed at most
        `retries` times, is queued again with the parameters it has.
        """
        with _create_scoped_session(self.scoped_session) as session:
            study_id = _TRIAL.find_or_raise_by_id(trial_id, session).study_id
            # The lock on the study keeps trial numbers apart; it is always taken before that on a trial.
            models.StudyModel.find_or_raise_by_id(study_id, session, for_update=True)
            trial: Any = _TRIAL.find_or_raise_by_id(trial_id, session, for_update=True)
            session.refresh(trial)
            if trial.state != TrialState.RUNNING:
                return False
            self._write_held(trial_id, session)
            frozen = self._build_frozen_trial_from_trial_model(trial)
            kills = [*frozen.system_attrs.get("retry_history", []), *([frozen.number] if kind == "killed" else [])]
            is_retried = kind == "interrupted" or (kind == "killed" and len(kills) <= retries)
            failure = {"kind": kind, "message": message, "retried": is_retried}
            self._set_user_attr(session, trial_id, "failure", failure)
            trial.state = TrialState.FAIL
            trial.datetime_complete = datetime.now()
            if is_retried:
                # Else ASHA and Hyperband would count one training twice.
                rungs = models.TrialSystemAttributeModel.key.startswith("completed_rung_")
                session.query(models.TrialSystemAttributeModel).filter_by(trial_id=trial_id).filter(rungs).delete(False)
                self._get_prepared_new_trial(study_id, _retry_of(frozen, kills), session)
            return True

    def insist(self, seconds: float) -> None:
        """From now on wait so long for the storage, whoever gives up: trials are handed back."""
        self.patience, self.giving_up = seconds, threading.Event()

    def reap(self, study_id: int, retries: int) -> list[int]:
        """The ids of running trials that were without a heartbeat for longer than the grace period, now failed.

        None after an outage: where the storage did not answer this worker, or the machine slept, the others could not
        beat either, and get a grace period for it.
        """
        message = f"no heartbeat for {self.grace_period} s"
        stale = self._get_stale_trial_ids(study_id)
        if time.time() < self.trusts_heartbeats_from:
            return []
        return [trial_id for trial_id in stale if self.fail(trial_id, "killed", message, retries=retries)]

    def _note_answer(self) -> None:
        """Be wary of heartbeats for a while if this answer came after a long silence (in wall-clock time)."""
        now, interval, grace = time.time(), self.heartbeat_interval or 0, self.grace_period or 0
        if now - self._last_answer > max(1.5 * interval, (grace - interval) / 2):
            self.trusts_heartbeats_from = now + grace
        self._last_answer = now

    def _write_held(self, trial_id: int, session: Session) -> None:
        """Write what this process knows of the trial and has not written yet."""

    def _set_user_attr(self, session: Session, trial_id: int, key: str, value: Any) -> None:
        self._set_trial_attr_without_commit(session, models.TrialUserAttributeModel, trial_id, key, value)

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        self._adopt_orphans(study_id)
        return super()._get_stale_trial_ids(study_id)

    def find_stuck(self, study_id: int) -> list[int]:
        """The ids of running trials that are stale or have no heartbeat at all; nothing is changed."""
        with _create_scoped_session(self.scoped_session) as session:
            orphans = self._find_orphans(study_id, session)
        return [*super()._get_stale_trial_ids(study_id), *orphans]

    def _adopt_orphans(self, study_id: int) -> None:
        """Give running trials without a heartbeat one, so that they become stale a grace period from now."""
        with _create_scoped_session(self.scoped_session, ignore_integrity_error=True) as session:
            orphans = self._find_orphans(study_id, session)
            session.add_all([models.TrialHeartbeatModel(trial_id=trial_id) for trial_id in orphans])

    def _find_orphans(self, study_id: int, session: Session) -> list[int]:
        query = session.query(_TRIAL.trial_id).filter(
            _TRIAL.study_id == study_id, _TRIAL.state == TrialState.RUNNING, ~_TRIAL.heartbeats.any()
        )
        return [trial_id for (trial_id,) in query]


for _name in (
    *("create_new_study", "delete_study", "get_all_studies", "get_study_id_from_name", "get_study_name_from_id"),
    *("get_study_directions", "get_study_user_attrs", "get_study_system_attrs", "set_study_user_attr"),
    *("set_study_system_attr", "_create_new_trial", "_set_trial_param", "set_trial_state_values"),
    *("set_trial_intermediate_value", "set_trial_user_attr", "set_trial_system_attr"),
    *("_get_best_trial_id", "_get_stale_trial_ids", "find_stuck", "record_heartbeat", "join", "fail"),
):
    setattr(RecoveringStorage, _name, patiently(getattr(RecoveringStorage, _name)))


def _retry_of(trial: FrozenTrial, kills: list[int]) -> FrozenTrial:
    """A waiting trial with the parameters of one that was killed or interrupted, linked to it the way Optuna does."""
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
