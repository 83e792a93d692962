"""Priors: what is likely to be good is tried first, whoever asks, and a wrong prior is unlearnt."""

import math
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

import hpsearch
from hpsearch.config.definition import StudyDefinition, parse_definition
from hpsearch.config.space import suggest
from hpsearch.search.priors import Priors
from hpsearch.search.samplers import WindowedTPESampler, build_sampler
from hpsearch.search.study import load_study, open_study
from hpsearch.storage.rdb import open_storage
from hpsearch.training.kinds import Hyperparameters

SPACE: dict[str, Any] = {
    "momentum": {"float": [0.0, 0.98], "when": {"optimizer": ["sgd", "rmsprop"]}},
    "optimizer": {"choice": ["adam", "sgd", "rmsprop"], "prior": "sgd"},
    "lr": {"float": [1e-4, 1e-1], "log": True},
    "width": {"int": [32, 512], "log": True},
    "dropout": {"float": [0.0, 0.45], "step": 0.15},
    "depth": {"int": [2, 4], "prior": 3},
}
MIDDLE = {"optimizer": "sgd", "lr": 2e-2, "momentum": 0.9, "dropout": 0.15, "depth": 3, "width": 337}

pytestmark = [
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
    pytest.mark.filterwarnings("ignore:Heartbeat of storage is supposed"),
]


def define(search: dict[str, Any], **sections: Any) -> StudyDefinition:
    return parse_definition({"data": {"name": "digits"}, "search": search, **sections})


def priors_of(search: dict[str, Any], **sections: Any) -> Priors:
    return Priors(define(search, **sections).space)


def start(definition: StudyDefinition, stream: int = 0, study: optuna.Study | None = None) -> optuna.Study:
    """The study of another worker, or a new one."""
    storage = study._storage if study else None
    return optuna.create_study(
        study_name="x",
        storage=storage,
        load_if_exists=True,
        direction="maximize",
        sampler=build_sampler(definition, stream),
    )


def ask(study: optuna.Study, definition: StudyDefinition) -> dict[str, Any]:
    trial = study.ask()
    suggest(trial, definition.space)
    return trial.params


@pytest.mark.parametrize(
    ("search", "fixed", "expected"),
    [
        ({"lr": {"float": [1e-4, 1e-1]}}, {}, [1e-3]),
        ({"lr": {"float": [1e-4, 1e-1]}}, {"optimizer": "sgd", "schedule": "cosine"}, [4e-2]),
        ({"lr": {"float": [1e-4, 1e-1]}, "optimizer": {"choice": ["adam", "sgd"]}}, {}, [1e-3, 2e-2]),
        ({"lr": {"float": [1e-4, 1e-1], "prior": 2e-3}, "optimizer": {"choice": ["adam", "sgd"]}}, {}, [2e-3]),
        ({"lr": {"float": [1e-4, 1e-1], "prior": False}}, {}, []),
        ({"lr": {"float": [1e-2, 1e-1]}}, {}, []),
        ({"lr": {"choice": [1e-3, 1e-2]}}, {}, []),
        ({"lr": {"choice": [1e-3, 1e-2], "prior": 1e-2}}, {}, [1e-2]),
    ],
)
def test_a_prior_is_that_of_the_study_file_or_a_built_in_one_that_the_range_contains(
    search: dict[str, Any], fixed: dict[str, Any], expected: list[Any]
) -> None:
    assert priors_of(search, fixed=fixed).find_all("lr") == expected


def test_the_guide_names_every_built_in_prior() -> None:
    page = (Path(hpsearch.__file__).parent / "docs" / "study-file.md").read_text()
    table = page.partition("| built-in prior |")[2].partition("\n\n")[0]
    shown = {name: float(value) for value, name in re.findall(r"^\| ([\d.e-]+).*\| `(\w+)`", table, re.MULTILINE)}
    fields = Hyperparameters.model_fields
    names = [name for name, field in fields.items() if field.annotation in (int, float) and name != "batch_size"]
    ranges: dict[Any, Any] = {int: {"int": [1, 64]}, float: {"float": [1e-5, 0.99]}}
    search = {name: ranges[fields[name].annotation] for name in names} | {"stem_stride": {"int": [1, 2]}}
    priors = priors_of(search, network={"kind": "cnn"})
    found = {name: priors.find(name, {"optimizer": "adam" if name == "lr" else "sgd"}) for name in names}
    assert shown == {name: prior for name, prior in found.items() if prior is not None} | {"width": 85}


def test_false_is_a_prior_where_it_is_a_choice() -> None:
    assert priors_of({"flip": {"choice": [True, False], "prior": False}}).find_all("flip") == [False]
    assert priors_of({"flip": {"choice": [True, False]}}).find_all("flip") == []


