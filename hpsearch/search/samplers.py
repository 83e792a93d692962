"""The sampler of a study, which chooses hyperparameters.

The default, TPE with priors, was chosen with `scripts/benchmark replay`: see tests/benchmark/README.md.
"""

from collections.abc import Callable
from heapq import nsmallest
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from hpsearch.config.definition import StudyDefinition
from hpsearch.search.priors import Priors, PriorSampler
from hpsearch.storage.tables import by_value

_N_BEST, _N_LATEST = 10, 90  # finished trials that TPE uses; of 100, its gamma counts 10 as good


def build_sampler(definition: StudyDefinition, stream: int) -> optuna.samplers.BaseSampler:
    """Build the study's sampler; each worker passes its own `stream` of random numbers."""
    seed = int(np.random.SeedSequence([definition.study.seed, stream]).generate_state(1)[0])
    startup = definition.sampler.startup
    match definition.sampler.kind:
        case "random":
            return optuna.samplers.RandomSampler(seed=seed)
        case "tpe":
            tpe = WindowedTPESampler(
                n_startup_trials=startup, seed=seed, multivariate=True, group=definition.space.is_conditional
            )
            priors = Priors(definition.space)
            has_priors = definition.sampler.prior and any(map(priors.find_all, definition.space.dimensions))
            return PriorSampler(priors, tpe, startup=startup, seed=seed + 1) if has_priors else tpe
        case "gp":
            return optuna.samplers.GPSampler(n_startup_trials=startup, seed=seed, deterministic_objective=False)
        case "cmaes":
            return optuna.samplers.CmaEsSampler(n_startup_trials=startup, seed=seed, warn_independent_sampling=False)


def _in_window(method: Callable[..., Any]) -> Any:
    """Let a method of the sampler see only the trials of the study that are in its `_Window`."""
    return lambda sampler, study, *arguments: method(sampler, _Window(study, sampler.n_latest), *arguments)


class WindowedTPESampler(optuna.samplers.TPESampler):
    """TPE over the best completed and the latest trials only, so its time hardly grows with the study.

    Optuna's TPE gives older trials less and less weight, but still computes with all of them.
    """

    def __init__(self, *, n_startup_trials: int = 10, **options: Any) -> None:  # 10 as in Optuna
        super().__init__(n_startup_trials=n_startup_trials, **options)
        self.n_latest = max(_N_LATEST, n_startup_trials)

    infer_relative_search_space = _in_window(optuna.samplers.TPESampler.infer_relative_search_space)
    sample_relative = _in_window(optuna.samplers.TPESampler.sample_relative)
    sample_independent = _in_window(optuna.samplers.TPESampler.sample_independent)


class _Window:
    """A view of a study with the best completed, the latest finished and all unfinished trials."""

    def __init__(self, study: optuna.Study, n_latest: int) -> None:
        self._study, self._n_latest = study, n_latest

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    def _get_trials(self, *arguments: Any, **options: Any) -> list[FrozenTrial]:
        trials = self._study._get_trials(*arguments, **options)
        finished = [trial for trial in trials if trial.state.is_finished()]
        if len(finished) <= self._n_latest:
            return trials
        first = finished[-self._n_latest].number
        older = [trial for trial in finished if trial.number < first and trial.state == TrialState.COMPLETE]
        best = {trial.number for trial in nsmallest(_N_BEST, older, key=by_value)}
        return [
            trial for trial in trials if trial.number >= first or trial.number in best or not trial.state.is_finished()
        ]
