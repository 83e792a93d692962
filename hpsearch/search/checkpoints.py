"""Where a study keeps its checkpoints, and which ones it still needs."""

import logging
from weakref import WeakKeyDictionary

import optuna
from optuna.trial import TrialState

from hpsearch.config.definition import StudyDefinition
from hpsearch.config.space import Suggests
from hpsearch.search.selection import by_value
from hpsearch.storage.artifacts import Folder
from hpsearch.storage.checkpoints import checkpoint_name, find_checkpoints
from hpsearch.storage.tables import count_interruptions

logger = logging.getLogger(__name__)

_ids = WeakKeyDictionary[optuna.Study, str]()  # a cache: ids never change and are needed after each trial


def artifact_folder(definition: StudyDefinition) -> Folder:
    """Return the folder for checkpoints and tracebacks of all studies with the definition's name."""
    return Folder(definition.study.artifacts) / definition.study.name


def checkpoint_folder(definition: StudyDefinition, study: optuna.Study) -> Folder:
    """Return the folder of the study's checkpoints; a study with the same name in another database has its own."""
    if study not in _ids and (found := study.user_attrs.get("id")):
        _ids[study] = found
    return artifact_folder(definition) / _ids.get(study, "")


def find_unneeded_checkpoints(definition: StudyDefinition, study: optuna.Study) -> list[str]:
    """Return the names of checkpoints that neither unfinished trials nor the `recovery.keep` best trials need."""
    # List the files before the trials: a trial is stored before it writes its first file.
    files = find_checkpoints(checkpoint_folder(definition, study))
    if not files:
        return []
    trials = study.get_trials(deepcopy=False)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    best = sorted(complete, key=by_value)[: definition.recovery.keep]
    needed = {name for trial in trials if not trial.state.is_finished() for name in checkpoints_of(trial)}
    for trial in best:
        needed |= {*[name for name in checkpoints_of(trial) if name in files][-1:]}
    return [name for name in files if name.removesuffix(".tmp") not in needed]


def checkpoints_of(trial: Suggests) -> list[str]:
    """Return the file names of the checkpoints of a trial's attempts, the current one last.

    In older studies an attempt has a trial number of its own, which the trial lists in `attempts`.
    """
    earlier = [checkpoint_name(number) for number in trial.user_attrs.get("attempts", ())]
    return earlier + [checkpoint_name(trial.number, i) for i in range(count_interruptions(trial) + 1)]


def sweep_checkpoints(definition: StudyDefinition, study: optuna.Study) -> None:
    """Remove the checkpoints that are no longer needed."""
    folder = checkpoint_folder(definition, study)
    try:
        for name in find_unneeded_checkpoints(definition, study):
            folder.remove(name)
    except OSError as error:
        logger.warning("cannot remove old checkpoints in %s (%s)", folder, error.strerror)
