"""The studies in a storage: created or resumed, guarded against mixing two searches, summarized."""

import json
import logging
import uuid
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from datetime import UTC, datetime
from typing import Any
from weakref import WeakKeyDictionary

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from hpsearch.config.definition import StudyDefinition
from hpsearch.errors import NoCompletedTrial, StudyMismatch, StudyNotFound
from hpsearch.storage.artifacts import Folder
from hpsearch.storage.checkpoints import find_checkpoints
from hpsearch.storage.engine import creation_lock, show_url
from hpsearch.storage.rdb import Storage
from hpsearch.storage.tally import count_trials

logger = logging.getLogger(__name__)

_ids = WeakKeyDictionary[optuna.Study, str]()  # they never change, and are needed after each trial


def open_study(definition: StudyDefinition, storage: Storage, *, keeps_extension: bool = True) -> optuna.Study:
    """The definition's study in the storage, created or resumed, with its budget and identity written into it.

    The trials to try first are queued once. What `extend` added to the budget is kept as long as the definition has
    the trials that it was added to, unless it is not to be kept. Raises `StudyMismatch`, and changes nothing,
    where the stored study was searched with another definition; budget, recovery and retrain may differ.
    """
    name = definition.study.name
    with creation_lock(storage.engine.url):
        study = optuna.create_study(study_name=name, storage=storage, direction="maximize", load_if_exists=True)
        _check_identity(definition, study)
        if "fingerprint" not in study.user_attrs:
            for values in definition.first[len(study.get_trials(deepcopy=False)) :]:
                study.enqueue_trial(values)
            study.set_user_attr("identity", definition.identity)
        if "id" not in study.user_attrs:
            study.set_user_attr("id", uuid.uuid4().hex[:8])
        budget = definition.budget.model_dump(exclude_none=True)
        extension = study.user_attrs.get("extension", {})
        if extension.get("of") != budget["trials"] or not keeps_extension:
            extension = {"of": budget["trials"], "by": 0}
            study.set_user_attr("extension", extension)
        study.set_user_attr("budget", budget | {"trials": budget["trials"] + extension["by"]})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            study.set_metric_names(["validation accuracy"])
        study.set_user_attr("fingerprint", definition.fingerprint)  # the last: it marks the study as whole
    return study


def load_study(definition: StudyDefinition, storage: Storage) -> optuna.Study:
    """The definition's study, which must be in the storage; raises `StudyNotFound` or `StudyMismatch`."""
    name = definition.study.name
    try:
        study = optuna.load_study(study_name=name, storage=storage)
    except KeyError as error:
        raise StudyNotFound(
            f"no study '{name}' in {show_url(storage.engine.url)}; start it with: hpsearch run STUDY"
        ) from error
    _check_identity(definition, study)
    if "fingerprint" not in study.user_attrs:
        raise StudyNotFound(f"study '{name}' was not started completely; go on with: hpsearch run STUDY")
    return study


def find_best(study: optuna.Study, number: int | None = None) -> FrozenTrial:
    """The best complete trial, or the complete trial of that number; raises `NoCompletedTrial`."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    chosen = [trial for trial in complete if number is None or trial.number == number]
    if not chosen:
        which = "no trial is complete yet" if number is None else f"trial {number} is not complete"
        raise NoCompletedTrial(f"study '{study.study_name}': {which}; see: hpsearch trials STUDY")
    return min(chosen, key=_by_value)


def find_best_few(study: optuna.Study, n: int) -> list[FrozenTrial]:
    """The `n` best complete trials that differ in their parameters, the best first; raises `NoCompletedTrial`."""
    find_best(study)
    different: list[FrozenTrial] = []
    for trial in sorted(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)), key=_by_value):
        if all(trial.params != other.params for other in different):
            different.append(trial)
    return different[:n]


def find_winner(study: optuna.Study) -> FrozenTrial:
    """The trial that `confirm` has chosen, else the best one; raises `NoCompletedTrial`."""
    confirmation = study.user_attrs.get("confirmation")
    return find_best(study, confirmation and confirmation["winner"])


def explain_choice(study: optuna.Study, command: str) -> str:
    """Why `find_winner` takes the trial that it takes; `command` is what follows the verb to confirm it."""
    winner, best = find_winner(study), find_best(study)
    confirmation = study.user_attrs.get("confirmation")
    if not confirmation:
        return f"trial {winner.number} has the best value; whether that was luck is told by: hpsearch confirm {command}"
    if best.number not in [candidate["number"] for candidate in confirmation["candidates"]]:
        return (
            f"trial {winner.number} is the confirmed winner, but trial {best.number}, whose value is the best now, was "
            f"not compared; do so with: hpsearch confirm {command}"
        )
    return f"trial {winner.number} is the confirmed winner"


def count_test_reading(study: optuna.Study, trial: FrozenTrial) -> int:
    """How many exports have read the test set for this study, after this one was written down."""
    reading = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "trial": trial.number}
    return len(change_attribute(study, "test_reads", lambda readings: [*(readings or ()), reading]))


def change_attribute(study: optuna.Study, key: str, change: Callable[[Any], Any]) -> Any:
    """The new value of a study's attribute, made of its old one (or None) while no other process changes it."""
    storage = getattr(study._storage, "_backend", None)  # Optuna wraps it in a cache
    with creation_lock(storage.engine.url) if isinstance(storage, Storage) else nullcontext():
        value = change(study.user_attrs.get(key))
        study.set_user_attr(key, value)
    return value