def test_networks_of_the_users_have_the_built_in_priors_of_training_and_their_own(tmp_path: Any) -> None:
    (tmp_path / "nets.py").write_text("def build(image_shape, n_classes, *, width: int, dropout=0.0, skip=True): ...")
    ranges: dict[str, Any] = {name: {"float": [0.0, 0.9]} for name in ("dropout", "augment", "label_smoothing")}
    ranges |= {"width": {"int": [8, 64]}, "skip": {"choice": [True, False], "prior": False}}
    network = {"kind": f"{tmp_path}/nets.py:build"}
    priors = priors_of(ranges, network=network)
    found = {name: priors.find_all(name) for name in ranges}
    assert found == {"dropout": [], "augment": [0.5], "label_smoothing": [0.1], "width": [], "skip": [False]}


def test_the_middle_of_the_priors_is_tried_first_in_whatever_order_the_study_file_has() -> None:
    definition = define(SPACE)
    assert ask(start(definition), definition) == MIDDLE


def test_the_middle_is_tried_once_however_many_workers_begin_at_once_or_later() -> None:
    definition = define(SPACE)
    first = start(definition)
    second = start(definition, 1, first)
    trials = [study.ask() for study in (first, second)]  # both have begun before either draws
    for trial in reversed(trials):
        suggest(trial, definition.space)
    resumed = start(definition, 2, first)
    params = [*(trial.params for trial in trials), ask(resumed, definition)]
    assert [each == MIDDLE for each in params] == [True, False, False]
    assert params[1]["lr"] != params[2]["lr"], "each worker has its own stream"


def test_the_middle_is_tried_once_by_workers_that_do_not_know_of_each_other_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    definition = define(SPACE)
    url = f"sqlite:///{tmp_path}/study.db"
    open_study(definition, open_storage(url))
    storages = [open_storage(url) for _ in range(2)]
    studies = []
    for stream, storage in enumerate(storages):
        storage.worker = f"host-{stream}"
        studies.append(load_study(definition, storage))
        studies[-1].sampler = build_sampler(definition, stream)
    params: list[dict[str, Any]] = []
    start_trial = storages[1]._start

    def start_second(study_id: int) -> FrozenTrial:  # the first begins after the second has read the list of trials
        params.append(ask(studies[0], definition))
        return start_trial(study_id)  # type: ignore[no-any-return]

    monkeypatch.setattr(storages[1], "_start", start_second)
    params.append(ask(studies[1], definition))
    assert [each == MIDDLE for each in params] == [True, False]


def test_trials_that_diverge_at_once_unlearn_a_prior() -> None:
    definition = define({"lr": {"float": [1e-4, 10.0], "log": True, "prior": 3.0}})
    study, values = start(definition), []
    for _ in range(40):
        trial = study.ask()
        suggest(trial, definition.space)
        values.append(trial.params["lr"])
        if values[-1] > 0.03:
            study.tell(trial, state=TrialState.PRUNED)
        else:
            trial.report(0.5, 1)
            study.tell(trial, 0.5)
    assert sum(value < 0.03 for value in values[20:]) >= 10


def test_a_running_trial_does_not_delay_what_is_learnt() -> None:
    definition = define({"augment": {"float": [0, 1], "prior": 0.001}}, sampler={"startup": 100})
    study = start(definition)
    distributions: dict[str, Any] = {"augment": FloatDistribution(0, 1)}
    for number in range(100):
        value = 1 - abs(number - 50) / 100
        params = {"augment": number / 100}
        study.add_trial(
            create_trial(params=params, distributions=distributions, value=value, intermediate_values={1: value})
        )
    study.ask().report(0.5, 1)
    chosen = [ask(study, definition)["augment"] for _ in range(30)]
    assert sum(0.3 < each < 0.7 for each in chosen) >= 15


def test_values_that_are_given_win_and_the_middle_is_the_first_trial_after_them() -> None:
    definition = define(SPACE)
    study = start(definition)
    study.enqueue_trial({"optimizer": "rmsprop", "depth": 2})
    given = ask(study, definition)
    assert (given["optimizer"], given["depth"]) == ("rmsprop", 2)
    assert "momentum" in given, "what is drawn depends on what is given"
    assert given["lr"] != MIDDLE["lr"]
    assert ask(study, definition) == MIDDLE
    study.enqueue_trial({"optimizer": "sgd"})
    assert ask(study, definition)["optimizer"] == "sgd"
    assert ask(study, definition) != MIDDLE


