"""Report each epoch to the pruner, prune unpromising trials, and explain why."""

import math
from typing import Any

import numpy as np
import optuna
from optuna.pruners import HyperbandPruner, PercentilePruner, SuccessiveHalvingPruner
from optuna.trial import FrozenTrial, TrialState

from hpsearch.training.trainer import EpochResult


class PruningCallback:
    """Reports each epoch's validation accuracy to the trial, and raises `TrialPruned` if the pruner decides so.

    The reason is stored in the trial's user attribute `pruning`. A trial is never pruned after its last epoch.
    """

    def __init__(self, trial: optuna.Trial, epochs: int) -> None:
        self.trial, self.epochs = trial, epochs

    def __call__(self, result: EpochResult) -> None:
        if self.report(result):
            pruning = explain_pruning(self.trial)
            if pruning["value"] >= pruning.get("threshold", math.inf):  # other trials have finished since
                del pruning["threshold"], pruning["rule"]
            self.trial.set_user_attr("pruning", pruning)
            raise optuna.TrialPruned(f"pruned in epoch {result.epoch}")

    def report(self, result: EpochResult) -> bool:
        """Report an epoch, which may be one of a resumed trial, and return whether the trial should be pruned."""
        self.trial.report(result.value, result.epoch)
        return result.epoch < self.epochs and self.trial.should_prune()


def explain_pruning(trial: optuna.Trial) -> dict[str, Any]:
    """Return why the pruner has just pruned the trial.

    The keys are `epoch`, `value` (the validation accuracy that was compared), `threshold` (the accuracy needed to
    continue) and `rule` (what the threshold is). The last two are missing for unknown pruners. The formulas are those
    of Optuna's `PercentilePruner` and `SuccessiveHalvingPruner` for maximization.
    """
    study = trial.study
    trials = study.get_trials(deepcopy=False)
    frozen = trials[trial.number]
    pruner, epoch = study.pruner, frozen.last_step or 0
    explanation: dict[str, Any] = {"epoch": epoch, "value": frozen.intermediate_values[epoch]}
    if isinstance(pruner, PercentilePruner):
        complete = [other.intermediate_values for other in trials if other.state == TrialState.COMPLETE]
        values = [reports[epoch] for reports in complete if epoch in reports]
        return explanation | {
            "value": max(frozen.intermediate_values.values()),
            "threshold": float(np.nanpercentile(values, 100 - pruner._percentile)),
            "rule": f"median of {len(values)} trials" if pruner._percentile == 50 else "percentile",
        }
    if isinstance(pruner, HyperbandPruner):
        bracket = pruner._get_bracket_id(study, frozen)
        trials = [other for other in trials if pruner._get_bracket_id(study, other) == bracket]
        pruner = pruner._pruners[bracket]
    if isinstance(pruner, SuccessiveHalvingPruner):
        return explanation | _explain_rung(frozen, trials, pruner._reduction_factor)
    return explanation


def _explain_rung(trial: FrozenTrial, trials: list[FrozenTrial], reduction_factor: int) -> dict[str, Any]:
    """Return the threshold at the last rung of successive halving that the trial reached."""
    rung = max(key for key in trial.system_attrs if key.startswith("completed_rung_"))
    values = sorted(other.system_attrs[rung] for other in trials if rung in other.system_attrs)
    n_promoted = max(len(values) // reduction_factor, 1)
    return {"threshold": values[-n_promoted], "rule": f"top {n_promoted} of {len(values)} trials"}
