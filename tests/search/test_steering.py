"""A search is steered while it runs: extended exactly, and given values that can be used."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from optuna.trial import TrialState

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


@pytest.fixture
def definition(url: str) -> StudyDefinition:
    return make_definition(url, search=SEARCH, budget={"trials": 6})


def test_an_extension_lasts_until_the_study_file_or_an_option_says_otherwise(definition: StudyDefinition) -> None:
    storage = open_storage(definition.study.storage)
    study = open_study(definition, storage)
    assert extend_study(study, 4) == 10
    assert extend_study(study, 5) == 15
    assert open_study(definition, storage).user_attrs["budget"]["trials"] == 15
    changed = evolve(definition, "budget", trials=9)
    study = open_study(changed, storage)
    assert study.user_attrs["budget"]["trials"] == 9
    assert extend_study(study, 2) == 11
    assert open_study(changed, storage).user_attrs["budget"]["trials"] == 11
    assert open_study(definition, storage).user_attrs["budget"]["trials"] == 6, "not 15: that was another budget's"
    assert extend_study(study, 1) == 7
    assert open_study(definition, storage, keeps_extension=False).user_attrs["budget"]["trials"] == 6


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
            return extend_study(open_study(definition, storage), 1)
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
        (["width"], ["--set width: expected NAME=VALUE, e.g. lr=1e-3"]),
        (["lr=0.01", "lr=0.02"], ["--set lr=0.02: lr was already set to 0.01"]),
        (["widht=9", "lr=5"], ["--set widht: is not in [search]; did you mean 'width'?", "--set lr: 5 is outside the"]),
        (["optimizer=adam", "momentum=0.5"], ["--set momentum: has no effect when optimizer = 'adam'"]),
        (["depth=3"], ["--set depth: is not in [search]"]),
        (["width=9.5"], ["--set width: must be a valid integer, but got 9.5"]),
        (["lr=NaN"], ["--set lr: "]),
        (["lr="], ["--set lr: "]),
        (["batch_norm=yes"], ["--set batch_norm: "]),
    ]:
        with pytest.raises(UsageError) as caught:
            enqueue_trial(definition, study, settings)
        for told, expected in zip(str(caught.value).splitlines(), lines, strict=True):
            assert told.startswith(expected)
    assert study.trials == []