def test_an_interrupted_trial_keeps_its_values() -> None:
    definition = define(SPACE)
    study = start(definition)
    params = ask(study, definition)
    again = optuna.Trial(start(definition, 1, study), study.trials[0]._trial_id)
    suggest(again, definition.space)
    assert again.params == params


@pytest.mark.parametrize("kind", ["median", "hyperband"])
def test_every_value_is_valid_and_a_stream_repeats(kind: str) -> None:
    definition = define(SPACE, pruner={"kind": kind}, sampler={"startup": 4})

    def search(stream: int) -> list[dict[str, Any]]:
        study = start(definition, stream)
        study.optimize(lambda trial: -suggest(trial, definition.space).lr, n_trials=12)
        return [trial.params for trial in study.trials]

    found = search(0)
    assert found == search(0) != search(1)
    for params in found:
        assert all(definition.space.dimensions[name].has(value) for name, value in params.items())
        assert ("momentum" in params) == (params["optimizer"] != "adam")


def test_threads_that_share_a_sampler_each_get_whole_trials() -> None:
    definition = define(SPACE)
    barrier = threading.Barrier(2, timeout=60)

    def objective(trial: optuna.Trial) -> float:
        barrier.wait()
        for name, dimension in definition.space.dimensions.items():
            if definition.space.is_active(name, trial.params):
                dimension.suggest(trial, name)
                barrier.wait() if name == "optimizer" else None
        return 0.0

    study = start(definition)
    study.optimize(objective, n_trials=4, n_jobs=2)
    assert sum(trial.params == MIDDLE for trial in study.trials) == 1
    assert {trial.state for trial in study.trials} == {TrialState.COMPLETE}


def run_curve(study: optuna.Study, definition: StudyDefinition, best: float, n_trials: int) -> None:
    """Run trials whose accuracy falls with the distance of the learning rate from the best one."""

    def objective(trial: optuna.Trial) -> float:
        value = 1 - abs(math.log10(suggest(trial, definition.space).lr / best)) / 4
        trial.report(value, 1)
        return value

    study.optimize(objective, n_trials=n_trials)


def test_a_prior_that_is_wrong_by_a_factor_of_30_is_unlearnt(monkeypatch: pytest.MonkeyPatch) -> None:
    spreads: list[float | None] = []
    original = Priors.draw

    def draw(
        self: Priors, random: np.random.Generator, spread: float | None, given: Mapping[str, Any] = {}
    ) -> dict[str, Any]:
        spreads.append(spread)
        return original(self, random, spread, given)

    monkeypatch.setattr(Priors, "draw", draw)
    n_from_prior = []
    for prior in (1e-3, 3e-2):
        space = {"lr": {"float": [1e-5, 1e-1], "log": True, "prior": prior}}
        n_early = n_late = 0
        for seed in range(4):
            definition = define(space, study={"seed": seed})
            study = start(definition)
            run_curve(study, definition, 1e-3, 10)
            n_early += sum(map(bool, spreads))
            spreads.clear()
            run_curve(study, definition, 1e-3, 25)
            n_late += sum(map(bool, spreads))
            spreads.clear()
        n_from_prior.append((n_early, n_late))
    (early, right), (early_too, wrong) = n_from_prior
    assert min(early, early_too) > 20, "of 40"
    assert wrong < right / 2, (wrong, right)


def test_priors_explain_trials_by_the_parameters_that_the_space_has() -> None:
    priors = priors_of(SPACE)
    middle = priors.explain(MIDDLE)
    assert middle > 0 > priors.explain(MIDDLE | {"lr": 1e-4})
    assert priors.explain(MIDDLE | {"of another": 1}) == middle
    assert priors.explain({"lr": -1.0, "optimizer": "lion"}) == 0.0


def test_a_search_without_priors_is_that_of_tpe() -> None:
    space = {"lr": {"float": [1e-4, 1e-1], "prior": False}}
    assert isinstance(build_sampler(define(space), 0), WindowedTPESampler)
    switched_off = define({"lr": {"float": [1e-4, 1e-1]}}, sampler={"prior": False})
    assert isinstance(build_sampler(switched_off, 0), WindowedTPESampler)


def test_a_search_learns_after_any_number_of_startup_trials() -> None:
    definition = define({"augment": {"float": [0, 1], "prior": 0.001}}, sampler={"startup": 150})
    study = start(definition)
    for number in range(200):
        value = 1 - abs(number - 100) / 200
        study.add_trial(
            create_trial(
                params={"augment": number / 200},
                distributions={"augment": FloatDistribution(0, 1)},
                value=value,
                intermediate_values={1: value},
            )
        )
    chosen = [ask(study, definition)["augment"] for _ in range(30)]
    assert sum(0.3 < each < 0.7 for each in chosen) >= 15
