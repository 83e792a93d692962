"""Trials as users see them: the state and outcome of each, and the progress of the search."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, TrialState

from hpsearch.config.definition import StudyDefinition
from hpsearch.config.urls import show_url
from hpsearch.errors import UsageError
from hpsearch.search.selection import by_value
from hpsearch.storage.tables import count_interruptions


@dataclass(frozen=True)
class TrialEvent:
    """A change of a trial's state; all but "running" are emitted after the database has committed them.

    `epoch` is the last reported epoch, `value` its validation accuracy. A trial whose attempt was interrupted or killed
    is "requeued"; the worker that had lost it has "dropped" it.
    """

    worker: str
    number: int
    state: Literal["running", "complete", "pruned", "failed", "requeued", "dropped"]
    epoch: int = 0
    value: float | None = None
    message: str = ""


Emit = Callable[[TrialEvent], None]


def make_event(trial: FrozenTrial) -> TrialEvent:
    """Return the event of a trial whose last attempt has ended."""
    worker = trial.user_attrs.get("worker", "unknown")
    state: Any = "requeued" if trial.state == TrialState.WAITING else name_state(trial)
    message = trial.user_attrs.get("diverged", "") if state == "pruned" else explain_end(trial)
    return TrialEvent(worker, trial.number, state, trial.last_step or 0, trial.value, message)


def name_state(trial: FrozenTrial) -> str:
    """Return the trial's state as users read it: Optuna's name in lower case, or "failed"."""
    return "failed" if trial.state == TrialState.FAIL else trial.state.name.lower()


def explain_end(trial: FrozenTrial) -> str:
    """Return why the trial failed or was pruned, or waits again, in one sentence, or ""."""
    attributes = trial.user_attrs
    reason = attributes.get("failure")
    if trial.state == TrialState.WAITING and attributes.get("interruptions"):
        reason = attributes["interruptions"][-1]
    if reason:
        return f"{reason['kind']}: {reason['message']}"
    if trial.state == TrialState.PRUNED and "diverged" in attributes:
        return str(attributes["diverged"])
    pruning = attributes.get("pruning", {})
    if trial.state == TrialState.PRUNED and "threshold" in pruning:
        value, threshold = (f"{pruning[key]:.4f}" for key in ("value", "threshold"))
        if value == threshold:
            value, threshold = (f"{pruning[key]:.6f}" for key in ("value", "threshold"))
        return f"{value} < {threshold} ({pruning['rule']}) at epoch {pruning['epoch']}"
    return ""


def describe_interruption(interruption: Mapping[str, Any]) -> str:
    """Return a text such as `killed: no heartbeat for 60 s (worker host-0, epoch 3)`."""
    where = f"worker {interruption['worker']}, epoch {interruption['epoch']}"
    return f"{interruption['kind']}: {interruption['message']} ({where})"


def describe_trial(trial: FrozenTrial) -> dict[str, Any]:
    """Return the row of a trial in `trials --json`."""
    return {
        "number": trial.number,
        "state": name_state(trial),
        "value": trial.value if trial.state.is_finished() else None,
        "epoch": trial.last_step or 0,
        "params": trial.params or trial.system_attrs.get("fixed_params", {}),
        "attempts": count_interruptions(trial) + (trial.state != TrialState.WAITING),
        "worker": trial.user_attrs.get("worker"),
        "seconds": trial.duration.total_seconds() if trial.duration else None,
        "note": explain_end(trial),
    }


def describe_in_full(study: optuna.Study, number: int) -> dict[str, Any]:
    """Return the document of `show --json`: a trial's row, times, reports, interruptions and environment.

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
        "interruptions": attributes.get("interruptions", []),
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
    trials = study.get_trials(deepcopy=False) if trials is None else trials
    of = {state: [trial for trial in trials if trial.state == state] for state in TrialState}
    pruned, full = of[TrialState.PRUNED], definition.budget.epochs
    best = min(of[TrialState.COMPLETE], key=by_value, default=None)
    return {
        "study": study.study_name,
        "storage": show_url(definition.study.storage),
        "budget": study.user_attrs["budget"],
        "trials": {
            "complete": len(of[TrialState.COMPLETE]),
            "pruned": len(pruned),
            "failed": len(of[TrialState.FAIL]),
            "running": len(of[TrialState.RUNNING]),
            "waiting": len(of[TrialState.WAITING]),
        },
        "best": best and {"number": best.number, "value": best.value, "params": best.params},
        "workers": [
            {"id": trial.user_attrs.get("worker"), "trial": trial.number, "epoch": trial.last_step or 0}
            for trial in of[TrialState.RUNNING]
        ],
        "epochs": {
            "run": sum(trial.last_step or 0 for trial in trials),
            "saved": sum(full - (trial.last_step or 0) for trial in pruned),
        },
    }
