"""The rows of a study copied to another database, in one transaction."""

import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import sqlalchemy
from optuna.storages._rdb.models import BaseModel
from optuna.trial import TrialState
from sqlalchemy import Connection

from hpsearch.errors import StorageError
from hpsearch.storage.rdb import Storage
from hpsearch.storage.retry import retry_on_outage
from hpsearch.storage.tables import HEARTBEATS, TRIALS

Rows = Mapping[Any, list[dict[str, Any]]]
_STUDIES: Any = BaseModel.metadata.tables["studies"]
_ATTACHED = [  # to a study or a trial, in the order in which they can be inserted
    table
    for table in BaseModel.metadata.sorted_tables
    if table not in (_STUDIES, TRIALS, HEARTBEATS) and {"study_id", "trial_id"} & {*table.c.keys()}
]


@retry_on_outage
def is_same_database(storage: Storage, other: Storage) -> bool:
    """Whether two storages are one, however their URLs are written."""
    places = [opened.engine.url for opened in (storage, other)]
    kinds = {place.get_backend_name() for place in places}
    if len(kinds) == 2:
        return False
    if kinds == {"sqlite"}:
        return Path(places[0].database or "").samefile(places[1].database or "")
    key = {"key": secrets.randbits(62)}  # locks of this kind are seen in one database only
    with storage.engine.connect() as connection, other.engine.connect() as other_connection:
        connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(:key)"), key)
        return not other_connection.execute(sqlalchemy.text("SELECT pg_try_advisory_xact_lock(:key)"), key).scalar()


@retry_on_outage
def has_study(storage: Storage, name: str) -> bool:
    """Whether the database has a study of that name."""
    with storage.engine.connect() as connection:
        return connection.execute(sqlalchemy.select(_STUDIES).where(_STUDIES.c.study_name == name)).first() is not None


@contextmanager
def _one_moment(storage: Storage) -> Iterator[Connection]:
    """A transaction that sees the database as it is at its first statement."""
    with storage.engine.connect() as connection:
        if connection.dialect.name == "postgresql":
            connection.execution_options(isolation_level="REPEATABLE READ")
        yield connection


@retry_on_outage
def read_study_rows(storage: Storage, name: str) -> Rows:
    """All rows of the study at one moment, by table.

    Of heartbeats only those of running trials are read, and how old they are: each database has a clock of its own.
    """
    trials = sqlalchemy.select(TRIALS.c.trial_id).join(_STUDIES).where(_STUDIES.c.study_name == name)
    study = sqlalchemy.select(_STUDIES.c.study_id).where(_STUDIES.c.study_name == name)
    running = trials.where(TRIALS.c.state == TrialState.RUNNING)
    with _one_moment(storage) as connection:
        rows: dict[Any, list[dict[str, Any]]] = {}
        for table in (_STUDIES, TRIALS, *_ATTACHED):
            owner = table.c.study_id.in_(study) if "study_id" in table.c else table.c.trial_id.in_(trials)
            query = sqlalchemy.select(table).where(owner).order_by(*table.primary_key)
            rows[table] = [dict(row) for row in connection.execute(query).mappings()]
        beats = connection.execute(sqlalchemy.select(HEARTBEATS).where(HEARTBEATS.c.trial_id.in_(running)))
        now = _read_clock(connection)
        rows[HEARTBEATS] = [{"trial_id": beat.trial_id, "age": now - beat.heartbeat} for beat in beats]
    return rows


@retry_on_outage
def write_study_rows(storage: Storage, rows: Rows, source: Storage) -> None:
    """Insert the rows of a study in one transaction, unless it has changed in its `source` since they were read."""
    with storage.engine.begin() as connection:
        [study] = rows[_STUDIES]
        [study_id] = _insert(connection, _STUDIES, [{"study_name": study["study_name"]}])
        trials = [row | {"study_id": study_id} for row in rows[TRIALS]]
        new_ids = _insert(connection, TRIALS, [_without_key(TRIALS, row) for row in trials])
        trial_ids = dict(zip((row["trial_id"] for row in trials), new_ids, strict=True))
        ids = {"study_id": {study["study_id"]: study_id}, "trial_id": trial_ids}
        for table in _ATTACHED:
            [owner] = ids.keys() & {*table.c.keys()}
            if rows[table]:
                attached = [_without_key(table, row) | {owner: ids[owner][row[owner]]} for row in rows[table]]
                connection.execute(sqlalchemy.insert(table), attached)
        now = _read_clock(connection)
        for beat in rows[HEARTBEATS]:
            values = {"trial_id": trial_ids[beat["trial_id"]], "heartbeat": now - beat["age"]}
            connection.execute(sqlalchemy.insert(HEARTBEATS), values)
        again = read_study_rows(source, study["study_name"])
        if any(again[table] != rows[table] for table in (_STUDIES, TRIALS, *_ATTACHED)):
            raise StorageError(
                f"study '{study['study_name']}' has changed while it was copied, so nothing was written; "
                "stop its workers first: hpsearch stop STUDY"
            )


def _insert(connection: Connection, table: Any, rows: list[dict[str, Any]]) -> list[int]:
    """The primary keys of the rows, once they are inserted, in their order."""
    [key] = table.primary_key
    if not rows:
        return []
    query = sqlalchemy.insert(table).returning(key, sort_by_parameter_order=True)
    return list(connection.execute(query, rows).scalars())


def _without_key(table: Any, row: Mapping[str, Any]) -> dict[str, Any]:
    [key] = table.primary_key
    return {name: value for name, value in row.items() if name != key.name}


def _read_clock(connection: Connection) -> datetime:
    """The time of the database, in the time zone in which it writes heartbeats."""
    now: datetime = connection.execute(sqlalchemy.select(sqlalchemy.func.now())).scalar_one()
    return now.replace(tzinfo=None)
