"""Reads, writes and counts trials in Optuna's tables, in few statements.

Optuna's RDBStorage writes each row in a separate transaction, about 20 per trial, and each waits for the disk. Here a
running trial is a `BufferedTrial` in memory: its reports are buffered and flushed at most every 0.5 s.
"""

import copy
import json
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import sqlalchemy
from optuna.distributions import BaseDistribution, distribution_to_json, json_to_distribution
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Connection
from sqlalchemy.dialects import postgresql, sqlite

WRITE_INTERVAL = 0.5  # minimum seconds between two flushes of reports
_TABLES = ("params", "distributions", "user_attrs", "system_attrs", "intermediate_values")  # of a FrozenTrial
_MAX_VARIABLES = 500  # per statement; SQLite's default limit is higher
TRIALS: Any = models.TrialModel.__table__
VALUES: Any = models.TrialValueModel.__table__
PARAMS: Any = models.TrialParamModel.__table__
REPORTS: Any = models.TrialIntermediateValueModel.__table__
USER_ATTRS: Any = models.TrialUserAttributeModel.__table__
SYSTEM_ATTRS: Any = models.TrialSystemAttributeModel.__table__
HEARTBEATS: Any = models.TrialHeartbeatModel.__table__
_KEYS = {VALUES: "objective", PARAMS: "param_name", REPORTS: "step", USER_ATTRS: "key", SYSTEM_ATTRS: "key"}


class BufferedTrial:
    """A running trial in the memory of its worker, with its unwritten rows."""

    def __init__(self, trial: FrozenTrial) -> None:
        self.trial = trial
        self.rows: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        self.is_due_at, self.written_at = float("inf"), time.monotonic()

    def set_param(self, name: str, internal_value: float, distribution: BaseDistribution) -> None:
        self.trial.params[name] = distribution.to_external_repr(internal_value)
        self.trial.distributions[name] = distribution
        text = distribution_to_json(distribution)
        self._add(PARAMS, 0.0, param_name=name, param_value=internal_value, distribution_json=text)

    def report(self, step: int, value: float) -> None:
        self.trial.intermediate_values[step] = value
        stored, kind = models.TrialIntermediateValueModel.intermediate_value_to_stored_repr(value)
        self._add(REPORTS, WRITE_INTERVAL, step=step, intermediate_value=stored, intermediate_value_type=kind)

    def set_user_attr(self, key: str, value: Any) -> None:
        self.trial.user_attrs[key] = value
        self._add(USER_ATTRS, WRITE_INTERVAL, key=key, value_json=json.dumps(value))

    def set_system_attr(self, key: str, value: Any) -> None:
        self.trial.system_attrs[key] = value
        self._add(SYSTEM_ATTRS, WRITE_INTERVAL, key=key, value_json=json.dumps(value))

    def write(self, connection: Connection) -> None:
        """Write the buffered rows in the connection's transaction; call `clear_rows` after the commit."""
        for table, rows in self.rows.items():
            connection.execute(_upsert(table, connection.dialect.name), rows)

    def clear_rows(self) -> None:
        self.rows.clear()
        self.is_due_at, self.written_at = float("inf"), time.monotonic()

    def snapshot(self) -> FrozenTrial:
        """Return a copy of the trial, which the caller may change."""
        trial = copy.copy(self.trial)
        for name in _TABLES:
            setattr(trial, name, dict(getattr(self.trial, name)))
        return trial

    def _add(self, table: Any, delay: float, **columns: Any) -> None:
        self.rows[table].append({"trial_id": self.trial._trial_id, **columns})
        self.is_due_at = min(self.is_due_at, self.written_at + delay)


def lock_trial(connection: Connection, trial_id: int) -> TrialState:
    """Lock the trial against changes by other transactions, and return its state. Raises `KeyError` if unknown."""
    state: TrialState | None = connection.execute(_SELECT_STATE, {"trial_id": trial_id}).scalar()
    if state is None:
        raise KeyError(f"no trial with id {trial_id}")
    return state


def find_study(connection: Connection, trial_id: int) -> int:
    """Return the id of the trial's study."""
    query = sqlalchemy.select(TRIALS.c.study_id).where(TRIALS.c.trial_id == trial_id)
    study_id: int = connection.execute(query).scalar_one()
    return study_id


