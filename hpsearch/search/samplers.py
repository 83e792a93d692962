"""The sampler of a study, which chooses hyperparameters.

The default, TPE, was chosen with `scripts/benchmark quality`: see tests/benchmark/README.md.
"""

from heapq import nlargest
from typing import Any, cast

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from hpsearch.config.definition import StudyDefinition

_N_BEST, _N_LATEST = 10, 90  # finished trials that TPE uses; of 100, its gamma counts 10 as good


def build_sampler(definition: StudyDefinition, stream: int) -> optuna.samplers.BaseSampler:
    """Build the study's sampler; each worker passes its own `stream` of random numbers."""
    seed = int(np.random.SeedSequence([definition.study.seed, stream]).generate_state(1)[0])
    startup = definition.sampler.startup
    match definition.sampler.kind:
        case "random":
            return optuna.samplers.RandomSampler(seed=seed)
        case "tpe":
            return WindowedTPESampler(
                n_startup_trials=startup, seed=seed, multivariate=True, group=definition.space.is_conditional
            )
        case "gp":
            return optuna.samplers.GPSampler(n_startup_trials=startup, seed=seed, deterministic_objective=False)
        case "cmaes":
            return optuna.samplers.CmaEsSampler(n_startup_trials=startup, seed=seed, warn_independent_sampling=False)


class WindowedTPESampler(optuna.samplers.TPESampler):
    """TPE over the best completed and the latest trials only, so its time hardly grows with the study.

    Optuna's TPE gives older trials less and less weight, but still computes with all of them.
    """

    def __init__(self, *, n_startup_trials: int = 10, **options: Any) -> None:  # 10 as in Optuna
        super().__init__(n_startup_trials=n_startup_trials, **options)
        self.n_latest = max(_N_LATEST, n_startup_trials)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return super().infer_relative_search_space(self._window(study), trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return super().sample_relative(self._window(study), trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return super().sample_independent(self._window(study), trial, param_name, param_distribution)

    def _window(self, study: optuna.Study) -> optuna.Study:
        return cast(optuna.Study, _Window(study, self.n_latest))


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
        best = {trial.number for trial in nlargest(_N_BEST, older, key=lambda trial: trial.values[0])}
        return [
            trial for trial in trials if trial.number >= first or trial.number in best or not trial.state.is_finished()
        ]
