"""A study copied to another database and another artifact store, whole or not at all, and compared."""

import hashlib
import json
import secrets
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.distributions import distribution_to_json
from optuna.storages._rdb.models import BaseModel
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Connection

from hpsearch.config.definition import StudyDefinition
from hpsearch.errors import StorageError, UsageError
from hpsearch.monitor.status import open_watch
from hpsearch.search.study import artifact_folder, find_unneeded_checkpoints
from hpsearch.storage.engine import creation_lock, show_url
from hpsearch.storage.rdb import Storage, open_storage
from hpsearch.storage.recovery import patiently
from hpsearch.storage.tables import HEARTBEATS, TRIALS

Rows = Mapping[Any, list[dict[str, Any]]]
Facts = list[dict[str, str]]  # of the study, then of each trial: what there is to know, as JSON by its name

_STUDIES: Any = BaseModel.metadata.tables["studies"]
_ATTACHED = [  # to a study or a trial, in the order in which they can be inserted
    table
    for table in BaseModel.metadata.sorted_tables
    if table not in (_STUDIES, TRIALS, HEARTBEATS) and {"study_id", "trial_id"} & {*table.c.keys()}
]
_DELETE = "hpsearch dashboard STUDY --storage URL --writable"


@dataclass(frozen=True)
class Copy:
    """What `copy_study` found or wrote; `digest` is the SHA-256 of all that can be read of the study on either side."""

    n_trials: int
    n_reports: int
    digest: str
    was_there: bool
    n_files_copied: int
    n_files_there: int


def copy_study(definition: StudyDefinition, target: StudyDefinition) -> Copy:
    """Copy the definition's study to the storage and the artifacts of `target`, and compare both sides.

    The study appears there in one transaction, after its files; so a copy that was interrupted is simply repeated. One
    that is there already must be equal. Raises `UsageError` where workers run, where both storages are the same, and
    where another study of the name is there; and `StorageError` where both sides are not equal in the end.
    """
    name = definition.study.name
    with ExitStack() as stack:
        watch = open_watch(definition)
        stack.callback(watch.storage.engine.dispose)
        if n_alive := watch.look().n_alive:
            raise UsageError(f"{n_alive} trials of '{name}' run; stop them first: hpsearch stop STUDY")
        storage = open_storage(target.study.storage)
        stack.callback(storage.engine.dispose)
        if _is_same_database(watch.storage, storage):
            raise UsageError(f"{show_url(target.study.storage)} is where the study is; copy it to another database")
        was_there = _is_there(storage, name)
        if was_there and (difference := _find_difference(_read_facts(definition), _read_facts(target))):
            raise UsageError(
                f"another study '{name}' is in {show_url(target.study.storage)} already ({difference}); "
                f"go on with that, or copy to another database, or delete that one: {_DELETE}"
            )
        n_copied, n_there = 0, 0
        if artifact_folder(definition) != artifact_folder(target):
            artifact_folder(target).check()
            n_copied, n_there = _copy_files(definition, target, watch.study)
        with creation_lock(storage.engine.url):
            if not _is_there(storage, name):
                _write_rows(storage, _read_rows(watch.storage, name), watch.storage)
    facts, copied = _read_facts(definition), _read_facts(target)
    if difference := _find_difference(facts, copied):
        raise StorageError(
            f"study '{name}' is in {show_url(target.study.storage)} now, but differs from its source ({difference}); "
            f"delete it there and copy again: {_DELETE}"
        )
    digest = hashlib.sha256(json.dumps(copied, sort_keys=True).encode()).hexdigest()
    n_reports = sum(name.startswith("report ") for trial in copied for name in trial)
    return Copy(len(copied) - 1, n_reports, digest, was_there, n_copied, n_there)


