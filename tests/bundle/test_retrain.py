"""The best trial is trained on training and validation images, and the test set is read once, at the end."""

import importlib.util
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch

from hpsearch.bundle import bundle, retrain
from hpsearch.bundle.evaluation import wilson_interval
from hpsearch.config.definition import StudyDefinition, evolve, parse_definition
from hpsearch.data import dataset
from hpsearch.data.dataset import load_test
from hpsearch.errors import BundleError, DataError, Diverged, StorageError, UsageError
from hpsearch.monitor.report import write_report
from hpsearch.search.study import load_study, open_study
from hpsearch.storage.checkpoints import checkpoint_folder
from hpsearch.storage.rdb import open_storage
from hpsearch.training import run
from hpsearch.training.networks import Network
from hpsearch.training.trainer import EpochResult, Trainer

from ..acceptance.commands import epochs_of, processes_of, start, wait_for
from ..conftest import make_definition

pytestmark = pytest.mark.usefixtures("forked_verification")


@pytest.fixture
def searched(tmp_path: Path) -> tuple[StudyDefinition, optuna.Study]:
    """A study with three complete trials; trial 1 is the best."""
    study_table = {"artifacts": str(tmp_path / "artifacts")}
    definition = make_definition(
        f"sqlite:///{tmp_path / 'study.db'}", study=study_table, retrain={"epochs": 3, "seeds": 2}
    )
    study = open_study(definition, open_storage(definition.study.storage))
    for value, width in ((0.7, 8), (0.9, 16), (0.8, 32)):
        study.enqueue_trial({"width": width, "lr": 0.02})
        with pytest.warns(UserWarning, match="Heartbeat"):
            trial = study.ask()
        trial.suggest_int("width", 8, 32)
        trial.suggest_float("lr", 1e-3, 1e-1, log=True)
        study.tell(trial, value)
    return definition, study


def test_the_best_trial_is_exported_with_its_figures(
    searched: tuple[StudyDefinition, optuna.Study], tmp_path: Path
) -> None:
    definition, study = searched
    seen: list[tuple[int, int]] = []
    metrics = retrain.export(
        definition, study, tmp_path / "b", on_epoch=lambda seed, result: seen.append((seed, result.epoch))
    )
    assert metrics["trial"] == 1
    assert metrics["validation_accuracy"] == 0.9
    assert metrics["n_images"] == {"train": 500, "validation": 200, "test": 360}
    assert metrics["test_accuracy"] == metrics["test_accuracies"]["of_each_seed"][0] > 0.5
    assert len(metrics["test_accuracies"]["of_each_seed"]) == 2
    assert seen == [(seed, epoch) for seed in (0, 1) for epoch in (1, 2, 3)]
    assert metrics["test_interval"][0] < metrics["test_accuracy"] < metrics["test_interval"][1]
    assert metrics["test_reads"] == 1
    assert {seen["accuracy"] for seen in metrics["verified"].values()} == {metrics["test_accuracy"]}
    assert json.loads((tmp_path / "b" / "metrics.json").read_text()) == metrics
    assert json.loads((tmp_path / "b" / "config.json").read_text())["hyperparameters"]["width"] == 16
    assert definition.study.name in (tmp_path / "b" / "study.toml").read_text()


def test_another_trial_may_be_chosen_and_an_unfinished_one_may_not(
    searched: tuple[StudyDefinition, optuna.Study], tmp_path: Path
) -> None:
    definition, study = searched
    assert retrain.export(definition, study, tmp_path / "b", number=2)["trial"] == 2
    with pytest.raises(UsageError, match="has no trial 7; valid numbers are 0 to "):
        retrain.export(definition, study, tmp_path / "c", number=7)
    assert not (tmp_path / "c").exists()


