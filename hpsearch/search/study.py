"""The studies in a storage: created or resumed, guarded against mixing two searches, summarized."""

import json
import uuid
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.study import StudyDirection
from optuna.trial import TrialState

from hpsearch.config.definition import StudyDefinition
from hpsearch.config.urls import show_url
from hpsearch.errors import StudyMismatch, StudyNotFound
from hpsearch.storage.engine import creation_lock
from hpsearch.storage.rdb import Storage, storage_of


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


def change_attribute(study: optuna.Study, key: str, change: Callable[[Any], Any]) -> Any:
    """The new value of a study's attribute, made of its old one (or None) while no other process changes it."""
    storage = storage_of(study)
    with creation_lock(storage.engine.url) if storage else nullcontext():
        value = change(study.user_attrs.get(key))
        study.set_user_attr(key, value)
    return value


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
