"""From the best trial to a bundle: trained on training and validation images, measured once on the test set."""

import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch

from hpsearch import bundle
from hpsearch.data import load_test
from hpsearch.definition import StudyDefinition
from hpsearch.evaluation import evaluate
from hpsearch.network import build_network, describe_layers
from hpsearch.objective import load_study_data, trial_seed
from hpsearch.space import suggest
from hpsearch.study import find_best
from hpsearch.training import EpochResult, keep_freed_memory, seed_everything, train


def export(
    definition: StudyDefinition,
    study: optuna.Study,
    target: Path,
    *,
    number: int | None = None,
    folder: Path | str | None = None,
    device: torch.device | str = "cpu",
    on_epoch: Callable[[int, EpochResult], None] = lambda seed, result: None,
) -> dict[str, Any]:
    """The metrics of the bundle that it writes to `target`, made from the best trial or from trial `number`.

    The network is trained on training and validation images together, once for each of `retrain.seeds`; the first
    model is exported. The test set is read after all training is done, so nothing can be chosen on it. Raises
    `NoCompletedTrial`, `DataError` and `BundleError`; a bundle that cannot be verified leaves nothing behind.
    """
    keep_freed_memory()
    trial = find_best(study, number)
    bundle.check_target(target)
    hyperparameters = suggest(trial, definition.space)
    data = load_study_data(definition, folder)
    images = data.merged().to(device)
    epochs = definition.retrain.epochs or definition.budget.epochs
    n_classes = len(data.class_names)

    networks, seeds = [], [trial_seed(definition.study.seed, trial, 1 + i) for i in range(definition.retrain.seeds)]
    for i, seed in enumerate(seeds):
        generator = seed_everything(seed)
        network = build_network(definition.network.kind, hyperparameters, data.image_shape, n_classes).to(device)
        report = [lambda result, i=i: on_epoch(i, result)]
        train(network, images, hyperparameters, epochs, generator=generator, callbacks=report)
        networks.append(network)

    test_images, test_labels = load_test(definition.data.name, folder)
    inputs = data.split_of(test_images, test_labels).images.to(device)
    labels = test_labels.numpy()
    evaluations = [
        evaluate(network.predict_proba(inputs).cpu().numpy(), labels, data.class_names) for network in networks
    ]
    accuracies = [evaluation.accuracy for evaluation in evaluations]
    metrics = {
        "validation_accuracy": trial.value,
        "test_accuracy": accuracies[0],
        "test_accuracies": {
            "of_each_seed": accuracies,
            "mean": float(np.mean(accuracies)),
            "std": float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else None,
        },
        "per_class": evaluations[0].per_class,
        "confusion_matrix": evaluations[0].confusion_matrix,
        "n_images": {"train": len(images), "validation": len(data.validation), "test": len(labels)},
        "n_parameters": sum(parameter.numel() for parameter in networks[0].parameters()),
        "study": study.study_name,
        "trial": trial.number,
        "n_trials": sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False)),
        "epochs": epochs,
        "seeds": {"study": definition.study.seed, "training": seeds},
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("hpsearch", "torch", "torchvision", "optuna", "numpy")},
    }
    config = {
        "format_version": bundle.FORMAT_VERSION,
        "data": definition.data.name,
        "kind": definition.network.kind,
        "hyperparameters": hyperparameters.model_dump(),
        "image_shape": list(data.image_shape),
        "mean": data.mean,
        "std": data.std,
        "class_names": list(data.class_names),
        "layers": describe_layers(definition.network.kind, hyperparameters, data.image_shape, n_classes),
    }
    contents = bundle.Contents(networks[0].cpu(), config, metrics, evaluations[0], definition.to_toml())
    bundle.save(contents, target, probe=test_images[:256])
    return metrics
