"""Checks the budget of a study in the transaction that starts a trial, so that it is exact.

Other transactions that start trials of the study wait until this one ends.
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

SEARCHING_STATES = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)  # their run time counts as search time
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
    """Select a user attribute of the study, as JSON text."""
    query = sqlalchemy.select(_ATTRIBUTES.c.value_json).where(
        _ATTRIBUTES.c.study_id == _STUDY, _ATTRIBUTES.c.key == key
    )
    return query.scalar_subquery().label(key)


def _count(state: TrialState) -> Any:
    return sqlalchemy.func.count().filter(_TRIALS.c.state == state).label(state.name.lower())


# Trials are never deleted, so the highest number gives their total. COMPLETE and PRUNED trials, whose number keeps
# growing, are not counted but derived from it.
_UNFINISHED = (TrialState.RUNNING, TrialState.WAITING, TrialState.FAIL)
_N_TRIALS = sqlalchemy.select(sqlalchemy.func.max(_TRIALS.c.number) + 1).where(_TRIALS.c.study_id == _STUDY)
_SELECT_SPENT = sqlalchemy.select(
    *(_attribute("budget"), _attribute("stopped"), _N_TRIALS.scalar_subquery().label("n_trials")),
    *map(_count, _UNFINISHED),
).where(_TRIALS.c.study_id == _STUDY, _TRIALS.c.state.in_(_UNFINISHED))
# Indexes that Optuna's tables lack; without them these queries slow down as trials accumulate.
INDEXES = (
    sqlalchemy.Index("ix_hpsearch_trials_state", _TRIALS.c.study_id, _TRIALS.c.state),
    sqlalchemy.Index("ix_hpsearch_trials_number", _TRIALS.c.study_id, _TRIALS.c.number),
    sqlalchemy.Index("ix_hpsearch_values", _VALUES.c.value),
)


Span = tuple[datetime, datetime]


@dataclass
class SearchTime:
    """The time spans of the trials up to the id `until`, which have all ended, so that the spans are final."""

    until: int = 0
    spans: list[Span] = field(default_factory=list)


def admit(session: Session, study_id: int, searched: SearchTime) -> int:
    """Return the number of trials of the study if the budget allows another trial to run.

    Otherwise raises `BudgetSpent` or `TooManyFailures`, which are final; `Stopped`, final until the study is run again;
    or `BudgetInFlight` if running trials may use up the rest of the budget. Raises `KeyError` for an unknown study.
    """
    lock_study(session, study_id)
    spent = _select(session, _SELECT_SPENT, study_id=study_id).one()  # a new statement sees the latest commits
    budget: dict[str, Any] = json.loads(spent.budget or "{}")
    n_trials = spent.n_trials or 0
    n_finished = n_trials - spent.running - spent.waiting - spent.fail
    if "trials" in budget and n_finished >= budget["trials"]:
        limit = budget["trials"]
        raise BudgetSpent(f"all {limit} trials are finished; add more with: hpsearch extend STUDY --trials N")
    if "target" in budget and (best := _best_value(session, study_id, budget["target"])) is not None:
        raise BudgetSpent(f"target reached: best value {best:.4f} >= {budget['target']}")
    if "minutes" in budget and (minutes := _minutes_searched(session, study_id, searched)) >= budget["minutes"]:
        raise BudgetSpent(f"time limit reached ({minutes:.1f} min); raise budget.minutes to continue")
    if "failures" in budget and spent.fail >= budget["failures"]:
        failures = _final_failures(session, study_id)
        if len(failures) >= budget["failures"]:
            raise TooManyFailures(
                f"{len(failures)} trials failed, most recently: {failures[-1]}; fix the cause, then raise "
                "budget.failures to continue"
            )
    if json.loads(spent.stopped or "false"):
        raise Stopped
    if "trials" in budget and n_finished + spent.running >= budget["trials"]:
        raise BudgetInFlight
    return int(n_trials)


def lock_study(session: Session, study_id: int) -> None:
    """Lock the study, so that no other transaction starts trials of it; call this before locking a trial.

    Raises `KeyError` if there is no such study.
    """
    if session.connection().execute(_LOCK_STUDY, {"study_id": study_id}).scalar() is None:
        raise KeyError(f"no study with id {study_id}")


def is_stopped(session: Session, trial_id: int) -> bool:
    """Return whether the user has stopped the trial's study."""
    return bool(json.loads(_select(session, _SELECT_STOPPED, trial_id=trial_id).scalar() or "false"))


def _select(session: Session, query: Any, **parameters: int) -> Any:
    return session.connection().execute(query, parameters)


def _best_value(session: Session, study_id: int, target: float) -> float | None:
    """Return the best value of the completed trials if it reaches the target, else None."""
    is_complete = sqlalchemy.exists().where(
        _TRIALS.c.trial_id == _VALUES.c.trial_id, _TRIALS.c.study_id == study_id, _TRIALS.c.state == TrialState.COMPLETE
    )
    query = session.query(sqlalchemy.func.max(_VALUES.c.value)).filter(_VALUES.c.value >= target, is_complete)
    best: float | None = query.scalar()
    return best


def seconds_searched(spans: Iterable[tuple[datetime, datetime | None]], now: datetime) -> float:
    """Return the seconds in which at least one trial ran; `spans` are their starts and ends, None if still running."""
    merged = _merge((start, complete or now) for start, complete in spans)
    return sum((end - start).total_seconds() for start, end in merged)


def _merge(spans: Iterable[Span]) -> list[Span]:
    """Merge overlapping spans, so that the result has none."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            start, end = merged[-1][0], max(merged.pop()[1], end)
        merged.append((start, max(start, end)))
    return merged


def _minutes_searched(session: Session, study_id: int, searched: SearchTime) -> float:
    """Return the minutes in which at least one trial ran; a running trial counts until its last heartbeat.

    Ended trials are read once, and then cached in `searched`.
    """
    heartbeats = models.TrialHeartbeatModel
    query = session.query(_TRIALS, heartbeats.heartbeat)
    query = query.outerjoin(heartbeats, heartbeats.trial_id == _TRIALS.c.trial_id).order_by(_TRIALS.c.trial_id)
    states = (*SEARCHING_STATES, TrialState.WAITING)
    rows = query.filter(
        _TRIALS.c.study_id == study_id, _TRIALS.c.state.in_(states), _TRIALS.c.trial_id > searched.until
    ).all()
    now = datetime.now(UTC).replace(tzinfo=None)
    # Heartbeats use the database's clock and time zone.
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
    """Return one line `kind: message` for each failed trial that was not retried, in the order of trials."""
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
