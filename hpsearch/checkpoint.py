"""Files of training state that are whole or absent: written beside, synced, renamed, checked before they are read.

A checkpoint is what `torch.save` writes, followed by the SHA-256 of that; `torch.load(file, weights_only=True)` reads
it as well.
"""

import hashlib
import io
import json
import logging
import os
import pickle
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hpsearch.errors import CheckpointError

logger = logging.getLogger(__name__)

State = dict[str, Any]
_DIGEST_SIZE = hashlib.sha256().digest_size
_NAME = re.compile(r"trial-(\d+)\.ckpt(\.tmp)?")


class Checkpoint:
    """The checkpoint of one trial, written every few seconds while it trains, and found again when it is retried.

    `earlier` are the numbers of the trial's attempts before this one, whose files are resumed from, and go once there
    is a newer one. `identity` says what is trained; a file of anything else is not resumed from. `interval` is the
    least number of seconds between two writes. A file that cannot be written costs a warning, not the trial.
    """

    def __init__(
        self, folder: Path, number: int, identity: Mapping[str, Any], earlier: Sequence[int] = (), interval: float = 0
    ) -> None:
        self.file = checkpoint_file(folder, number)
        self.earlier = [checkpoint_file(folder, attempt) for attempt in earlier]
        self.identity = json.dumps(identity, sort_keys=True)
        self.interval = interval
        self._written = time.monotonic()
        self._has_warned = False

    def load(self) -> State | None:
        """The newest sound state of this training, if there is one; damaged files are named and passed over."""
        for file in reversed(self.earlier):
            if not file.exists():
                continue
            try:
                saved = read(file)
            except (CheckpointError, OSError) as error:
                logger.warning("%s", error)
                continue
            if saved.get("identity") == self.identity:
                state: State = saved["state"]
                return state
        return None

    def write_if_due(self, capture: Callable[[], State]) -> None:
        """Write the state that `capture` returns, unless the last write was less than `interval` seconds ago."""
        if time.monotonic() - self._written >= self.interval:
            self.write(capture())

    def write(self, state: State) -> None:
        """Write the state now; once it is safe, the files of earlier attempts go."""
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write(self.file, {"identity": self.identity, "state": state})
            for file in self.earlier:
                file.unlink(missing_ok=True)
        except OSError as error:
            if not self._has_warned:
                logger.warning(
                    "no checkpoint can be written to %s (%s), so this trial would start again from its last one",
                    self.file,
                    error.strerror,
                )
            self._has_warned = True
        self._written = time.monotonic()


def checkpoint_file(folder: Path, number: int) -> Path:
    """The file of a trial's checkpoint, by the number of the trial."""
    return folder / f"trial-{number}.ckpt"


def find_checkpoints(folder: Path) -> dict[Path, int]:
    """The checkpoints in a folder, half-written ones too, each with the number of its trial."""
    matches = {file: _NAME.fullmatch(file.name) for file in sorted(folder.glob("trial-*.ckpt*"))}
    return {file: int(match[1]) for file, match in matches.items() if match}


def write(file: Path, content: Mapping[str, Any]) -> None:
    """Replace the file, or leave it as it was: after a kill at any moment, one of both is there, and whole.

    Only one process at a time may write to the same file. Raises `OSError`.
    """
    import torch  # which takes seconds, and is not needed for looking at a study

    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    payload = buffer.getvalue()
    temporary = file.with_name(f"{file.name}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(payload)
            stream.write(hashlib.sha256(payload).digest())
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(file.parent)


def read(file: Path) -> dict[str, Any]:
    """The content of a file that `write` wrote; nothing of it is parsed before its digest is checked.

    Reading runs no code. Raises `CheckpointError` for a file that is damaged or something else, and `OSError`.
    """
    import torch

    content = file.read_bytes()
    payload, digest = content[:-_DIGEST_SIZE], content[-_DIGEST_SIZE:]
    if hashlib.sha256(payload).digest() != digest:
        raise CheckpointError(f"the checkpoint {file} is damaged, and is not used")
    try:
        loaded: dict[str, Any] = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"the checkpoint {file} is not one of hpsearch, and is not used") from error
    return loaded


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
