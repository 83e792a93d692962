"""Retrain the best trials with new seeds, to find the real winner and how lucky the search was."""

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
from hpsearch.bundle.trainings import train_all
from hpsearch.config.definition import StudyDefinition
from hpsearch.data.dataset import ImageData
from hpsearch.data.sets import DataSet
from hpsearch.errors import Diverged, UsageError
from hpsearch.search.selection import confirmed_values, find_best_few
from hpsearch.search.study import check_data, check_writable
from hpsearch.storage.rdb import storage_of
from hpsearch.training.metrics import Score, balanced_interval
from hpsearch.training.networks import build_network
from hpsearch.training.run import build_trainer, load_study_data, trial_seed
from hpsearch.training.trainer import measure

_FIRST_REPETITION = 1_000  # seeds 0: search, from 1: export, from 1,000: confirm
_LEVEL = 0.95
_FEWEST_IMAGES = 6  # that can make a difference significant

Run = tuple[FrozenTrial, int]
Result = float | list[int]  # of a run: its accuracy; for the balanced accuracy, the correct images of each class


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
    and never repeated; `on_run` gets the trial, the run's index and its value, and `on_epoch` the number of epochs
    trained and of all. If the metric is the balanced accuracy, candidates have `balanced_accuracies` beside their
    `accuracies`; `mean` and `interval` are those of the metric. `n_workers` processes share the work and the devices.
    Raises `NoCompletedTrial`, `DataError`, `StudyMismatch` for other data than the search had, `UsageError` for fewer
    than two seeds, and `WorkerError` if a process dies.
    """
    if seeds < 2:
        raise UsageError(f"--seeds {seeds}: must be at least 2 (a single run shows no variance)")
    trials = find_best_few(study, top)
    check_writable(study)
    data = load_study_data(definition, folder)
    check_data(definition, study, data)
    n_images = data.validation.labels.bincount().tolist()
    done: dict[str, Result] = dict(study.user_attrs.get("confirmed_runs", {}))
    missing = [(trial, i) for i in range(seeds) for trial in trials if f"{trial.number}/{i}" not in done]
    epochs, trained = definition.budget.epochs, Counter[tuple[int, int]]()  # the latter by trial and run
    train = partial(_measure, definition, missing)
    options: dict[str, Any] = {"n_workers": n_workers, "devices": devices, "folder": folder}
    for index, result in train_all(definition, data, train, range(len(missing)), **options):
        trial, i = missing[index]
        trained[trial.number, i] = trained[trial.number, i] + 1 if result is None else epochs
        on_epoch(trained.total(), len(missing) * epochs)
        if result is None:
            continue
        new = {f"{trial.number}/{i}": result}
        done |= storage_of(study).change_study_attrs(study._study_id, partial(_add_runs, new))["confirmed_runs"]
        on_run(trial.number, i, _describe_runs([result], n_images)["mean"])
    results = {trial.number: [done[f"{trial.number}/{i}"] for i in range(seeds)] for trial in trials}
    sizes = {trial.number: _count_parameters(definition, data, trial) for trial in trials}
    candidates = [
        {
            "number": trial.number,
            "search_value": trial.value,
            **_describe_runs(results[trial.number], n_images),
            "n_parameters": sizes[trial.number],
        }
        for trial in trials
    ]
    values = {candidate["number"]: confirmed_values(candidate) for candidate in candidates}
    scores = {number: _read_scores(runs, n_images) for number, runs in results.items()}
    winner, is_tie = choose_winner(values, sizes, sum(n_images), scores if all(scores.values()) else None)
    confirmation = {
        "metric": definition.study.metric,
        "seeds": seeds,
        "epochs": definition.budget.epochs,
        "candidates": candidates,
        "winner": winner,
        "is_tie": is_tie,
        "optimism": (trials[0].value or 0.0) - candidates[0]["mean"],
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    study.set_user_attr("confirmation", confirmation)
    return confirmation


def _describe_runs(results: Sequence[Result], n_images: Sequence[int]) -> dict[str, Any]:
    """Return accuracies, mean and interval of the runs of a trial, on so many validation images of each class."""
    if scores := _read_scores(results, n_images):
        values, interval = [score.balanced_accuracy for score in scores], balanced_interval(scores)
        more = {"accuracies": [score.accuracy for score in scores], "balanced_accuracies": values}
    else:
        values = [result for result in results if not isinstance(result, list)]
        interval, more = mean_interval(values, sum(n_images)), {"accuracies": values}
    return more | {"mean": float(np.mean(values)), "interval": interval}


def _read_scores(results: Sequence[Result], n_images: Sequence[int]) -> list[Score]:
    """Return the scores of runs of which the correct images of each class are known, which no accuracy tells."""
    return [Score(result, n_images) for result in results if isinstance(result, list)]


def _add_runs(new: dict[str, Result], attributes: dict[str, Any]) -> dict[str, Any]:
    return {"confirmed_runs": attributes.get("confirmed_runs", {}) | new}


def choose_winner(
    accuracies: Mapping[int, list[float]],
    sizes: Mapping[int, int],
    n_images: int,
    scores: Mapping[int, Sequence[Score]] | None = None,
) -> tuple[int, bool]:
    """Return the winner's number, and whether there is a tie; in a tie the smallest network wins.

    The candidates are compared on the same images, so the chance of drawing these images, which widens the confidence
    interval of each accuracy, largely cancels in their differences; the chance of the seeds remains. A candidate is
    tied with the highest mean unless Tukey's test finds them different (honestly significant difference, 1949,
    https://doi.org/10.2307/3001913; simultaneous 95% intervals for all pairs, a common variance). It is also tied if
    the means differ by fewer than six images: even if one network is right on all images on which two disagree, five
    are not significant at 95% (McNemar 1947, https://doi.org/10.1007/BF02295996: 2 * 0.5^5 = 6%). Balanced accuracies,
    of which the `scores` are given, differ by the images that `_count_differing` counts.

    Among equal sizes the higher mean wins. Candidates with a run that diverged (accuracy 0) or collapsed (below half of
    the highest accuracy) are left out, unless all have one: the variance of such a run would tie all others.
    """
    least = max(map(max, accuracies.values())) / 2
    converged = {number: values for number, values in accuracies.items() if min(values) >= least > 0}
    accuracies = converged or accuracies
    means = {number: float(np.mean(values)) for number, values in accuracies.items()}
    best = max(means, key=lambda number: (means[number], -sizes[number]))
    n_differing = {number: (means[best] - means[number]) * n_images for number in means}
    if scores:
        n_differing = {number: _count_differing(scores[best], scores[number]) for number in means}
    tied = {number for number, n in n_differing.items() if round(n, 3) < _FEWEST_IMAGES}
    if len(means) > 1 and any(np.ptp(values) > 0 for values in accuracies.values()):
        lows = stats.tukey_hsd(*accuracies.values()).confidence_interval(_LEVEL).low[[*means].index(best)]
        tied |= {number for number, low in zip(means, lows, strict=True) if low <= 0}
    return min(tied, key=lambda number: (sizes[number], -means[number], number)), len(tied) > 1


def _count_differing(best: Sequence[Score], other: Sequence[Score]) -> float:
    """Return by how many images of equal weight two mean balanced accuracies differ.

    An image counts 1 / (K n) in a class of n images out of K classes. The images by which the networks differ therefore
    have unequal weights w. They count as (sum of w)^2 / (sum of w^2) images of equal weight, where those in favor of
    the other one are subtracted from the first sum (Kish 1965, Survey Sampling, section 11.7).
    """
    n_images = np.array(best[0].n_images)
    weights = np.divide(1, n_images, where=n_images > 0, out=np.zeros(len(n_images))) / np.count_nonzero(n_images)
    of_best, of_other = (np.mean([score.correct for score in scores], axis=0) for scores in (best, other))
    differences = of_best - of_other
    variance = float((np.abs(differences) * weights**2).sum())
    return float((differences * weights).sum()) ** 2 / variance if variance else 0.0


def _count_parameters(definition: StudyDefinition, data: ImageData, trial: FrozenTrial) -> int:
    hyperparameters, n_classes = definition.space.read(trial.params), len(data.class_names)
    with torch.device("meta") if not definition.network.code else nullcontext():  # the user's code may need values
        network = build_network(definition.network, hyperparameters, data.image_shape, n_classes)
    return sum(parameter.numel() for parameter in network.parameters())


def _measure(
    definition: StudyDefinition, runs: Sequence[Run], index: int, data: ImageData, check: Callable[[], None]
) -> Iterator[Result | None]:
    """Retrain a trial with a new seed; yield None after each epoch, then its result."""
    trial, i = runs[index]
    seed = trial_seed(definition.study.seed, trial, _FIRST_REPETITION + i)
    trainer = build_trainer(definition, data, definition.space.read(trial.params), seed)
    try:
        while not trainer.is_done:
            trainer.run_epoch(check)
            yield None
        score = measure(trainer.network, data.validation)
    except Diverged:
        n_images = data.validation.labels.bincount().tolist()
        score = Score([0] * len(n_images), n_images)
    yield score.accuracy if definition.study.metric == "accuracy" else list(score.correct)
