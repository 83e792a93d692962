"""Whole searches through the real command line: trials per minute, start-up, workers, memory."""

import os
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import psutil
import torch
from optuna.trial import FrozenTrial

from hpsearch.config.definition import StudyDefinition, evolve, parse_definition
from hpsearch.config.space import suggest
from tests.acceptance.commands import HPSEARCH, environment, wait_for, workers_of
from tests.benchmark import textbook
from tests.benchmark.report import UNFAIR, Options, Row, ratios, summarize
from tests.benchmark.textbook import Outcome

SPACE = {
    "depth": {"int": [1, 3]},
    "width": {"int": [4, 128]},
    "dropout": {"float": [0.2, 0.5]},
    "lr": {"float": [1e-5, 1e-1], "log": True},
    "optimizer": {"choice": ["adam", "rmsprop", "sgd"]},
}
_N_TRIALS = 4  # that the textbook way runs; hpsearch runs them several times, so that its measurement lasts as long


def define(
    trials: list[dict[str, Any]], *, kind: str = "mlp", batch_size: int = 128, batch_norm: bool = False, **budget: Any
) -> StudyDefinition:
    """A study without pruning that tries the given trials, of `train` and `validation` images and `epochs`."""
    train, validation, epochs = budget["train"], budget["validation"], budget["epochs"]
    return parse_definition(
        {
            "study": {"name": "speed", "storage": "sqlite:///speed.db"},
            "budget": {"trials": max(len(trials), 1), "epochs": epochs},
            "data": {"name": "mnist", "train": train, "validation": validation},
            "network": {"kind": kind},
            "search": SPACE | budget.get("search", {}),
            "fixed": {"batch_size": batch_size, "batch_norm": batch_norm},
            "try": trials,
            "pruner": {"kind": "none"},
        }
    )


