"""Priors: which values are likely to be good, and the sampler that draws from them until the trials know better."""

import math
from collections.abc import Mapping, Sequence
from itertools import islice, product
from statistics import NormalDist
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from hpsearch.config.signature import OwnHyperparameters
from hpsearch.config.space import Choice, Dimension, IntRange, Range, SearchSpace, TrainingHyperparameters, is_among

_SPREAD = 0.2  # the standard deviation of a prior, as a share of the range
_UNIFORM = 0.2  # the share of trials that are drawn from the whole space
_N_LATEST = 100  # trials by which a prior is judged
_N_BEST = 10  # at most so many of them are good
_LR = {"sgd": 2e-2}  # of a constant schedule; of the other optimizers 1e-3
_ENDED = (TrialState.COMPLETE, TrialState.PRUNED)
_PEAK = {"constant": 1.0, "cosine": 2.0, "onecycle": 5.0}  # of a schedule's highest learning rate, in multiples
_DEPENDENT = ("optimizer", "schedule")  # on which built-in priors depend
_VALUES: dict[str, float] = {"dropout": 0.1, "weight_decay": 1e-2, "label_smoothing": 0.1, "augment": 0.5}
_WIDTH = 0.85  # of the range: wide networks are better as long as there is time


class Priors:
    """The priors of a search space: those of the study file, and built-in ones for hpsearch's own hyperparameters.

    A prior is the value in the middle of a normal distribution over the range (over its logarithm with `log`), or a
    choice that is as likely as all others together.
    """

    def __init__(self, space: SearchSpace) -> None:
        self.space = space
        self._is_own = issubclass(space.hyperparameters, OwnHyperparameters)  # whether the network is the user's
        self._names: dict[str, None] = {}  # in the order of drawing
        for name in (*_DEPENDENT, *space.dimensions):
            self._add(name)

    def _add(self, name: str) -> None:
        if name in self.space.dimensions:
            for parent in self.space.dimensions[name].when:
                self._add(parent)
            self._names[name] = None

    def find_all(self, name: str) -> list[Any]:
        """Return the priors of a hyperparameter, several if they depend on a searched optimizer or schedule."""
        searched = {key: self.space.dimensions[key].values for key in _DEPENDENT if key in self.space.dimensions}
        combinations = (dict(zip(searched, values, strict=True)) for values in product(*searched.values()))
        found = [self.find(name, self.space.fixed | values) for values in combinations]
        return [prior for i, prior in enumerate(found) if prior is not None and prior not in found[:i]]

    def find(self, name: str, values: Mapping[str, Any]) -> Any:
        """Return the prior of a hyperparameter, given the values of those on which it depends; None if it has none."""
        dimension = self.space.dimensions[name]
        if dimension.prior is not None:
            return dimension.snap(dimension.prior)
        if not isinstance(dimension, Range):
            return None
        prior = self._find_built_in(name, dimension, values)
        low, high = dimension.values
        if prior is None or not low <= prior <= high:
            return None
        return prior if dimension.has(prior) else dimension.at(dimension.place(prior))

    def _find_built_in(self, name: str, dimension: Range, values: Mapping[str, Any]) -> Any:
        if self._is_own and name not in TrainingHyperparameters.model_fields:
            return None
        fields = self.space.hyperparameters.model_fields
        optimizer, schedule = (values.get(key, fields[key].default) for key in _DEPENDENT)
        match name:
            case "lr":
                return _LR.get(optimizer, 1e-3) * _PEAK.get(schedule, 1.0)
            case "momentum":
                return 0.9 if optimizer == "sgd" else None
            case "width":
                return dimension.at(_WIDTH)
        return _VALUES.get(name)

    def draw(self, random: np.random.Generator, spread: float | None, given: Mapping[str, Any] = {}) -> dict[str, Any]:
        """Draw what is not given from the priors with a spread (0: their middle), or from the whole space (None)."""
        values = {**self.space.fixed, **given}
        drawn: dict[str, Any] = {}
        for name in self._names:
            if name not in given and self.space.is_active(name, values):
                middle = None if spread is None else self.find(name, values)
                values[name] = drawn[name] = _draw(random, self.space.dimensions[name], middle, spread or 0.0)
        return drawn

    def explain(self, params: Mapping[str, Any]) -> float:
        """Return the logarithm of how much likelier a configuration is under the priors than in the whole space.

        Parameters that the space does not have, as those of other versions, count nothing.
        """
        values = {**self.space.fixed, **params}
        total = 0.0
        for name, value in params.items():
            dimension = self.space.dimensions.get(name)
            middle = self.find(name, values) if dimension and dimension.has(value) else None
            if middle is None:
                continue
            if isinstance(dimension, Range):
                normal = NormalDist(dimension.place(middle), _SPREAD)
                inside = normal.cdf(1) - normal.cdf(0)
                total += math.log(max(normal.pdf(dimension.place(value)) / inside, 1e-9))
            elif isinstance(dimension, Choice) and (n_others := len(dimension.values) - 1):
                total += math.log((n_others + 1) / 2 / (1 if is_among(value, [middle]) else n_others))
        return total


