"""The objective: a trial becomes a value, in plain Optuna as well, the same for the same seed."""

import json
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import FixedTrial, FrozenTrial, TrialState

from hpsearch.bundle.confirm import confirm
from hpsearch.bundle.replay import replay
from hpsearch.bundle.retrain import export
from hpsearch.data.dataset import ImageData, Split
from hpsearch.errors import Drained, StorageUnavailable, StudyMismatch
from hpsearch.search.objective import Objective
from hpsearch.search.pruning import AshaPruner, PruningCallback
from hpsearch.search.study import open_study
from hpsearch.storage.artifacts import Folder
from hpsearch.storage.checkpoints import read
from hpsearch.storage.rdb import open_storage
from hpsearch.training import run, trainer
from hpsearch.training.metrics import Score
from hpsearch.training.networks import build_network
from hpsearch.training.run import trial_seed
from hpsearch.training.trainer import EpochResult
from hpsearch.workers.processes import run_pool
from hpsearch.workers.shutdown import Drain
from hpsearch.workers.worker import run_worker

from ..conftest import make_definition

PARAMS = {"width": 16, "lr": 0.01}


def test_the_objective_runs_in_plain_optuna() -> None:
    study = optuna.create_study(direction="maximize")
    study.optimize(Objective(make_definition()), n_trials=3)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 3
    assert study.best_value > 0.3
    assert all(list(trial.intermediate_values) == [1, 2] for trial in study.trials)
    assert study.trials[0].value == study.trials[0].intermediate_values[2]


def test_a_study_that_minimizes_is_refused_before_anything_is_trained(digits: ImageData) -> None:
    study = optuna.create_study()
    with pytest.raises(StudyMismatch, match=r"does not maximize .* create another one with direction='maximize'"):
        study.optimize(Objective(make_definition(), digits), n_trials=1)
    assert study.trials[0].params == {}


def test_a_study_keeps_to_the_data_that_it_was_searched_on_first(digits: ImageData, tmp_path: Path) -> None:
    definition = make_definition(f"sqlite:///{tmp_path / 'study.db'}")
    study = open_study(definition, open_storage(definition.study.storage))
    darker = replace(digits, validation=Split(digits.validation.images - 0.1, digits.validation.labels))
    study.optimize(Objective(definition, darker), n_trials=1)
    study.optimize(Objective(definition, darker), n_trials=1)
    told = (
        r"'small' was searched on other images than these of digits:\n  SHA-256 of labels and pixels: \w+ -> \w+\nPoint"
    )
    for use in (
        lambda: study.optimize(Objective(definition, digits), n_trials=1),
        lambda: run_worker(definition, Drain()),
        lambda: run_pool(definition, Drain(), 1),
        lambda: confirm(definition, study),
        lambda: export(definition, study, str(tmp_path / "model")),
        lambda: replay(definition, study, 0),
    ):
        with pytest.raises(StudyMismatch, match=told):
            use()
    assert "test_reads" not in study.user_attrs
    study.set_user_attr("data", None)  # as in an older version, which did not note it
    assert replay(definition, study, 0)["identical"] is False
    study.optimize(Objective(definition, digits), n_trials=1)
    assert study.user_attrs["data"] == digits.describe()


def test_an_enqueued_value_that_is_not_used_is_named(digits: ImageData, caplog: pytest.LogCaptureFixture) -> None:
    momentum = {"float": [0.0, 0.9], "when": {"optimizer": ["sgd"]}}
    search = {"width": {"int": [8, 32]}, "optimizer": {"choice": ["adam", "sgd"]}, "momentum": momentum}
    study = optuna.create_study(direction="maximize")
    study.enqueue_trial({"optimizer": "adam", "momentum": 0.9, "witdh": 9})
    study.enqueue_trial({"optimizer": "sgd", "momentum": 0.9})
    study.optimize(Objective(make_definition(search=search), digits), n_trials=2)
    said = [record.message for record in caplog.records if record.name == "hpsearch.search.objective"]
    assert [message.partition(" that was")[0] for message in said] == [
        "trial 0: the value of momentum",
        "trial 0: the value of witdh",
    ]


