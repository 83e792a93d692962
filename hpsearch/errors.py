"""All errors that hpsearch raises, with the exit status of the command line for each.

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
├── OwnCodeError              1
├── BundleError               1
├── TrialLost                 1
├── Drained                  75
│   ├── Interrupted         130
│   └── Stopped              75
└── Diverged                  1
"""

import ast
import inspect
import textwrap
from collections.abc import Sequence
from typing import Any


def read_docstring(documented: Any) -> str:
    """Return the docstring of a class or function, from its source if Python has dropped it (PYTHONOPTIMIZE=2)."""
    if documented.__doc__ is not None:
        return str(documented.__doc__)
    [node] = ast.parse(textwrap.dedent(inspect.getsource(documented))).body
    return ast.get_docstring(node) or ""  # type: ignore[arg-type]  # a class or function


class HpsearchError(Exception):
    """An error occurred in hpsearch."""

    exit_status = 1

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or read_docstring(type(self)))


class UsageError(HpsearchError):
    """Invalid argument."""

    exit_status = 2


class DefinitionError(UsageError):
    """The study file is invalid; `problems` holds one line per problem."""

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(f"{source}: {problem}" for problem in problems))


class StudyMismatch(UsageError):
    """The stored study was started with a different definition."""


class DataError(HpsearchError):
    """The images cannot be read."""


class StorageError(HpsearchError):
    """The database contains something that hpsearch cannot use."""


class StorageUnavailable(StorageError):
    """The database or the artifact store cannot be reached."""

    exit_status = 75


class StudyNotFound(HpsearchError):
    """The database has no study with this name."""


class NoCompletedTrial(HpsearchError):
    """No completed trial yet."""

    exit_status = 4


class BudgetSpent(HpsearchError):
    """The study's budget is used up."""

    exit_status = 0


class BudgetInFlight(HpsearchError):
    """The running trials may use up the budget; no other trial can start now."""

    exit_status = 0


class TooManyFailures(HpsearchError):
    """The study reached its limit of failed trials."""


class WorkerError(HpsearchError):
    """The workers cannot continue."""


class ClusterError(HpsearchError):
    """The Ray cluster cannot be reached, or its tasks cannot continue."""


class RepeatedFailures(HpsearchError):
    """A worker failed several trials in a row."""


class CheckpointError(HpsearchError):
    """The checkpoint is corrupt or not a checkpoint."""


class ImageError(HpsearchError):
    """The file cannot be read as an image."""


class OwnCodeError(HpsearchError):
    """A function that the study file names failed, or returned something that hpsearch cannot use."""


class BundleError(HpsearchError):
    """The model folder is corrupt or not a model folder of hpsearch."""


class TrialLost(HpsearchError):
    """Another worker has taken over the trial, or the trial was ended."""


class Drained(HpsearchError):
    """Stopped before the budget was used up; run the same command to continue."""

    exit_status = 75


class Interrupted(Drained):
    """Interrupted; run the same command to continue."""

    exit_status = 130


class Stopped(Drained):
    """The study was stopped; resume it with: hpsearch run STUDY"""


class Diverged(HpsearchError):
    """The training diverged (loss is NaN or infinite)."""