def _draw(random: np.random.Generator, dimension: Dimension, middle: Any, spread: float) -> Any:
    if middle is not None and not spread:
        return middle
    if isinstance(dimension, Range):
        place = random.random()
        if middle is not None:
            normal = NormalDist(dimension.place(middle), spread)
            low, high = normal.cdf(0), normal.cdf(1)
            place = normal.inv_cdf(low + place * (high - low))
        return dimension.at(place)
    others = dimension.values if middle is None else [each for each in dimension.values if not is_among(each, [middle])]
    is_middle = middle is not None and (not others or random.random() < 0.5)
    return middle if is_middle else others[random.integers(len(others))]


def _rank(trial: FrozenTrial) -> tuple[float, float]:
    """Return what is larger for better trials: how long they were trained, and then the value."""
    if trial.state == TrialState.COMPLETE:
        return math.inf, trial.values[0]
    return max(trial.intermediate_values.items(), default=(0, 0.0))  # none if it diverged at once


def _distribution(dimension: Dimension) -> BaseDistribution:
    """Return the distribution from which Optuna's `suggest` methods have the value of a dimension."""
    if not isinstance(dimension, Range):
        return CategoricalDistribution(dimension.values)
    kind = IntDistribution if isinstance(dimension, IntRange) else FloatDistribution
    low, high = dimension.values
    return kind(low, high, log=dimension.log, step=dimension.step)


class _Drawn(dict[str, BaseDistribution]):
    """The search space of a trial whose `params` are drawn already."""

    def __init__(self, space: SearchSpace, params: dict[str, Any]) -> None:
        super().__init__({name: _distribution(space.dimensions[name]) for name in params})
        self.params = params


class PriorSampler(optuna.samplers.BaseSampler):
    """Draws trials from the whole space, from the priors and from another sampler, in shares that depend on the trials.

    The first trial that is not given is the middle of the priors. The next are drawn from the priors, but for a fifth
    from the whole space. After `startup` trials the other sampler takes part: the better the priors explain the best
    quarter of the trials, the larger is their share of at most a half. This is after PriorBand (Mallik et al. 2023,
    https://arxiv.org/abs/2306.12370), with another sampler in place of changes to the best trial.
    """

    def __init__(self, priors: Priors, sampler: optuna.samplers.BaseSampler, *, startup: int, seed: int) -> None:
        self.priors, self.sampler, self.startup = priors, sampler, startup
        self._random = np.random.default_rng(seed)

    def reseed_rng(self) -> None:
        self._random = np.random.default_rng()
        self.sampler.reseed_rng()

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self.sampler.before_trial(study, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        trials = study._get_trials(deepcopy=False, use_cache=True)  # which the other sampler reads, too
        first = next((other.number for other in trials if "fixed_params" not in other.system_attrs), None)
        spread: float | None = 0.0
        if first != trial.number or len(trials) <= trial.number:  # then the latest of other workers are not known yet
            kind = self._random.random()
            if kind >= _UNIFORM + (1 - _UNIFORM) * self._share_of_priors(trials):
                return self.sampler.infer_relative_search_space(study, trial)
            spread = None if kind < _UNIFORM else _SPREAD
        given = trial.system_attrs.get("fixed_params", {})
        return _Drawn(self.priors.space, self.priors.draw(self._random, spread, given))

    def _share_of_priors(self, trials: Sequence[FrozenTrial]) -> float:
        """Return which share of the trials that are not drawn from the whole space is drawn from the priors."""
        if sum(trial.state in _ENDED for trial in trials) < self.startup:
            return 1.0
        known = (trial for trial in reversed(trials) if trial.state in _ENDED or trial.intermediate_values)
        latest = (trial for trial in known if trial.state != TrialState.FAIL)
        ranked = sorted(islice(latest, _N_LATEST), key=_rank)
        best = ranked[-min(max(len(ranked) // 4, 2), _N_BEST) :]
        explained = sum(self.priors.explain(trial.params) for trial in best) / len(best)
        return 0.5 / (1 + math.exp(-2 * explained))

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if isinstance(search_space, _Drawn):
            return search_space.params
        return self.sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self.sampler.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: optuna.Study, trial: FrozenTrial, state: Any, values: Any) -> None:
        self.sampler.after_trial(study, trial, state, values)
