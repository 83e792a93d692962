"""Control a search while it runs: start, stop, resume and extend it, and enqueue trials."""

import json
from collections.abc import Iterable
from typing import Any

import optuna
from optuna.trial import TrialState

from hpsearch.config.definition import StudyDefinition
from hpsearch.config.validation import check_try
from hpsearch.errors import StudyNotFound, UsageError
from hpsearch.search.study import change_attributes, load_study, open_study
from hpsearch.storage.artifacts import Folder
from hpsearch.storage.rdb import open_storage, storage_of


def start_study(definition: StudyDefinition, *, keeps_extension: bool = True, resumes: bool = True) -> None:
    """Create or resume the definition's study with `open_study`, after checking its artifact store.

    If `resumes` is false, an existing study keeps its budget and stays stopped if it was. Raises the errors of
    `Folder.check`, `open_storage` and `open_study`.
    """
    Folder(definition.study.artifacts).check()
    storage = open_storage(definition.study.storage)
    try:
        if resumes:
            resume_study(open_study(definition, storage, keeps_extension=keeps_extension))
            return
        try:
            load_study(definition, storage)
        except StudyNotFound:
            open_study(definition, storage)
    finally:
        storage.engine.dispose()


def stop_study(study: optuna.Study) -> None:
    """Make every worker finish its epoch, save a checkpoint, re-queue its trial and exit."""
    study.set_user_attr("stopped", True)


def resume_study(study: optuna.Study) -> None:
    """Let workers start trials again."""
    if study.user_attrs.get("stopped"):
        study.set_user_attr("stopped", False)


def extend_study(study: optuna.Study, n_trials: int) -> int:
    """Add trials to the study's budget and return its new number of trials. Running workers pick them up.

    The extension is dropped when the study is run with a different number of trials.
    """

    def extend(attributes: dict[str, Any]) -> dict[str, Any]:
        budget = attributes["budget"]
        extension = attributes.get("extension", {"of": budget["trials"], "by": 0})
        return {
            "budget": budget | {"trials": budget["trials"] + n_trials},
            "extension": extension | {"by": extension["by"] + n_trials},
        }

    return int(change_attributes(study, extend)["budget"]["trials"])


def enqueue_trial(definition: StudyDefinition, study: optuna.Study, settings: Iterable[str]) -> int:
    """Enqueue a trial with settings `NAME=VALUE` and return its number; the sampler chooses the rest.

    Raises `UsageError` with one line per invalid setting; nothing is enqueued then.
    """
    values: dict[str, Any] = {}
    problems: list[str] = []
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            problems.append(f"--set {setting}: expected NAME=VALUE, e.g. lr=1e-3")
        elif name in values:
            problems.append(f"--set {setting}: {name} was already set to {values[name]!r}")
        values[name] = _parse(text)
    if not problems:
        problems = [f"--set {name}: {message}" for (name, *_), message in check_try(values, definition.space)]
    if problems:
        raise UsageError("\n".join(problems))
    trial = optuna.trial.create_trial(state=TrialState.WAITING, system_attrs={"fixed_params": values})
    storage = storage_of(study)
    return storage.get_trial_number_from_id(storage.create_new_trial(study._study_id, template_trial=trial))


def _parse(text: str) -> Any:
    """Convert a value on the command line to a number, boolean or string."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    return value if isinstance(value, bool | int | float | str) else text