def _copy_files(definition: StudyDefinition, target: StudyDefinition, study: optuna.Study) -> tuple[int, int]:
    """How many files of the study were copied, and how many were there already."""
    folder, other = artifact_folder(definition), artifact_folder(target)
    there, n_copied, n_same = set(other.find()), 0, 0
    for name in _find_files(definition, study):
        content = folder.read(name)
        if name in there and other.read(name) == content:
            n_same += 1
            continue
        other.write(name, content)
        if other.read(name) != content:
            raise StorageError(f"{other / name} is another than what was written; copy the study again")
        n_copied += 1
    return n_copied, n_same


def _find_files(definition: StudyDefinition, study: optuna.Study) -> list[str]:
    """The names of the study's files: checkpoints that are needed, attached files, and tracebacks of its trials."""
    own = f"{study.user_attrs.get('id', '')}/"
    dropped = {own + name for name in find_unneeded_checkpoints(definition, study)}
    tracebacks = {f"trial-{trial.number}.txt" for trial in study.get_trials(deepcopy=False)}
    return [
        name
        for name in artifact_folder(definition).find()
        if name in tracebacks or (name.startswith(own) and name not in dropped and not name.endswith(".tmp"))
    ]


@patiently
def _is_same_database(storage: Storage, other: Storage) -> bool:
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


@patiently
def _is_there(storage: Storage, name: str) -> bool:
    with storage.engine.connect() as connection:
        return connection.execute(sqlalchemy.select(_STUDIES).where(_STUDIES.c.study_name == name)).first() is not None


@contextmanager
def _one_moment(storage: Storage) -> Iterator[Connection]:
    """A transaction that sees the database as it is at its first statement."""
    with storage.engine.connect() as connection:
        if connection.dialect.name == "postgresql":
            connection.execution_options(isolation_level="REPEATABLE READ")
        yield connection


@patiently
def _read_rows(storage: Storage, name: str) -> Rows:
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


@patiently
def _write_rows(storage: Storage, rows: Rows, source: Storage) -> None:
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
        again = _read_rows(source, study["study_name"])
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


def _read_facts(definition: StudyDefinition) -> Facts:
    """What any reader sees of the study, who does not know how it was copied."""
    storage = open_storage(definition.study.storage, reads_only=True)
    try:
        study = optuna.load_study(study_name=definition.study.name, storage=storage)
        facts: dict[str, Any] = {"directions": [direction.name for direction in study.directions]}
        facts |= _by_name("attribute", study.user_attrs)
        facts |= _by_name("system attribute", storage.get_study_system_attrs(study._study_id))
        every = [facts, *map(_describe, study.get_trials(deepcopy=False))]
    finally:
        storage.engine.dispose()
    return [{name: json.dumps(value, sort_keys=True) for name, value in facts.items()} for facts in every]


def _describe(trial: FrozenTrial) -> dict[str, Any]:
    times = {"began": trial.datetime_start, "ended": trial.datetime_complete}
    distributions = {name: distribution_to_json(each) for name, each in trial.distributions.items()}
    return (
        {"number": trial.number, "state": trial.state.name, "values": trial.values}
        | {name: time and time.astimezone(UTC).isoformat() for name, time in times.items()}
        | _by_name("parameter", trial.params)
        | _by_name("distribution", distributions)
        | _by_name("report", trial.intermediate_values)
        | _by_name("attribute", trial.user_attrs)
        | _by_name("system attribute", trial.system_attrs)
    )


def _by_name(kind: str, values: Mapping[Any, Any]) -> dict[str, Any]:
    return {f"{kind} {name}": value for name, value in values.items()}


def _find_difference(here: Facts, there: Facts) -> str:
    """The first difference between two studies, or nothing."""
    if len(here) != len(there):
        return f"{len(here) - 1:,} trials here, {len(there) - 1:,} there"
    for index, (mine, other) in enumerate(zip(here, there, strict=True)):
        for name in sorted(mine.keys() | other.keys()):
            if mine.get(name) != other.get(name):
                what = f"trial {index - 1}: {name}" if index else name
                values = (textwrap.shorten(facts.get(name, "absent"), 60) for facts in (mine, other))
                return f"{what}: {' here, '.join(values)} there"
    return ""
