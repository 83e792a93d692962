"""Searches that train nothing: the real samplers and pruners, driven by a model of recorded learning curves.

`scripts/benchmark replay` simulates hundreds of searches by two workers for each strategy and task.
"""

import json
import math
import warnings
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.trial import FrozenTrial, TrialState
from scipy.stats import spearmanr
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Kernel, Matern, WhiteKernel
from threadpoolctl import threadpool_limits

from hpsearch.config.definition import StudyDefinition, parse_definition
from hpsearch.config.space import Choice, Range, SearchSpace, suggest
from hpsearch.search.priors import Priors
from hpsearch.search.pruning import AshaPruner, build_pruner
from hpsearch.search.samplers import build_sampler
from tests.benchmark.record import FILE, SIGNALS, TASKS, Task, define
from tests.benchmark.report import Options, Row

_WORST = (0.1, 2.302585, 2.302585, 0.1, 2.302585)  # of guessing among ten classes
_N_WORKERS = 2
_N_NEAREST = 12  # pairs of trainings that the noise of a configuration is drawn from
_N_FITTED = 150  # at most so many configurations decide the kernel
_N_FOLDS = 5

Array = NDArray[np.float64]


class Surrogate:
    """Predicts the learning curves of a configuration, and draws the noise of a seed.

    The mean is that of a Gaussian process on the logarithms of error, cross-entropy and loss, with one kernel for all
    epochs and signals. The noise is half of the difference of two recorded trainings that are about as good, over all
    epochs and signals together, times the square root of 2.
    """

    def __init__(self, space: SearchSpace, params: Sequence[Mapping[str, Any]], numbers: Array, curves: Array) -> None:
        self.space = space
        self.n_epochs = curves.shape[1]
        logs = _to_logs(curves).reshape(len(curves), -1)
        first: dict[int, int] = {}
        pairs: list[tuple[int, int]] = []
        for row, number in enumerate(numbers):
            if number in first:
                pairs.append((first[number], row))
            first.setdefault(number, row)
        rows = [*first.values()]
        self.rows, self.params, self.pairs = rows, params, pairs
        self.logs = logs
        self.fit(rows)
        halves = np.array([(logs[a] - logs[b]) / math.sqrt(2) for a, b in pairs])
        last = self.column("accuracy")
        levels = np.array([(logs[a, last] + logs[b, last]) / 2 for a, b in pairs])
        order = np.argsort(levels)
        self._levels, self._halves = levels[order], halves[order]

    def column(self, signal: str) -> int:
        """Return the column of `logs` with a signal after the last epoch."""
        return (int(self.n_epochs) - 1) * len(SIGNALS) + SIGNALS.index(signal)

    def _fit_kernel(self, rows: Sequence[int] | NDArray[np.int64]) -> Kernel:
        """Return the kernel that suits the accuracies after the first and the last epoch of these rows."""
        inputs = np.array([self.encode(self.params[row]) for row in rows])
        targets = self.logs[rows][:, [0, self.column("accuracy")]]
        scales = ConstantKernel(1.0, (1e-2, 1e3)) * Matern(np.ones(inputs.shape[1]), (5e-2, 1e2), nu=2.5)
        process = GaussianProcessRegressor(scales + WhiteKernel(0.1, (1e-4, 1)), normalize_y=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # of a dimension that does not matter
            return process.fit(inputs, targets).kernel_

    def fit(self, rows: Sequence[int] | NDArray[np.int64]) -> None:
        """Fit the Gaussian process to these rows."""
        kernel = self._fit_kernel(rows[:: math.ceil(len(rows) / _N_FITTED)])
        inputs = np.array([self.encode(self.params[row]) for row in rows])
        targets = self.logs[rows]
        self._known: dict[str, Array] = {}
        self._mean, self._scale = targets.mean(0), targets.std(0)
        scaled = (targets - self._mean) / self._scale
        self._process = GaussianProcessRegressor(kernel, optimizer=None).fit(inputs, scaled)

    def encode(self, params: Mapping[str, Any]) -> list[float]:
        """Return the place of a configuration: numbers from 0 to 1, and one number for each choice."""
        place: list[float] = []
        for name, dimension in self.space.dimensions.items():
            value = params.get(name)
            if isinstance(dimension, Choice):
                place += [float(value == choice) for choice in dimension.values]
            elif isinstance(dimension, Range):
                place.append(-0.5 if value is None else dimension.place(value))
        return place

    def mean_logs(self, params: Mapping[str, Any]) -> Array:
        """Return the mean of the logarithms (epochs, signals)."""
        key = json.dumps(params, sort_keys=True)
        if key not in self._known:
            scaled = self._process.predict([self.encode(params)])[0]
            self._known[key] = scaled * self._scale + self._mean
        return self._known[key].reshape(self.n_epochs, -1)

    def value(self, params: Mapping[str, Any]) -> float:
        """Return the accuracy after the last epoch without the noise of a seed."""
        return 1 - math.exp(self.mean_logs(params)[-1, 0])

    def draw(self, params: Mapping[str, Any], random: np.random.Generator) -> Array:
        """Return the signals of a training: (epochs, signals)."""
        logs = self.mean_logs(params)
        place = int(np.searchsorted(self._levels, logs[-1, 0]))
        start = min(max(place - _N_NEAREST // 2, 0), max(len(self._levels) - _N_NEAREST, 0))
        near: Array = self._halves[start : start + _N_NEAREST]
        noise: Array = near[random.integers(len(near))] * random.choice([-1, 1])
        noise = noise.reshape(logs.shape)
        return _from_logs(logs + noise)


def _to_logs(curves: Array) -> Array:
    filled = np.where(np.isfinite(curves), curves, np.array(_WORST)).astype(np.float64)
    errors = np.where(np.char.find(np.array(SIGNALS), "accuracy") >= 0, 1 - filled, filled)
    logs: Array = np.log(np.clip(errors, 1e-5, 3.0))
    return logs


def _from_logs(logs: Array) -> Array:
    values = np.exp(logs)
    curves: Array = np.where(np.char.find(np.array(SIGNALS), "accuracy") >= 0, 1 - np.minimum(values, 1), values)
    return curves


def load_surrogate(name: str) -> Surrogate:
    """Return the surrogate of a recorded task."""
    with np.load(FILE) as packed:
        params = json.loads(str(packed[f"{name}.params"]))
        return Surrogate(define(TASKS[name]).space, params, packed[f"{name}.numbers"], packed[f"{name}.curves"])


def list_recorded() -> list[str]:
    """Return the names of the recorded tasks."""
    with np.load(FILE) as packed:
        return [name for name in TASKS if f"{name}.curves" in packed]


@dataclass(frozen=True)
class Strategy:
    """Tables of a study file, and what the pruner compares: a signal, to be minimized unless it is an accuracy.

    The prior of the learning rate is `wrong_by` times too high, or too low if that is within the range.
    """

    tables: Mapping[str, Any]
    signal: str = "accuracy"
    wrong_by: float = 1.0

    def define(self, task: Task, seed: int) -> StudyDefinition:
        tables = {**define(task).to_tables(), **self.tables}
        tables["study"] = tables["study"] | {"seed": seed}
        if self.wrong_by != 1:
            lr = tables["search"]["lr"]
            right = Priors(define(task).space).find("lr", {"optimizer": "adam"} | tables["fixed"])
            places = [right / self.wrong_by, right * self.wrong_by]
            lr["prior"] = next((at for at in places if lr["float"][0] <= at <= lr["float"][1]), lr["float"][0])
        return parse_definition(tables)


class SignalPruner(AshaPruner):
    """Successive halving that compares a signal of the simulated curves."""

    def __init__(self, epochs: int, curves: Mapping[int, Array], signal: str) -> None:
        super().__init__(epochs)
        self.curves, self.column = curves, SIGNALS.index(signal)
        self.sign = 1 if "accuracy" in signal else -1

    def signal(self, trial: FrozenTrial, epoch: int) -> float:
        return self.sign * float(self.curves[trial.number][epoch - 1, self.column])


class Course(NamedTuple):
    """After each trial that is the best so far: the epochs of all trials, its accuracy without noise, its report."""

    epochs: list[int]
    values: list[float]
    reports: list[float]

    def value_after(self, n_epochs: int) -> float:
        """Return the value of the best trial after so many epochs; 0 before the first is complete."""
        n = bisect_right(self.epochs, n_epochs)
        return self.values[n - 1] if n else 0.0

    def epochs_to(self, value: float, *, reported: bool = False) -> float:
        """Return the epochs after which the best trial was as good as that; infinite if it never was."""
        reached = zip(self.epochs, self.reports if reported else self.values, strict=True)
        return next((n for n, each in reached if each >= value), math.inf)


def simulate(task: Task, surrogate: Surrogate, strategy: Strategy, seed: int, n_epochs: int) -> Course:
    """Run a search of two workers that each train an epoch in the same time, until it has spent `n_epochs`.

    The best trial is the one with the best reported value, as for `hpsearch export`; its noise-free value counts.
    """
    definition = strategy.define(task, seed)
    random = np.random.default_rng(seed)
    curves: dict[int, Array] = {}
    study = optuna.create_study(direction="maximize")
    is_asha = definition.pruner.kind == "asha"
    study.pruner = (
        SignalPruner(definition.budget.epochs, curves, strategy.signal) if is_asha else build_pruner(definition)
    )
    samplers = [build_sampler(definition, stream) for stream in range(_N_WORKERS)]
    running: list[optuna.Trial | None] = [None] * _N_WORKERS
    course, best = Course([], [], []), -math.inf
    for spent in range(1, n_epochs + 1):
        worker = spent % _N_WORKERS
        study.sampler = samplers[worker]
        if (trial := running[worker]) is None:
            trial = study.ask()
            suggest(trial, definition.space)
            curves[trial.number] = surrogate.draw(trial.params, random)
        epoch = len(study._storage.get_trial(trial._trial_id).intermediate_values) + 1
        value = float(curves[trial.number][epoch - 1, 0])
        trial.report(value, epoch)
        running[worker] = None
        if epoch == definition.budget.epochs:
            study.tell(trial, value)
            if value > best:
                best = value
                course.epochs.append(spent)
                course.values.append(surrogate.value(trial.params))
                course.reports.append(value)
        elif trial.should_prune():
            study.tell(trial, state=TrialState.PRUNED)
        else:
            running[worker] = trial
    return course


_OLD = {"kind": "tpe", "startup": 10, "prior": False}
RANDOM = "random, no pruning"
MEDIAN = "TPE, median (the default until 2026)"
HYPERBAND = "TPE, Hyperband"
DEFAULT = "default: priors, TPE, ASHA of averaged weights"
STRATEGIES = {
    RANDOM: Strategy({"sampler": {"kind": "random"}, "pruner": {"kind": "none"}}),
    MEDIAN: Strategy({"sampler": _OLD, "pruner": {"kind": "median"}}),
    "TPE, ASHA": Strategy({"sampler": _OLD, "pruner": {"kind": "asha"}}),
    HYPERBAND: Strategy({"sampler": _OLD, "pruner": {"kind": "hyperband"}}),
    DEFAULT: Strategy({}, "averaged_accuracy"),
    "without priors": Strategy({"sampler": {"prior": False}}, "averaged_accuracy"),
    "startup after 4 trials": Strategy({"sampler": {"startup": 4}}, "averaged_accuracy"),
    "startup after 10 trials": Strategy({"sampler": {"startup": 10}}, "averaged_accuracy"),
    "without pruning": Strategy({"pruner": {"kind": "none"}}),
    "with the median pruner": Strategy({"pruner": {"kind": "median"}}),
    "ASHA of the accuracy": Strategy({}),
    "ASHA of the cross-entropy": Strategy({}, "cross_entropy"),
    "ASHA of the training loss": Strategy({}, "loss"),
    "ASHA of the cross-entropy of averaged weights": Strategy({}, "averaged_cross_entropy"),
    "prior of lr wrong by a factor of 30": Strategy({}, "averaged_accuracy", wrong_by=30),
}
_N_SEARCHES = 200
_SHARES = {"a tenth": 0.1, "a third": 1 / 3, "all": 1.0}


def replay(folder: Path, options: Options) -> list[Row]:
    """Return how many epochs each strategy needs for random search's best, and how good it gets."""
    rows: list[Row] = []
    with ProcessPoolExecutor(_N_WORKERS, get_context("spawn"), threadpool_limits, (1,)) as pool:
        for name in list_recorded():
            futures = {label: pool.submit(_simulate_all, name, label) for label in STRATEGIES}
            rows += _judge_surrogate(name, load_surrogate(name))
            courses = {label: future.result() for label, future in futures.items()}
            rows += _summarize(name, courses)
            draw(courses, TASKS[name].n_epochs, options.output / f"replay-{name}.png")
    return rows


def _judge_surrogate(name: str, surrogate: Surrogate) -> Iterator[Row]:
    """Yield how far the surrogate is from configurations that it was not fitted to, and how far seeds are apart."""
    rows, last = np.array(surrogate.rows), surrogate.column("accuracy")
    errors, predicted = np.empty(len(rows)), np.empty(len(rows))
    for fold in range(_N_FOLDS):
        held_out = np.arange(len(rows)) % _N_FOLDS == fold
        surrogate.fit(rows[~held_out])
        predicted[held_out] = [surrogate.mean_logs(surrogate.params[row])[-1, 0] for row in rows[held_out]]
    surrogate.fit(rows)
    recorded = surrogate.logs[rows, last]
    good = recorded <= np.median(recorded)
    errors = 100 * np.abs(np.exp(predicted) - np.exp(recorded))
    seeds = np.array([100 * abs(np.diff(np.exp(surrogate.logs[[a, b], last]))[0]) for a, b in surrogate.pairs])
    text = "surrogate: error of the final accuracy of held-out configurations"
    for which, chosen in (("all", np.full(len(rows), True)), ("the better half", good)):
        low, median, high = np.percentile(errors[chosen], (5, 50, 95))
        yield Row(f"replay {name}", f"{text}, {which}", "points", median, low, high, int(chosen.sum()))
        order = float(spearmanr(predicted[chosen], recorded[chosen]).statistic)
        yield Row(f"replay {name}", f"surrogate: rank correlation, {which}", "", order, n=int(chosen.sum()))
    low, median, high = np.percentile(seeds, (5, 50, 95))
    yield Row(f"replay {name}", "difference of two seeds", "points", median, low, high, len(seeds))


def _summarize(name: str, courses: Mapping[str, Sequence[Course]]) -> Iterator[Row]:
    n_epochs = TASKS[name].n_epochs
    finals = {label: [run.value_after(n_epochs) for run in runs] for label, runs in courses.items()}
    reported = float(np.mean([run.reports[-1] for run in courses[RANDOM]]))
    targets = [
        ("random search's best", float(np.median(finals[RANDOM])), False),
        ("the best of TPE and median", float(np.median(finals[MEDIAN])), False),
        ("random search's mean best report, as in `quality`", reported, True),
    ]
    for what, target, is_report in targets:
        for label, runs in courses.items():
            fewer = [n_epochs / run.epochs_to(target, reported=is_report) for run in runs]  # 0 where it is not reached
            low, median, high = np.percentile(fewer, (5, 50, 95), method="nearest")
            goal = "5x / 8x" if label == DEFAULT and target == targets[0][1] else ""
            text = f"{label}: fewer epochs than {n_epochs} to {what}, {target:.4f}"
            yield Row(f"replay {name}", text, "x", median, low, high, len(runs), goal)
    for label, runs in courses.items():
        for part, share in _SHARES.items():
            values = [100 * run.value_after(int(share * n_epochs)) for run in runs]
            low, median, high = np.percentile(values, (5, 50, 95))
            yield Row(f"replay {name}", f"{label}: best after {part} of the epochs", "%", median, low, high, len(runs))


@cache
def _surrogate(name: str) -> Surrogate:
    return load_surrogate(name)


def _simulate_all(name: str, label: str) -> list[Course]:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    task, surrogate = TASKS[name], _surrogate(name)
    seeds = range(_N_SEARCHES)
    return [simulate(task, surrogate, STRATEGIES[label], seed, task.n_epochs) for seed in seeds]


def draw(courses: Mapping[str, Sequence[Course]], n_epochs: int, file: Path) -> None:
    """Draw the median error, without noise, of the best trial over the epochs of all trials."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    grid = np.arange(1, n_epochs + 1)
    for label, runs in courses.items():
        values = np.array([[run.value_after(int(n)) for n in grid] for run in runs])
        medians = np.median(values, axis=0)
        axes.plot(grid[medians > 0], 100 * (1 - medians[medians > 0]), label=label)
    axes.set(xlabel="epochs trained, all trials", ylabel="error of the best trial without noise, %", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(file, dpi=120)
