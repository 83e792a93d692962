"""Create, resume and load studies, never mixing trials of two definitions; stop and extend them, and enqueue trials."""

import hashlib
import json
import logging
import uuid
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.study import StudyDirection
from optuna.trial import TrialState

from hpsearch.config.definition import StudyDefinition, check_new, read_identity
from hpsearch.config.urls import show_url
from hpsearch.config.validation import check_try, complete_try
from hpsearch.errors import DataError, DefinitionError, StudyMismatch, StudyNotFound, UsageError
from hpsearch.storage.artifacts import Folder
from hpsearch.storage.checkpoints import checkpoint_folder
from hpsearch.storage.engine import creation_lock
from hpsearch.storage.rdb import Storage, open_storage, storage_of

if TYPE_CHECKING:
    from hpsearch.data.dataset import ImageData
    from hpsearch.data.inventory import Inventory
    from hpsearch.data.sets import DataSet
    from hpsearch.training.networks import OwnNetwork

logger = logging.getLogger(__name__)


def start_study(
    definition: StudyDefinition,
    *,
    keeps_extension: bool = True,
    resumes: bool = True,
    data: "DataSet | Path | str | None" = None,
    tries: bool = True,
    on_tried: "Callable[[OwnNetwork, DataSet], None]" = lambda network, data_set: None,
) -> None:
    """Create or resume the definition's study with `open_study`, after checking its artifact store.

    If `resumes` is false, an existing study keeps its budget and stays stopped if it was. A network of the user's is
    tried (`try_network`) before its study is created, if `tries` is true; then an edit that corrects it needs no new
    name; `on_tried` gets it. `data` is the folder of the images, or the open data set, as for `open_data_set`. Raises
    the errors of `Folder.check`, `open_storage`, `open_study` and `try_network`.
    """
    Folder(definition.study.artifacts).check()
    storage = open_storage(definition.study.storage)
    try:
        if tries and definition.network.code and definition.study.name not in optuna.get_all_study_names(storage):
            from hpsearch.training.run import open_data_set
            from hpsearch.training.tryout import try_network  # takes seconds, with torch

            data_set = open_data_set(definition, data)
            if network := try_network(definition, data_set.image_shape, len(data_set.class_names)):
                on_tried(network, data_set)
        if resumes:
            resume_study(open_study(definition, storage, keeps_extension=keeps_extension))
            return
        try:
            load_study(definition, storage)
        except StudyNotFound:
            open_study(definition, storage)
    finally:
        storage.engine.dispose()


def open_study(definition: StudyDefinition, storage: Storage, *, keeps_extension: bool = True) -> optuna.Study:
    """Create or resume the definition's study, and store its budget and identity in it.

    The trials of `first` are enqueued once. The number of trials at which the search ends is what was said last:

    - `run --trials N` (`keeps_extension` is false) sets it to N, and raises `UsageError` if more have started;
    - `add --trials N` (`extend_study`) sets it to N more;
    - `run` sets it to the study file's number, or keeps what `add` has set since the file had another number.

    It is never below the number of finished and running trials. Raises `StudyMismatch`, and changes nothing, if the
    stored study was started with another definition; budget, sampler, pruner, recovery and retrain may differ. Raises
    the errors of `check_new` if there is no such study yet.
    """
    name = definition.study.name
    with creation_lock(storage.engine.url):
        try:
            storage.get_study_id_from_name(name)
        except KeyError:
            check_new(definition, f"study '{name}'")
        study = optuna.create_study(study_name=name, storage=storage, direction="maximize", load_if_exists=True)
        _check_identity(definition, study)
        if "fingerprint" not in study.user_attrs:
            for values in definition.first[len(study.get_trials(deepcopy=False)) :]:
                study.enqueue_trial(values)
            study.set_user_attr("identity", definition.identity)
        if "id" not in study.user_attrs:
            study.set_user_attr("id", uuid.uuid4().hex[:8])

        def set_budget(attributes: dict[str, Any], n_started: int) -> dict[str, Any]:
            n_trials = definition.budget.trials
            if n_trials < n_started and not keeps_extension:
                raise UsageError(
                    f"--trials {n_trials}: study '{name}' already has {n_started} trials, and --trials is the total; "
                    f"to run {n_trials} more: hpsearch add STUDY --trials {n_trials}"
                )
            extension = attributes.get("extension", {})
            if extension.get("of") != n_trials or not keeps_extension:
                extension = {"of": n_trials, "by": 0}
            budget = definition.budget.model_dump(exclude_none=True)
            return {"extension": extension, "budget": budget | {"trials": max(n_trials + extension["by"], n_started)}}

        storage.change_budget(study._study_id, set_budget)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            study.set_metric_names([f"validation {definition.study.metric_title}"])
        if "fingerprint" not in study.user_attrs:
            for code in definition.codes:
                _source_folder(definition, study).write(code.name, code.source.encode())
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


