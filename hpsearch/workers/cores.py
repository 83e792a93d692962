"""Counts the workers of a study on this machine, which share its cores, and lets those wait that find none free.

Each worker holds a lock on a file in a temporary folder of the user. The lock ends with its process.
"""

import errno
import fcntl
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

import optuna

from hpsearch.errors import BudgetInFlight, StorageUnavailable
from hpsearch.storage.rdb import storage_of
from hpsearch.training.devices import count_cores, may_have_gpu
from hpsearch.workers.shutdown import Drain

logger = logging.getLogger(__name__)

_POLL = 3.0  # seconds between two looks whether a core is free


class Neighbors:
    """The workers of a study on this machine that may use the same cores as this process."""

    def __init__(self, study: optuna.Study) -> None:
        self._folder = Path(tempfile.gettempdir(), f"hpsearch-{os.getuid()}")  # also where XDG_RUNTIME_DIR is not set
        self._study = study.user_attrs.get("id", "")

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Let the others count this process inside the `with` block. Logs a warning if that is impossible."""
        file = self._folder / f"{self._study}-{os.getpid()}"
        try:
            stream = _create_locked(file)
        except OSError as error:
            problem = f"cannot write {error.filename or file}: {error.strerror}"
            logger.warning("workers of this machine do not know of each other (%s); set --threads for each", problem)
            yield
            return
        with stream:
            try:
                yield
            finally:
                file.unlink(missing_ok=True)

    def count(self) -> int:
        """Return the number of workers that have joined, this one included if it has."""
        own = _own_cores()
        return sum(not own.isdisjoint(cores) for cores in map(_read_cores, self._folder.glob(f"{self._study}-*")))


def _create_locked(file: Path) -> TextIO:
    """Create a file with the cores of this process; it is locked before others can see it. Raises `OSError`."""
    folder = file.parent
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():  # anybody may have created it
        raise PermissionError(errno.EPERM, "the folder belongs to another user", str(folder))
    hidden = file.with_name(f".{file.name}")
    stream = hidden.open("w")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.write(" ".join(map(str, sorted(_own_cores()))))
        stream.flush()
        hidden.rename(file)
    except OSError:
        stream.close()
        raise
    return stream


def _read_cores(file: Path) -> set[int]:
    """Return the cores that a worker may use; none if it has ended, and then its file is removed."""
    with suppress(FileNotFoundError, PermissionError), file.open() as stream:  # it has just ended, or is another user's
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return {int(core) for core in stream.read().split()}
        file.unlink(missing_ok=True)
    return set()


def _own_cores() -> set[int]:
    """Return the numbers of the cores on which the system may run this process."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else {*range(os.cpu_count() or 1)}


def needs_core(n_workers: int) -> bool:
    """Return whether `n_workers` workers need more cores than this machine has, so that one of them is of no use."""
    return n_workers > count_cores() and not may_have_gpu()


def wait_for_core(neighbors: Neighbors, study: optuna.Study, drain: Drain) -> None:
    """Wait while the others need all cores.

    Raises what starting a trial would raise if the search is over meanwhile, and what the drain does.
    """
    storage = storage_of(study)
    while needs_core(neighbors.count() + 1):
        with suppress(BudgetInFlight, StorageUnavailable):  # the others retry as well
            storage.check_budget(study._study_id)
        drain.event.wait(_POLL)
        drain.check()
