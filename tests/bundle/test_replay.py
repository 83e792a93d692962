"""A finished trial is run again from its seed, and found identical, or not and why."""

from pathlib import Path

import optuna
import pytest
import torch

from hpsearch.bundle import replay as module
from hpsearch.bundle.replay import replay
from hpsearch.config.definition import StudyDefinition
from hpsearch.errors import NoCompletedTrial, UsageError
from hpsearch.search.objective import Objective
from hpsearch.search.study import open_study
from hpsearch.storage.rdb import open_storage

from ..conftest import make_definition


class PruneTheSecond(optuna.pruners.BasePruner):
    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        return trial.number == 1 and trial.last_step == 2


@pytest.fixture
def searched(tmp_path: Path) -> tuple[StudyDefinition, optuna.Study]:
    """A complete trial, a pruned one, one that diverged and one that waits."""
    definition = make_definition(
        f"sqlite:///{tmp_path / 'study.db'}",
        budget={"epochs": 4},
        search={"width": {"int": [8, 32]}, "lr": {"float": [1e-3, 1e38], "log": True}},
        fixed={"dropout": 0.2, "augment": 0.5},
    )
    study = open_study(definition, open_storage(definition.study.storage))
    for lr in (0.02, 1e-3, 1e37, 0.01):
        study.enqueue_trial({"width": 16, "lr": lr})
    study.pruner = PruneTheSecond()
    study.optimize(Objective(definition), n_trials=3)
    return definition, study


@pytest.mark.parametrize(("number", "state"), [(0, "complete"), (1, "pruned")])
def test_a_trial_is_identical_to_the_last_bit(
    searched: tuple[StudyDefinition, optuna.Study], number: int, state: str
) -> None:
    definition, study = searched
    epochs: list[int] = []
    document = replay(definition, study, number, on_epoch=lambda result: epochs.append(result.epoch))
    assert (document["state"], document["identical"], document["largest_difference"]) == (state, True, 0)
    assert document["reasons"] == []
    assert document["value"] == document["replayed_value"] == study.trials[number].intermediate_values[epochs[-1]]
    assert epochs == list(study.trials[number].intermediate_values)


def test_a_difference_is_measured_and_explained(searched: tuple[StudyDefinition, optuna.Study]) -> None:
    definition, study = searched
    trial = study.trials[0]
    was = trial.user_attrs["environment"]
    study.add_trial(
        optuna.trial.create_trial(
            value=0.5,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs={"environment": was | {"torch": "1.0", "device": "NVIDIA H200"}},
            intermediate_values=trial.intermediate_values | {3: 0.125},
        )
    )
    document = replay(definition, study, 4)  # another number, so another seed
    assert not document["identical"]
    assert document["epoch"] == 3
    assert document["largest_difference"] > 0.3
    assert document["reasons"] == [
        f"torch: was 1.0, is now {torch.__version__}",
        "device: was NVIDIA H200, is now cpu",
    ]


def test_a_trial_of_another_program_has_no_environment_to_compare(
    searched: tuple[StudyDefinition, optuna.Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    definition, study = searched
    monkeypatch.setattr(module, "trial_seed", lambda *_: 1)
    assert replay(definition, study, 0)["reasons"][0].startswith("no recorded difference")
    trial = study.trials[0]
    study.add_trial(
        optuna.trial.create_trial(
            value=0.5, params=trial.params, distributions=trial.distributions, intermediate_values={1: 0.1}
        )
    )
    assert "has no environment recorded" in replay(definition, study, 4)["reasons"][0]


def test_a_trial_runs_with_the_threads_that_it_had(
    searched: tuple[StudyDefinition, optuna.Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    definition, study = searched
    threads: list[int] = []
    monkeypatch.setattr(module, "load_study_data", lambda *_: threads.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        with pytest.raises(AttributeError):
            replay(definition, study, 0)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    assert threads == [study.trials[0].user_attrs["environment"]["threads"]] == [before]


@pytest.mark.parametrize(
    ("number", "message"), [(9, "has no trial 9"), (2, "has no finished epoch"), (3, "has no finished epoch")]
)
def test_what_cannot_be_replayed_is_said(
    searched: tuple[StudyDefinition, optuna.Study], number: int, message: str
) -> None:
    with pytest.raises((NoCompletedTrial, UsageError), match=message):
        replay(*searched, number)