def check_data(definition: StudyDefinition, study: optuna.Study, data: "ImageData", *, stores: bool = False) -> None:
    """Raise `StudyMismatch`, with what has changed, if the study was searched on other data.

    A search that `stores` is the first to use data notes what they are; older versions did not, and then any data fit.
    """
    found, known = data.describe(), study.user_attrs.get("data")
    if known is None and stores:
        known = _note_data(definition, study, data, found)
    if known in (None, found):
        return
    title, inventory = definition.data.title, data.inventory
    changes = _compare_images(definition, study, inventory) if inventory and "counts" in known else []
    names = {"sha256": "SHA-256 of labels and pixels"}
    changes = changes or [
        f"{names.get(key, key)}: {known.get(key)} -> {value}" for key, value in found.items() if known.get(key) != value
    ]
    undo = "Point --data or HPSEARCH_DATA at those images"
    if inventory:
        undo = "Undo the change, or point --data at a copy of the images as they were"
    raise StudyMismatch(
        f"study '{study.study_name}' was searched on other images than these of {title}:"
        + "".join(f"\n  {change}" for change in changes)
        + f"\n{undo}, or search on these in a new study: set study.name in the file."
    )


def _note_data(definition: StudyDefinition, study: optuna.Study, data: "ImageData", found: dict[str, Any]) -> Any:
    """Note what the data of a study are, and return what is noted: another machine may have been first."""
    try:
        storage = storage_of(study)
    except UsageError:  # a plain study of Optuna
        study.set_user_attr("data", found)
        return found
    if data.inventory:  # too long for the database, which every worker reads again and again
        folder, name = checkpoint_folder(definition, study), _name_list(data.inventory.sha256)
        try:
            folder.write(name, data.inventory.to_bytes())
        except OSError as error:
            advice = "if the images change, the study can only say how many a class has lost or gained"
            logger.warning("cannot write the list of images %s: %s; %s", folder / name, error.strerror or error, advice)
    noted = storage.change_study_attrs(study._study_id, lambda attributes: {"data": attributes.get("data") or found})
    return noted["data"]


def _compare_images(definition: StudyDefinition, study: optuna.Study, inventory: "Inventory") -> list[str]:
    """Return what differs between these images and those of the study, as far as it is known."""
    known = study.user_attrs["data"]
    try:
        content = checkpoint_folder(definition, study).read(_name_list(known["sha256"]))
        return inventory.compare(type(inventory).from_bytes(content))
    except (OSError, DataError):  # the list is missing, so only the numbers of images are known
        before, now = (
            dict(zip(names, counts, strict=True))
            for names, counts in ((known["class_names"], known["counts"]), (inventory.class_names, inventory.counts))
        )
        return [
            f"images of class {name}: {before.get(name, 0):,} -> {now.get(name, 0):,}"
            for name in dict.fromkeys([*before, *now])
            if before.get(name, 0) != now.get(name, 0)
        ]


def _name_list(sha256: str) -> str:
    return f"images-{sha256[:16]}.json.z"


def count_validation(definition: StudyDefinition, study: optuna.Study) -> int:
    """Return the number of validation images of the study; 0 for own images that no search has read."""
    known = study.user_attrs.get("data") or {"validation": definition.data.validation}
    return int(known["validation"] or 0)


def check_writable(study: optuna.Study) -> None:
    """Raise `StorageError` if the study may only be read."""
    storage_of(study).change_study_attrs(study._study_id, lambda attributes: {"fingerprint": attributes["fingerprint"]})


def check_direction(study: optuna.Study) -> None:
    """Raise `StudyMismatch` unless the study maximizes one value, as metrics need."""
    if study.directions != [StudyDirection.MAXIMIZE]:
        raise StudyMismatch(
            f"study '{study.study_name}' does not maximize one value, the accuracy; create another one with "
            "direction='maximize'"
        )


