"""The pruners of a study, which stop unpromising trials early and say why, and the callback that asks them.

The default, asynchronous successive halving, was chosen with `scripts/benchmark replay`: see tests/benchmark/README.md.
"""

import threading
from bisect import insort
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from hpsearch.config.definition import StudyDefinition
from hpsearch.training.trainer import EpochResult

_FACTOR = 3  # of so many trials one continues


def find_rungs(epochs: int) -> list[int]:
    """Return after which epochs successive halving compares trials of so many: after a ninth and a third of them."""
    return sorted({max(round(epochs / share), 1) for share in (_FACTOR**2, _FACTOR)} - {epochs})


def build_pruner(definition: StudyDefinition) -> optuna.pruners.BasePruner:
    """Build the study's pruner; its resource is the epoch."""
    match definition.pruner.kind:
        case "asha":
            return AshaPruner(definition.budget.epochs)
        case "hyperband":
            epochs = definition.budget.epochs
            return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=epochs, reduction_factor=3)
        case "median":
            return MedianPruner(definition.sampler.startup)
        case "none":
            return optuna.pruners.NopPruner()


class ThresholdPruner(optuna.pruners.BasePruner):
    """Prunes a trial whose value, to be maximized, is below a threshold.

    `reasons` has, by trial number, why a trial was pruned: `epoch`, `value` (which was compared), `threshold` (the
    value needed to continue), `rule` (what the threshold is), and whether the value is that of `averaged` weights.
    """

    def __init__(self) -> None:
        self.reasons: dict[int, dict[str, Any]] = {}

    def is_below(
        self, trial: FrozenTrial, value: float, threshold: float, rule: str, *, averaged: bool = False
    ) -> bool:
        """Return whether the value is below the threshold, and keep the reason if it is."""
        if value < threshold:
            reason = {"epoch": trial.last_step, "value": value, "threshold": threshold, "rule": rule}
            self.reasons[trial.number] = reason | ({"averaged": True} if averaged else {})
        return value < threshold


class MedianPruner(ThresholdPruner):
    """Prunes trials whose best value is below the median of the completed trials at the same epoch.

    Nothing is pruned before `n_startup_trials` trials are completed.
    """

    def __init__(self, n_startup_trials: int) -> None:
        super().__init__()
        self.n_startup_trials = n_startup_trials

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        complete, epoch = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)), trial.last_step
        values = [other.intermediate_values[epoch] for other in complete if epoch in other.intermediate_values]
        if len(complete) < self.n_startup_trials or not values:
            return False
        best = max(trial.intermediate_values.values())
        return self.is_below(trial, best, float(np.percentile(values, 50)), f"median of {len(values)} trials")


@dataclass
class _Past:
    """Of the first `n_trials` of a study: the places of those that have not ended, and the others' values, sorted.

    The values are by epoch and whether they are those of averaged weights.
    """

    n_trials: int = 0
    open_places: list[int] = field(default_factory=list)
    values: dict[tuple[int, bool], list[float]] = field(default_factory=lambda: defaultdict(list))


class AshaPruner(ThresholdPruner):
    """Keeps the best third of the trials that reached the same epoch, after a ninth and a third of all epochs.

    This is asynchronous successive halving (Li et al. 2020, https://arxiv.org/abs/1810.05934). While there are fewer
    than three trials, the best one continues. It compares the metric of the averaged weights (see `Trainer`), which
    tells more about the end of the training than that of the weights. Trials of older versions have none, so they are
    compared only with each other.
    """

    def __init__(self, epochs: int) -> None:
        super().__init__()
        self.rungs = find_rungs(epochs)
        self._past = WeakKeyDictionary[optuna.Study, _Past]()
        self._lock = threading.Lock()  # of the threads of `n_jobs`

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        epoch = trial.last_step or 0
        if epoch not in self.rungs:
            return False
        averaged, value = self.is_averaged(trial, epoch), self.signal(trial, epoch)
        with self._lock:
            past = self._past.setdefault(study, _Past())
            others = [other for other in self._update(past, study) if other.number != trial.number]
            ended = [*past.values[epoch, averaged]]
        values = [self.signal(each, epoch) for each in others if self._has(each, epoch, averaged=averaged)]
        n_values = len(ended) + len(values) + 1
        n_kept = max(n_values // _FACTOR, 1)
        threshold = sorted([*ended[-n_kept:], *values, value])[-n_kept]
        return self.is_below(trial, value, threshold, f"top {n_kept} of {n_values} trials", averaged=averaged)

    def _update(self, past: _Past, study: optuna.Study) -> list[FrozenTrial]:
        """Add to the past the trials that have ended since, and return those that have not ended."""
        trials = study.get_trials(deepcopy=False)
        open_places: list[int] = []
        for place in chain(past.open_places, range(past.n_trials, len(trials))):
            trial = trials[place]
            if not trial.state.is_finished():
                open_places.append(place)
                continue
            for epoch in self.rungs:
                if epoch in trial.intermediate_values:
                    insort(past.values[epoch, self.is_averaged(trial, epoch)], self.signal(trial, epoch))
        past.open_places, past.n_trials = open_places, len(trials)
        return [trials[place] for place in open_places]

    def _has(self, trial: FrozenTrial, epoch: int, *, averaged: bool) -> bool:
        return epoch in trial.intermediate_values and self.is_averaged(trial, epoch) == averaged

    def is_averaged(self, trial: FrozenTrial, epoch: int) -> bool:
        """Return whether the averaged weights of a trial were measured after an epoch."""
        return str(epoch) in trial.user_attrs.get("averaged", {})

    def signal(self, trial: FrozenTrial, epoch: int) -> float:
        """Return what is compared, to be maximized: the metric of the averaged weights, or else the report."""
        averaged: dict[str, float] = trial.user_attrs.get("averaged", {})
        return averaged.get(str(epoch), trial.intermediate_values[epoch])


class PruningCallback:
    """Reports each epoch's value to the trial, and raises `TrialPruned` if the pruner decides so.

    The reason is stored in the trial's user attribute `pruning`; of a pruner that gives none, it has only `epoch` and
    `value`. A trial is never pruned after its last epoch.
    """

    def __init__(self, trial: optuna.Trial, epochs: int) -> None:
        self.trial, self.epochs = trial, epochs
        self.reported = set[int]()
        if isinstance(trial, optuna.Trial):  # a `FixedTrial` has no storage
            self.reported.update(trial.storage.get_trial(trial._trial_id).intermediate_values)

    def __call__(self, result: EpochResult) -> None:
        self.report(result)
        is_last = result.epoch >= max(self.reported, default=0)  # a pruner looks at the last report
        if is_last and result.epoch < self.epochs and self.trial.should_prune():
            reasons = getattr(self.trial.study.pruner, "reasons", {})
            reason = reasons.pop(self.trial.number, {"epoch": result.epoch, "value": result.value})
            self.trial.set_user_attr("pruning", reason)
            raise optuna.TrialPruned(f"pruned in epoch {result.epoch}")

    def report(self, result: EpochResult) -> None:
        """Report an epoch, unless the trial did so before it was interrupted."""
        if result.epoch not in self.reported:
            self.trial.report(result.value, result.epoch)
