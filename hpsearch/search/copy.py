"""Copy a study to another database and artifact store, completely or not at all, and verify the copy."""

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

Facts = list[dict[str, str]]  # all attributes as JSON: first those of the study, then those of each trial
_DELETE = "hpsearch dashboard STUDY --storage URL --writable"


@dataclass(frozen=True)
class Copy:
    """The result of `copy_study`; `digest` is the SHA-256 of the study's content, equal on both sides."""

    n_trials: int
    n_reports: int
    digest: str
    was_there: bool
    n_files_copied: int
    n_files_there: int


def copy_study(definition: StudyDefinition, target: StudyDefinition) -> Copy:
    """Copy the definition's study to the database and the artifact store of `target`, and compare both sides.

    The study is written in one transaction, after its files, so an interrupted copy can simply be repeated. Raises
    `UsageError` if workers are running, if both databases are the same, or if the target has a different study with
    this name. Raises `StorageError` if the copy differs from its source.
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
        stale = source.find_stale(study._study_id)
        if n_alive := sum(trial._trial_id not in stale for trial in running):
            raise UsageError(f"'{name}' has {n_alive} running trials; stop it first: hpsearch stop STUDY")
        storage = open_storage(target.study.storage)
        stack.callback(storage.engine.dispose)
        if is_same_database(source, storage):
            raise UsageError(f"source and target are the same database: {show_url(target.study.storage)}")
        was_there = has_study(storage, name)
        if was_there and (difference := _find_difference(_read_facts(definition), _read_facts(target))):
            raise UsageError(
                f"{show_url(target.study.storage)} already has a different study '{name}' ({difference}); "
                f"continue with that one, choose another database, or delete it there: {_DELETE}"
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
            f"copied, but verification failed: '{name}' in {show_url(target.study.storage)} differs from its source "
            f"({difference}); delete it there and copy again: {_DELETE}"
        )
    digest = hashlib.sha256(json.dumps(copied, sort_keys=True).encode()).hexdigest()
    n_reports = sum(name.startswith("report ") for trial in copied for name in trial)
    return Copy(len(copied) - 1, n_reports, digest, was_there, n_copied, n_there)


def _copy_files(definition: StudyDefinition, target: StudyDefinition, study: optuna.Study) -> tuple[int, int]:
    """Copy the study's files. Returns how many were copied, and how many already existed."""
    folder, other = artifact_folder(definition), artifact_folder(target)
    existing, n_copied, n_same = set(other.find()), 0, 0
    for name in _find_files(definition, study):
        content = folder.read(name)
        if name in existing and other.read(name) == content:
            n_same += 1
            continue
        other.write(name, content)
        if other.read(name) != content:
            raise StorageError(f"{other / name} was not written correctly; run copy again")
        n_copied += 1
    return n_copied, n_same


def _find_files(definition: StudyDefinition, study: optuna.Study) -> list[str]:
    """Return the names of the study's files: checkpoints that are still needed, attachments, and tracebacks."""
    own = f"{study.user_attrs.get('id', '')}/"
    unneeded = {own + name for name in find_unneeded_checkpoints(definition, study)}
    tracebacks = {f"trial-{trial.number}.txt" for trial in study.get_trials(deepcopy=False)}
    return [
        name
        for name in artifact_folder(definition).find()
        if name in tracebacks or (name.startswith(own) and name not in unneeded and not name.endswith(".tmp"))
    ]


def _read_facts(definition: StudyDefinition) -> Facts:
    """Read the study through Optuna's own functions, independently of how it was copied."""
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
    times = {"started": trial.datetime_start, "ended": trial.datetime_complete}
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
    """Describe the first difference between two studies; return "" if they are equal."""
    if len(here) != len(there):
        return f"{len(here) - 1:,} trials in the source, {len(there) - 1:,} in the target"
    for index, (mine, other) in enumerate(zip(here, there, strict=True)):
        for name in sorted(mine.keys() | other.keys()):
            if mine.get(name) != other.get(name):
                what = f"trial {index - 1}: {name}" if index else name
                values = (textwrap.shorten(facts.get(name, "absent"), 60) for facts in (mine, other))
                return f"{what}: {' in the source, '.join(values)} in the target"
    return ""
