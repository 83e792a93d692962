"""Every error that hpsearch raises, each with the exit status of the command line.

HpsearchError                 1
├── UsageError                2
│   ├── DefinitionError       2
│   └── StudyMismatch         2
├── DataError                 1
├── StorageError              1
│   └── StorageUnavailable   75
├── StudyNotFound             1
├── NoCompletedTrial          4
├── BudgetSpent               0
├── BudgetInFlight            0
├── TooManyFailures           1
├── WorkerError               1
├── ClusterError              1
├── RepeatedFailures          1
├── CheckpointError           1
├── ImageError                1
├── BundleError               1
├── Drained                  75
│   ├── Interrupted         130
│   └── Stopped              75
└── Diverged                  1
"""

from collections.abc import Sequence


class HpsearchError(Exception):
    """Something went wrong in hpsearch."""

    exit_status = 1

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or type(self).__doc__)


class UsageError(HpsearchError):
    """An argument cannot be used."""

    exit_status = 2


class DefinitionError(UsageError):
    """The study file is not valid; `problems` holds one line for each mistake."""

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(f"{source}: {problem}" for problem in problems))


class StudyMismatch(UsageError):
    """The stored study was searched with another definition."""


class DataError(HpsearchError):
    """The images cannot be read."""


class StorageError(HpsearchError):
    """The storage holds something that hpsearch cannot use."""


class StorageUnavailable(StorageError):
    """The storage, or the artifact store, cannot be reached."""

    exit_status = 75


class StudyNotFound(HpsearchError):
    """The storage holds no study of that name."""


class NoCompletedTrial(HpsearchError):
    """No trial of the study is complete yet."""

    exit_status = 4


class BudgetSpent(HpsearchError):
    """The study has all that its budget allows."""

    exit_status = 0


class BudgetInFlight(HpsearchError):
    """Trials that are running may use up the budget; there is no room for another one now."""

    exit_status = 0


class TooManyFailures(HpsearchError):
    """The study reached its bound of failed trials."""


class WorkerError(HpsearchError):
    """The workers cannot go on."""


class ClusterError(HpsearchError):
    """The Ray cluster cannot be reached, or the tasks in it cannot go on."""


class RepeatedFailures(HpsearchError):
    """One worker failed several trials in a row."""


class CheckpointError(HpsearchError):
    """The checkpoint is damaged or not a checkpoint."""


class ImageError(HpsearchError):
    """A file cannot be read as an image."""


class BundleError(HpsearchError):
    """The bundle is damaged or not a bundle."""


class Drained(HpsearchError):
    """Drained with budget left; start again to go on."""

    exit_status = 75


class Interrupted(Drained):
    """Interrupted; run again to go on."""

    exit_status = 130


class Stopped(Drained):
    """The study was stopped for all workers; go on with: hpsearch run STUDY."""


class Diverged(HpsearchError):
    """The training loss is not finite."""
