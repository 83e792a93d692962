"""Create, resume and load studies; never mix trials of two different definitions."""

import json
import uuid
import warnings
from collections.abc import Callable
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
    """Create or resume the definition's study, and store its budget and identity in it.

    The trials of `first` are enqueued once. Trials added by `extend` are kept while the definition's number of trials
    stays the same, unless `keeps_extension` is false. Raises `StudyMismatch`, and changes nothing, if the stored study
    was started with a different definition; budget, recovery and retrain may differ.
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

        def set_budget(attributes: dict[str, Any]) -> dict[str, Any]:
            budget = definition.budget.model_dump(exclude_none=True)
            extension = attributes.get("extension", {})
            if extension.get("of") != budget["trials"] or not keeps_extension:
                extension = {"of": budget["trials"], "by": 0}
            return {"extension": extension, "budget": budget | {"trials": budget["trials"] + extension["by"]}}

        change_attributes(study, set_budget)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            study.set_metric_names(["validation accuracy"])
        study.set_user_attr("fingerprint", definition.fingerprint)  # last: it marks the study as complete
    return study


def load_study(definition: StudyDefinition, storage: Storage) -> optuna.Study:
    """Load the definition's study, which must exist; raises `StudyNotFound` or `StudyMismatch`."""
    name = definition.study.name
    try:
        study = optuna.load_study(study_name=name, storage=storage)
    except KeyError as error:
        raise StudyNotFound(
            f"study '{name}' not found in {show_url(storage.engine.url)}; start it with: hpsearch run STUDY"
        ) from error
    _check_identity(definition, study)
    if "fingerprint" not in study.user_attrs:
        raise StudyNotFound(f"study '{name}' was only partly created; finish with: hpsearch run STUDY")
    return study


def change_attributes(study: optuna.Study, change: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """Change attributes of a study in one transaction: see `Storage.change_study_attrs`."""
    changed: dict[str, Any] = storage_of(study).change_study_attrs(study._study_id, change)
    return changed


def _check_identity(definition: StudyDefinition, study: optuna.Study) -> None:
    attributes = study.user_attrs
    if "fingerprint" not in attributes:
        if any(trial.state != TrialState.WAITING for trial in study.get_trials(deepcopy=False)):
            raise StudyMismatch(
                f"study '{study.study_name}' contains trials that hpsearch did not create; choose another study.name"
            )
        if study.direction != StudyDirection.MAXIMIZE:
            raise StudyMismatch(f"study '{study.study_name}' is a minimization study; choose another study.name")
    elif attributes["fingerprint"] != definition.fingerprint:
        stored, wanted = attributes["identity"], json.loads(json.dumps(definition.identity))
        differing = [
            f"\n  {key}: {stored.get(key, 'absent')} -> {wanted.get(key, 'absent')}"
            for key in sorted(stored.keys() | wanted.keys())
            if stored.get(key) != wanted.get(key)
        ]
        raise StudyMismatch(
            f"study '{study.study_name}' was started with different settings:{''.join(differing)}\n"
            "Undo the change, or set study.name in the file to start a new study."
        )
