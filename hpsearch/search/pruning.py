"""Reports to the pruner after each epoch, ends hopeless trials, and says what they were measured against."""

import math
from typing import Any

import numpy as np
import optuna
from optuna.pruners import HyperbandPruner, PercentilePruner, SuccessiveHalvingPruner
from optuna.trial import FrozenTrial, TrialState

from hpsearch.training.trainer import EpochResult


class PruningCallback:
    """Reports each epoch's validation accuracy to the trial, and raises `TrialPruned` where the pruner says so.

    Why is kept in the trial's user attribute `pruning`. After the last epoch nothing is left to save, so the trial is
    complete.
    """

    def __init__(self, trial: optuna.Trial, epochs: int) -> None:
        self.trial, self.epochs = trial, epochs

    def __call__(self, result: EpochResult) -> None:
        if self.report(result):
            pruning = explain_pruning(self.trial)
            if pruning["value"] >= pruning.get("threshold", math.inf):  # other trials have ended since
                del pruning["threshold"], pruning["rule"]
            self.trial.set_user_attr("pruning", pruning)
            raise optuna.TrialPruned(f"pruned in epoch {result.epoch}")

    def report(self, result: EpochResult) -> bool:
        """Whether the pruner would end the trial after this epoch; it sees the epochs of a resumed trial so, too."""
        self.trial.report(result.value, result.epoch)
        return result.epoch < self.epochs and self.trial.should_prune()


def explain_pruning(trial: optuna.Trial) -> dict[str, Any]:
    """Why the pruner has just ended the trial, as far as pruners of Optuna's show it.

    `epoch`, `value` (the validation accuracy that was compared), `threshold` (what it should have reached) and `rule`
    (what the threshold is); the last two are missing where the pruner is another one. The formulas are those of
    Optuna's `PercentilePruner` and `SuccessiveHalvingPruner`, to be maximized.
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
            "rule": f"the median of {len(values)} trials" if pruner._percentile == 50 else "the percentile",
        }
    if isinstance(pruner, HyperbandPruner):
        bracket = pruner._get_bracket_id(study, frozen)
        trials = [other for other in trials if pruner._get_bracket_id(study, other) == bracket]
        pruner = pruner._pruners[bracket]
    if isinstance(pruner, SuccessiveHalvingPruner):
        return explanation | _explain_rung(frozen, trials, pruner._reduction_factor)
    return explanation


def _explain_rung(trial: FrozenTrial, trials: list[FrozenTrial], reduction_factor: int) -> dict[str, Any]:
    """What the trial should have reached at the last rung of successive halving that it came to."""
    rung = max(key for key in trial.system_attrs if key.startswith("completed_rung_"))
    values = sorted(other.system_attrs[rung] for other in trials if rung in other.system_attrs)
    n_promoted = max(len(values) // reduction_factor, 1)
    return {"threshold": values[-n_promoted], "rule": f"the best {n_promoted} of {len(values)} trials"}
