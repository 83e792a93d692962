"""Trials as users see them: the state and outcome of each, and the progress of the search."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, TrialState

from hpsearch.config.definition import StudyDefinition
from hpsearch.config.urls import show_url
from hpsearch.errors import UsageError
from hpsearch.storage.rdb import storage_of
from hpsearch.storage.tables import count_trials


@dataclass(frozen=True)
class TrialEvent:
    """A change of a trial's state; all but "running" are emitted after the database has committed them.

    `epoch` is the last reported epoch, `value` its validation accuracy. A trial that was failed and re-queued by
    another worker is "dropped".
    """

    worker: str
    number: int
    state: Literal["running", "complete", "pruned", "failed", "dropped"]
    epoch: int = 0
    value: float | None = None
    message: str = ""


Emit = Callable[[TrialEvent], None]


def name_state(trial: FrozenTrial) -> str:
    """Return the trial's state as users read it: Optuna's name in lower case, or "failed"."""
    return "failed" if trial.state == TrialState.FAIL else trial.state.name.lower()


def explain_end(trial: FrozenTrial) -> str:
    """Return why the trial failed or was pruned, in one sentence, or ""."""
    attributes = trial.user_attrs
    if failure := attributes.get("failure"):
        return f"{failure['kind']}: {failure['message']}"
    if trial.state == TrialState.PRUNED and "diverged" in attributes:
        return str(attributes["diverged"])
    pruning = attributes.get("pruning", {})
    if trial.state == TrialState.PRUNED and "threshold" in pruning:
        value, threshold = (f"{pruning[key]:.4f}" for key in ("value", "threshold"))
        if value == threshold:
            value, threshold = (f"{pruning[key]:.6f}" for key in ("value", "threshold"))
        return f"{value} < {threshold} ({pruning['rule']}) at epoch {pruning['epoch']}"
    return ""


def describe_trial(trial: FrozenTrial) -> dict[str, Any]:
    """Return the row of a trial in `trials --json`."""
    return {
        "number": trial.number,
        "state": name_state(trial),
        "value": trial.value if trial.state.is_finished() else None,
        "epoch": trial.last_step or 0,
        "params": trial.params or trial.system_attrs.get("fixed_params", {}),
        "worker": trial.user_attrs.get("worker"),
        "seconds": trial.duration.total_seconds() if trial.duration else None,
        "note": explain_end(trial),
    }


def describe_in_full(study: optuna.Study, number: int) -> dict[str, Any]:
    """Return the document of `show --json`: a trial's row, times, reports, attempts and environment.

    Raises `UsageError` if the study has no trial with that number.
    """
    trials = study.get_trials(deepcopy=False)
    if not 0 <= number < len(trials):
        valid = f"valid numbers are 0 to {len(trials) - 1}" if trials else "it has no trials yet"
        raise UsageError(f"study '{study.study_name}' has no trial {number}; {valid}")
    trial = trials[number]
    attributes, times = trial.user_attrs, (trial.datetime_start, trial.datetime_complete)
    started, ended = (time and time.astimezone().isoformat(timespec="seconds") for time in times)
    return describe_trial(trial) | {
        "started": started,
        "ended": ended,
        "reports": {str(epoch): value for epoch, value in sorted(trial.intermediate_values.items())},
        "images_per_second": attributes.get("images_per_second"),
        "attempts": attributes.get("attempts", []),
        "resumed_after": attributes.get("resumed_after"),
        "failure": attributes.get("failure"),
        "pruning": attributes.get("pruning"),
        "environment": attributes.get("environment"),
    }


def read_status(
    definition: StudyDefinition, study: optuna.Study, trials: list[FrozenTrial] | None = None
) -> dict[str, Any]:
    """Return the document of `status --json`: trial counts, the best trial, workers, epochs run and saved.

    Pass `trials` if the study's trials are already loaded.
    """
    storage = storage_of(study)
    if trials is None and storage:
        counts = storage.read_counts(study._study_id)
    else:
        counts = count_trials(study.get_trials(deepcopy=False) if trials is None else trials)
    n, best, full = counts.by_state, counts.best, definition.budget.epochs
    n_pruned = n.get(TrialState.PRUNED, 0)
    return {
        "study": study.study_name,
        "storage": show_url(definition.study.storage),
        "budget": study.user_attrs["budget"],
        "trials": {
            "complete": n.get(TrialState.COMPLETE, 0),
            "pruned": n_pruned,
            "failed": n.get(TrialState.FAIL, 0),
            "running": n.get(TrialState.RUNNING, 0),
            "waiting": n.get(TrialState.WAITING, 0),
        },
        "best": best and {"number": best.number, "value": best.value, "params": best.params},
        "workers": [
            {"id": trial.user_attrs.get("worker"), "trial": trial.number, "epoch": trial.last_step or 0}
            for trial in counts.running
        ],
        "epochs": {"run": counts.n_epochs, "saved": full * n_pruned - counts.n_epochs_of_pruned},
    }
