"""Copies the rows of a study to another database, in one transaction."""

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sqlalchemy
from optuna.storages._rdb.models import BaseModel

from hpsearch.errors import StorageError
from hpsearch.storage.rdb import Storage
from hpsearch.storage.retry import retry_on_outage
from hpsearch.storage.tables import HEARTBEATS, STUDIES, TRIALS

Rows = Mapping[Any, list[dict[str, Any]]]
_ATTACHED = [  # tables of a study's or a trial's details, in the order of insertion
    table
    for table in BaseModel.metadata.sorted_tables
    if table not in (STUDIES, TRIALS, HEARTBEATS) and {"study_id", "trial_id"} & {*table.c.keys()}
]


@retry_on_outage
def is_same_database(storage: Storage, other: Storage) -> bool:
    """Return whether two storages use the same database, even if their URLs differ."""
    urls = [opened.engine.url for opened in (storage, other)]
    backends = {url.get_backend_name() for url in urls}
    if len(backends) == 2:
        return False
    if backends == {"sqlite"}:
        return Path(urls[0].database or "").samefile(urls[1].database or "")
    key = {"key": secrets.randbits(62)}  # an advisory lock is visible in one database only
    with storage.engine.connect() as connection, other.engine.connect() as other_connection:
        connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(:key)"), key)
        return not other_connection.execute(sqlalchemy.text("SELECT pg_try_advisory_xact_lock(:key)"), key).scalar()


@retry_on_outage
def read_study_rows(storage: Storage, name: str) -> Rows:
    """Read a consistent snapshot of all rows of the study, by table; heartbeats, which nobody sends there, excepted."""
    trials = sqlalchemy.select(TRIALS.c.trial_id).join(STUDIES).where(STUDIES.c.study_name == name)
    study = sqlalchemy.select(STUDIES.c.study_id).where(STUDIES.c.study_name == name)
    rows: dict[Any, list[dict[str, Any]]] = {}
    with storage.engine.connect() as connection:
        if connection.dialect.name == "postgresql":  # as of the first statement; SQLite does that anyway
            connection.execution_options(isolation_level="REPEATABLE READ")
        for table in (STUDIES, TRIALS, *_ATTACHED):
            owner = table.c.study_id.in_(study) if "study_id" in table.c else table.c.trial_id.in_(trials)
            query = sqlalchemy.select(table).where(owner).order_by(*table.primary_key)
            rows[table] = [dict(row) for row in connection.execute(query).mappings()]
    return rows


@retry_on_outage
def write_study_rows(storage: Storage, rows: Rows, source: Storage) -> None:
    """Insert the rows of a study in one transaction. Raises `StorageError` if `source` has changed since the read."""
    new_ids: dict[str, dict[int, int]] = {}  # of each primary key, by old id
    with storage.engine.begin() as connection:
        for table, old_rows in rows.items():
            [key] = table.primary_key
            names = [column.name for column in table.c if column is not key]
            new_rows = [
                {name: new_ids[name][row[name]] if name in new_ids else row[name] for name in names} for row in old_rows
            ]
            if new_rows:
                query = sqlalchemy.insert(table).returning(key, sort_by_parameter_order=True)
                keys = connection.execute(query, new_rows).scalars()
                new_ids[key.name] = dict(zip((row[key.name] for row in old_rows), keys, strict=True))
        [study] = rows[STUDIES]
        if read_study_rows(source, study["study_name"]) != rows:
            raise StorageError(
                f"study '{study['study_name']}' changed during the copy, so nothing was written; "
                "stop it first: hpsearch stop STUDY"
            )