def test_the_confirmed_winner_is_exported_and_its_confirmation_told(
    searched: tuple[StudyDefinition, optuna.Study], tmp_path: Path
) -> None:
    definition, study = searched
    candidate = {"number": 2, "accuracies": [0.75, 0.75], "mean": 0.75, "interval": [0.75, 0.75], "n_parameters": 5}
    study.set_user_attr("confirmation", {"winner": 2, "is_tie": True, "candidates": [candidate]})
    metrics = retrain.export(definition, study, tmp_path / "b")
    assert (metrics["trial"], metrics["confirmed"]) == (
        2,
        candidate | {"is_winner": True, "is_tie": True, "n_compared": 1, "interval": wilson_interval(0.75, 200)},
    )
    assert "Other trials were statistically tied with it" in (tmp_path / "b" / "README.md").read_text()
    assert "mean 75.00%, 95% CI 68.57 to 80.49%" in (tmp_path / "b" / "README.md").read_text()
    assert retrain.export(definition, study, tmp_path / "c", number=1)["confirmed"] is None
    study.set_user_attr("confirmation", {"winner": 2, "is_tie": False, "candidates": [candidate]})
    retrain.export(definition, study, tmp_path / "b")
    assert "No other trial was compared with it." in (tmp_path / "b" / "README.md").read_text()


def test_the_study_counts_how_often_the_test_set_was_read(
    searched: tuple[StudyDefinition, optuna.Study], tmp_path: Path
) -> None:
    definition, study = searched
    assert [retrain.export(definition, study, tmp_path / "b", number=i)["test_reads"] for i in (1, 2)] == [1, 2]
    assert [reading["trial"] for reading in study.user_attrs["test_reads"]] == [1, 2]
    assert "**export number 2**" in (tmp_path / "b" / "README.md").read_text()


