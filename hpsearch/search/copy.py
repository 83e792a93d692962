"""Copy a study to another database and artifact store, completely or not at all, and verify the copy.

A SQLite database is copied to a file as a whole, also while workers use it. Otherwise the rows of the study are copied.
"""

import textwrap
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from hpsearch.config.definition import StudyDefinition
from hpsearch.config.urls import parse_url, show_url
from hpsearch.errors import StorageError, UsageError
from hpsearch.search.study import load_study
from hpsearch.storage import backup
from hpsearch.storage.checkpoints import artifact_folder, checkpoint_folder, find_unneeded_checkpoints
from hpsearch.storage.engine import creation_lock
from hpsearch.storage.rdb import open_storage
from hpsearch.storage.transfer import is_same_database, read_study_rows, write_study_rows


@dataclass(frozen=True)
class Copy:
    """What source and copy of a study both have, and what was written."""

    n_trials: int
    n_reports: int
    was_there: bool
    n_files_copied: int
    n_files_there: int


def back_up_study(definition: StudyDefinition, target: StudyDefinition, *, force: bool = False) -> Copy:
    """Copy the SQLite database of the definition's study to that of `target`, a new file, and the study's files.

    Workers may use the study: the copy is a snapshot of one moment. Its files are copied before, so a trial that was
    running then resumes from its checkpoint. With `force` an existing file is replaced. Raises `UsageError` and
    `StorageError`.
    """
    urls = [parse_url(each.study.storage) for each in (definition, target)]
    file = Path(str(urls[1].database))
    backup.check_backup(urls[0], file, force=force)
    source = open_storage(definition.study.storage, must_exist=True)
    try:
        n_copied, n_there = _copy_files(definition, target, load_study(definition, source))
    finally:
        source.engine.dispose()
    backup.backup(urls[0], file, force=force)
    trials = [content for name, content in _read_study(target).items() if name.startswith("trial ")]
    return Copy(len(trials), sum(len(trial["intermediate_values"]) for trial in trials), False, n_copied, n_there)


def copy_study(definition: StudyDefinition, target: StudyDefinition) -> Copy:
    """Copy the definition's study to the database and the artifact store of `target`, and compare both sides.

    The study is written in one transaction, after its files, so an interrupted copy can simply be repeated. Raises
    `UsageError` if workers are running, if both databases are the same, or if the target has a different study with
    this name. Raises `StorageError` if the copy differs from its source.
    """
    name, place = definition.study.name, show_url(target.study.storage)
    delete = f"optuna delete-study --study-name {name} --storage {place}"
    with ExitStack() as stack:
        recovery = definition.recovery
        source = open_storage(
            definition.study.storage, heartbeat=recovery.heartbeat, grace=recovery.grace, reads_only=True
        )
        stack.callback(source.engine.dispose)
        study = load_study(definition, source)
        trials = study.get_trials(deepcopy=False)
        stale = source.find_stale(study._study_id)
        n_alive = sum(trial.state == TrialState.RUNNING and trial._trial_id not in stale for trial in trials)
        if n_alive:
            raise UsageError(f"'{name}' has {n_alive} running trials; stop it first: hpsearch stop STUDY")
        storage = open_storage(target.study.storage)
        stack.callback(storage.engine.dispose)
        if is_same_database(source, storage):
            raise UsageError(f"source and target are the same database: {place}")
        was_there = name in optuna.get_all_study_names(storage)
        if was_there and (difference := _compare(definition, target)):
            raise UsageError(
                f"{place} already has a different study '{name}' ({difference}); "
                f"continue with that one, choose another database, or delete it there: {delete}"
            )
        n_copied, n_there = _copy_files(definition, target, study)
        with creation_lock(storage.engine.url):
            if name not in optuna.get_all_study_names(storage):
                write_study_rows(storage, read_study_rows(source, name), source)
    if difference := _compare(definition, target):
        raise StorageError(
            f"copied, but verification failed: '{name}' in {place} differs from its source ({difference}); "
            f"delete it there and copy again: {delete}"
        )
    return Copy(len(trials), sum(len(trial.intermediate_values) for trial in trials), was_there, n_copied, n_there)


def _copy_files(definition: StudyDefinition, target: StudyDefinition, study: optuna.Study) -> tuple[int, int]:
    """Copy the study's files to another place. Returns how many were copied, and how many already existed."""
    folder, other = artifact_folder(definition), artifact_folder(target)
    if folder == other:
        return 0, 0
    other.check()
    existing, n_copied, n_same = set(other.find()), 0, 0
    for name in _find_files(definition, study):
        try:
            content = folder.read(name)
        except FileNotFoundError:  # the checkpoint of a trial that has just ended
            continue
        if name in existing and other.read(name) == content:
            n_same += 1
            continue
        if name in existing and "/" not in name:  # a traceback, which may be of another study
            raise UsageError(f"{other / name} is there and differs; choose another --artifacts-to")
        other.write(name, content)
        if other.read(name) != content:
            raise StorageError(f"{other / name} was not written correctly; run copy again")
        n_copied += 1
    return n_copied, n_same


def _find_files(definition: StudyDefinition, study: optuna.Study) -> list[str]:
    """Return the names of the study's files: checkpoints that are still needed, attachments, and tracebacks.

    Earlier versions wrote the tracebacks of all studies of a name in the same folder.
    """
    own = f"{study.user_attrs.get('id', '')}/"
    folder, keep = checkpoint_folder(definition, study), definition.recovery.keep
    unneeded = {own + name for name in find_unneeded_checkpoints(folder, study, keep)}
    tracebacks = {f"trial-{trial.number}.txt" for trial in study.get_trials(deepcopy=False)}
    return [
        name
        for name in artifact_folder(definition).find()
        if name in tracebacks or (name.startswith(own) and name not in unneeded and not name.endswith(".tmp"))
    ]


def _compare(definition: StudyDefinition, target: StudyDefinition) -> str:
    """Describe the first difference between the study and its copy, both as Optuna reads them; "" if equal."""
    return _find_difference(_read_study(definition), _read_study(target))


def _read_study(definition: StudyDefinition) -> dict[str, Any]:
    """Return the study's number of trials, directions and attributes, and everything of each trial but its id."""
    storage = open_storage(definition.study.storage, reads_only=True)
    try:
        study = optuna.load_study(study_name=definition.study.name, storage=storage)
        trials = study.get_trials(deepcopy=False)
        content: dict[str, Any] = {
            "number of trials": len(trials),
            "directions": study.directions,
            "user_attrs": study.user_attrs,
            "system_attrs": storage.get_study_system_attrs(study._study_id),
        }
    finally:
        storage.engine.dispose()
    for trial in trials:
        content[f"trial {trial.number}"] = {k.strip("_"): v for k, v in vars(trial).items() if k != "_trial_id"}
    return content


def _find_difference(mine: Any, other: Any, where: str = "") -> str:
    """Describe the first difference between two values, looking into dictionaries; return "" if they are equal."""
    if isinstance(mine, dict) and isinstance(other, dict):
        both = ((name, mine.get(name, "absent"), other.get(name, "absent")) for name in mine | other)
        found = (_find_difference(here, there, f"{where} {name}".lstrip()) for name, here, there in both)
        return next(filter(None, found), "")
    if repr(mine) == repr(other):  # NaN has the repr of another NaN, but is not equal to it
        return ""
    here, there = (textwrap.shorten(str(value), 60) for value in (mine, other))
    return f"{where}: {here} in the source, {there} in the target"