def insert_trial(
    connection: Connection, study_id: int, number: int, start: datetime, worker: str | None = None
) -> FrozenTrial:
    """Insert a running trial, with its worker and first heartbeat if given; the study's row must be locked."""
    columns = {"study_id": study_id, "number": number, "state": TrialState.RUNNING, "datetime_start": _to_utc(start)}
    if worker and connection.dialect.name == "postgresql":  # in one statement, because other workers wait for the lock
        trial_id = connection.execute(_insert_assigned(), columns | {"worker": json.dumps(worker)}).scalar_one()
    else:
        result: Any = connection.execute(sqlalchemy.insert(TRIALS), columns)
        trial_id = result.inserted_primary_key[0]
        if worker:
            assign_worker(connection, trial_id, worker)
    trial = _new_trial(trial_id, number, TrialState.RUNNING, start)
    trial.user_attrs |= {"worker": worker} if worker else {}
    return trial


def assign_worker(connection: Connection, trial_id: int, worker: str) -> None:
    """Write the trial's worker and its first heartbeat, so that the trial is never without one."""
    columns = {"trial_id": trial_id, "key": "worker", "value_json": json.dumps(worker)}
    connection.execute(_upsert(USER_ATTRS, connection.dialect.name), columns)
    beat(connection, trial_id)


def change_state(connection: Connection, trial: FrozenTrial, before: TrialState) -> bool:
    """Write the trial's state, start and end if it was in the state `before`; return whether it was."""
    values = {
        "id": trial._trial_id,
        "before": before,
        "after": trial.state,
        "start": _to_utc(trial.datetime_start),
        "complete": _to_utc(trial.datetime_complete),
    }
    return connection.execute(_CHANGE_STATE, values).rowcount == 1


def write_values(connection: Connection, trial_id: int, values: Sequence[float]) -> None:
    """Write the trial's final values."""
    for objective, value in enumerate(values):
        stored, kind = models.TrialValueModel.value_to_stored_repr(value)
        columns = {"trial_id": trial_id, "objective": objective, "value": stored, "value_type": kind}
        connection.execute(_upsert(VALUES, connection.dialect.name), columns)


def beat(connection: Connection, trial_id: int) -> None:
    """Set the trial's heartbeat to the current time."""
    connection.execute(_upsert(HEARTBEATS, connection.dialect.name), {"trial_id": trial_id})


def read_trials(
    connection: Connection,
    *,
    study_id: int | None = None,
    above: int | None = None,
    ids: Collection[int] = (),
    known: Mapping[int, BufferedTrial] = MappingProxyType({}),
) -> list[FrozenTrial]:
    """Read the trials with the `ids` and the trials of the study with ids above `above`, sorted by id.

    A trial in `known` is taken from there if its state is unchanged.
    """
    found: list[Any] = []
    if above is not None:
        found += connection.execute(_SELECT_ABOVE, {"study_id": study_id, "above": above}).all()
    for batch in _batches(sorted(ids)):
        found += connection.execute(_select_among(TRIALS, connection.dialect.name), {"ids": batch}).all()
    found.sort(key=lambda row: row.trial_id)
    trials: dict[int, FrozenTrial] = {}
    to_read: list[int] = []
    for row in found:
        buffered = known.get(row.trial_id)
        if buffered and buffered.trial.state == row.state:
            trials[row.trial_id] = buffered.snapshot()
        else:
            times = _to_local(row.datetime_start), _to_local(row.datetime_complete)
            trials[row.trial_id] = _new_trial(row.trial_id, row.number, row.state, *times)
            to_read.append(row.trial_id)
    for batch in _batches(to_read):
        _read_details(connection, trials, batch)
    return list(trials.values())


