"""The SQL statements on studies and trials, and the buffered trial whose rows they write.

Optuna's RDBStorage writes each row in a separate transaction, about 20 per trial, and each waits for the disk. Here a
running trial is a `BufferedTrial` in memory: its reports are buffered and flushed at most every 0.5 s. The functions
take the connection of an open transaction.
"""

import copy
import json
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import sqlalchemy
from optuna import distributions
from optuna.distributions import BaseDistribution
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Connection
from sqlalchemy.dialects import postgresql, sqlite

from hpsearch.config.space import Suggests

WRITE_INTERVAL = 0.5  # minimum seconds between two flushes of reports
_MAX_SILENCE = 5.0  # seconds after which a trial without a note of the time was not running
_TABLES = ("params", "distributions", "user_attrs", "system_attrs", "intermediate_values")  # of a FrozenTrial
_MAX_VARIABLES = 500  # per statement; SQLite's default limit is higher
STUDIES: Any = models.StudyModel.__table__
STUDY_ATTRS: Any = models.StudyUserAttributeModel.__table__
TRIALS: Any = models.TrialModel.__table__
VALUES: Any = models.TrialValueModel.__table__
PARAMS: Any = models.TrialParamModel.__table__
REPORTS: Any = models.TrialIntermediateValueModel.__table__
USER_ATTRS: Any = models.TrialUserAttributeModel.__table__
SYSTEM_ATTRS: Any = models.TrialSystemAttributeModel.__table__
HEARTBEATS: Any = models.TrialHeartbeatModel.__table__
# Indexes that Optuna's tables lack; without them the queries of each trial slow down as trials accumulate.
INDEXES = (
    sqlalchemy.Index("ix_hpsearch_trials_state", TRIALS.c.study_id, TRIALS.c.state),
    sqlalchemy.Index("ix_hpsearch_trials_number", TRIALS.c.study_id, TRIALS.c.number),
    sqlalchemy.Index("ix_hpsearch_values", VALUES.c.value),
)


class BufferedTrial:
    """A running trial in the memory of its worker, with its unwritten rows.

    `attempt` is the worker's fencing token: the trial is lost as soon as its row is of a later attempt.
    """

    def __init__(self, trial: FrozenTrial) -> None:
        self.trial, self.attempt = trial, count_interruptions(trial)
        self.seen_at = time.time()
        self.rows: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        self.is_due_at, self.written_at = float("inf"), time.monotonic()

    def set_param(
        self, name: str, internal_value: float, distribution: BaseDistribution, previous: BaseDistribution | None = None
    ) -> None:
        if previous is not None:
            distributions.check_distribution_compatibility(previous, distribution)
        self.trial.params[name] = distribution.to_external_repr(internal_value)
        self.trial.distributions[name] = distribution
        text = distributions.distribution_to_json(distribution)
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

    def note_time(self) -> None:
        """Note that the trial is running, as its worker does every second.

        If the last note is not about a second old, the machine was asleep, the process was stopped or the clock was
        set. The time in between becomes a pause: its start and end in the user attribute `pauses`.
        """
        before, self.seen_at = self.seen_at, time.time()
        if abs(self.seen_at - before) > _MAX_SILENCE:
            pause = [datetime.fromtimestamp(seconds, UTC).isoformat() for seconds in (before, self.seen_at)]
            self.trial.user_attrs["pauses"] = [*self.trial.user_attrs.get("pauses", ()), pause]

    def write_pauses(self, connection: Connection) -> None:
        """Write the pauses in the connection's transaction."""
        if pauses := self.trial.user_attrs.get("pauses"):
            write_user_attr(connection, self.trial, "pauses", pauses)

    def write(self, connection: Connection) -> None:
        """Write the buffered rows in the connection's transaction; call `clear_rows` after the commit."""
        self.write_pauses(connection)
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


def count_interruptions(trial: Suggests) -> int:
    """Return how many attempts at the trial ended early; the current attempt has this number, from 0."""
    return len(trial.user_attrs.get("interruptions", ()))


def rank(value: float | None, number: int) -> tuple[float, int]:
    """Sort key of a trial: the best value first, and the earlier trial of equals."""
    return -(value or 0.0), number


def by_value(trial: FrozenTrial) -> tuple[float, int]:
    """Sort key: see `rank`."""
    return rank(trial.value, trial.number)


def lock_study(connection: Connection, study_id: int) -> None:
    """Make other transactions that start trials of the study wait. Raises `KeyError` if there is no such study.

    It is always locked before a trial.
    """
    if connection.execute(_LOCK_STUDY, {"study_id": study_id}).scalar() is None:
        raise KeyError(f"no study with id {study_id}")