def draw_trials(n: int) -> list[dict[str, Any]]:
    """Points of the space, drawn at random with a fixed seed."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    space = define([], train=3840, validation=1280, epochs=10).space
    trials = [study.ask() for _ in range(n)]
    for trial in trials:
        suggest(trial, space)
    return [trial.params for trial in trials]


def run_hpsearch(folder: Path, definition: StudyDefinition, n_workers: int, cores: Sequence[int] = ()) -> Outcome:
    """The definition's search in a new database, on some cores or on all."""
    file, database = folder / "speed.toml", folder / "speed.db"
    database.unlink(missing_ok=True)
    file.write_text(definition.to_toml())
    command = [*HPSEARCH, "run", str(file), "--workers", str(n_workers), "--storage", f"sqlite:///{database}"]
    pinned = [*(("taskset", "--cpu-list", ",".join(map(str, cores))) if cores else ()), *command]
    start = time.perf_counter()
    subprocess.run(pinned, check=True, capture_output=True, env=environment())
    whole = time.perf_counter() - start
    trials = optuna.load_study(study_name="speed", storage=f"sqlite:///{database}").trials
    batch_size, n_train = definition.fixed["batch_size"], definition.data.train or 0
    n_steps = sum(trial.last_step or 0 for trial in trials) * -(-n_train // batch_size)
    seconds = seconds_of(trials)
    return Outcome(seconds, [trial.values[0] for trial in trials], n_steps, start_up=whole - seconds)


def seconds_of(trials: Sequence[FrozenTrial]) -> float:
    """The seconds from the start of the first trial to the end of the last."""
    starts = [trial.datetime_start.timestamp() for trial in trials if trial.datetime_start]
    return max(trial.datetime_complete.timestamp() for trial in trials if trial.datetime_complete) - min(starts)


def has_parameters(database: Path) -> bool:
    """Whether a trial has its parameters, which are stored just before its first batch."""
    try:
        with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
            return bool(connection.execute("SELECT count(*) FROM trial_params").fetchone()[0])
    except sqlite3.OperationalError:  # not there yet
        return False


def compare(
    part: str, folder: Path, options: Options, make: Callable[[int], StudyDefinition], n: int, times: int, goal: str
) -> list[Row]:
    """hpsearch with 2 workers over the textbook ways, with a check that all did the same work equally well."""
    ways: dict[str, Callable[[int], Outcome]] = {
        "hpsearch, 2 workers": lambda seed: run_hpsearch(folder, evolve(make(times), "study", seed=seed), 2),
        "textbook, n_jobs=1": lambda _: textbook.run_optuna(make(1), options.data, n, 1),
        "textbook, n_jobs=2": lambda _: textbook.run_optuna(make(1), options.data, n, 2),
    }
    if textbook.has_ray_tune():
        ways["Ray Tune, 2 at a time"] = lambda _: textbook.run_ray(make(1), options.data, n)
    outcomes: dict[str, list[Outcome]] = {name: [] for name in ways}
    for repeat in range(options.repeats):
        for name, run in ways.items():
            outcomes[name].append(run(repeat))
            print(f"  {name}: {outcomes[name][-1].per_minute:.1f} trials/min", file=sys.stderr, flush=True)
    rows = [
        summarize(part, f"{name}: trials a minute", "", [run.per_minute for run in runs])
        for name, runs in outcomes.items()
    ]
    ours, *others = outcomes.values()
    best = [max(run.per_minute for run in runs) for runs in zip(*others, strict=True)]
    rows.append(summarize(part, "over the best other way", "x", ratios([run.per_minute for run in ours], best), goal))
    whole = [60 * len(run.accuracies) / (run.seconds + run.start_up) for run in ours]
    what = f"the same, our start-up counted (of {len(ours[0].accuracies)} trials)"
    rows.append(summarize(part, what, "x", ratios(whole, best)))
    for name, runs in outcomes.items():
        accuracies = [statistics.mean(run.accuracies) for run in runs]
        n_steps = runs[0].n_steps / len(runs[0].accuracies)
        rows.append(summarize(part, f"{name}: mean accuracy after {n_steps:g} steps", "", accuracies))
    return [*rows, *(Row(part, f"{UNFAIR}: {problem}") for problem in find_unfairness(outcomes, n))]


def find_unfairness(outcomes: Mapping[str, Sequence[Outcome]], n_points: int) -> list[str]:
    """Where ways made other steps than the first, or reached another accuracy than by noise.

    A run's trials go round the `n_points` points; the noise is that of the first way's trials of the same point. The
    allowed difference of the means is 4 standard errors.
    """
    steps = {name: {run.n_steps / len(run.accuracies) for run in runs} for name, runs in outcomes.items()}
    problems = [f"different numbers of optimizer steps a trial: {steps}"] if len(set.union(*steps.values())) > 1 else []
    ours, *others = ([accuracy for run in runs for accuracy in run.accuracies] for runs in outcomes.values())
    noise = statistics.mean(statistics.variance(ours[i::n_points]) for i in range(n_points))
    for name, theirs in zip(list(outcomes)[1:], others, strict=True):
        difference = statistics.mean(theirs) - statistics.mean(ours)
        error = (noise * (1 / len(theirs) + 1 / len(ours))) ** 0.5
        if abs(difference) > 4 * error:
            problems.append(f"{name} reached another accuracy by {difference:.4f}, standard error {error:.4f}")
    return problems


def throughput(folder: Path, options: Options) -> list[Row]:
    trials = draw_trials(_N_TRIALS)

    def make(times: int) -> StudyDefinition:
        return define(trials * times, train=3840, validation=1280, epochs=10)

    return compare("throughput", folder, options, make, len(trials), 8, "15x / 40x")


def full_fidelity(folder: Path, options: Options) -> list[Row]:
    mlp = {"depth": 2, "width": 256, "lr": 1e-3, "optimizer": "adam", "dropout": 0.2}
    cnn = {"depth": 5, "width": 16, "lr": 1e-2, "optimizer": "adam", "dropout": 0.2}
    wide: dict[str, Any] = {"search": {"depth": {"int": [1, 5]}, "width": {"int": [4, 256]}}}
    wide |= {"train": 50_000, "validation": 10_000, "epochs": 1}
    return [
        *compare("full: MLP", folder, options, lambda n: define([mlp] * 2 * n, **wide), 2, 4, "8x / 12x"),
        *compare(
            *("full: CNN", folder, options),
            lambda n: define([cnn] * 2 * n, kind="cnn", batch_size=256, batch_norm=True, **wide),
            *(2, 4, "3x / 5x"),
        ),
    ]


def start_up(folder: Path, options: Options) -> list[Row]:
    """Seconds of `--help` and of `check`, and from `run` to its first batch."""
    file, database = folder / "speed.toml", folder / "speed.db"
    file.write_text(define(draw_trials(1), train=3840, validation=1280, epochs=1).to_toml())

    def time_command(*arguments: str) -> float:
        start = time.perf_counter()
        subprocess.run([*HPSEARCH, *arguments], check=True, capture_output=True, env=environment())
        return time.perf_counter() - start

    def time_first_batch() -> float:
        database.unlink(missing_ok=True)
        start = time.perf_counter()
        command = [*HPSEARCH, "run", str(file), "--workers", "2", "--storage", f"sqlite:///{database}"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()):
            wait_for(lambda: has_parameters(database), "the first batch")
            return time.perf_counter() - start

    measured: dict[str, list[float]] = {"--help": [], "check": [], "first batch after run": []}
    for _ in range(options.repeats + 1):  # the first fills the caches of the file system
        measured["--help"].append(time_command("--help"))
        measured["check"].append(time_command("check", str(file)))
        measured["first batch after run"].append(time_first_batch())
    goals = {"--help": "0.5 s / 0.2 s", "first batch after run": "8 s / 4 s"}
    return [summarize("start-up", name, "s", times[1:], goals.get(name, "")) for name, times in measured.items()]


def scaling(folder: Path, options: Options) -> list[Row]:
    """Trials a minute of more workers, each with a core, over one with a core; and the memory of one more worker.

    A worker alone on the machine trains with all cores; that is the other row.
    """
    definition = define(draw_trials(_N_TRIALS) * 25, train=3840, validation=1280, epochs=10)
    cores = sorted(psutil.Process().cpu_affinity() or [])
    counts = [n for n in (1, 2, 4, 8, 16) if n <= len(cores)]
    rates: dict[int, list[float]] = {n: [] for n in counts}
    alone: list[float] = []
    for _ in range(options.repeats):
        for n, measured in rates.items():
            measured.append(run_hpsearch(folder, definition, n, cores[:n]).per_minute)
        alone.append(run_hpsearch(folder, definition, 1).per_minute)
    rows = [
        summarize("scaling", f"{n} workers over 1", "x", ratios(rates[n], rates[1]), "1.8x / 1.95x" if n == 2 else "")
        for n in counts[1:]
    ]
    most = f"{counts[-1]} workers over 1 that has all cores"
    rows.append(summarize("scaling", most, "x", ratios(rates[counts[-1]], alone)))
    memory = [_measure_memory(folder, definition) for _ in range(options.repeats)]
    return [*rows, summarize("scaling", "memory of a further worker", "MB", memory, "500 MB / 300 MB")]


def _measure_memory(folder: Path, definition: StudyDefinition) -> float:
    """The largest memory, in MB, that a worker shares with no other process."""
    file, database = folder / "speed.toml", folder / "speed.db"
    database.unlink(missing_ok=True)
    file.write_text(definition.to_toml())
    largest = 0.0
    command = [*HPSEARCH, "run", str(file), "--workers", "2", "--storage", f"sqlite:///{database}"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()) as run:
        while run.poll() is None:
            for pid in workers_of(run):
                try:
                    largest = max(largest, psutil.Process(pid).memory_full_info().uss / 1e6)
                except psutil.Error:  # it has just ended
                    continue
            time.sleep(0.2)
    return largest


def gpu(folder: Path, options: Options) -> list[Row]:
    """Trials a minute of 1 to 16 workers on one device."""
    if not torch.cuda.is_available():
        return []
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    rows = []
    for n in (1, 2, 4, 8, 16):
        definition = define(draw_trials(_N_TRIALS) * 2 * n, train=50_000, validation=10_000, epochs=2)
        rates = [run_hpsearch(folder, definition, n).per_minute for _ in range(options.repeats)]
        rows.append(summarize("gpu", f"{n} workers: trials a minute", "", rates))
    return rows
