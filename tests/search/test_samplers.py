"""How a study searches: samplers and pruners do what they are for, and TPE computes with a part of a large study."""

from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial

from hpsearch.config.space import suggest
from hpsearch.search.pruning import build_pruner
from hpsearch.search.samplers import WindowedTPESampler, build_sampler

from ..conftest import make_definition


@pytest.mark.parametrize("kind", ["tpe", "random", "gp", "cmaes"])
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_every_sampler_searches_a_conditional_space(kind: str) -> None:
    definition = make_definition(
        sampler={"kind": kind, "startup": 2},
        search={
            "lr": {"float": [1e-3, 1e-1], "log": True},
            "width": {"int": [8, 32]},
            "optimizer": {"choice": ["adam", "sgd"]},
            "momentum": {"float": [0.1, 0.9], "when": {"optimizer": ["sgd"]}},
        },
    )
    study = optuna.create_study(direction="maximize", sampler=build_sampler(definition, stream=0))
    study.optimize(lambda trial: suggest(trial, definition.space).lr, n_trials=6)
    assert len({trial.params["width"] for trial in study.trials}) > 1
    assert {"momentum" in trial.params for trial in study.trials if trial.params["optimizer"] == "adam"} <= {False}
    assert all("momentum" in trial.params for trial in study.trials if trial.params["optimizer"] == "sgd")


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("kind", ["tpe", "random", "gp", "cmaes"])
def test_workers_draw_from_different_streams_and_a_stream_repeats(kind: str) -> None:
    definition = make_definition(sampler={"kind": kind})

    def first_lr(stream: int) -> float:
        study = optuna.create_study(sampler=build_sampler(definition, stream))
        study.ask()  # the middle of the priors
        return study.ask().suggest_float("lr", 1e-3, 1e-1, log=True)

    assert first_lr(0) == first_lr(0)
    assert first_lr(0) != first_lr(1)


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize(("kind", "prunes"), [("asha", True), ("hyperband", True), ("median", True), ("none", False)])
def test_every_pruner_but_none_stops_hopeless_trials(kind: str, prunes: bool) -> None:
    definition = make_definition(pruner={"kind": kind}, sampler={"startup": 4}, budget={"epochs": 9})
    study = optuna.create_study(
        direction="maximize", pruner=build_pruner(definition), sampler=optuna.samplers.RandomSampler(seed=0)
    )

    def objective(trial: optuna.Trial) -> float:
        value = 1.0 - trial.number * 0.01  # each is worse than all before
        for epoch in range(1, 10):
            trial.report(value, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned
        return value

    study.optimize(objective, n_trials=30)
    states: list[Any] = [trial.state for trial in study.trials]
    assert (TrialState.PRUNED in states) == prunes
    assert states[0] == TrialState.COMPLETE


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("sampler", ["tpe", "random", "gp", "cmaes"])
@pytest.mark.parametrize("pruner", ["asha", "hyperband", "median", "none"])
def test_every_sampler_goes_with_every_pruner(sampler: str, pruner: str) -> None:
    definition = make_definition(pruner={"kind": pruner}, sampler={"kind": sampler, "startup": 2}, budget={"epochs": 4})
    study = optuna.create_study(
        direction="maximize", pruner=build_pruner(definition), sampler=build_sampler(definition, stream=0)
    )

    def objective(trial: optuna.Trial) -> float:
        lr = suggest(trial, definition.space).lr
        for epoch in range(1, 5):
            trial.report(lr * epoch, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned
        return lr

    study.optimize(objective, n_trials=6)
    assert {trial.state for trial in study.trials} <= {TrialState.COMPLETE, TrialState.PRUNED}


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("has_conditions", [True, False])
def test_tpe_chooses_as_optunas_own_does_while_the_study_is_small(has_conditions: bool) -> None:
    def objective(trial: optuna.Trial) -> float:
        lr = trial.suggest_float("lr", 0, 1)
        return lr + (trial.suggest_float("momentum", 0, 1) if lr > 0.5 and has_conditions else 0)

    def search(kind: type[optuna.samplers.TPESampler]) -> list[dict[str, Any]]:
        study = optuna.create_study(sampler=kind(seed=0, multivariate=True, group=has_conditions))
        study.optimize(objective, n_trials=40)
        return [trial.params for trial in study.trials]

    assert search(WindowedTPESampler) == search(optuna.samplers.TPESampler)


def add_trials(study: optuna.Study, n: int) -> None:
    """Complete trials whose best is in the middle."""
    distributions: Any = {"lr": FloatDistribution(0, 1)}
    for number in range(n):
        value = 1 - abs(number - n / 2) / n
        study.add_trial(create_trial(params={"lr": number / n}, distributions=distributions, value=value))


def test_tpe_computes_with_the_best_and_the_latest_trials_of_a_large_study(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[int]] = []
    original = optuna.samplers.TPESampler._build_parzen_estimator

    def build(self: Any, study: Any, space: Any, trials: Any, **options: Any) -> Any:
        seen.append({trial.number for trial in trials})
        return original(self, study, space, trials, **options)

    monkeypatch.setattr(optuna.samplers.TPESampler, "_build_parzen_estimator", build)
    study = optuna.create_study(direction="maximize", sampler=WindowedTPESampler(seed=0))
    running = study.ask().number
    add_trials(study, 1_000)
    lr = study.ask().suggest_float("lr", 0, 1)
    below, above = seen
    best, latest = set(range(496, 506)), set(range(911, 1_001))  # numbers start with 1, after the running trial
    assert below == best
    assert above == latest | {running}
    assert 0.4 < lr < 0.6


def test_tpe_begins_to_learn_after_any_number_of_startup_trials() -> None:
    study = optuna.create_study(direction="maximize", sampler=WindowedTPESampler(seed=0, n_startup_trials=150))
    add_trials(study, 300)
    chosen = [study.ask().suggest_float("lr", 0, 1) for _ in range(20)]
    assert sum(0.3 < lr < 0.7 for lr in chosen) >= 16  # eight of them by chance


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_tpe_goes_with_the_brackets_of_hyperband_in_a_large_study() -> None:
    definition = make_definition(sampler={"prior": False}, pruner={"kind": "hyperband"}, budget={"epochs": 9})
    study = optuna.create_study(
        direction="maximize", pruner=build_pruner(definition), sampler=build_sampler(definition, stream=0)
    )
    add_trials(study, 300)
    chosen = [study.ask().suggest_float("lr", 0, 1) for _ in range(20)]
    assert sum(0.3 < lr < 0.7 for lr in chosen) >= 16  # eight of them by chance