def _check_identity(definition: StudyDefinition, study: optuna.Study) -> None:
    attributes = study.user_attrs
    if "fingerprint" not in attributes:
        if any(trial.state != TrialState.WAITING for trial in study.get_trials(deepcopy=False)):
            raise StudyMismatch(
                f"study '{study.study_name}' contains trials that hpsearch did not create; choose another study.name"
            )
        check_direction(study)
    elif differing := _find_differences(attributes, definition):
        raise StudyMismatch(
            f"study '{study.study_name}' was started with different settings:{''.join(differing)}\n"
            f"Undo the change{_find_source(definition, study)}, or set study.name in the file to start a new study."
        )


def _source_folder(definition: StudyDefinition, study: optuna.Study) -> Folder:
    return checkpoint_folder(definition, study) / "source"


def _find_source(definition: StudyDefinition, study: optuna.Study) -> str:
    """Return where the file of a network of the user's is as the study was started with, if it has changed since."""
    code, wanted = definition.network.code, study.user_attrs["identity"].get("network.source")
    if code is None or wanted in (None, code.sha256):
        return ""
    folder = _source_folder(definition, study)
    try:
        is_there = hashlib.sha256(folder.read(code.name)).hexdigest() == wanted
    except OSError:
        return ""
    return f" ({code.name} as it was: {folder / code.name})" if is_there else ""


def _find_differences(attributes: dict[str, Any], definition: StudyDefinition) -> list[str]:
    """Return a line for each setting that differs; equal numbers, which older versions wrote as in the file, do not."""
    if attributes["fingerprint"] == definition.fingerprint:
        return []
    wanted = definition.identity
    may_change = ("sampler.", "pruner.")  # in older versions they might not
    stored = {key: value for key, value in attributes["identity"].items() if not key.startswith(may_change)}
    with suppress(DefinitionError):  # of another version; then it is compared as it is
        stored = read_identity(stored, definition.codes)
    code = definition.network.code
    names = {"network.source": f"{code.name} was edited, SHA-256"} if code else {}
    stored, wanted = ({"study.metric": "accuracy"} | each for each in (stored, wanted))  # absent if it is the default
    return [
        f"\n  {names.get(key, key)}: {stored.get(key, 'absent')} -> {wanted.get(key, 'absent')}"
        for key in sorted(stored.keys() | wanted.keys())
        if json.dumps(stored.get(key), sort_keys=True) != json.dumps(wanted.get(key), sort_keys=True)
    ]


def stop_study(study: optuna.Study) -> None:
    """Make every worker finish its epoch, save a checkpoint, re-queue its trial and exit."""
    study.set_user_attr("stopped", True)


def resume_study(study: optuna.Study) -> None:
    """Let workers start trials again."""
    if study.user_attrs.get("stopped"):
        study.set_user_attr("stopped", False)


def extend_study(definition: StudyDefinition, study: optuna.Study, n_trials: int) -> int:
    """Add trials to the study's budget and return its new number of trials. Running workers pick them up.

    They come on top of the budget, or of the trials that have started if these are more. `open_study` says how long the
    extension lasts; it is stored as the number of trials in the study file (`of`) and the difference from it (`by`).
    """
    of = definition.budget.trials

    def extend(attributes: dict[str, Any], n_started: int) -> dict[str, Any]:
        total = max(attributes["budget"]["trials"], n_started) + n_trials
        return {"budget": attributes["budget"] | {"trials": total}, "extension": {"of": of, "by": total - of}}

    return int(storage_of(study).change_budget(study._study_id, extend)["budget"]["trials"])


def enqueue_trial(definition: StudyDefinition, study: optuna.Study, settings: Iterable[str]) -> int:
    """Enqueue a trial with settings `NAME=VALUE` and return its number; the sampler chooses the rest.

    Raises `UsageError` with one line per invalid setting; nothing is enqueued then.
    """
    values: dict[str, Any] = {}
    problems: list[str] = []
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            problems.append(f"{setting}: expected NAME=VALUE, e.g. lr=1e-3")
        elif name in values:
            problems.append(f"{setting}: {name} was already set to {values[name]!r}")
        values[name] = _parse(text)
    if not problems:
        problems = [f"{name}: {message}" for (name, *_), message in check_try(values, definition.space)]
    if problems:
        raise UsageError("\n".join(problems))
    values = complete_try(values, definition.space)
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
