"""A search is steered while it runs: stopped for all workers, extended, given values to try next."""

import json
from collections.abc import Iterable
from typing import Any

import optuna
from optuna.trial import TrialState

from hpsearch.config.definition import StudyDefinition
from hpsearch.config.validation import check_try
from hpsearch.errors import StudyNotFound, UsageError
from hpsearch.search.study import change_attribute, load_study, open_study
from hpsearch.storage.artifacts import Folder
from hpsearch.storage.rdb import open_storage, storage_of


def start_study(definition: StudyDefinition, *, keeps_extension: bool = True, resumes: bool = True) -> None:
    """Create or resume the definition's study, as `open_study` does, once its artifacts are seen to have a place.

    Unless it `resumes`, a study that is there already is left as it is, with its budget, and stopped if it was. Raises
    what `Folder.check`, `open_storage` and `open_study` raise.
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
    """Make every worker finish its epoch, write a checkpoint, hand its trial back and end."""
    study.set_user_attr("stopped", True)


def resume_study(study: optuna.Study) -> None:
    """Let workers begin trials again."""
    if study.user_attrs.get("stopped"):
        study.set_user_attr("stopped", False)


def extend_study(study: optuna.Study, n_trials: int) -> int:
    """The trials of the study's budget, after so many were added; workers that run see it at their next trial.

    The extension holds as long as the study is run with the trials that it was run with last.
    """

    def extend(budget: dict[str, Any]) -> dict[str, Any]:
        extension = study.user_attrs.get("extension", {"of": budget["trials"], "by": 0})
        study.set_user_attr("extension", extension | {"by": extension["by"] + n_trials})
        return budget | {"trials": budget["trials"] + n_trials}

    return int(change_attribute(study, "budget", extend)["trials"])


def enqueue_trial(definition: StudyDefinition, study: optuna.Study, settings: Iterable[str]) -> int:
    """The number of a waiting trial with the values of settings `name=value`; the sampler adds the others.

    Raises `UsageError` with a line for each setting that cannot be used, and queues nothing then.
    """
    values: dict[str, Any] = {}
    problems: list[str] = []
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            problems.append(f"--set {setting}: must be name=value, such as lr=1e-3")
        elif name in values:
            problems.append(f"--set {setting}: {name} has the value {values[name]!r} already")
        values[name] = _parse(text)
    fixed = definition.to_tables()["fixed"]
    if not problems:
        found = check_try("set", values, definition.search, fixed)
        problems = [f"--{path.replace('.', ' ', 1)}: {message}" for path, message in found]
    if problems:
        raise UsageError("\n".join(problems))
    trial = optuna.trial.create_trial(state=TrialState.WAITING, system_attrs={"fixed_params": values})
    storage = storage_of(study)
    if storage is None:
        raise UsageError(f"study '{study.study_name}' is not in a storage of hpsearch; open it with open_storage")
    return storage.get_trial_number_from_id(storage.create_new_trial(study._study_id, template_trial=trial))


def _parse(text: str) -> Any:
    """The number, boolean or string that a value on the command line stands for."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    return value if isinstance(value, bool | int | float | str) else text
