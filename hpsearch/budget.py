"""The budget of a study, counted in the transaction that starts a trial, so that it is exact.

Other transactions that start trials of the study wait for the end of this one.
"""

import json
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from operator import itemgetter
from typing import Any

import sqlalchemy
from optuna.storages._rdb import models
from optuna.trial import TrialState
from sqlalchemy.orm import Session

from hpsearch.errors import BudgetInFlight, BudgetSpent, Stopped, TooManyFailures

SEARCHING_STATES = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)  # not those that failed, nor pauses
_TRIAL: Any = models.TrialModel
_STUDIES: Any = models.StudyModel.__table__
_ATTRIBUTES: Any = models.StudyUserAttributeModel.__table__
_LOCK_STUDY = (
    sqlalchemy.select(_STUDIES.c.study_id)
    .where(_STUDIES.c.study_id == sqlalchemy.bindparam("study_id"))
    .with_for_update()
)
_SELECT_LIMITS = sqlalchemy.select(_ATTRIBUTES.c.key, _ATTRIBUTES.c.value_json).where(
    _ATTRIBUTES.c.study_id == sqlalchemy.bindparam("study_id"), _ATTRIBUTES.c.key.in_(("budget", "stopped"))
)
_SELECT_STOPPED = (
    sqlalchemy.select(_ATTRIBUTES.c.value_json)
    .join(_TRIAL, _TRIAL.study_id == _ATTRIBUTES.c.study_id)
    .where(_TRIAL.trial_id == sqlalchemy.bindparam("trial_id"), _ATTRIBUTES.c.key == "stopped")
)
_COUNT_TRIALS = (
    sqlalchemy.select(_TRIAL.state, sqlalchemy.func.count())
    .where(_TRIAL.study_id == sqlalchemy.bindparam("study_id"))
    .group_by(_TRIAL.state)
)


def admit(session: Session, study_id: int) -> int:
    """The number of the study's trials, if its budget has room for one more that runs; else this raises.

    `BudgetSpent` and `TooManyFailures` are final, and so is `Stopped` until the study is run again; `BudgetInFlight`
    means that running trials may use up the rest, or fail and leave room. `KeyError` is raised where there is no such
    study.
    """
    lock_study(session, study_id)
    # In a statement that has not waited for the lock.
    limits = {row.key: json.loads(row.value_json) for row in _select(session, _SELECT_LIMITS, study_id=study_id)}
    budget: dict[str, Any] = limits.get("budget", {})
    counts: dict[TrialState, int] = dict(_select(session, _COUNT_TRIALS, study_id=study_id).all())
    n_finished = counts.get(TrialState.COMPLETE, 0) + counts.get(TrialState.PRUNED, 0)
    if "trials" in budget and n_finished >= budget["trials"]:
        raise BudgetSpent(f"the study has its {budget['trials']} trials; hpsearch extend gives it more")
    if "target" in budget and (best := _best_value(session, study_id)) >= budget["target"]:
        raise BudgetSpent(f"the best value {best:.4f} reaches the target of {budget['target']}")
    if "minutes" in budget and (spent := _minutes_searched(session, study_id)) >= budget["minutes"]:
        raise BudgetSpent(f"the study was searched for {spent:.1f} minutes; raise budget.minutes for more")
    if "failures" in budget and counts.get(TrialState.FAIL, 0) >= budget["failures"]:
        failures = _final_failures(session, study_id)
        if len(failures) >= budget["failures"]:
            raise TooManyFailures(
                f"{len(failures)} trials failed, the last one by {failures[-1]}; mend the cause, then raise "
                "budget.failures to go on"
            )
    if limits.get("stopped"):
        raise Stopped
    if "trials" in budget and n_finished + counts.get(TrialState.RUNNING, 0) >= budget["trials"]:
        raise BudgetInFlight
    return sum(counts.values())


def lock_study(session: Session, study_id: int) -> None:
    """Keep other transactions from starting trials of the study; taken before the lock on a trial.

    Raises `KeyError` where there is no such study.
    """
    if session.connection().execute(_LOCK_STUDY, {"study_id": study_id}).scalar() is None:
        raise KeyError(f"no study with id {study_id}")


def is_stopped(session: Session, trial_id: int) -> bool:
    """Whether the trial's study is to stop."""
    return bool(json.loads(_select(session, _SELECT_STOPPED, trial_id=trial_id).scalar() or "false"))


def _select(session: Session, query: Any, **parameters: int) -> Any:
    return session.connection().execute(query, parameters)


def _best_value(session: Session, study_id: int) -> float:
    query = session.query(sqlalchemy.func.max(models.TrialValueModel.value)).join(_TRIAL)
    best = query.filter(_TRIAL.study_id == study_id, _TRIAL.state == TrialState.COMPLETE).scalar()
    return float("-inf") if best is None else float(best)


def seconds_searched(spans: Iterable[tuple[datetime, datetime | None]], now: datetime) -> float:
    """The seconds in which at least one trial ran, of trials that began and ended so or have not ended."""
    total, end = timedelta(), datetime.min
    for start, complete in sorted(spans, key=itemgetter(0)):
        finish = complete or now
        total += max(finish - max(start, end), timedelta())
        end = max(end, finish)
    return total.total_seconds()


def _minutes_searched(session: Session, study_id: int) -> float:
    """The minutes in which at least one trial ran; one that runs has done so until its last heartbeat."""
    columns = _TRIAL.__table__.c
    query = session.query(columns.datetime_start, columns.datetime_complete, models.TrialHeartbeatModel.heartbeat)
    rows = query.outerjoin(models.TrialHeartbeatModel, models.TrialHeartbeatModel.trial_id == columns.trial_id)
    rows = rows.filter(_TRIAL.study_id == study_id, _TRIAL.state.in_(SEARCHING_STATES))
    now = datetime.now(UTC).replace(tzinfo=None)
    # Heartbeats are in the database's time and time zone.
    database_now = session.execute(sqlalchemy.select(sqlalchemy.func.now())).scalar_one().replace(tzinfo=None)
    spans = [
        (start, complete or (now - max(database_now - heartbeat, timedelta()) if heartbeat else now))
        for start, complete, heartbeat in rows
    ]
    return seconds_searched(spans, now) / 60


def _final_failures(session: Session, study_id: int) -> list[str]:
    """`kind: message`, on one line, of each failed trial that was not queued again, in the order of the trials."""
    attribute: Any = models.TrialUserAttributeModel
    rows = (
        session.query(attribute.value_json)
        .select_from(_TRIAL)
        .outerjoin(attribute, (attribute.trial_id == _TRIAL.trial_id) & (attribute.key == "failure"))
        .filter(_TRIAL.study_id == study_id, _TRIAL.state == TrialState.FAIL)
        .order_by(_TRIAL.trial_id)
    )
    failures = [json.loads(text) if text else {"kind": "unknown", "message": ""} for (text,) in rows]
    lines = [f"{failure['kind']}: {failure['message']}" for failure in failures if not failure.get("retried")]
    return [" ".join(line.split()) for line in lines]
