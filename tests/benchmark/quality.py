"""The best accuracy over the epochs and the time that a search has spent, for several samplers and pruners."""

import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from hpsearch.config.definition import StudyDefinition, parse_definition
from hpsearch.errors import Drained
from tests.acceptance.commands import HPSEARCH, environment
from tests.benchmark.record import TASKS
from tests.benchmark.replay import DEFAULT, HYPERBAND, MEDIAN, RANDOM, STRATEGIES
from tests.benchmark.report import Options, Row, summarize

_TASKS = ("digits", "mnist-mlp-4000", "mnist-mlp")
_WAYS = (RANDOM, MEDIAN, HYPERBAND, DEFAULT)


class Course(NamedTuple):
    """After each complete trial: the epochs of all trials so far, the seconds, and the best validation accuracy."""

    epochs: list[int]
    seconds: list[float]
    best: list[float]

    def epochs_to(self, accuracy: float) -> float:
        """The epochs after which the accuracy was reached; infinite if it was not."""
        return next((n for n, best in zip(self.epochs, self.best, strict=True) if best >= accuracy), float("inf"))


def define(task: str, seed: int, way: str) -> StudyDefinition:
    """A task of the recorded ones, searched in a way, with any number of trials."""
    tables = STRATEGIES[way].define(TASKS[task], seed).to_tables()
    tables["study"] |= {"name": "quality", "storage": "sqlite:///quality.db"}
    tables["budget"]["trials"] = 1_000_000
    return parse_definition(tables)


def search(folder: Path, definition: StudyDefinition, n_epochs: int) -> Course:
    """The course of a search by two workers, which is stopped when it has spent `n_epochs`."""
    file, database = folder / "quality.toml", folder / "quality.db"
    database.unlink(missing_ok=True)
    file.write_text(definition.to_toml())
    command = [*HPSEARCH, "run", str(file), "--workers", "2", "--storage", f"sqlite:///{database}"]
    with (
        Path(folder, "talk").open("w+") as talk,
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=talk, env=environment()) as run,
    ):
        while run.poll() is None and _count_epochs(database) < n_epochs:
            time.sleep(0.5)
        run.terminate()
        if run.wait() != Drained.exit_status:
            talk.seek(0)
            raise RuntimeError(f"a search ended with exit status {run.returncode}: {talk.read()[-2000:]}")
    study = optuna.load_study(study_name="quality", storage=f"sqlite:///{database}")
    return follow(study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED)), n_epochs)


def _count_epochs(database: Path) -> int:
    """The epochs of all finished trials."""
    query = """SELECT count(*) FROM trial_intermediate_values JOIN trials USING (trial_id)
               WHERE state IN ('COMPLETE', 'PRUNED')"""
    try:
        with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
            return int(connection.execute(query).fetchone()[0])
    except sqlite3.OperationalError:  # not there yet
        return 0


def follow(trials: Sequence[FrozenTrial], n_epochs: int) -> Course:
    """The course of finished trials up to `n_epochs`."""
    starts = [trial.datetime_start.timestamp() for trial in trials if trial.datetime_start]
    ends = sorted((trial.datetime_complete.timestamp(), trial.number) for trial in trials if trial.datetime_complete)
    by_number = {trial.number: trial for trial in trials}
    n_spent, best, course = 0, 0.0, Course([], [], [])
    for end, number in ends:
        trial = by_number[number]
        n_spent += (trial.last_step or 0) + ("diverged" in trial.user_attrs)  # that epoch has no report
        if n_spent > n_epochs:
            break
        if trial.state == TrialState.COMPLETE:
            best = max(best, trial.values[0])
            course.epochs.append(n_spent)
            course.seconds.append(end - min(starts))
            course.best.append(best)
    return course


def quality(folder: Path, options: Options) -> list[Row]:
    """What each way finds in the epochs of random search, and how early it has random search's mean best accuracy."""
    return [row for task in _TASKS for row in _compare(task, folder, options)]


def _compare(task: str, folder: Path, options: Options) -> list[Row]:
    n_epochs = TASKS[task].n_epochs
    courses: dict[str, list[Course]] = {way: [] for way in _WAYS}
    for seed in range(options.repeats):
        for way, runs in courses.items():
            runs.append(course := search(folder, define(task, seed, way), n_epochs))
            print(f"  {task}, {way}: {course.best[-1]} in {course.epochs[-1]} epochs", file=sys.stderr, flush=True)
    target = float(np.mean([run.best[-1] for run in courses[RANDOM]]))
    rows = []
    for way, runs in courses.items():
        rows.append(summarize(f"quality {task}", f"{way}: best accuracy", "", [run.best[-1] for run in runs]))
        fewer = [n_epochs / run.epochs_to(target) for run in runs]  # 0 where it is not reached
        goal = "5x / 8x" if way == DEFAULT else ""
        rows.append(
            summarize(f"quality {task}", f"{way}: fewer epochs than {n_epochs} to {target:.4f}", "x", fewer, goal)
        )
    draw(courses, target, options.output / f"quality-{task}.png")
    return rows


def draw(courses: dict[str, list[Course]], target: float, file: Path) -> None:
    """The median error of the best trial so far over epochs and over seconds, with the range of the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, column, label in ((left, 0, "epochs trained, all trials"), (right, 1, "seconds, two workers")):
        end = max(run[column][-1] for runs in courses.values() for run in runs)
        grid = np.linspace(0, end, 400)
        for name, runs in courses.items():
            errors = np.array([_errors_at(grid, run[column], run.best) for run in runs])
            known = ~np.isnan(errors).any(axis=0)
            [line] = axes.plot(grid[known], np.median(errors[:, known], axis=0), label=name)
            axes.fill_between(
                grid[known], errors[:, known].min(0), errors[:, known].max(0), color=line.get_color(), alpha=0.12
            )
        axes.axhline(100 * (1 - target), color="grey", linewidth=0.8, linestyle="--")
        axes.set(xlabel=label, xlim=(0, end))
        axes.grid(alpha=0.3)
    lowest = 100 * (1 - max(run.best[-1] for runs in courses.values() for run in runs))
    left.set(ylabel="validation error of the best trial, %", ylim=(lowest - 0.02, 200 * (1 - target)))
    left.legend(frameon=False)
    figure.savefig(file, dpi=120)


def _errors_at(grid: np.ndarray[Any, Any], times: list[Any], best: list[float]) -> np.ndarray[Any, Any]:
    """The error in percent of the best trial at each time, NaN before the first trial and after the last."""
    places = np.searchsorted(times, grid, side="right") - 1
    is_known = (places >= 0) & (grid <= times[-1])
    return np.where(is_known, 100 * (1 - np.array(best))[np.maximum(places, 0)], np.nan)
