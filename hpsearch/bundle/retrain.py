"""Export the best trial: retrain it on training and validation images, test it once, and save the model folder."""

import platform
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from optuna.trial import FrozenTrial

from hpsearch.bundle import bundle, formats
from hpsearch.bundle.config import VERSION
from hpsearch.bundle.evaluation import Evaluation, candidate_interval, evaluate
from hpsearch.bundle.likeness import Likeness
from hpsearch.config.definition import StudyDefinition
from hpsearch.config.signature import OwnHyperparameters
from hpsearch.config.space import TrainingHyperparameters
from hpsearch.config.urls import expand_home
from hpsearch.data.dataset import ImageData, check_test, load_test
from hpsearch.data.sets import DataSet
from hpsearch.errors import Diverged
from hpsearch.plugins import NETWORKS, find
from hpsearch.search.selection import find_best, find_winner
from hpsearch.search.study import check_data, check_writable, count_validation
from hpsearch.storage.rdb import storage_of
from hpsearch.training.networks import build_network
from hpsearch.training.run import build_trainer, load_study_data, open_data_set, trial_seed
from hpsearch.training.trainer import EpochResult


def export(
    definition: StudyDefinition,
    study: optuna.Study,
    target: Path | str,
    *,
    number: int | None = None,
    onnx: bool = False,
    torch_export: bool = False,
    folder: DataSet | Path | str | None = None,
    device: torch.device | str = "cpu",
    force: bool = False,
    on_epoch: Callable[[int, EpochResult], None] = lambda seed, result: None,
    on_file: Callable[[int, int], None] = lambda n_done, n_total: None,
) -> dict[str, Any]:
    """Export the confirmed winner, else the best trial, or trial `number` to `target`; return the metrics.

    The network is retrained on training and validation images together, once for each of `retrain.seeds`; the first
    model is exported. The test set is used only after all training, so nothing can be selected on it, and the study
    counts each use. What can fail is checked before the training. With `force`, a modified model or one of another
    study is replaced too. Raises `NoCompletedTrial`, `DataError`, `StudyMismatch` for other data than the search had,
    `StorageError` if the study cannot be written, `UsageError` if packages for ONNX are missing, `Diverged`, and
    `BundleError`. If verification fails, nothing is written.
    """
    trial = find_winner(study) if number is None else find_best(study, number)
    if onnx:
        formats.check_onnx()
    target = Path(expand_home(str(target)))
    bundle.check_target(
        target,
        bundle.Origin.model_validate(_describe_search(study, trial, count_validation(definition, study))),
        force=force,
    )
    check_writable(study)
    hyperparameters = definition.space.read(trial.params)
    data_set = open_data_set(definition, folder)
    data = load_study_data(definition, data_set)
    check_data(definition, study, data)
    check_test(data_set)
    config = _describe_network(definition, data_set, data, hyperparameters)
    code, has_examples = definition.network.code, definition.retrain.examples
    network = build_network(definition.network, hyperparameters, data.image_shape, len(data.class_names))
    n_models = 2 + onnx + (torch_export or code is not None)
    bundle.check_space(target, network, config, n_models, data_set.n_test)
    likeness = Likeness.fit(data) if has_examples else None
    images = data.merged().to(device)
    epochs = definition.retrain.epochs or definition.budget.epochs
    seeds = [trial_seed(definition.study.seed, trial, 1 + i) for i in range(definition.retrain.seeds)]
    networks = []
    for i, seed in enumerate(seeds):
        trainer = build_trainer(definition, data, hyperparameters, seed, split=images, epochs=epochs)
        try:
            for result in trainer:
                on_epoch(i, result)
        except Diverged as error:
            raise Diverged(f"trial {trial.number}, model {i + 1}: {error}; choose another one with --trial") from error
        networks.append(trainer.network.cpu())

    test_images, test_labels = load_test(data_set)
    n_test_uses = record_test_use(study, trial)
    inputs = data.split_of(test_images, test_labels)
    labels = test_labels.numpy()
    evaluations = [evaluate(network.predict_split(inputs).numpy(), labels, data.class_names) for network in networks]
    metrics = {
        "metric": definition.study.metric,
        **_describe_evaluations(evaluations),
        "test_reads": n_test_uses,
        "n_images": {"train": len(images), "validation": len(data.validation), "test": len(labels)},
        "data": data.describe(),
        "n_parameters": sum(parameter.numel() for parameter in networks[0].parameters()),
        **_describe_search(study, trial, len(data.validation)),
        "epochs": epochs,
        "seeds": {"study": definition.study.seed, "training": seeds},
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("hpsearch", "torch", "torchvision", "optuna", "numpy")},
    }
    if definition.data.name is None:
        metrics["images"] = _describe_images(definition)
    contents = bundle.Contents(
        networks[0],
        config,
        metrics,
        evaluations[0],
        definition.to_toml(),
        likeness,
        hub_id=data_set.hub_id,
        code=code,
        has_examples=has_examples,
    )
    options: dict[str, Any] = {"onnx": onnx, "torch_export": torch_export, "force": force, "on_file": on_file}
    verified = bundle.save(contents, target, test_images, labels, **options)
    return metrics | {"verified": verified}


