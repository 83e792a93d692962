"""Records the learning curves of many configurations, from which `replay` makes searches that train nothing.

`scripts/benchmark record` trains what is missing in `curves.npz`, which takes hours, and packs it. Each training is a
line in `dist/curves` first, so that recording can be interrupted. Remove both to record anew.
"""

import json
import sys
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from numpy.typing import NDArray
from optuna.trial import FixedTrial, create_trial

from hpsearch.config.definition import StudyDefinition, load_definition, parse_definition
from hpsearch.config.space import suggest
from hpsearch.data.augment import augment
from hpsearch.data.dataset import ImageData, Split
from hpsearch.errors import Diverged
from hpsearch.training.networks import Network
from hpsearch.training.run import build_trainer, load_study_data
from tests.benchmark.report import Options, Row

FILE = Path(__file__).with_name("curves.npz")
SIGNALS = ("accuracy", "cross_entropy", "loss", "averaged_accuracy", "averaged_cross_entropy")
_N_WORKERS = 2
_DIGITS = 4  # significant ones of a recorded number


@dataclass(frozen=True)
class Task:
    """A study whose configurations are recorded: so many at random, so many near the best, so many a second time.

    Its budget is one of its own, so that a search for less does not change what is compared with.
    """

    study: str
    trials: int
    epochs: int
    n_random: int
    n_near: int
    n_again: int
    data: Mapping[str, Any] | None = None  # instead of the study file's
    space: Mapping[str, Any] | None = None  # the tables `search` and `fixed`, instead of the study file's
    turned: bool = False  # whether all images, those for validation included, are turned and shifted at random

    @property
    def n_epochs(self) -> int:
        """Return the epochs of the whole budget without pruning, which random search spends."""
        return self.trials * self.epochs


# Of `mnist-cnn` when its curves were recorded.
_CNN = {
    "search": {
        "depth": {"int": [3, 5]},
        "width": {"int": [12, 32], "log": True},
        "lr": {"float": [1e-3, 3e-2], "log": True},
        "optimizer": {"choice": ["adamw", "nadam"]},
        "weight_decay": {"float": [1e-5, 1e-1], "log": True},
        "label_smoothing": {"float": [0.0, 0.15]},
        "augment": {"float": [0.2, 0.8]},
    },
    "fixed": {"batch_size": 256, "schedule": "onecycle", "batch_norm": True},
}
TASKS = {
    "digits": Task("digits", 30, 15, 700, 300, 80),
    "mnist-mlp-4000": Task("mnist-mlp", 40, 9, 300, 100, 40, data={"train": 4_000}),
    "mnist-turned": Task("mnist-mlp", 40, 9, 200, 80, 40, data={"train": 10_000}, turned=True),
    "mnist-mlp": Task("mnist-mlp", 40, 9, 300, 100, 24),
    "mnist-cnn": Task("mnist-cnn", 20, 9, 80, 24, 16, data={"train": 8_000, "validation": 5_000}, space=_CNN),
}


def define(task: Task) -> StudyDefinition:
    """Return the study of a task, without its first guesses."""
    tables = load_definition(task.study).to_tables()
    tables.pop("try", None)
    tables["budget"] = {"trials": task.trials, "epochs": task.epochs}
    tables["data"] |= task.data or {}
    tables |= task.space or {}
    return parse_definition(tables)


def record(folder: Path, options: Options) -> list[Row]:
    """Train what is missing of all tasks, and pack the curves; what was trained is kept in `output`."""
    curves = options.output / "curves"
    curves.mkdir(parents=True, exist_ok=True)
    if FILE.exists():
        unpack(curves)
    for name in TASKS:
        _record_task(name, curves / f"{name}.jsonl")
        pack(curves)
    return []


def unpack(folder: Path) -> None:
    """Write what is packed of the tasks that have no file in the folder yet."""
    with np.load(FILE) as packed:
        for name in TASKS:
            if f"{name}.curves" not in packed or (file := folder / f"{name}.jsonl").exists():
                continue
            params, numbers = json.loads(str(packed[f"{name}.params"])), packed[f"{name}.numbers"].tolist()
            lines = []
            for row, curves in enumerate(packed[f"{name}.curves"].tolist()):
                seed = numbers[:row].count(numbers[row])
                shown = [[_shorten(value) for value in epoch] for epoch in curves]
                lines.append(json.dumps({"number": numbers[row], "seed": seed, "params": params[row], "curves": shown}))
            file.write_text("".join(f"{line}\n" for line in lines))


