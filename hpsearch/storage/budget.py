"""The budget of a study, counted in the transaction that starts a trial, so that it is exact.

Other transactions that start trials of the study wait for the end of this one.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
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
_TRIALS, _VALUES = _TRIAL.__table__, models.TrialValueModel.__table__
_STUDY: Any = sqlalchemy.bindparam("study_id")
_LOCK_STUDY = sqlalchemy.select(_STUDIES.c.study_id).where(_STUDIES.c.study_id == _STUDY).with_for_update()
_SELECT_STOPPED = (
    sqlalchemy.select(_ATTRIBUTES.c.value_json)
    .join(_TRIAL, _TRIAL.study_id == _ATTRIBUTES.c.study_id)
    .where(_TRIAL.trial_id == sqlalchemy.bindparam("trial_id"), _ATTRIBUTES.c.key == "stopped")
)


def _attribute(key: str) -> Any:
    """The study's attribute, as text."""
    query = sqlalchemy.select(_ATTRIBUTES.c.value_json).where(
        _ATTRIBUTES.c.study_id == _STUDY, _ATTRIBUTES.c.key == key
    )
    return query.scalar_subquery().label(key)


def _count(state: TrialState) -> Any:
    return sqlalchemy.func.count().filter(_TRIALS.c.state == state).label(state.name.lower())


# Trials are never deleted, so the highest number tells how many there are; those that are COMPLETE or PRUNED, which
# become ever more, are not counted.
_UNFINISHED = (TrialState.RUNNING, TrialState.WAITING, TrialState.FAIL)
_N_TRIALS = sqlalchemy.select(sqlalchemy.func.max(_TRIALS.c.number) + 1).where(_TRIALS.c.study_id == _STUDY)
_SELECT_SPENT = sqlalchemy.select(
    *(_attribute("budget"), _attribute("stopped"), _N_TRIALS.scalar_subquery().label("n_trials")),
    *map(_count, _UNFINISHED),
).where(_TRIALS.c.study_id == _STUDY, _TRIALS.c.state.in_(_UNFINISHED))
# What Optuna's tables lack for the queries above and below not to take longer as trials grow.
INDEXES = (
    sqlalchemy.Index("ix_hpsearch_trials_state", _TRIALS.c.study_id, _TRIALS.c.state),
    sqlalchemy.Index("ix_hpsearch_trials_number", _TRIALS.c.study_id, _TRIALS.c.number),
    sqlalchemy.Index("ix_hpsearch_values", _VALUES.c.value),
)


Span = tuple[datetime, datetime]


@dataclass
class SearchTime:
    """When trials of a study ran that have all ended, up to the one with the id `until`: this stays as it is."""

    until: int = 0
    spans: list[Span] = field(default_factory=list)


def admit(session: Session, study_id: int, searched: SearchTime) -> int:
    """The number of the study's trials, if its budget has room for one more that runs; else this raises.

    `BudgetSpent` and `TooManyFailures` are final, and so is `Stopped` until the study is run again; `BudgetInFlight`
    means that running trials may use up the rest, or fail and leave room. `KeyError` is raised where there is no such
    study.
    """
    lock_study(session, study_id)
    spent = _select(session, _SELECT_SPENT, study_id=study_id).one()  # a statement that has not waited for the lock
    budget: dict[str, Any] = json.loads(spent.budget or "{}")
    n_trials = spent.n_trials or 0
    n_finished = n_trials - spent.running - spent.waiting - spent.fail
    if "trials" in budget and n_finished >= budget["trials"]:
        raise BudgetSpent(f"the study has its {budget['trials']} trials; hpsearch extend gives it more")
    if "target" in budget and (best := _best_value(session, study_id, budget["target"])) is not None:
        raise BudgetSpent(f"the best value {best:.4f} reaches the target of {budget['target']}")
    if "minutes" in budget and (minutes := _minutes_searched(session, study_id, searched)) >= budget["minutes"]:
        raise BudgetSpent(f"the study was searched for {minutes:.1f} minutes; raise budget.minutes for more")
    if "failures" in budget and spent.fail >= budget["failures"]:
        failures = _final_failures(session, study_id)
        if len(failures) >= budget["failures"]:
            raise TooManyFailures(
                f"{len(failures)} trials failed, the last one by {failures[-1]}; mend the cause, then raise "
                "budget.failures to go on"
            )
    if json.loads(spent.stopped or "false"):
        raise Stopped
    if "trials" in budget and n_finished + spent.running >= budget["trials"]:
        raise BudgetInFlight
    return int(n_trials)


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


def _best_value(session: Session, study_id: int, target: float) -> float | None:
    """The best value of a complete trial, if it is not below the target."""
    is_complete = sqlalchemy.exists().where(
        _TRIALS.c.trial_id == _VALUES.c.trial_id, _TRIALS.c.study_id == study_id, _TRIALS.c.state == TrialState.COMPLETE
    )
    query = session.query(sqlalchemy.func.max(_VALUES.c.value)).filter(_VALUES.c.value >= target, is_complete)
    best: float | None = query.scalar()
    return best


def seconds_searched(spans: Iterable[tuple[datetime, datetime | None]], now: datetime) -> float:
    """The seconds in which at least one trial ran, of trials that began and ended so or have not ended."""
    merged = _merge((start, complete or now) for start, complete in spans)
    return sum((end - start).total_seconds() for start, end in merged)


def _merge(spans: Iterable[Span]) -> list[Span]:
    """The same time as spans that do not overlap."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            start, end = merged[-1][0], max(merged.pop()[1], end)
        merged.append((start, max(start, end)))
    return merged


def _minutes_searched(session: Session, study_id: int, searched: SearchTime) -> float:
    """The minutes in which at least one trial ran; one that runs has done so until its last heartbeat.

    Trials that ended are read once, and then known by `searched`.
    """
    heartbeats = models.TrialHeartbeatModel
    query = session.query(_TRIALS, heartbeats.heartbeat)
    query = query.outerjoin(heartbeats, heartbeats.trial_id == _TRIALS.c.trial_id).order_by(_TRIALS.c.trial_id)
    states = (*SEARCHING_STATES, TrialState.WAITING)
    rows = query.filter(
        _TRIALS.c.study_id == study_id, _TRIALS.c.state.in_(states), _TRIALS.c.trial_id > searched.until
    ).all()
    now = datetime.now(UTC).replace(tzinfo=None)
    # Heartbeats are in the database's time and time zone.
    database_now = session.execute(sqlalchemy.select(sqlalchemy.func.now())).scalar_one().replace(tzinfo=None)
    spans = [
        (row.datetime_start, row.datetime_complete or now - _age(row.heartbeat, database_now))
        for row in rows
        if row.state != TrialState.WAITING
    ]
    seconds = seconds_searched([*searched.spans, *spans], now)
    n_ended = next((i for i, row in enumerate(rows) if not row.state.is_finished()), len(rows))
    if n_ended:
        searched.until = rows[n_ended - 1].trial_id
        searched.spans = _merge([*searched.spans, *spans[:n_ended]])
    return seconds / 60


def _age(heartbeat: datetime | None, database_now: datetime) -> timedelta:
    return max(database_now - heartbeat, timedelta()) if heartbeat else timedelta()


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