def _read_details(connection: Connection, trials: Mapping[int, FrozenTrial], ids: list[int]) -> None:
    def select(table: Any) -> Any:
        return connection.execute(_select_among(table, connection.dialect.name), {"ids": ids})

    for row in select(PARAMS):
        trial, distribution = trials[row.trial_id], _parse_distribution(row.distribution_json)
        trial.distributions[row.param_name] = distribution
        trial.params[row.param_name] = distribution.to_external_repr(row.param_value)
    for row in select(VALUES):
        trial = trials[row.trial_id]
        value = models.TrialValueModel.stored_repr_to_value(row.value, row.value_type)
        trial.values = [*(trial.values or ()), value]
    for row in select(REPORTS):
        trials[row.trial_id].intermediate_values[row.step] = (
            models.TrialIntermediateValueModel.stored_repr_to_intermediate_value(
                row.intermediate_value, row.intermediate_value_type
            )
        )
    for row in select(USER_ATTRS):
        trials[row.trial_id].user_attrs[row.key] = json.loads(row.value_json)
    for row in select(SYSTEM_ATTRS):
        trials[row.trial_id].system_attrs[row.key] = json.loads(row.value_json)


def read_trial(connection: Connection, trial_id: int) -> FrozenTrial:
    """Read the trial with the id. Raises `KeyError` if there is none."""
    for trial in read_trials(connection, ids=[trial_id]):
        return trial
    raise KeyError(f"no trial with id {trial_id}")


def _new_trial(
    trial_id: int, number: int, state: TrialState, start: datetime | None, complete: datetime | None = None
) -> FrozenTrial:
    # value; the two times; params, distributions, user_attrs, system_attrs and intermediate_values
    return FrozenTrial(number, state, None, start, complete, {}, {}, {}, {}, {}, trial_id)


def _batches(ids: list[int]) -> Iterable[list[int]]:
    return (ids[i : i + _MAX_VARIABLES] for i in range(0, len(ids), _MAX_VARIABLES))


_SELECT_STATE = (
    sqlalchemy.select(TRIALS.c.state).where(TRIALS.c.trial_id == sqlalchemy.bindparam("trial_id")).with_for_update()
)
_CHANGE_STATE = (
    sqlalchemy.update(TRIALS)
    .where(TRIALS.c.trial_id == sqlalchemy.bindparam("id"), TRIALS.c.state == sqlalchemy.bindparam("before"))
    .values(
        state=sqlalchemy.bindparam("after"),
        datetime_start=sqlalchemy.bindparam("start"),
        datetime_complete=sqlalchemy.bindparam("complete"),
    )
)
_SELECT_ABOVE = sqlalchemy.select(TRIALS).where(
    TRIALS.c.study_id == sqlalchemy.bindparam("study_id"), TRIALS.c.trial_id > sqlalchemy.bindparam("above")
)


@lru_cache
def _insert_assigned() -> Any:
    names = ("study_id", "number", "state", "datetime_start")
    insert = sqlalchemy.insert(TRIALS).values({name: sqlalchemy.bindparam(name) for name in names})
    trial = insert.returning(TRIALS.c.trial_id).cte("trial")
    worker = sqlalchemy.select(trial.c.trial_id, sqlalchemy.literal("worker"), sqlalchemy.bindparam("worker"))
    attribute = sqlalchemy.insert(USER_ATTRS).from_select(["trial_id", "key", "value_json"], worker)
    now = sqlalchemy.select(trial.c.trial_id, sqlalchemy.func.now())
    heartbeat = sqlalchemy.insert(HEARTBEATS).from_select(["trial_id", "heartbeat"], now)
    return sqlalchemy.select(trial.c.trial_id).add_cte(attribute.cte("attribute"), heartbeat.cte("heartbeat"))


@lru_cache
def _select_among(table: Any, dialect: str) -> Any:
    """Select the table's rows of the trials with the `ids`, in the order of writing."""
    if dialect == "postgresql":  # one parameter, so that SQLAlchemy and psycopg can cache the query
        ids: Any = sqlalchemy.bindparam("ids", type_=postgresql.ARRAY(sqlalchemy.Integer))
        condition = table.c.trial_id == sqlalchemy.any_(ids)
    else:
        condition = table.c.trial_id.in_(sqlalchemy.bindparam("ids", expanding=True))
    return sqlalchemy.select(table).where(condition).order_by(table.primary_key.columns[0])


@lru_cache
def _upsert(table: Any, dialect: str) -> Any:
    insert: Any = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}[dialect](table)
    keys = ["trial_id", *([_KEYS[table]] if table in _KEYS else [])]
    columns = [column.name for column in table.c if not column.primary_key and column.name not in keys]
    return insert.on_conflict_do_update(index_elements=keys, set_={name: insert.excluded[name] for name in columns})