def read_study_attrs(connection: Connection, study_id: int) -> dict[str, Any]:
    """Return the user attributes of a study."""
    rows = connection.execute(sqlalchemy.select(STUDY_ATTRS).where(STUDY_ATTRS.c.study_id == study_id))
    return {row.key: json.loads(row.value_json) for row in rows}


def write_study_attr(connection: Connection, study_id: int, key: str, value: Any) -> None:
    """Write a user attribute of a study."""
    columns = {"study_id": study_id, "key": key, "value_json": json.dumps(value)}
    connection.execute(_upsert(STUDY_ATTRS, connection.dialect.name), columns)


def lock_trial(connection: Connection, trial_id: int) -> tuple[TrialState, int, bool]:
    """Lock a trial; return its state, its attempt, and whether its study is stopped. Raises `KeyError` if unknown.

    The attempt needs a statement of its own: PostgreSQL does not read other rows again when it has waited for a lock.
    """
    state: TrialState | None = connection.execute(_LOCK_TRIAL, {"id": trial_id}).scalar()
    if state is None:
        raise KeyError(f"no trial with id {trial_id}")
    row = connection.execute(_SELECT_ATTEMPT, {"id": trial_id}).one()
    return state, len(json.loads(row.interruptions or "[]")), json.loads(row.stopped or "false")


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
        trial = _new_trial(trial_id, number, TrialState.RUNNING, start)
        trial.user_attrs["worker"] = worker
        return trial
    result: Any = connection.execute(sqlalchemy.insert(TRIALS), columns)
    [trial_id] = result.inserted_primary_key
    trial = _new_trial(trial_id, number, TrialState.RUNNING, start)
    if worker:
        assign_worker(connection, trial, worker)
    return trial


def assign_worker(connection: Connection, trial: FrozenTrial, worker: str) -> None:
    """Write the trial's worker and its first heartbeat, so that the trial is never without one."""
    write_user_attr(connection, trial, "worker", worker)
    beat(connection, trial._trial_id)


def requeue(connection: Connection, trial: FrozenTrial, kind: str, message: str, end: datetime) -> None:
    """Let a trial wait for another attempt, with what ended this one at its user attribute `interruptions`.

    Its worker and heartbeat are deleted, so that whoever claims it next is not taken for that worker. Its pauses move
    into the reason.
    """
    reason = {"kind": kind, "message": message, "epoch": trial.last_step or 0}
    reason |= {"worker": trial.user_attrs.pop("worker", "unknown"), "ended": end.astimezone(UTC).isoformat()}
    reason |= {"started": (trial.datetime_start or end).astimezone(UTC).isoformat()}
    if pauses := trial.user_attrs.pop("pauses", None):
        reason["pauses"] = pauses
    write_user_attr(connection, trial, "interruptions", [*trial.user_attrs.get("interruptions", ()), reason])
    connection.execute(sqlalchemy.delete(HEARTBEATS).where(HEARTBEATS.c.trial_id == trial._trial_id))
    is_of_attempt = (USER_ATTRS.c.trial_id == trial._trial_id) & USER_ATTRS.c.key.in_(("worker", "pauses"))
    connection.execute(sqlalchemy.delete(USER_ATTRS).where(is_of_attempt))
    trial.state, trial.datetime_start = TrialState.WAITING, None
    write_state(connection, trial)


def write_state(connection: Connection, trial: FrozenTrial) -> None:
    """Write the state, start and end of a trial, which must be locked."""
    values = {"state": trial.state, "datetime_start": _to_utc(trial.datetime_start)}
    values["datetime_complete"] = _to_utc(trial.datetime_complete)
    connection.execute(sqlalchemy.update(TRIALS).where(TRIALS.c.trial_id == trial._trial_id).values(values))


def write_user_attr(connection: Connection, trial: FrozenTrial, key: str, value: Any) -> None:
    """Write a user attribute of a trial."""
    columns = {"trial_id": trial._trial_id, "key": key, "value_json": json.dumps(value)}
    connection.execute(_upsert(USER_ATTRS, connection.dialect.name), columns)
    trial.user_attrs[key] = value


def write_values(connection: Connection, trial_id: int, values: Sequence[float]) -> None:
    """Write the trial's final values."""
    for objective, value in enumerate(values):
        stored, kind = models.TrialValueModel.value_to_stored_repr(value)
        columns = {"trial_id": trial_id, "objective": objective, "value": stored, "value_type": kind}
        connection.execute(_upsert(VALUES, connection.dialect.name), columns)


