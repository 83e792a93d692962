"""Files of training state that are whole or absent, wherever they are kept, and checked before they are read.

A checkpoint is what `torch.save` writes, followed by the SHA-256 of that; `torch.load(file, weights_only=True)` reads
it as well.
"""

import hashlib
import io
import json
import logging
import pickle
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hpsearch.errors import CheckpointError
from hpsearch.storage.artifacts import Folder

logger = logging.getLogger(__name__)

State = dict[str, Any]
_LONGEST_PAUSE = 300.0  # seconds between two tries where writing fails
_DIGEST_SIZE = hashlib.sha256().digest_size
_NAME = re.compile(r"trial-(\d+)\.ckpt(\.tmp)?")


class Checkpoint:
    """The checkpoint of one trial, written every few seconds while it trains, and found again when it is retried.

    `earlier` are the numbers of the trial's attempts before this one, whose files are resumed from, and go once there
    is a newer one. `identity` says what is trained; a file of anything else is not resumed from. `interval` is the
    least number of seconds between two writes. A file that cannot be written costs a warning, not the trial, and the
    next tries are further and further apart until one succeeds.
    """

    def __init__(
        self, folder: Folder, number: int, identity: Mapping[str, Any], earlier: Sequence[int] = (), interval: float = 0
    ) -> None:
        self.folder, self.name = folder, checkpoint_name(number)
        self.earlier = [checkpoint_name(attempt) for attempt in earlier]
        self.identity = json.dumps(identity, sort_keys=True)
        self.interval = interval
        self._pause = 0.0  # seconds, after failures
        self._written = time.monotonic()
        self._has_warned = False

    def load(self) -> State | None:
        """The newest sound state of this training, if there is one; damaged files are named and passed over."""
        for name in reversed(self.earlier):
            try:
                saved = read(self.folder, name)
            except FileNotFoundError:
                continue
            except (CheckpointError, OSError) as error:
                logger.warning("%s", error)
                continue
            if saved.get("identity") == self.identity:
                state: State = saved["state"]
                return state
        return None

    def write_if_due(self, capture: Callable[[], State]) -> None:
        """Write the state that `capture` returns, unless the last write was less than `interval` seconds ago."""
        if time.monotonic() - self._written >= max(self.interval, self._pause):
            self.write(capture())

    def write_always(self) -> None:
        """From now on write whenever it is asked for."""
        self.interval = self._pause = 0.0

    def write(self, state: State) -> None:
        """Write the state now; once it is safe, the files of earlier attempts go."""
        try:
            write(self.folder, self.name, {"identity": self.identity, "state": state})
            self._pause = 0.0
            while self.earlier:
                self.folder.remove(self.earlier[0])
                self.earlier.pop(0)
        except OSError as error:
            self._pause = min(2 * max(self.interval, self._pause, 0.5), _LONGEST_PAUSE)
            if not self._has_warned:
                logger.warning(
                    "no checkpoint can be written to %s (%s), so this trial would start again from its last one",
                    self.folder / self.name,
                    error.strerror,
                )
            self._has_warned = True
        self._written = time.monotonic()


def checkpoint_name(number: int) -> str:
    """The name of a trial's checkpoint, by the number of the trial."""
    return f"trial-{number}.ckpt"


def find_checkpoints(folder: Folder) -> dict[str, int]:
    """The names of the checkpoints in a folder, half-written ones too, each with the number of its trial."""
    matches = {name: _NAME.fullmatch(name) for name in folder.find()}
    return {name: int(match[1]) for name, match in matches.items() if match}


def write(folder: Folder, name: str, content: Mapping[str, Any]) -> None:
    """Replace the file, or leave it as it was, as `Folder.write` does; raises `OSError`."""
    import torch  # which takes seconds, and is not needed for looking at a study

    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    payload = buffer.getvalue()
    folder.write(name, payload + hashlib.sha256(payload).digest())


def read(folder: Folder, name: str) -> dict[str, Any]:
    """The content of a file that `write` wrote; nothing of it is parsed before its digest is checked.

    Reading runs no code. Raises `CheckpointError` for a file that is damaged or something else, and `OSError`.
    """
    import torch

    content = folder.read(name)
    payload, digest = content[:-_DIGEST_SIZE], content[-_DIGEST_SIZE:]
    if hashlib.sha256(payload).digest() != digest:
        raise CheckpointError(f"the checkpoint {folder / name} is damaged, and is not used")
    try:
        loaded: dict[str, Any] = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"the checkpoint {folder / name} is not one of hpsearch, and is not used") from error
    return loaded