def artifact_folder(definition: StudyDefinition) -> Folder:
    """Where studies of the definition's name keep what their trials leave behind."""
    return Folder(definition.study.artifacts) / definition.study.name


def checkpoint_folder(definition: StudyDefinition, study: optuna.Study) -> Folder:
    """Where the study's checkpoints are: apart from those of a study of the same name in another storage."""
    if study not in _ids and (found := study.user_attrs.get("id")):
        _ids[study] = found
    return artifact_folder(definition) / _ids.get(study, "")


def find_unneeded_checkpoints(definition: StudyDefinition, study: optuna.Study) -> list[str]:
    """The names of the checkpoints that no trial will be resumed from, and that are not of the `recovery.keep` best."""
    # In this order: a trial is stored before it has a file.
    files = find_checkpoints(checkpoint_folder(definition, study))
    if not files:
        return []
    trials = study.get_trials(deepcopy=False)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    best = sorted(complete, key=_by_value)[: definition.recovery.keep]
    needed = set[int]()
    for trial in (*best, *(trial for trial in trials if not trial.state.is_finished())):
        needed |= {trial.number, *trial.user_attrs.get("attempts", ())}
    return [name for name, number in files.items() if number not in needed]


def sweep_checkpoints(definition: StudyDefinition, study: optuna.Study) -> None:
    """Remove the checkpoints that are not needed any more."""
    folder = checkpoint_folder(definition, study)
    try:
        for name in find_unneeded_checkpoints(definition, study):
            folder.remove(name)
    except OSError as error:
        logger.warning("what is not needed any more in %s cannot be removed (%s)", folder, error.strerror)


def summarize(
    definition: StudyDefinition, study: optuna.Study, trials: list[FrozenTrial] | None = None
) -> dict[str, Any]:
    """The document of `status --json`: counts by state, the best trial, the workers, the epochs run and saved.

    `trials` are those of the study, where they were read already.
    """
    storage = getattr(study._storage, "_backend", None)  # Optuna wraps it in a cache
    if trials is None and isinstance(storage, Storage):
        tally = storage.tally(study._study_id)
    else:
        tally = count_trials(study.get_trials(deepcopy=False) if trials is None else trials)
    counts, best, full = tally.counts, tally.best, definition.budget.epochs
    n_pruned = counts.get(TrialState.PRUNED, 0)
    return {
        "study": study.study_name,
        "storage": show_url(definition.study.storage),
        "budget": study.user_attrs["budget"],
        "trials": {
            "complete": counts.get(TrialState.COMPLETE, 0),
            "pruned": n_pruned,
            "failed": counts.get(TrialState.FAIL, 0),
            "running": counts.get(TrialState.RUNNING, 0),
            "waiting": counts.get(TrialState.WAITING, 0),
        },
        "best": best and {"number": best.number, "value": best.value, "params": best.params},
        "workers": [
            {"id": trial.user_attrs.get("worker"), "trial": trial.number, "epoch": trial.last_step or 0}
            for trial in tally.running
        ],
        "epochs": {"run": tally.n_epochs, "saved": full * n_pruned - tally.n_epochs_of_pruned},
    }


def _by_value(trial: FrozenTrial) -> tuple[float, int]:
    """Sorts the best trial first, and the earlier of equals before the later."""
    return -(trial.value or 0.0), trial.number


def _check_identity(definition: StudyDefinition, study: optuna.Study) -> None:
    attributes = study.user_attrs
    if "fingerprint" not in attributes:
        if any(trial.state != TrialState.WAITING for trial in study.get_trials(deepcopy=False)):
            raise StudyMismatch(
                f"study '{study.study_name}' has trials that hpsearch did not make; give study.name another value"
            )
        if study.direction != StudyDirection.MAXIMIZE:
            raise StudyMismatch(f"study '{study.study_name}' minimizes; give study.name another value")
    elif attributes["fingerprint"] != definition.fingerprint:
        stored, wanted = attributes["identity"], json.loads(json.dumps(definition.identity))
        differing = [
            f"{key} ({stored.get(key, 'absent')} -> {wanted.get(key, 'absent')})"
            for key in sorted(stored.keys() | wanted.keys())
            if stored.get(key) != wanted.get(key)
        ]
        raise StudyMismatch(
            f"study '{study.study_name}' was searched with other values of {', '.join(differing)}; "
            "undo the change, or give study.name another value to start a new study"
        )