@lru_cache
def _parse_distribution(text: str) -> BaseDistribution:
    return json_to_distribution(text)


def _to_utc(local: datetime | None) -> datetime | None:
    return local and local.astimezone(UTC).replace(tzinfo=None)


def _to_local(utc: datetime | None) -> datetime | None:
    return utc and utc.replace(tzinfo=UTC).astimezone().replace(tzinfo=None)


@dataclass(frozen=True)
class Counts:
    """The number of trials in each state, the running trials, the best completed trial, and the epochs run.

    A retried trial includes the epochs of its earlier attempts, which `n_epochs` counts only once.
    """

    by_state: dict[TrialState, int]
    running: Sequence[FrozenTrial]
    best: FrozenTrial | None
    n_epochs: int
    n_epochs_of_pruned: int


def read_counts(connection: Connection, study_id: int) -> Counts:
    """Count the trials of a study; of equally good trials, the earliest is the best."""
    in_study = TRIALS.c.study_id == study_id
    by_state = sqlalchemy.select(TRIALS.c.state, sqlalchemy.func.count()).where(in_study).group_by(TRIALS.c.state)
    n_trials: dict[TrialState, int] = dict(_rows(connection, by_state))
    is_running = sqlalchemy.select(TRIALS.c.trial_id).where(in_study, TRIALS.c.state == TrialState.RUNNING)
    complete = sqlalchemy.select(TRIALS.c.trial_id).where(in_study, TRIALS.c.state == TrialState.COMPLETE)
    by_value = complete.join(VALUES).order_by(VALUES.c.value.desc().nulls_last(), TRIALS.c.number).limit(1)
    best = connection.execute(by_value).scalar()
    attempts = (
        sqlalchemy.select(USER_ATTRS.c.value_json)
        .join(TRIALS)
        .where(in_study, TRIALS.c.state != TrialState.WAITING, USER_ATTRS.c.key == "attempts")
    )
    superseded = {number for text in connection.execute(attempts).scalars() for number in json.loads(text)}
    steps = sqlalchemy.select(REPORTS.c.trial_id, sqlalchemy.func.max(REPORTS.c.step).label("last"))
    last = steps.join(TRIALS).where(in_study).group_by(REPORTS.c.trial_id).subquery()
    total: Any = sqlalchemy.select(TRIALS.c.state, sqlalchemy.func.sum(last.c.last)).join(last)
    epochs: dict[TrialState, int] = dict(_rows(connection, total.group_by(TRIALS.c.state)))
    n_repeated = 0
    if superseded:
        earlier = sqlalchemy.select(sqlalchemy.func.sum(last.c.last)).join(TRIALS)
        n_repeated = connection.execute(earlier.where(TRIALS.c.number.in_(superseded))).scalar() or 0
    found = read_trials(connection, ids=[*connection.execute(is_running).scalars(), *([best] if best else [])])
    return Counts(
        by_state=n_trials,
        running=[trial for trial in found if trial._trial_id != best],
        best=next((trial for trial in found if trial._trial_id == best), None),
        n_epochs=int(sum(epochs.values()) - n_repeated),
        n_epochs_of_pruned=int(epochs.get(TrialState.PRUNED, 0)),
    )


def _rows(connection: Connection, query: Any) -> Any:
    return connection.execute(query).all()


def count_trials(trials: Sequence[FrozenTrial]) -> Counts:
    """Count trials that are already in memory."""
    n_trials: dict[TrialState, int] = {}
    for trial in trials:
        n_trials[trial.state] = n_trials.get(trial.state, 0) + 1
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    begun = [trial for trial in trials if trial.state != TrialState.WAITING]
    superseded = {number for trial in begun for number in trial.user_attrs.get("attempts", ())}
    return Counts(
        by_state=n_trials,
        running=[trial for trial in trials if trial.state == TrialState.RUNNING],
        best=min(complete, key=lambda trial: (-(trial.value or 0.0), trial.number), default=None),
        n_epochs=sum(trial.last_step or 0 for trial in trials if trial.number not in superseded),
        n_epochs_of_pruned=sum(trial.last_step or 0 for trial in trials if trial.state == TrialState.PRUNED),
    )
