"""Checkpoints of training states, written atomically and verified before they are read, and which ones a study needs.

A checkpoint is the output of `torch.save`, followed by its SHA-256. `torch.load(file, weights_only=True)` reads it too.
"""

import hashlib
import io
import json
import logging
import pickle
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import optuna
from optuna.trial import TrialState

from hpsearch.config.definition import StudyDefinition
from hpsearch.config.space import Suggests
from hpsearch.errors import CheckpointError
from hpsearch.storage.artifacts import Folder
from hpsearch.storage.tables import by_value, count_interruptions

logger = logging.getLogger(__name__)

State = dict[str, Any]
_LONGEST_PAUSE = 300.0  # seconds between attempts while writing fails
_DIGEST_SIZE = hashlib.sha256().digest_size
_NAME = re.compile(r"trial-\d+(-\d+)?\.ckpt(\.([0-9a-f]{8}\.)?tmp)?")
_EXPORT = "export-"


class Checkpoint:
    """The checkpoint of an attempt at a trial, written every few seconds during training.

    `names` are the file names of the trial's attempts, the current one last. Only that file is written; the newest of
    the others is resumed from. `identity` describes the training; a file with another identity is ignored. `interval`
    is the minimum number of seconds between two writes. If a write fails, a warning is logged, the trial continues, and
    attempts are made less and less often until one succeeds.
    """

    def __init__(self, folder: Folder, names: Sequence[str], identity: Mapping[str, Any], interval: float = 0) -> None:
        self.folder = folder
        *self.earlier, self.name = names
        self.identity = json.dumps(identity, sort_keys=True)
        self.interval = interval
        self._pause = 0.0  # seconds, after failures
        self._written = time.monotonic()
        self._has_warned = False

    def load(self) -> State | None:
        """Load the newest valid state of this training, if any; invalid files are skipped with a warning."""
        for name in reversed(self.earlier):
            try:
                saved = read(self.folder, name)
            except FileNotFoundError:
                continue
            except (CheckpointError, OSError) as error:
                logger.warning("warning: %s, ignoring it", error)
                continue
            if saved.get("identity") == self.identity:
                state: State = saved["state"]
                return state
        return None

    def write_if_due(self, capture: Callable[[], State]) -> None:
        """Write the state that `capture` returns if the last write was at least `interval` seconds ago."""
        if time.monotonic() - self._written >= max(self.interval, self._pause):
            self.write(capture())

    def write(self, state: State) -> None:
        """Write the state now."""
        try:
            write(self.folder, self.name, {"identity": self.identity, "state": state})
            self._pause = 0.0
        except OSError as error:
            self._pause = min(2 * max(self.interval, self._pause, 0.5), _LONGEST_PAUSE)
            if not self._has_warned:
                logger.warning(
                    "warning: cannot write a checkpoint to %s (%s); if this process stops, the training restarts from "
                    "its last checkpoint",
                    self.folder / self.name,
                    error.strerror,
                )
            self._has_warned = True
        self._written = time.monotonic()


def checkpoint_name(number: int, attempt: int = 0) -> str:
    """Return the file name of the checkpoint of an attempt at a trial."""
    return f"trial-{number}-{attempt}.ckpt" if attempt else f"trial-{number}.ckpt"


def export_checkpoint_name(number: int, i: int) -> str:
    """Return the file name of the checkpoint of a network that is trained for an export of a trial."""
    return f"{_EXPORT}{number}-{i}.ckpt"


def find_export_checkpoints(folder: Folder) -> list[str]:
    """Return the file names of the checkpoints of exports that have not finished, partial ones included."""
    return [name for name in folder.find() if name.startswith(_EXPORT)]


def find_checkpoints(folder: Folder) -> list[str]:
    """Return the file names of all checkpoints in a folder, partial ones included."""
    return [name for name in folder.find() if _NAME.fullmatch(name)]


def write(folder: Folder, name: str, content: Mapping[str, Any]) -> None:
    """Replace the file atomically, as `Folder.write` does. Raises `OSError`."""
    import torch  # takes seconds, and reading a study does not need it

    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    payload = buffer.getvalue()
    folder.write(name, payload + hashlib.sha256(payload).digest())


def read(folder: Folder, name: str) -> dict[str, Any]:
    """Read a file written by `write`; its digest is verified before anything is parsed.

    Never executes code from the file. Raises `CheckpointError` if the file is not a valid checkpoint, and `OSError`.
    """
    import torch

    content = folder.read(name)
    payload, digest = content[:-_DIGEST_SIZE], content[-_DIGEST_SIZE:]
    if hashlib.sha256(payload).digest() != digest:
        raise CheckpointError(f"checkpoint {folder / name} is corrupt")
    try:
        loaded: dict[str, Any] = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"checkpoint {folder / name} was not written by hpsearch") from error
    return loaded


def artifact_folder(definition: StudyDefinition) -> Folder:
    """Return the folder for checkpoints and tracebacks of all studies with the definition's name."""
    return Folder(definition.study.artifacts) / definition.study.name


def checkpoint_folder(definition: StudyDefinition, study: optuna.Study) -> Folder:
    """Return the folder of the study's checkpoints; a study with the same name in another database has its own."""
    return artifact_folder(definition) / str(study.user_attrs.get("id", ""))


def find_unneeded_checkpoints(folder: Folder, study: optuna.Study, keep: int) -> list[str]:
    """Return the names of the study's checkpoints in its folder that are not needed.

    Of the `keep` best trials, the newest is needed; of an unfinished one also the one before, and the temporary file of
    its attempt, because its worker may be writing the newest at this moment.
    """
    # List the files before the trials: a trial is stored before it writes its first file.
    files = find_checkpoints(folder)
    if not files:
        return []
    trials = study.get_trials(deepcopy=False)
    best = sorted((trial for trial in trials if trial.state == TrialState.COMPLETE), key=by_value)
    unfinished = [trial for trial in trials if not trial.state.is_finished()]
    needed = set[str]()
    for some, n_newest in ((best[:keep], 1), (unfinished, 2)):
        for trial in some:
            needed |= {*[name for name in checkpoints_of(trial) if name in files][-n_newest:]}
    written = tuple(f"{checkpoints_of(trial)[-1]}." for trial in unfinished)
    return [name for name in files if name not in needed and not name.startswith(written)]


def checkpoints_of(trial: Suggests) -> list[str]:
    """Return the file names of the checkpoints of a trial's attempts, the current one last.

    In older studies an attempt has a trial number of its own, which the trial lists in `attempts`.
    """
    earlier = [checkpoint_name(number) for number in trial.user_attrs.get("attempts", ())]
    return earlier + [checkpoint_name(trial.number, i) for i in range(count_interruptions(trial) + 1)]


def remove_checkpoints(folder: Folder, names: Iterable[str]) -> None:
    """Remove the files that exist; if one cannot be removed, only log a warning."""
    try:
        for name in names:
            folder.remove(name)
    except OSError as error:
        logger.warning("cannot remove old checkpoints in %s (%s)", folder, error.strerror)


def sweep_checkpoints(folder: Folder, study: optuna.Study, keep: int) -> None:
    """Remove the checkpoints that are no longer needed: see `find_unneeded_checkpoints`."""
    try:
        for name in find_unneeded_checkpoints(folder, study, keep):
            folder.remove(name)
    except OSError as error:
        logger.warning("cannot remove old checkpoints in %s (%s)", folder, error.strerror)