def record_test_use(study: optuna.Study, trial: FrozenTrial) -> int:
    """Record a use of the test set, and return how many exports of this study have used it."""
    use = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "trial": trial.number}

    def add_use(attributes: dict[str, Any]) -> dict[str, Any]:
        return {"test_reads": [*attributes.get("test_reads", ()), use]}

    return len(storage_of(study).change_study_attrs(study._study_id, add_use)["test_reads"])


def _describe_evaluations(evaluations: list[Evaluation]) -> dict[str, Any]:
    """Summarize the evaluations of all models; the first is the exported one."""
    first = evaluations[0]
    return {
        "test_accuracy": first.accuracy,
        "test_interval": first.interval,
        "test_accuracies": _describe_seeds([evaluation.accuracy for evaluation in evaluations]),
        "test_balanced_accuracy": first.balanced_accuracy,
        "test_balanced_interval": first.balanced_interval,
        "test_balanced_accuracies": _describe_seeds([evaluation.balanced_accuracy for evaluation in evaluations]),
        "per_class": first.per_class,
        "confusion_matrix": first.confusion_matrix,
        "calibration": first.calibration,
    }


def _describe_seeds(values: list[float]) -> dict[str, Any]:
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"of_each_seed": values, "mean": float(np.mean(values)), "std": std}


def _describe_search(study: optuna.Study, trial: FrozenTrial, n_validation: int) -> dict[str, Any]:
    """Describe how the trial was found, and its result in `confirm`, if any."""
    confirmation = study.user_attrs.get("confirmation", {"candidates": []})
    candidates = {candidate["number"]: candidate for candidate in confirmation["candidates"]}
    if confirmed := candidates.get(trial.number):
        confirmed |= {"interval": candidate_interval(confirmed, n_validation)}
        confirmed |= {"is_winner": trial.number == confirmation["winner"], "is_tie": confirmation["is_tie"]}
        confirmed["n_compared"] = len(candidates)
    values = {"validation_accuracy": trial.value}
    if "interval" in trial.user_attrs:  # the value is the balanced accuracy
        values = {"validation_accuracy": trial.user_attrs["accuracy"], "validation_balanced_accuracy": trial.value}
    return {
        **values,
        "confirmed": confirmed,
        "study": study.study_name,
        "study_id": study.user_attrs.get("id"),
        "trial": trial.number,
        "n_trials": sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False)),
    }


def _describe_images(definition: StudyDefinition) -> dict[str, Any]:
    """Return the table [data] without the folder of this machine."""
    settings = definition.data.model_dump(mode="json", exclude_none=True)
    return settings | {key: definition.data.title for key in ("folder", "file") if key in settings}


def _describe_network(
    definition: StudyDefinition, data_set: DataSet, data: ImageData, hyperparameters: TrainingHyperparameters
) -> dict[str, Any]:
    """Return the content of `config.json`."""
    kind, layers, arguments = definition.network.kind, None, None
    if isinstance(hyperparameters, OwnHyperparameters):
        arguments = hyperparameters.arguments()
    else:
        layers = find(NETWORKS, kind).describe(hyperparameters, data.image_shape, len(data.class_names))
    return {
        "format_version": VERSION,
        "data": definition.data.title,
        "kind": kind,
        "hyperparameters": hyperparameters.model_dump(),
        "image_shape": list(data.image_shape),
        "mean": list(data.mean),
        "std": list(data.std),
        "class_names": list(data.class_names),
        "preparation": data_set.preparation,
        "layers": layers,
        "build": arguments,
    }