def test_trials_in_threads_have_the_values_that_they_have_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Threads meet while they draw weights, if nothing keeps them apart."""
    definition = make_definition(fixed={"dropout": 0.3, "augment": 0.5}, pruner={"kind": "none"})
    meeting = threading.Barrier(3)

    def build_together(*arguments: Any) -> Any:
        with suppress(threading.BrokenBarrierError):
            meeting.wait(timeout=0.1)
        return build_network(*arguments)

    def run(n_jobs: int) -> dict[int, float | None]:
        study = optuna.create_study(direction="maximize")
        for i in range(3):
            study.enqueue_trial({"lr": 0.01 * (i + 1), "width": 16})
        study.optimize(Objective(definition), n_trials=3, n_jobs=n_jobs)
        return {trial.number: trial.value for trial in study.trials}

    one_by_one = run(1)
    monkeypatch.setattr("hpsearch.training.run.build_network", build_together)
    assert run(3) == one_by_one


def test_the_value_is_the_same_for_the_same_trial_and_differs_between_trials(digits: ImageData) -> None:
    objective = Objective(make_definition(), digits)
    trials: list[Any] = [FixedTrial(PARAMS, number=number) for number in (0, 0, 1)]
    values = [objective(trial) for trial in trials]
    assert values[0] == values[1]
    assert values[0] != values[2]


def test_the_value_is_that_of_the_last_epoch_even_if_another_was_better(
    digits: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([Score([9], [10]), Score([7], [10])])
    monkeypatch.setattr(trainer, "measure", lambda network, split: next(scores))
    definition = make_definition(pruner={"kind": "none"})  # which needs no other measurements
    assert Objective(definition, digits)(FixedTrial(PARAMS)) == 0.7  # type: ignore[arg-type]


def test_a_trial_of_the_balanced_accuracy_has_it_as_value_and_report_and_the_accuracy_beside_it(
    digits: ImageData,
) -> None:
    rare = digits.validation.labels != 3
    rare[:40] = True  # few of the threes
    unequal = replace(digits, validation=Split(digits.validation.images[rare], digits.validation.labels[rare]))
    accuracy = Objective(make_definition(), unequal)(FixedTrial(PARAMS))  # type: ignore[arg-type]
    study = optuna.create_study(direction="maximize")
    study.enqueue_trial(PARAMS)
    study.optimize(Objective(make_definition(None, study={"metric": "balanced_accuracy"}), unequal), n_trials=1)
    [trial] = study.trials
    assert trial.value == trial.intermediate_values[2]
    assert trial.user_attrs["accuracy"] == accuracy != trial.value
    low, high = trial.user_attrs["interval"]
    assert low < trial.value < high


def test_a_trial_trains_on_the_training_split_and_is_measured_on_the_validation_split(
    digits: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits: list[Any] = []

    class Noting(trainer.Trainer):
        def __init__(self, network: Any, split: Any, *arguments: Any, **options: Any) -> None:
            splits.extend((split, options["validation"]))
            super().__init__(network, split, *arguments, **options)

    monkeypatch.setattr(run, "Trainer", Noting)
    objective = Objective(make_definition(), digits)
    objective(FixedTrial(PARAMS))  # type: ignore[arg-type]
    assert splits == [objective.data.train, objective.data.validation]


def test_a_retried_trial_has_the_seed_of_the_trial_that_it_repeats() -> None:
    first, retry = FixedTrial(PARAMS, number=3), FixedTrial(PARAMS, number=9)
    retry.set_user_attr("attempts", [3])
    assert trial_seed(7, retry) == trial_seed(7, first)
    assert trial_seed(7, first) != trial_seed(8, first)
    assert trial_seed(7, first) != trial_seed(7, first, repetition=1)


@pytest.mark.parametrize(
    ("kind", "newer"), [("mlp", {}), ("mlp", {"flip": True}), ("cnn", {}), ("cnn", {"stem_stride": 1})]
)
def test_a_checkpoint_names_newer_hyperparameters_only_where_they_are_on_so_that_older_checkpoints_are_resumed(
    digits: ImageData, tmp_path: Path, kind: str, newer: dict[str, Any]
) -> None:
    def stop(*, between_epochs: bool = False) -> None:
        raise Drained

    definition, trial = make_definition(network={"kind": kind}, fixed=newer), FixedTrial(PARAMS)
    objective = Objective(definition, digits, checkpoints=tmp_path)
    with pytest.raises(Drained):
        objective(trial, stop)  # type: ignore[arg-type]
    identity = json.loads(read(Folder(tmp_path), "trial-0.ckpt")["identity"])
    older = {
        "activation": "relu", "augment": 0.0, "batch_norm": True, "batch_size": 64, "depth": 2, "dropout": 0.0,
        "label_smoothing": 0.0, "lr": 0.01, "momentum": 0.0, "optimizer": "adam", "schedule": "constant",
        "weight_decay": 0.0, "width": 16,
    }  # fmt: skip
    assert identity["hyperparameters"] == older | newer


def test_a_diverging_trial_is_pruned_with_its_last_finite_report(digits: ImageData) -> None:
    definition = make_definition(search={"lr": {"float": [1e30, 1e38], "log": True}}, fixed={"optimizer": "sgd"})
    study = optuna.create_study(direction="maximize")
    study.optimize(Objective(definition, digits), n_trials=2)
    for trial in study.trials:
        assert trial.state == TrialState.PRUNED
        assert trial.user_attrs["diverged"].startswith("training diverged: loss is")
        assert trial.value is None
    with pytest.raises(ValueError, match="No trials are completed"):
        _ = study.best_trial


class Outage(AshaPruner):
    """Cannot be asked once, as if the database were gone."""

    def __init__(self, epochs: int) -> None:
        super().__init__(epochs)
        self.asked: list[int | None] = []

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        self.asked.append(trial.last_step)
        if self.asked == [1]:
            raise StorageUnavailable
        return super().prune(study, trial)


def test_a_resumed_trial_is_compared_as_if_it_had_not_been_interrupted(digits: ImageData, tmp_path: Path) -> None:
    definition = make_definition(budget={"epochs": 9})
    pruner = Outage(9)
    study = optuna.create_study(direction="maximize", pruner=pruner)
    objective = Objective(definition, digits, checkpoints=tmp_path)
    study.enqueue_trial(PARAMS)
    first = study.ask()
    with pytest.raises(StorageUnavailable):
        objective(first)
    study.tell(first, state=TrialState.FAIL)
    study.enqueue_trial(PARAMS, user_attrs={"attempts": [0]})  # its attributes and reports are lost
    resumed = study.ask()

    def stop(*, between_epochs: bool = False) -> None:
        if between_epochs:
            raise Drained

    with pytest.raises(Drained):
        objective(resumed, stop)
    assert pruner.asked == [1, 1, 2], "after resuming, the pruner is asked what it could not be asked before"
    study.tell(resumed, state=TrialState.FAIL)
    study.enqueue_trial(PARAMS, user_attrs={"attempts": [0, 1]})
    again = study.ask()
    objective(again)
    assert pruner.asked == [1, 1, 2, 3, 4, 5, 6, 7, 8], "and nothing twice"
    assert resumed.user_attrs["averaged"].keys() == {"1"}
    assert again.user_attrs["averaged"].keys() == {"1", "3"}
    assert again.user_attrs["averaged"]["1"] == first.user_attrs["averaged"]["1"]


def test_weights_are_averaged_only_for_the_pruner_that_compares_them(digits: ImageData) -> None:
    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.MedianPruner())
    study.optimize(Objective(make_definition(budget={"epochs": 3}), digits), n_trials=1)
    assert "averaged" not in study.trials[0].user_attrs


class AlwaysPrune(optuna.pruners.BasePruner):
    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        return True


def test_pruning_reports_first_and_spares_a_trial_after_its_last_epoch() -> None:
    study = optuna.create_study(direction="maximize", pruner=AlwaysPrune())
    trial = study.ask()
    callback = PruningCallback(trial, epochs=2)
    with pytest.raises(optuna.TrialPruned):
        callback(EpochResult(1, 0.1, 0.7))
    callback(EpochResult(2, 0.1, 0.8))
    assert study.get_trials()[0].intermediate_values == {1: 0.7, 2: 0.8}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_the_objective_runs_on_a_gpu(digits: ImageData, kind: str) -> None:
    definition = make_definition(network={"kind": kind}, fixed={"augment": 0.3}, budget={"epochs": 5})
    trial: Any = FixedTrial(PARAMS)
    assert Objective(definition, digits, device="cuda")(trial) > 0.3
