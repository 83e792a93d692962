"""What happens to trials: the events that workers emit, and why a trial ended, in words."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from optuna.trial import FrozenTrial, TrialState


@dataclass(frozen=True)
class TrialEvent:
    """A change of a trial's state; all but "running" are emitted after the database has committed them.

    `epoch` is the last reported epoch, `value` that of `find_value`. A trial whose attempt was interrupted or killed
    is "requeued"; the worker that had lost it has "dropped" it.
    """

    worker: str
    number: int
    state: Literal["running", "complete", "pruned", "failed", "requeued", "dropped"]
    epoch: int = 0
    value: float | None = None
    message: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)


Emit = Callable[[TrialEvent], None]


def make_event(trial: FrozenTrial) -> TrialEvent:
    """Return the event of a trial whose last attempt has ended."""
    attributes = trial.user_attrs
    state: Any = "requeued" if trial.state == TrialState.WAITING else name_state(trial)
    worker = attributes["interruptions"][-1]["worker"] if state == "requeued" else attributes.get("worker", "unknown")
    message = attributes.get("diverged", "") if state == "pruned" else explain_end(trial)
    return TrialEvent(worker, trial.number, state, trial.last_step or 0, find_value(trial), message, trial.params)


def name_state(trial: FrozenTrial) -> str:
    """Return the trial's state as users read it: Optuna's name in lower case, or "failed"."""
    return "failed" if trial.state == TrialState.FAIL else trial.state.name.lower()


def find_value(trial: FrozenTrial) -> float | None:
    """Return the value of an ended trial: the last one, or the one that the pruner compared.

    The median pruner compares the best one so far; Optuna's value of a pruned trial is always the last one. That of
    averaged weights, which successive halving compares, is not a value of the trial.
    """
    pruning = trial.user_attrs.get("pruning", {}) if trial.state == TrialState.PRUNED else {}
    compared = None if pruning.get("averaged") else pruning.get("value")
    return trial.value if compared is None else compared


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
        is_last = pruning["value"] == trial.intermediate_values.get(pruning["epoch"], pruning["value"])
        which = "averaged " if pruning.get("averaged") else "" if is_last else "best "
        return f"{which}{value} < {threshold} ({pruning['rule']}) at epoch {pruning['epoch']}"
    return ""