def pack(folder: Path) -> None:
    """Pack the curves of all tasks that are recorded in the folder, a line of a file for each training."""
    packed: dict[str, NDArray[Any]] = {}
    for name in TASKS:
        if (file := folder / f"{name}.jsonl").exists():
            rows = sorted(map(json.loads, file.read_text().splitlines()), key=lambda row: (row["number"], row["seed"]))
            packed[f"{name}.params"] = np.array(json.dumps([row["params"] for row in rows]))
            packed[f"{name}.numbers"] = np.array([row["number"] for row in rows], np.int16)
            packed[f"{name}.curves"] = np.array([row["curves"] for row in rows], np.float32)
    np.savez_compressed(FILE, **packed)  # type: ignore[arg-type]


def _record_task(name: str, file: Path) -> None:
    task = TASKS[name]
    definition = define(task)
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(row["number"], row["seed"]) for row in rows}
    sampler = optuna.samplers.TPESampler(n_startup_trials=task.n_random, seed=len(rows))  # others than before
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for row in (row for row in rows if row["seed"] == 0):
        fixed = FixedTrial(row["params"])
        suggest(fixed, definition.space)
        study.add_trial(
            create_trial(params=row["params"], distributions=fixed.distributions, value=_value(row["curves"]))
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    with (
        file.open("a") as lines,
        ProcessPoolExecutor(_N_WORKERS, get_context("spawn"), torch.set_num_threads, (1,)) as pool,
    ):
        running: dict[Future[Any], tuple[dict[str, Any], optuna.Trial | None]] = {}

        def train(number: int, seed: int, params: dict[str, Any], trial: optuna.Trial | None = None) -> None:
            if len(running) == 2 * _N_WORKERS:
                collect()
            row = {"number": number, "seed": seed, "params": params}
            running[pool.submit(_train, name, params, 1000 * seed + number)] = row, trial

        def collect() -> None:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                row, trial = running.pop(future)
                row["curves"] = future.result()
                lines.write(json.dumps(row) + "\n")
                lines.flush()
                rows.append(row)
                if trial:
                    study.tell(trial, _value(row["curves"]))
                print(f"  {name}: {len(rows)} trainings", file=sys.stderr, flush=True)

        for number in range(task.n_random + task.n_near):
            if (number, 0) not in done:
                trial = study.ask()
                suggest(trial, definition.space)
                train(number, 0, trial.params, trial)
        while running:
            collect()
        # The noise of seeds matters most among good trials, so half of those that are trained again are the best.
        first = sorted((row for row in rows if row["seed"] == 0), key=lambda row: -_value(row["curves"]))
        step = max((len(first) - task.n_again // 2) // (task.n_again // 2), 1)
        again = [*first[: task.n_again // 2], *first[task.n_again // 2 :: step][: task.n_again // 2]]
        for row in (row for row in again if (row["number"], 1) not in done):
            train(row["number"], 1, row["params"])
        while running:
            collect()


def _value(curves: list[list[float | None]]) -> float:
    return curves[-1][0] or 0.0


@cache
def _load(name: str) -> tuple[StudyDefinition, ImageData]:
    definition = define(TASKS[name])
    data = load_study_data(definition)
    if TASKS[name].turned:
        noise = torch.Generator().manual_seed(0)
        turned = [Split(augment(split.images, 1.0, noise), split.labels) for split in (data.train, data.validation)]
        data = replace(data, train=turned[0], validation=turned[1])
    return definition, data


def _train(name: str, params: dict[str, Any], seed: int) -> list[list[float | None]]:
    """Return the signals of each epoch; None from the epoch on in which the training diverged."""
    definition, data = _load(name)
    last = [definition.budget.epochs]  # the trainer averages the weights until then
    hyperparameters = suggest(FixedTrial(params), definition.space)
    trainer = build_trainer(definition, data, hyperparameters, seed, averaged_after=last)
    average = trainer._average
    assert average
    curves: list[list[float | None]] = []
    while not trainer.is_done:
        try:
            loss = trainer.run_epoch().loss
        except Diverged:
            break
        measured = [*measure(trainer.network, data.validation), loss]
        with average.used():
            measured += measure(trainer.network, data.validation)
        curves.append([_shorten(value) for value in measured])
    return curves + [[None] * len(SIGNALS)] * (trainer.epochs - len(curves))


def _shorten(value: float) -> float | None:
    return float(f"{value:.{_DIGITS}g}") if np.isfinite(value) else None


def measure(network: Network, split: Split) -> tuple[float, float]:
    """Return the accuracy and the mean cross-entropy, the probabilities not less than 1e-12."""
    probabilities = network.predict_split(split)
    likelihood = probabilities.gather(1, split.labels[:, None]).clamp(min=1e-12)
    return (probabilities.argmax(1) == split.labels).double().mean().item(), -likelihood.log().mean().item()
