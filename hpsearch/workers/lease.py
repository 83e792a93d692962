"""What keeps a running trial with its worker."""

import logging
import threading
from typing import TYPE_CHECKING, Self

import optuna

from hpsearch.errors import Stopped, StorageError
from hpsearch.training.trainer import EpochResult

if TYPE_CHECKING:
    from hpsearch.workers.worker import Worker

logger = logging.getLogger(__name__)


class LeaseLost(Exception):
    """The trial was given to another worker."""


class Lease(threading.Thread):
    """While entered, beats for a running trial, notices when it was taken away, and reaps the trials of the dead."""

    def __init__(self, worker: "Worker", trial: optuna.Trial) -> None:
        super().__init__(name=f"lease of trial {trial.number}", daemon=True)
        self.worker, self.trial_id = worker, trial._trial_id
        self.ended, self.lost = threading.Event(), threading.Event()
        self.is_between_epochs = False

    def check(self) -> None:
        """Store what is new; raise if the trial is not this worker's any more, or somebody wishes to stop.

        A wish to stop the whole study is heard when the epoch is finished.
        """
        self.worker.drain.check()
        if self.lost.is_set():
            raise LeaseLost
        self.worker.storage.store(self.trial_id)
        if self.is_between_epochs and self.worker.storage.is_stopped:
            raise Stopped
        self.is_between_epochs = False

    def finish_epoch(self, _result: EpochResult) -> None:
        self.is_between_epochs = True

    def run(self) -> None:
        storage = self.worker.storage
        while not self.ended.wait(self.worker.definition.recovery.heartbeat):
            try:
                if not storage.beat(self.trial_id):
                    self.lost.set()
                    return
                self.worker.reap()
            except StorageError as error:  # the worker's own calls meet it as well, and end the worker
                logger.warning("%s", error)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.join()