def beat(connection: Connection, trial_id: int) -> None:
    """Set the trial's heartbeat to the current time."""
    connection.execute(_upsert(HEARTBEATS, connection.dialect.name), {"trial_id": trial_id})


def adopt(connection: Connection, trial_id: int, age: timedelta | None) -> None:
    """Give a running trial a heartbeat in place of none, or of one in the future, whose negative age is given.

    The clock was set back since such a heartbeat, so on SQLite, whose clock is the machine's, the time in between is a
    pause. The clock of a PostgreSQL server says nothing about when the trial ran.
    """
    if age is not None and connection.dialect.name == "sqlite":
        now, trial = datetime.now(UTC), read_trial(connection, trial_id)
        pauses = [*trial.user_attrs.get("pauses", ()), [(now - age).isoformat(), now.isoformat()]]
        write_user_attr(connection, trial, "pauses", pauses)
    beat(connection, trial_id)


def read_clock(connection: Connection) -> datetime:
    """Return the database's time, in UTC: SQLite's without a time zone, PostgreSQL's with one."""
    now: datetime = connection.execute(sqlalchemy.select(sqlalchemy.func.now())).scalar_one()
    return now


def read_running(connection: Connection, study_id: int) -> list[tuple[int, int, timedelta | None]]:
    """Return the id, attempt, and age of the heartbeat of each running trial; the age is None if it has none.

    An age is negative if the clock was set back since.
    """
    query = _WITH_HEARTBEATS.where(TRIALS.c.study_id == study_id, TRIALS.c.state == TrialState.RUNNING)
    rows = connection.execute(query.order_by(TRIALS.c.trial_id)).all()
    now = read_clock(connection).replace(tzinfo=None)
    return [
        (row.trial_id, len(json.loads(row.interruptions or "[]")), row.heartbeat and now - row.heartbeat)
        for row in rows
    ]


def read_spent(connection: Connection, study_id: int) -> Any:
    """Return the study's budget and whether it is stopped, as JSON, and its numbers of trials: see `_SELECT_SPENT`."""
    return connection.execute(_SELECT_SPENT, {"study_id": study_id}).one()


def count_started(connection: Connection, study_id: int) -> int:
    """Return the number of trials that count against the budget: complete, pruned and running ones."""
    spent = read_spent(connection, study_id)
    return int((spent.n_trials or 0) - spent.waiting - spent.fail)


def read_best_value(connection: Connection, study_id: int, target: float) -> float | None:
    """Return the best value of the completed trials if it reaches the target, else None."""
    is_complete = sqlalchemy.exists().where(
        TRIALS.c.trial_id == VALUES.c.trial_id, TRIALS.c.study_id == study_id, TRIALS.c.state == TrialState.COMPLETE
    )
    query = sqlalchemy.select(sqlalchemy.func.max(VALUES.c.value)).where(VALUES.c.value >= target, is_complete)
    best: float | None = connection.execute(query).scalar()
    return best


def read_times(connection: Connection, study_id: int, above: int) -> Sequence[Any]:
    """Return state, times, heartbeat, interruptions and pauses of the study's trials with ids above `above`."""
    query = _WITH_HEARTBEATS.where(TRIALS.c.study_id == study_id, TRIALS.c.trial_id > above)
    return connection.execute(query.order_by(TRIALS.c.trial_id)).all()


def read_ends(connection: Connection, study_id: int, above: int) -> Sequence[Any]:
    """Return state, times, value and its interval of the study's trials with ids above `above`."""
    return connection.execute(_SELECT_ENDS, {"study_id": study_id, "above": above}).all()


def read_n_validation(connection: Connection, study_id: int) -> int:
    """Return the number of validation images of a study; 0 before a worker has loaded its data."""
    text = connection.execute(sqlalchemy.select(_attr(STUDY_ATTRS, "data", _STUDY)), {"study_id": study_id}).scalar()
    return int(json.loads(text or "{}").get("validation") or 0)


def read_failures(connection: Connection, study_id: int) -> list[dict[str, Any]]:
    """Return the user attribute `failure` of each failed trial, in the order of trials."""
    is_failure = (USER_ATTRS.c.trial_id == TRIALS.c.trial_id) & (USER_ATTRS.c.key == "failure")
    query = sqlalchemy.select(USER_ATTRS.c.value_json).select_from(TRIALS.outerjoin(USER_ATTRS, is_failure))
    query = query.where(TRIALS.c.study_id == study_id, TRIALS.c.state == TrialState.FAIL).order_by(TRIALS.c.trial_id)
    return [json.loads(text or "{}") for text in connection.execute(query).scalars()]


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


