"""A study copied to another database and another artifact store, whole or not at all, and compared."""

import hashlib
import json
import textwrap
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC
from typing import Any

import optuna
from optuna.distributions import distribution_to_json
from optuna.trial import FrozenTrial, TrialState

from hpsearch.config.definition import StudyDefinition
from hpsearch.config.urls import show_url
from hpsearch.errors import StorageError, UsageError
from hpsearch.search.checkpoints import artifact_folder, find_unneeded_checkpoints
from hpsearch.search.study import load_study
from hpsearch.storage.engine import creation_lock
from hpsearch.storage.rdb import open_storage
from hpsearch.storage.transfer import has_study, is_same_database, read_study_rows, write_study_rows

Facts = list[dict[str, str]]  # of the study, then of each trial: what there is to know, as JSON by its name
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
        recovery = definition.recovery
        source = open_storage(
            definition.study.storage, heartbeat=recovery.heartbeat, grace=recovery.grace, reads_only=True
        )
        stack.callback(source.engine.dispose)
        study = load_study(definition, source)
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        stuck = source.find_stuck(study._study_id)
        if n_alive := sum(trial._trial_id not in stuck for trial in running):
            raise UsageError(f"{n_alive} trials of '{name}' run; stop them first: hpsearch stop STUDY")
        storage = open_storage(target.study.storage)
        stack.callback(storage.engine.dispose)
        if is_same_database(source, storage):
            raise UsageError(f"{show_url(target.study.storage)} is where the study is; copy it to another database")
        was_there = has_study(storage, name)
        if was_there and (difference := _find_difference(_read_facts(definition), _read_facts(target))):
            raise UsageError(
                f"another study '{name}' is in {show_url(target.study.storage)} already ({difference}); "
                f"go on with that, or copy to another database, or delete that one: {_DELETE}"
            )
        n_copied, n_there = 0, 0
        if artifact_folder(definition) != artifact_folder(target):
            artifact_folder(target).check()
            n_copied, n_there = _copy_files(definition, target, study)
        with creation_lock(storage.engine.url):
            if not has_study(storage, name):
                write_study_rows(storage, read_study_rows(source, name), source)
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
