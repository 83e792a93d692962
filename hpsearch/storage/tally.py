"""What `status` says of a study, counted by the database: reading ten thousand trials for it would take a second."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Connection

from hpsearch.storage.tables import REPORTS, TRIALS, USER_ATTRS, VALUES, read_trials


@dataclass(frozen=True)
class Tally:
    """How many trials are in each state, those that run, the best complete one, and the epochs run.

    A retried trial has the epochs of its earlier attempts, so `n_epochs` does not count those again.
    """

    counts: dict[TrialState, int]
    running: Sequence[FrozenTrial]
    best: FrozenTrial | None
    n_epochs: int
    n_epochs_of_pruned: int


def read_tally(connection: Connection, study_id: int) -> Tally:
    """The tally of a study at this moment; the best of equal trials is the earliest."""
    mine = TRIALS.c.study_id == study_id
    by_state = sqlalchemy.select(TRIALS.c.state, sqlalchemy.func.count()).where(mine).group_by(TRIALS.c.state)
    counts: dict[TrialState, int] = dict(_rows(connection, by_state))
    is_running = sqlalchemy.select(TRIALS.c.trial_id).where(mine, TRIALS.c.state == TrialState.RUNNING)
    complete = sqlalchemy.select(TRIALS.c.trial_id).where(mine, TRIALS.c.state == TrialState.COMPLETE)
    by_value = complete.join(VALUES).order_by(VALUES.c.value.desc().nulls_last(), TRIALS.c.number).limit(1)
    best = connection.execute(by_value).scalar()
    attempts = (
        sqlalchemy.select(USER_ATTRS.c.value_json)
        .join(TRIALS)
        .where(mine, TRIALS.c.state != TrialState.WAITING, USER_ATTRS.c.key == "attempts")
    )
    superseded = {number for text in connection.execute(attempts).scalars() for number in json.loads(text)}
    steps = sqlalchemy.select(REPORTS.c.trial_id, sqlalchemy.func.max(REPORTS.c.step).label("last"))
    last = steps.join(TRIALS).where(mine).group_by(REPORTS.c.trial_id).subquery()
    total: Any = sqlalchemy.select(TRIALS.c.state, sqlalchemy.func.sum(last.c.last)).join(last)
    epochs: dict[TrialState, int] = dict(_rows(connection, total.group_by(TRIALS.c.state)))
    twice = 0
    if superseded:
        again = sqlalchemy.select(sqlalchemy.func.sum(last.c.last)).join(TRIALS).where(TRIALS.c.number.in_(superseded))
        twice = connection.execute(again).scalar() or 0
    found = read_trials(connection, ids=[*connection.execute(is_running).scalars(), *([best] if best else [])])
    return Tally(
        counts=counts,
        running=[trial for trial in found if trial._trial_id != best],
        best=next((trial for trial in found if trial._trial_id == best), None),
        n_epochs=int(sum(epochs.values()) - twice),
        n_epochs_of_pruned=int(epochs.get(TrialState.PRUNED, 0)),
    )


def _rows(connection: Connection, query: Any) -> Any:
    return connection.execute(query).all()


def count_trials(trials: Sequence[FrozenTrial]) -> Tally:
    """The tally of trials that were read already."""
    counts: dict[TrialState, int] = {}
    for trial in trials:
        counts[trial.state] = counts.get(trial.state, 0) + 1
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    begun = [trial for trial in trials if trial.state != TrialState.WAITING]
    superseded = {number for trial in begun for number in trial.user_attrs.get("attempts", ())}
    return Tally(
        counts=counts,
        running=[trial for trial in trials if trial.state == TrialState.RUNNING],
        best=min(complete, key=lambda trial: (-(trial.value or 0.0), trial.number), default=None),
        n_epochs=sum(trial.last_step or 0 for trial in trials if trial.number not in superseded),
        n_epochs_of_pruned=sum(trial.last_step or 0 for trial in trials if trial.state == TrialState.PRUNED),
    )
