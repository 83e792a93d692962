"""Priors: which values are likely to be good, and the sampler that draws from them until the trials know better."""

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial

from hpsearch.config.space import Choice, Dimension, Range, SearchSpace

_SPREAD = 0.2  # the standard deviation of a prior, as a share of the range
_UNIFORM = 0.2  # the share of trials that are drawn from the whole space
_N_LATEST = 100  # trials by which a prior is judged
_N_BEST = 10  # at most so many of them are good
_LR = {"sgd": 2e-2}  # of a constant schedule; of the other optimizers 1e-3
_PEAK = {"constant": 1.0, "cosine": 2.0, "onecycle": 5.0}  # of a schedule's highest learning rate, in multiples
_VALUES: dict[str, float] = {"dropout": 0.1, "weight_decay": 1e-2, "label_smoothing": 0.1, "augment": 0.5}
_WIDTH = 0.85  # of the range: wide networks are better as long as there is time


class Priors:
    """The priors of a search space: those of the study file, and built-in ones for hpsearch's own hyperparameters.

    A prior is the value in the middle of a normal distribution over the range (over its logarithm with `log`), or a
    choice that is as likely as all others together.
    """

    def __init__(self, space: SearchSpace) -> None:
        self.space = space
        names = sorted(space.dimensions, key=lambda name: name == "lr")  # whose prior depends on the optimizer
        self._dimensions = {name: space.dimensions[name] for name in names}
        self._is_own = "width" not in space.hyperparameters.model_fields  # whether the network is the user's

    def find(self, name: str, values: Mapping[str, Any]) -> Any:
        """Return the prior of a hyperparameter, given the values of those before it; None if there is none."""
        dimension = self.space.dimensions[name]
        if dimension.prior is not None:
            return dimension.prior if dimension.has(dimension.prior) else None
        built_in = self._find_built_in(name, dimension, values)
        return built_in if isinstance(dimension, Range) and dimension.snap(built_in) is not None else None

    def _find_built_in(self, name: str, dimension: Dimension, values: Mapping[str, Any]) -> Any:
        hyperparameters = self.space.hyperparameters
        fields = hyperparameters.model_fields
        if name == "lr":
            optimizer, schedule = (values.get(key, fields[key].default) for key in ("optimizer", "schedule"))
            return _LR.get(optimizer, 1e-3) * _PEAK[schedule]
        if name == "width" and isinstance(dimension, Range):
            return dimension.at(_WIDTH)
        if name == "momentum":
            return 0.9 if values.get("optimizer", fields["optimizer"].default) == "sgd" else None
        return _VALUES.get(name)

    def draw(self, random: np.random.Generator, spread: float | None) -> dict[str, Any]:
        """Draw a configuration from the priors with a spread (0: their middle), or from the whole space (None)."""
        values = dict(self.space.fixed)
        drawn: dict[str, Any] = {}
        for name, dimension in self._dimensions.items():
            if self.space.is_active(name, values):
                middle = None if spread is None else self.find(name, values)
                values[name] = drawn[name] = _draw(random, dimension, middle, spread or 0.0)
        return drawn

    def explain(self, params: Mapping[str, Any]) -> float:
        """Return the logarithm of how much likelier a configuration is under the priors than in the whole space."""
        values = {**self.space.fixed, **params}
        total = 0.0
        for name, value in params.items():
            dimension = self.space.dimensions.get(name)
            middle = None if dimension is None else self.find(name, values)
            if middle is None:
                continue
            if isinstance(dimension, Range):
                normal = NormalDist(dimension.place(middle), _SPREAD)
                inside = normal.cdf(1) - normal.cdf(0)
                total += math.log(max(normal.pdf(dimension.place(value)) / inside, 1e-9))
            elif isinstance(dimension, Choice) and (n_others := len(dimension.values) - 1):
                total += math.log((n_others + 1) / 2 / (1 if value == middle else n_others))
        return total


def _draw(random: np.random.Generator, dimension: Dimension, middle: Any, spread: float) -> Any:
    if isinstance(dimension, Range):
        place = random.random() if middle is None else dimension.place(middle)
        if middle is not None and spread:
            normal = NormalDist(place, spread)
            low, high = normal.cdf(0), normal.cdf(1)
            place = normal.inv_cdf(low + random.random() * (high - low))
        return dimension.at(place)
    others = [value for value in dimension.values if value != middle]
    is_middle = middle is not None and (not spread or not others or random.random() < 0.5)
    return middle if is_middle else others[random.integers(len(others))]


class PriorSampler(optuna.samplers.BaseSampler):
    """Draws trials from the whole space, from the priors and from another sampler, in shares that depend on the trials.

    The first trial that is not given is the middle of the priors. The next are drawn from the priors, but for a fifth
    from the whole space. After `startup` trials the other sampler takes part: the better the priors explain the best
    quarter of the trials, the larger is their share of at most a half. This is after PriorBand (Mallik et al. 2023,
    https://arxiv.org/abs/2306.12370), with another sampler in place of changes to the best trial.
    """

    def __init__(self, space: SearchSpace, sampler: optuna.samplers.BaseSampler, *, startup: int, seed: int) -> None:
        self.priors, self.sampler, self.startup = Priors(space), sampler, startup
        self._random = np.random.default_rng(seed)
        self._drawn: dict[int, dict[str, Any]] = {}  # by trial number

    def reseed_rng(self) -> None:
        self._random = np.random.default_rng()
        self.sampler.reseed_rng()

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        others = [other for other in study.get_trials(deepcopy=False)[-_N_LATEST:] if other.number != trial.number]
        if all("fixed_params" in other.system_attrs for other in others):
            self._drawn[trial.number] = self.priors.draw(self._random, 0.0)
            return
        reported = [other for other in others if other.intermediate_values]
        prior = self._share_of_priors(reported)
        kind = self._random.random()
        if kind < _UNIFORM:
            self._drawn[trial.number] = self.priors.draw(self._random, None)
        elif kind < _UNIFORM + (1 - _UNIFORM) * prior:
            self._drawn[trial.number] = self.priors.draw(self._random, _SPREAD)
        else:
            self._drawn.pop(trial.number, None)
            self.sampler.before_trial(study, trial)

    def _share_of_priors(self, reported: Sequence[FrozenTrial]) -> float:
        if len(reported) < self.startup:
            return 1.0
        ranked = sorted(reported, key=lambda trial: max(trial.intermediate_values.items()))
        best = ranked[-min(max(len(ranked) // 4, 2), _N_BEST) :]
        explained = sum(self.priors.explain(trial.params) for trial in best) / len(best)
        return 0.5 / (1 + math.exp(-2 * explained))

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        if trial.number in self._drawn:
            return {}
        return self.sampler.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {} if trial.number in self._drawn else self.sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        drawn = self._drawn.get(trial.number, {})
        if param_name in drawn:
            return drawn[param_name]
        return self.sampler.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: optuna.Study, trial: FrozenTrial, state: Any, values: Any) -> None:
        self._drawn.pop(trial.number, None)
        self.sampler.after_trial(study, trial, state, values)