def _attr(table: Any, key: str, owner_id: Any) -> Any:
    """Select a user attribute of the study or trial with the id, as JSON text."""
    [owner] = table.foreign_keys
    query = sqlalchemy.select(table.c.value_json).where(owner.parent == owner_id, table.c.key == key)
    return query.scalar_subquery().label(key)


# How earlier attempts at a trial ended: their number is the fencing token.
_INTERRUPTIONS = _attr(USER_ATTRS, "interruptions", TRIALS.c.trial_id)
_STUDY: Any = sqlalchemy.bindparam("study_id")
_IS_TRIAL = TRIALS.c.trial_id == sqlalchemy.bindparam("id")
# To let one transaction at a time start trials of a study.
_LOCK_STUDY = sqlalchemy.select(STUDIES.c.study_id).where(STUDIES.c.study_id == _STUDY).with_for_update()
# To write to a trial only while it is running, and in the attempt of the writer.
_LOCK_TRIAL = sqlalchemy.select(TRIALS.c.state).where(_IS_TRIAL).with_for_update()
_SELECT_ATTEMPT = sqlalchemy.select(_INTERRUPTIONS, _attr(STUDY_ATTRS, "stopped", TRIALS.c.study_id)).where(_IS_TRIAL)
# For Optuna's cache, which asks for the trials that it has not seen yet.
_SELECT_ABOVE = sqlalchemy.select(TRIALS).where(
    TRIALS.c.study_id == _STUDY, TRIALS.c.trial_id > sqlalchemy.bindparam("above")
)
# Trials are never deleted, so the highest number gives their total. COMPLETE and PRUNED trials, whose number keeps
# growing, are not counted but derived from it.
_UNFINISHED = (TrialState.RUNNING, TrialState.WAITING, TrialState.FAIL)
_N_TRIALS = sqlalchemy.select(sqlalchemy.func.max(TRIALS.c.number) + 1).where(TRIALS.c.study_id == _STUDY)
_SELECT_SPENT = sqlalchemy.select(
    *(_attr(STUDY_ATTRS, key, _STUDY) for key in ("budget", "stopped")),
    _N_TRIALS.scalar_subquery().label("n_trials"),
    *(sqlalchemy.func.count().filter(TRIALS.c.state == state).label(state.name.lower()) for state in _UNFINISHED),
).where(TRIALS.c.study_id == _STUDY, TRIALS.c.state.in_(_UNFINISHED))
# To find stale trials, and the time that was searched.
_WITH_HEARTBEATS = sqlalchemy.select(
    TRIALS, HEARTBEATS.c.heartbeat, _INTERRUPTIONS, _attr(USER_ATTRS, "pauses", TRIALS.c.trial_id)
).outerjoin(HEARTBEATS, HEARTBEATS.c.trial_id == TRIALS.c.trial_id)

# To count the trials since the last gain.
_SELECT_ENDS = (
    sqlalchemy.select(TRIALS, VALUES.c.value, _attr(USER_ATTRS, "interval", TRIALS.c.trial_id))
    .outerjoin(VALUES, VALUES.c.trial_id == TRIALS.c.trial_id)
    .where(TRIALS.c.study_id == _STUDY, TRIALS.c.trial_id > sqlalchemy.bindparam("above"))
    .order_by(TRIALS.c.trial_id)
)


@lru_cache
def _insert_assigned() -> Any:
    """Insert a trial with its worker and first heartbeat in one statement; return its id."""
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
    """Insert rows of a table, or replace the values of those that exist."""
    insert: Any = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}[dialect](table)
    [keys] = (each.columns.keys() for each in table.constraints if isinstance(each, sqlalchemy.UniqueConstraint))
    columns = [column.name for column in table.c if not column.primary_key and column.name not in keys]
    return insert.on_conflict_do_update(index_elements=keys, set_={name: insert.excluded[name] for name in columns})


@lru_cache
def _parse_distribution(text: str) -> BaseDistribution:
    return distributions.json_to_distribution(text)


def _to_utc(local: datetime | None) -> datetime | None:
    return local and local.astimezone(UTC).replace(tzinfo=None)


def _to_local(utc: datetime | None) -> datetime | None:
    return utc and datetime.fromtimestamp(utc.replace(tzinfo=UTC).timestamp())  # unlike `astimezone`, it sets `fold`