def test_without_the_packages_for_onnx_nothing_is_trained(
    searched: tuple[StudyDefinition, optuna.Study], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    definition, study = searched
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(run, "Trainer", None)
    with pytest.raises(UsageError, match=r"install them with: pip install 'hpsearch\[onnx\]'"):
        retrain.export(definition, study, tmp_path / "b", onnx=True)


def test_an_ensemble_averages_the_probabilities_of_its_networks_in_every_format(
    searched: tuple[StudyDefinition, optuna.Study], tmp_path: Path
) -> None:
    definition, study = searched
    first = retrain.export(definition, study, tmp_path / "first")
    definition = evolve(definition, "retrain", export="ensemble")
    options: dict[str, Any] = {"onnx": True, "torch_export": True, "n_workers": 2}
    metrics = retrain.export(definition, study, tmp_path / "b", **options)
    assert metrics["test_accuracies"] == first["test_accuracies"]
    assert (metrics["n_members"], metrics["n_parameters"]) == (2, 2 * first["n_parameters"])
    assert [*metrics["verified"]] == ["model.safetensors", "model.pt", "model.onnx", "model.pt2"]
    assert {seen["accuracy"] for seen in metrics["verified"].values()} == {metrics["test_accuracy"]}

    weights = torch.load(tmp_path / "b" / "model.pt", weights_only=True)
    alone = torch.load(tmp_path / "first" / "model.pt", weights_only=True)
    assert all(torch.equal(weights[f"0.{name}"], alone[name]) for name in alone)
    assert not any(torch.equal(weights[f"1.{name}"], alone[name]) for name in alone if "weight" in name)
    classifier, member = bundle.load(tmp_path / "b"), bundle.load(tmp_path / "first")
    images = member.load_test()[0].numpy()
    assert isinstance(member.network, Network)
    each = [member.predict_proba(images)]
    member.network.load_state_dict({name: weights[f"1.{name}"] for name in alone})
    each.append(member.predict_proba(images))
    assert np.allclose(classifier.predict_proba(images), np.mean(each, axis=0), atol=1e-6)
    assert repr(classifier).startswith("<Classifier: ensemble of 2 mlp with")

    lines = (tmp_path / "b" / "predict.py").read_text().splitlines()
    assert len(lines) <= 42
    assert max(map(len, lines)) <= 120
    card = (tmp_path / "b" / "README.md").read_text()
    mean = metrics["test_accuracies"]["mean"]
    assert (
        f"of them alone has a test accuracy of {100 * mean:.2f}% on average; asking the ensemble takes 2 times" in card
    )
    assert "each of the 2 networks alone" in card
    assert "All networks that were trained are members of the ensemble." in card


def test_the_probabilities_of_shifted_copies_are_averaged_in_every_format(
    searched: tuple[StudyDefinition, optuna.Study], tmp_path: Path
) -> None:
    definition, study = searched
    first = retrain.export(definition, study, tmp_path / "first")
    definition = evolve(definition, "retrain", shift=2)
    metrics = retrain.export(definition, study, tmp_path / "b", onnx=True, torch_export=True)
    assert metrics["test_accuracies"] == first["test_accuracies"]
    assert metrics["n_parameters"] == first["n_parameters"]
    assert [*metrics["verified"]] == ["model.safetensors", "model.pt", "model.onnx", "model.pt2"]
    assert {seen["accuracy"] for seen in metrics["verified"].values()} == {metrics["test_accuracy"]}

    classifier, alone = bundle.load(tmp_path / "b"), bundle.load(tmp_path / "first")
    images = alone.load_test()[0].numpy()
    height, width = images.shape[2:]
    padded = np.pad(images, ((0, 0), (0, 0), (2, 2), (2, 2)), mode="edge")
    starts = ((2, 2), (0, 2), (4, 2), (2, 0), (2, 4))
    each = [alone.predict_proba(padded[:, :, y : y + height, x : x + width]) for y, x in starts]
    assert np.allclose(classifier.predict_proba(images), np.mean(each, axis=0), atol=1e-6)

    lines = (tmp_path / "b" / "predict.py").read_text().splitlines()
    assert len(lines) <= 45
    assert max(map(len, lines)) <= 120
    assert "28x28 pixels, averaged over shifts by 2, to 10 classes" in repr(classifier)
    card = (tmp_path / "b" / "README.md").read_text()
    assert "averaged over the image and copies that are shifted by 2 pixels up, down, left and right" in card
    assert f"Without shifted copies, its test accuracy is {100 * first['test_accuracy']:.2f}%." in card
    assert "2 models with different seeds, without shifted copies" in card
    write_report(definition, study, tmp_path / "r.html", bundle=tmp_path / "b", command="small")
    text = " ".join((tmp_path / "r.html").read_text().split())
    assert f"copies shifted by 2 pixels; without them it reaches {100 * first['test_accuracy']:.2f}%." in text


def test_an_export_that_was_interrupted_trains_only_the_rest_and_gives_the_same_model(
    searched: tuple[StudyDefinition, optuna.Study], tmp_path: Path
) -> None:
    definition, study = searched
    retrain.export(definition, study, tmp_path / "whole")
    definition = evolve(definition, "recovery", checkpoint=0)
    seen: list[tuple[int, int]] = []

    def note(i: int, result: EpochResult) -> None:
        seen.append((i, result.epoch))
        if seen[-1] == (1, 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        retrain.export(definition, study, tmp_path / "b", on_epoch=note)
    files = checkpoint_folder(definition, study)
    assert [*files.find()] == ["export-1-0.ckpt", "export-1-1.ckpt"]
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        retrain.export(definition, study, tmp_path / "b", on_epoch=note)
    assert seen == [(0, 3), (1, 2), (1, 3)]  # the first two are read from the checkpoints
    longer = evolve(definition, "retrain", epochs=4)
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        retrain.export(longer, study, tmp_path / "b", on_epoch=note)
    assert seen[0] == (0, 1), "a checkpoint of a shorter training was used"
    retrain.export(definition, study, tmp_path / "b", n_workers=2)
    assert (tmp_path / "b" / "model.pt").read_bytes() == (tmp_path / "whole" / "model.pt").read_bytes()
    assert not files.find()


def test_a_network_that_diverges_in_an_export_is_named(
    searched: tuple[StudyDefinition, optuna.Study], tmp_path: Path
) -> None:
    definition, study = searched
    study.enqueue_trial({"width": 8, "lr": 0.1})
    trial = study.ask()
    definition.space.dimensions["width"].suggest(trial, "width")
    definition.space.dimensions["lr"].suggest(trial, "lr")
    study.tell(trial, 0.1)
    diverging = parse_definition(
        definition.to_tables()
        | {"fixed": {"depth": 2, "optimizer": "sgd", "batch_norm": False, "momentum": 0.99999, "weight_decay": 1e30}}
    )
    with pytest.raises(Diverged, match=f"trial {trial.number}, model [12]: training diverged"):
        retrain.export(diverging, study, tmp_path / "b", number=trial.number, n_workers=2)
    assert "test_reads" not in study.user_attrs


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_signal_to_an_export_leaves_no_process_and_no_model_and_the_next_one_goes_on(
    searched: tuple[StudyDefinition, optuna.Study], tmp_path: Path, number: signal.Signals
) -> None:
    definition, _ = searched
    definition = evolve(definition, "retrain", epochs=epochs_of(3), export="ensemble")
    definition = evolve(definition, "recovery", checkpoint=0)
    (tmp_path / "small.toml").write_text(definition.to_toml())
    log = tmp_path / "log"
    command = start("export", "small.toml", "--workers", 2, cwd=tmp_path, log=log)
    wait_for(lambda: all(f"model {i}/2  epoch 9/" in log.read_text() for i in (1, 2)), "some epochs of both")
    os.kill(command.pid, number)
    command.wait(timeout=120)
    wait_for(lambda: not processes_of(command.pid), "the end of all processes")
    assert not (tmp_path / "models" / "small").exists()
    again = start("export", "small.toml", "--workers", 2, cwd=tmp_path, log=log)
    assert again.wait(timeout=300) == 0, log.read_text()
    assert "epoch 5/" not in log.read_text()
    assert bundle.load(tmp_path / "models" / "small").config.n_members == 2


def test_an_export_repeats_itself(searched: tuple[StudyDefinition, optuna.Study], tmp_path: Path) -> None:
    definition, study = searched
    weights = []
    for name in ("one", "two"):
        retrain.export(definition, study, tmp_path / name)
        weights.append(torch.load(tmp_path / name / "model.pt", weights_only=True))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_test_set_is_read_once_and_after_all_training(
    searched: tuple[StudyDefinition, optuna.Study], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    definition, study = searched
    events: list[str] = []

    class Watched(Trainer):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            events.append(f"train on {len(arguments[1])}")
            assert options.get("validation") is None
            super().__init__(*arguments, **options)

    original = load_test

    def watched_test(*arguments: Any) -> Any:
        events.append("test")
        return original(*arguments)

    monkeypatch.setattr(run, "Trainer", Watched)
    monkeypatch.setattr(retrain, "load_test", watched_test)
    retrain.export(definition, study, tmp_path / "b")
    assert events == ["train on 500", "train on 500", "test"]


def test_a_target_that_is_in_the_way_is_refused_before_any_training(
    searched: tuple[StudyDefinition, optuna.Study], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    definition, study = searched
    (tmp_path / "precious").write_text("all my work")
    monkeypatch.setattr(run, "Trainer", None)
    with pytest.raises(UsageError, match=r"cannot replace .*; choose another --output"):
        retrain.export(definition, study, tmp_path / "precious")


def test_what_can_fail_after_the_training_fails_before_it(
    searched: tuple[StudyDefinition, optuna.Study], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    definition, study = searched
    monkeypatch.setattr(run, "Trainer", None)
    reading = load_study(definition, open_storage(definition.study.storage, reads_only=True))
    with pytest.raises(StorageError, match="readonly database"):
        retrain.export(definition, reading, tmp_path / "b")
    with monkeypatch.context() as patch:
        patch.setattr(bundle, "check_space", raise_error(BundleError("only 2 MB free")))
        with pytest.raises(BundleError, match="only 2 MB free"):
            retrain.export(definition, study, tmp_path / "b")
    monkeypatch.setattr(dataset, "load_test", raise_error(DataError("no test images")))
    with pytest.raises(DataError, match="no test images"):
        retrain.export(definition, study, tmp_path / "b")
    assert not (tmp_path / "b").exists()
    assert "test_reads" not in study.user_attrs


def test_a_test_set_that_could_not_be_read_does_not_count_as_read(
    searched: tuple[StudyDefinition, optuna.Study], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    definition, study = searched
    with monkeypatch.context() as patch:
        patch.setattr(retrain, "load_test", raise_error(DataError("the disk was unplugged")))
        with pytest.raises(DataError, match="unplugged"):
            retrain.export(definition, study, tmp_path / "b")
    assert "test_reads" not in study.user_attrs
    assert retrain.export(definition, study, tmp_path / "b")["test_reads"] == 1


def test_a_tilde_in_the_target_is_the_home_folder(
    searched: tuple[StudyDefinition, optuna.Study], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "precious").write_text("all my work")
    with pytest.raises(UsageError, match=f"cannot replace {tmp_path}/precious"):
        retrain.export(*searched, Path("~/precious"))


def raise_error(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail
