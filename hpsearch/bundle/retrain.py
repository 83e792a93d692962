"""Export the best trial: retrain it on training and validation images, test it once, and save the model folder."""

import io
import platform
from collections.abc import Callable, Iterator, Sequence
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
from hpsearch.bundle.trainings import train_all
from hpsearch.config.definition import StudyDefinition
from hpsearch.config.signature import OwnHyperparameters
from hpsearch.config.space import TrainingHyperparameters
from hpsearch.config.urls import expand_home
from hpsearch.data.dataset import ImageData, check_test, load_test
from hpsearch.data.sets import DataSet
from hpsearch.errors import Diverged, Drained, OwnCodeError
from hpsearch.plugins import NETWORKS, find
from hpsearch.search.objective import identify_training
from hpsearch.search.selection import find_best, find_winner
from hpsearch.search.study import check_data, check_writable, count_validation
from hpsearch.storage.artifacts import Folder
from hpsearch.storage.checkpoints import Checkpoint, checkpoint_folder, export_checkpoint_name, remove_checkpoints
from hpsearch.storage.rdb import storage_of
from hpsearch.training.networks import Ensemble, Network, build_network, combine
from hpsearch.training.run import build_trainer, load_study_data, open_data_set, trial_seed
from hpsearch.training.trainer import EpochResult

_N_COMPARED = 8  # images


def export(
    definition: StudyDefinition,
    study: optuna.Study,
    target: Path | str,
    *,
    number: int | None = None,
    onnx: bool = False,
    torch_export: bool = False,
    folder: DataSet | Path | str | None = None,
    n_workers: int = 1,
    devices: Sequence[str] = ("cpu",),
    force: bool = False,
    on_epoch: Callable[[int, EpochResult], None] = lambda seed, result: None,
    on_file: Callable[[int, int], None] = lambda n_done, n_total: None,
) -> dict[str, Any]:
    """Export the confirmed winner, else the best trial, or trial `number` to `target`; return the metrics.

    The network is retrained on training and validation images together, once for each of `retrain.seeds`, in
    `n_workers` processes that share the devices. The first one is exported, or as an ensemble all of them; with
    `retrain.shift`, either reads shifted copies of an image, too. Training that was interrupted goes on from its
    checkpoints. The test set is used only after all training, so nothing can be selected on it, and the study counts
    each use. What can fail is checked before the training. With `force`, a modified model or one of another study is
    replaced too. `on_epoch` gets the index of a network and each result.
    Raises `NoCompletedTrial`, `DataError`, `StudyMismatch` for other data than the search had, `StorageError` if the
    study cannot be written, `UsageError` if the target is in the way or packages for ONNX are missing, `Diverged`,
    `OwnCodeError` if a network of the user's cannot be rebuilt from its weights, `WorkerError` if a process dies, and
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
    n_networks, n_members, shift = definition.retrain.seeds, definition.retrain.n_members, definition.retrain.shift
    networks = [
        build_network(definition.network, hyperparameters, data.image_shape, len(data.class_names))
        for _ in range(n_networks)
    ]
    if code:  # other values than those that were tried before the search may lead to other operators
        formats.check_conversion(code, networks[0], data.image_shape, len(data.class_names))
    exported = combine(networks[:n_members], shift)
    n_files = 2 + onnx + (torch_export or code is not None)
    bundle.check_space(target, exported, config, n_files, data_set.n_test)
    likeness = Likeness.fit(data) if has_examples else None
    training = _Training(definition, trial, checkpoint_folder(definition, study))
    options: dict[str, Any] = {"n_workers": n_workers, "devices": devices, "folder": data_set, "merges": True}
    for i, value in train_all(definition, data, training.run, range(n_networks), **options):
        if isinstance(value, EpochResult):
            on_epoch(i, value)
        else:
            networks[i].load_state_dict(torch.load(io.BytesIO(value), weights_only=True, map_location="cpu"))

    test_images, test_labels = load_test(data_set)
    n_test_uses = record_test_use(study, trial)
    inputs = data.split_of(test_images, test_labels)
    labels = test_labels.numpy()
    evaluations = [evaluate(network.predict_split(inputs).numpy(), labels, data.class_names) for network in networks]
    evaluation = evaluations[0]
    if isinstance(exported, Ensemble):
        evaluation = evaluate(exported.predict_split(inputs).numpy(), labels, data.class_names)
    n_validation = len(data.validation)
    metrics = {
        "metric": definition.study.metric,
        **_describe_evaluations(evaluation, evaluations),
        "test_reads": n_test_uses,
        "n_images": {"train": len(data.train) + n_validation, "validation": n_validation, "test": len(labels)},
        "data": data.describe(),
        "n_members": n_members,
        "shift": shift,
        "n_parameters": sum(parameter.numel() for parameter in exported.parameters()),
        **_describe_search(study, trial, n_validation),
        "epochs": training.epochs,
        "seeds": {"study": definition.study.seed, "training": training.seeds},
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("hpsearch", "torch", "torchvision", "optuna", "numpy")},
    }
    if definition.data.name is None:
        metrics["images"] = _describe_images(definition)
    contents = bundle.Contents(
        exported,
        config,
        metrics,
        evaluation,
        definition.to_toml(),
        likeness,
        hub_id=data_set.hub_id,
        code=code,
        has_examples=has_examples,
    )
    options = {"onnx": onnx, "torch_export": torch_export, "force": force, "on_file": on_file}
    verified = bundle.save(contents, target, test_images, labels, **options)
    remove_checkpoints(training.checkpoints, (export_checkpoint_name(trial.number, i) for i in range(n_networks)))
    return metrics | {"verified": verified}


class _Training:
    """The training of the networks of an export, each of which has a checkpoint, and goes on from it."""

    def __init__(self, definition: StudyDefinition, trial: FrozenTrial, checkpoints: Folder) -> None:
        self.definition, self.trial, self.checkpoints = definition, trial, checkpoints
        self.epochs = definition.retrain.epochs or definition.budget.epochs
        self.seeds = [trial_seed(definition.study.seed, trial, 1 + i) for i in range(definition.retrain.seeds)]

    def run(self, i: int, data: ImageData, check: Callable[[], None]) -> Iterator[EpochResult | bytes]:
        """Train network `i`, and yield the result of each epoch, then the weights. Raises `Diverged`."""
        definition, seed, number = self.definition, self.seeds[i], self.trial.number
        hyperparameters = definition.space.read(self.trial.params)
        trainer = build_trainer(definition, data, hyperparameters, seed, split=data.train, epochs=self.epochs)
        name = export_checkpoint_name(number, i)
        identity = identify_training(definition.fingerprint, seed, hyperparameters) | {"epochs": self.epochs}
        checkpoint = Checkpoint(self.checkpoints, [name, name], identity, definition.recovery.checkpoint)
        if state := checkpoint.load():
            trainer.load_state_dict(state)
            yield from trainer.results[-1:]
        try:
            while not trainer.is_done:
                yield trainer.run_epoch(check)
                if trainer.is_done:
                    self._check_state(trainer.network, data)
                    checkpoint.write(trainer.state_dict())
                else:
                    checkpoint.write_if_due(trainer.state_dict)
        except Diverged as error:
            raise Diverged(f"trial {number}, model {i + 1}: {error}; choose another one with --trial") from error
        except Drained:
            checkpoint.write(trainer.state_dict())
            raise
        weights = io.BytesIO()
        torch.save(trainer.network.state_dict(), weights)
        yield weights.getvalue()

    def _check_state(self, network: Network, data: ImageData) -> None:
        """Raise `OwnCodeError` if a network of the user's has learned what its parameters and buffers do not have."""
        if not (code := self.definition.network.code):
            return
        hyperparameters, images = self.definition.space.read(self.trial.params), data.train.take(slice(0, _N_COMPARED))
        rebuilt = build_network(self.definition.network, hyperparameters, data.image_shape, len(data.class_names))
        rebuilt.load_state_dict(network.state_dict())
        found, expected = rebuilt.to(images.device).predict_proba(images), network.predict_proba(images)
        if not torch.allclose(found, expected, atol=1e-4):
            difference = (found - expected).abs().max().item()
            raise OwnCodeError(
                f"{code.path}: with the parameters and buffers of the trained network, a new one gives other "
                f"probabilities (by up to {difference:.2g}); make a buffer of what else it learns"
            )


def record_test_use(study: optuna.Study, trial: FrozenTrial) -> int:
    """Record a use of the test set, and return how many exports of this study have used it."""
    use = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "trial": trial.number}

    def add_use(attributes: dict[str, Any]) -> dict[str, Any]:
        return {"test_reads": [*attributes.get("test_reads", ()), use]}

    return len(storage_of(study).change_study_attrs(study._study_id, add_use)["test_reads"])


def _describe_evaluations(exported: Evaluation, each: list[Evaluation]) -> dict[str, Any]:
    """Summarize the evaluation of the exported model, and those of each network that was trained."""
    return {
        "test_accuracy": exported.accuracy,
        "test_interval": exported.interval,
        "test_accuracies": _describe_seeds([evaluation.accuracy for evaluation in each]),
        "test_balanced_accuracy": exported.balanced_accuracy,
        "test_balanced_interval": exported.balanced_interval,
        "test_balanced_accuracies": _describe_seeds([evaluation.balanced_accuracy for evaluation in each]),
        "per_class": exported.per_class,
        "confusion_matrix": exported.confusion_matrix,
        "calibration": exported.calibration,
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
    retrain, kind, layers, arguments = definition.retrain, definition.network.kind, None, None
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
        **({"n_members": retrain.n_members, "shift": retrain.shift} if retrain.n_members > 1 or retrain.shift else {}),
    }
