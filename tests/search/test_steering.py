"""A search is steered while it runs: extended exactly, and given values that can be used."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from optuna.trial import TrialState, create_trial

from hpsearch.config.definition import StudyDefinition, evolve
from hpsearch.errors import UsageError
from hpsearch.search.study import enqueue_trial, extend_study, open_study, start_study, stop_study
from hpsearch.storage.rdb import open_storage

from ..conftest import make_definition

SEARCH = {
    "width": {"int": [8, 32]},
    "lr": {"float": [1e-3, 1e-1], "log": True},
    "optimizer": {"choice": ["adam", "sgd"]},
    "momentum": {"float": [0.0, 0.9], "when": {"optimizer": ["sgd"]}},
    "batch_norm": {"choice": [True, False]},
}
STATES = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)


@pytest.fixture
def definition(url: str) -> StudyDefinition:
    return make_definition(url, search=SEARCH, budget={"trials": 6})


@pytest.mark.parametrize(
    "steps",
    [
        "run 6, add 4 = 10, run = 10, add 5 = 15, run = 15, done 15, add 1 = 16, run = 16",
        "total 9 = 9, run = 6, total 9 = 9, add 2 = 11, run = 11, total 9 = 9, add 1 = 10, run = 10",
        "total 2 = 2, done 2, add 2 = 4, run = 4, done 4, add 1 = 5, file 8 = 8, add 1 = 9, run = 9",
        "done 6, add 4 = 10, done 10, total 5 refused, run = 10, add 5 = 15, run = 15, total 10 = 10, run = 10",
        "total 9 = 9, done 9, run = 9, add 2 = 11, run = 11, done 11, file 3 = 11, total 11 = 11, add 1 = 12, run = 12",
        "total 9 = 9, done 7, run = 7, add 1 = 8, total 6 refused, run = 8, total 7 = 7, add 1 = 8, file 6 = 8",
    ],
)
def test_the_number_of_trials_is_what_was_said_last_and_never_less_than_there_are(steps: str, tmp_path: Path) -> None:
    definition = make_definition(f"sqlite:///{tmp_path / 'study.db'}", budget={"trials": 6})
    storage = open_storage(definition.study.storage)
    study = open_study(definition, storage)
    for step in steps.split(", "):
        command, _, expected = step.partition(" = ")
        match command.split():
            case ["run", *_]:
                open_study(definition, storage)
            case ["file", number]:
                definition = evolve(definition, "budget", trials=int(number))
                open_study(definition, storage)
            case ["total", number]:
                open_study(evolve(definition, "budget", trials=int(number)), storage, keeps_extension=False)
            case ["total", number, "refused"]:
                before, told = study.user_attrs, rf"--trials {number}: study 'small' already has \d+ trials, and"
                with pytest.raises(UsageError, match=told):
                    open_study(evolve(definition, "budget", trials=int(number)), storage, keeps_extension=False)
                assert study.user_attrs == before
            case ["add", number]:
                assert extend_study(definition, study, int(number)) == int(expected)
            case ["done", number]:
                for i in range(len(study.trials), int(number)):
                    study.add_trial(create_trial(state=STATES[i % 3], value=None if i % 3 == 2 else 0.5))
        assert not expected or study.user_attrs["budget"]["trials"] == int(expected), step


def test_a_run_resumes_a_study_that_was_stopped_and_another_worker_does_not(definition: StudyDefinition) -> None:
    study = open_study(definition, open_storage(definition.study.storage))
    stop_study(study)
    start_study(definition, resumes=False)
    assert study.user_attrs["stopped"]
    start_study(definition)
    assert not study.user_attrs["stopped"]


def test_extensions_at_the_same_time_all_count(definition: StudyDefinition) -> None:
    open_study(definition, open_storage(definition.study.storage))

    def extend(_: int) -> int:
        storage = open_storage(definition.study.storage)
        try:
            return extend_study(definition, open_study(definition, storage), 1)
        finally:
            storage.engine.dispose()

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(extend, range(8))) == list(range(7, 15))


def test_given_values_wait_with_their_types(definition: StudyDefinition) -> None:
    study = open_study(definition, open_storage(definition.study.storage))
    settings = ["width=16", "lr=1e-2", "optimizer=sgd", "momentum=0.5", "batch_norm=true"]
    assert enqueue_trial(definition, study, settings) == 0
    assert enqueue_trial(definition, study, ["optimizer=adam"]) == 1
    first, second = study.trials
    assert first.state == second.state == TrialState.WAITING
    values = {"width": 16, "lr": 0.01, "optimizer": "sgd", "momentum": 0.5, "batch_norm": True}
    assert first.system_attrs["fixed_params"] == values
    assert second.system_attrs["fixed_params"] == {"optimizer": "adam"}


def test_given_numbers_are_those_that_the_search_has_and_bring_what_their_condition_needs(url: str) -> None:
    step = {"float": [0.1, 0.4], "step": 0.1}
    definition = make_definition(url, search=SEARCH | {"dropout": step, "lr": {"float": [1e-3, 1]}})
    study = open_study(definition, open_storage(url))
    enqueue_trial(definition, study, ["momentum=0", "lr=1", "dropout=0.3"])
    [waiting] = study.trials
    values = waiting.system_attrs["fixed_params"]
    assert values == {"momentum": 0.0, "optimizer": "sgd", "lr": 1.0, "dropout": 0.1 + 2 * 0.1}
    assert isinstance(values["lr"], float)


def test_every_setting_that_cannot_be_used_is_named_and_nothing_is_queued(definition: StudyDefinition) -> None:
    study = open_study(definition, open_storage(definition.study.storage))
    for settings, lines in [
        (["width"], ["width: expected NAME=VALUE, e.g. lr=1e-3"]),
        (["lr=0.01", "lr=0.02"], ["lr=0.02: lr was already set to 0.01"]),
        (["widht=9", "lr=5"], ["widht: is not in [search]; did you mean 'width'?", "lr: 5 is outside the"]),
        (["optimizer=adam", "momentum=0.5"], ["momentum: has no effect when optimizer = 'adam'"]),
        (["depth=3"], ["depth: is not in [search]"]),
        (["width=9.5"], ["width: must be a valid integer, but got 9.5"]),
        (["lr=NaN"], ["lr: "]),
        (["lr="], ["lr: "]),
        (["batch_norm=yes"], ["batch_norm: "]),
    ]:
        with pytest.raises(UsageError) as caught:
            enqueue_trial(definition, study, settings)
        for told, expected in zip(str(caught.value).splitlines(), lines, strict=True):
            assert told.startswith(expected)
    assert study.trials == []
