"""What a user would write instead: Optuna's own PyTorch example, and the same objective under Ray Tune.

The dataset is opened in each trial and its images are transformed one by one by a DataLoader; the study is in memory.
"""

import importlib.util
import tempfile
import time
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import torch
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, Subset

from hpsearch.config.definition import StudyDefinition
from hpsearch.config.space import TrainingHyperparameters, suggest
from hpsearch.plugins import NETWORKS, find

_OPTIMIZERS = {"adam": "Adam", "adamw": "AdamW", "sgd": "SGD", "rmsprop": "RMSprop"}


class Outcome(NamedTuple):
    """Seconds from the first trial's start to the last one's end, the accuracy of each trial, and the steps of all.

    `start_up` are the seconds that the command took beside. Ray starts a process for each trial; that is in `seconds`.
    """

    seconds: float
    accuracies: list[float]
    n_steps: int
    start_up: float = 0.0

    @property
    def per_minute(self) -> float:
        return 60 * len(self.accuracies) / self.seconds


def run_optuna(definition: StudyDefinition, folder: Path, n_trials: int, n_jobs: int) -> Outcome:
    """The definition's first trials in the textbook way."""
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0))
    for values in definition.first:
        study.enqueue_trial(dict(values))
    steps: list[int] = []

    def objective(trial: optuna.Trial) -> float:
        accuracy, n_steps = train_trial(definition, suggest(trial, definition.space), folder)
        steps.append(n_steps)
        return accuracy

    start = time.perf_counter()
    study.optimize(objective, n_trials=n_trials, n_jobs=n_jobs)
    seconds = time.perf_counter() - start
    return Outcome(seconds, [trial.values[0] for trial in study.trials], sum(steps))


def train_trial(
    definition: StudyDefinition, hyperparameters: TrainingHyperparameters, folder: Path
) -> tuple[float, int]:
    """The validation accuracy after the last epoch, and the optimizer steps that were made."""
    from torchvision import datasets, transforms

    data = definition.data
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    dataset = datasets.MNIST(str(folder), train=True, transform=transform)
    train_rows, validation_rows = _split(tuple(dataset.targets.tolist()), data.train, data.validation)
    train_loader = DataLoader(Subset(dataset, train_rows), hyperparameters.batch_size, shuffle=True)
    validation_loader = DataLoader(Subset(dataset, validation_rows), hyperparameters.batch_size)

    layers = find(NETWORKS, definition.network.kind).describe(hyperparameters, (1, 28, 28), 10)
    network = nn.Sequential(*(getattr(nn, name)(**arguments) for name, arguments in layers))
    optimizer = getattr(torch.optim, _OPTIMIZERS[hyperparameters.optimizer])(network.parameters(), hyperparameters.lr)
    loss_function = nn.CrossEntropyLoss()
    n_steps, accuracy = 0, 0.0
    for _ in range(definition.budget.epochs):
        network.train()
        for images, labels in train_loader:
            optimizer.zero_grad()
            loss_function(network(images), labels).backward()
            optimizer.step()
            n_steps += 1
        network.eval()
        n_right = 0
        with torch.no_grad():
            for images, labels in validation_loader:
                n_right += int((network(images).argmax(dim=1) == labels).sum())
        accuracy = n_right / len(validation_rows)
    return accuracy, n_steps


@lru_cache
def _split(labels: tuple[int, ...], n_train: int | None, n_validation: int) -> list[list[int]]:
    """The rows that hpsearch trains on and those that it validates on."""
    split = train_test_split(
        range(len(labels)), train_size=n_train, test_size=n_validation, stratify=labels, random_state=0
    )
    return [sorted(rows) for rows in split]


def has_ray_tune() -> bool:
    """Return whether Ray Tune can be imported: `pip install "ray[tune]"`."""
    return all(importlib.util.find_spec(package) for package in ("ray", "pandas", "pyarrow"))


def run_ray(definition: StudyDefinition, folder: Path, n_trials: int) -> Outcome:
    """The definition's first trials under Ray Tune, one core for each trial."""
    import ray
    from ray import tune

    first = [suggest(optuna.trial.FixedTrial(dict(values)), definition.space) for values in definition.first[:n_trials]]

    def trainable(config: dict[str, Any]) -> dict[str, float]:
        accuracy, n_steps = train_trial(definition, first[config["trial"]], folder)
        return {"accuracy": accuracy, "n_steps": n_steps}

    ray.init(ignore_reinit_error=True, log_to_driver=False, configure_logging=False)
    with tempfile.TemporaryDirectory(prefix="benchmark-ray-") as results_folder:
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"cpu": 1}),
            param_space={"trial": tune.grid_search(list(range(len(first))))},
            tune_config=tune.TuneConfig(metric="accuracy", mode="max"),
            run_config=tune.RunConfig(verbose=0, storage_path=results_folder),
        )
        start = time.perf_counter()
        results = list(tuner.fit())
        seconds = time.perf_counter() - start
    accuracies = [result.metrics["accuracy"] for result in results]
    return Outcome(seconds, accuracies, sum(result.metrics["n_steps"] for result in results))
