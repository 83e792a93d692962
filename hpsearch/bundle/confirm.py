"""Retrain the best trials with new seeds, to find the real winner and how lucky the search was."""

import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from optuna.trial import FrozenTrial
from scipy import stats

from hpsearch.bundle.evaluation import mean_interval
from hpsearch.config.definition import StudyDefinition
from hpsearch.data.dataset import ImageData
from hpsearch.data.sets import DataSet
from hpsearch.errors import Diverged, HpsearchError, UsageError, WorkerError
from hpsearch.search.selection import find_best_few
from hpsearch.search.study import check_data, check_writable
from hpsearch.storage.rdb import storage_of
from hpsearch.training.networks import build_network
from hpsearch.training.run import build_trainer, load_study_data, trial_seed
from hpsearch.training.trainer import measure_accuracy
from hpsearch.workers.processes import Processes, Send, Task, share
from hpsearch.workers.shutdown import Drain
from hpsearch.workers.worker import WorkerExit

_FIRST_REPETITION = 1_000  # seeds 0: search, from 1: export, from 1,000: confirm
_LEVEL = 0.95
_FEWEST_IMAGES = 6  # that can make a difference significant

Run = tuple[FrozenTrial, int]


def confirm(
    definition: StudyDefinition,
    study: optuna.Study,
    *,
    top: int = 3,
    seeds: int = 3,
    n_workers: int = 1,
    folder: DataSet | Path | str | None = None,
    devices: Sequence[str] = ("cpu",),
    on_run: Callable[[int, int, float], None] = lambda trial, run, accuracy: None,
    on_epoch: Callable[[int, int], None] = lambda n_done, n_total: None,
) -> dict[str, Any]:
    """Retrain the `top` best trials `seeds` times each; store the comparison in the study and return it.

    A run differs from the one in the search only in its seed: it trains on the training split for the budget's epochs,
    and is evaluated on the validation split. A run that diverges counts as accuracy 0. Finished runs are stored at once
    and never repeated; `on_run` gets the trial, the run's index and its accuracy, and `on_epoch` the number of epochs
    trained and of all. `n_workers` processes share the work and the devices. Raises `NoCompletedTrial`, `DataError`,
    `StudyMismatch` for other data than the search had, `UsageError` for fewer than two seeds, and `WorkerError` if a
    process dies.
    """
    if seeds < 2:
        raise UsageError(f"--seeds {seeds}: must be at least 2 (a single run shows no variance)")
    trials = find_best_few(study, top)
    check_writable(study)
    data = load_study_data(definition, folder)
    check_data(definition, study, data)
    done: dict[str, float] = dict(study.user_attrs.get("confirmed_runs", {}))
    missing = [(trial, i) for i in range(seeds) for trial in trials if f"{trial.number}/{i}" not in done]
    epochs, trained = definition.budget.epochs, Counter[tuple[int, int]]()  # the latter by trial and run
    for (trial, i), accuracy in _train_all(definition, data, missing, n_workers, devices, folder):
        trained[trial.number, i] = trained[trial.number, i] + 1 if accuracy is None else epochs
        on_epoch(trained.total(), len(missing) * epochs)
        if accuracy is None:
            continue
        new = {f"{trial.number}/{i}": accuracy}
        done |= storage_of(study).change_study_attrs(study._study_id, partial(_add_runs, new))["confirmed_runs"]
        on_run(trial.number, i, accuracy)
    accuracies = {trial.number: [done[f"{trial.number}/{i}"] for i in range(seeds)] for trial in trials}
    sizes = {trial.number: _count_parameters(definition, data, trial) for trial in trials}
    winner, is_tie = choose_winner(accuracies, sizes, len(data.validation))
    candidates = [
        {
            "number": trial.number,
            "search_value": trial.value,
            "accuracies": accuracies[trial.number],
            "mean": float(np.mean(accuracies[trial.number])),
            "interval": mean_interval(accuracies[trial.number], len(data.validation)),
            "n_parameters": sizes[trial.number],
        }
        for trial in trials
    ]
    confirmation = {
        "seeds": seeds,
        "epochs": definition.budget.epochs,
        "candidates": candidates,
        "winner": winner,
        "is_tie": is_tie,
        "optimism": (trials[0].value or 0.0) - float(np.mean(accuracies[trials[0].number])),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    study.set_user_attr("confirmation", confirmation)
    return confirmation


def _add_runs(new: dict[str, float], attributes: dict[str, Any]) -> dict[str, Any]:
    return {"confirmed_runs": attributes.get("confirmed_runs", {}) | new}


def choose_winner(accuracies: Mapping[int, list[float]], sizes: Mapping[int, int], n_images: int) -> tuple[int, bool]:
    """Return the winner's number, and whether there is a tie; in a tie the smallest network wins.

    The candidates are compared on the same images, so the chance of drawing these images, which widens the confidence
    interval of each accuracy, largely cancels in their differences; the chance of the seeds remains. A candidate is
    tied with the highest mean unless Tukey's test finds them different (honestly significant difference, 1949,
    https://doi.org/10.2307/3001913; simultaneous 95% intervals for all pairs, a common variance). It is also tied if
    the means differ by fewer than six images: even if one network is right on all images on which two disagree, five
    are not significant at 95% (McNemar 1947, https://doi.org/10.1007/BF02295996: 2 * 0.5^5 = 6%).

    Among equal sizes the higher mean wins. Candidates with a run that diverged (accuracy 0) or collapsed (below half of
    the highest accuracy) are left out, unless all have one: the variance of such a run would tie all others.
    """
    least = max(map(max, accuracies.values())) / 2
    converged = {number: values for number, values in accuracies.items() if min(values) >= least > 0}
    accuracies = converged or accuracies
    means = {number: float(np.mean(values)) for number, values in accuracies.items()}
    best = max(means, key=lambda number: (means[number], -sizes[number]))
    tied = {number for number in means if round((means[best] - means[number]) * n_images, 3) < _FEWEST_IMAGES}
    if len(means) > 1 and any(np.ptp(values) > 0 for values in accuracies.values()):
        lows = stats.tukey_hsd(*accuracies.values()).confidence_interval(_LEVEL).low[[*means].index(best)]
        tied |= {number for number, low in zip(means, lows, strict=True) if low <= 0}
    return min(tied, key=lambda number: (sizes[number], -means[number], number)), len(tied) > 1


def _count_parameters(definition: StudyDefinition, data: ImageData, trial: FrozenTrial) -> int:
    hyperparameters, n_classes = definition.space.read(trial.params), len(data.class_names)
    with torch.device("meta") if not definition.network.code else nullcontext():  # the user's code may need values
        network = build_network(definition.network, hyperparameters, data.image_shape, n_classes)
    return sum(parameter.numel() for parameter in network.parameters())


def _train_all(
    definition: StudyDefinition,
    data: ImageData,
    runs: list[Run],
    n_workers: int,
    devices: Sequence[str],
    folder: DataSet | Path | str | None,
) -> Iterator[tuple[Run, float | None]]:
    """Train all runs, and yield each after each epoch with None, and at its end with its accuracy.

    No process outlives the iteration.
    """
    n_workers = min(n_workers, len(runs))
    if n_workers <= 1:
        here = data.to(devices[0])
        for run in runs:
            yield from ((run, accuracy) for accuracy in _measure(definition, here, run))
        return
    shared = share(data, folder)
    n_threads = max(1, torch.get_num_threads() // n_workers)

    def prepare(slot: int) -> tuple[str, Task]:
        device = devices[slot % len(devices)]
        return f"confirm {slot}", partial(_work, definition, shared, device, n_threads, runs, next_run)

    processes = Processes(prepare)
    next_run = multiprocessing.get_context("forkserver").Value("i")
    try:
        for slot in range(n_workers):
            processes.start(slot)
        while processes.running:
            for _, message in processes.wait():
                match message:
                    case (i, accuracy):
                        yield runs[i], accuracy
                    case WorkerExit(error=HpsearchError() as error):
                        raise error
                    case WorkerExit(is_dead=True):
                        raise WorkerError(
                            "a training process was killed (out of memory?); run confirm again, finished runs are kept"
                        )
    finally:
        processes.kill()


def _work(
    definition: StudyDefinition,
    data: ImageData | DataSet | Path | str | None,
    device: str,
    n_threads: int,
    runs: list[Run],
    next_run: Any,
    drain: Drain,
    send: Send,
) -> str:
    """Train runs that no other process has taken, and send the index and accuracy of each.

    `data` is the data, or the folder to load them from.
    """
    torch.set_num_threads(n_threads)
    here = (data if isinstance(data, ImageData) else load_study_data(definition, data)).to(device)
    while True:
        with next_run.get_lock():
            i = next_run.value
            next_run.value += 1
        if i >= len(runs):
            return "all runs are trained"
        for accuracy in _measure(definition, here, runs[i], drain.check):
            send((i, accuracy))


def _measure(
    definition: StudyDefinition, data: ImageData, run: Run, check: Callable[[], None] = lambda: None
) -> Iterator[float | None]:
    """Retrain a trial with the new seed of that index; yield None after each epoch, then its validation accuracy."""
    trial, i = run
    seed = trial_seed(definition.study.seed, trial, _FIRST_REPETITION + i)
    trainer = build_trainer(definition, data, definition.space.read(trial.params), seed)
    try:
        while not trainer.is_done:
            trainer.run_epoch(check)
            yield None
    except Diverged:
        yield 0.0
        return
    yield measure_accuracy(trainer.network, data.validation)
