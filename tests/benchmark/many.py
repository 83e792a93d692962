"""Many workers on one PostgreSQL: trials a second with an objective that costs nothing, and what they wait for."""

import multiprocessing
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import optuna
import psutil
import psycopg
from optuna.trial import TrialState

from hpsearch.config.definition import StudyDefinition, parse_definition
from hpsearch.config.space import suggest
from hpsearch.search.study import load_study, open_study
from hpsearch.storage.rdb import open_storage
from hpsearch.workers.shutdown import Drain
from hpsearch.workers.worker import Worker, open_worker_storage
from tests.benchmark.pieces import _new_database, _postgresql
from tests.benchmark.report import UNFAIR, Options, Row, summarize
from tests.benchmark.searches import SPACE

N_EPOCHS = 3
_WAITING = """
    SELECT coalesce(wait_event_type || ' ' || wait_event, 'CPU') FROM pg_stat_activity
    WHERE state = 'active' AND application_name = 'hpsearch'
"""


def define(url: str, n_trials: int) -> StudyDefinition:
    """A study of that many trials with the random sampler, which asks the storage no more than any other."""
    return parse_definition(
        {
            "study": {"name": "many", "storage": url, "artifacts": "/nonexistent"},
            "budget": {"trials": n_trials, "epochs": N_EPOCHS},
            "data": {"name": "digits", "validation": 200},
            "search": SPACE,
            "sampler": {"kind": "random"},
        }
    )


def many(folder: Path, options: Options) -> list[Row]:
    """Trials a second of 1, 4, 16 and 64 workers, and the milliseconds of a trial that each part takes."""
    measured: list[Row] = []
    with _postgresql(folder) as server:
        for n_workers in (1, 4, 16, 64):
            runs = [run(_new_database(server), n_workers, 200 + 25 * n_workers) for _ in range(options.repeats)]
            for what, unit in runs[0]:
                values = [figures[what, unit] for figures in runs if (what, unit) in figures]
                measured.append(summarize("many", f"{n_workers} workers: {what}", unit, values))
            if any(figures["beyond the budget", "trials"] for figures in runs):
                measured.append(Row("many", f"{UNFAIR}: the budget was not exact"))
    return measured


def run(url: str, n_workers: int, n_trials: int) -> dict[tuple[str, str], float]:
    """What a search by that many processes took; raises `RuntimeError` if one of them failed.

    They are forked from a server of their own: one that this process has already may lack what they need, and each of
    them would load 400 MB of it.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_run, url, n_workers, n_trials).result()


def _run(url: str, n_workers: int, n_trials: int) -> dict[tuple[str, str], float]:
    definition = define(url, n_trials)
    storage = open_storage(url)
    study = open_study(definition, storage)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "alembic.command", "alembic.script"])
    barrier, answers = context.Barrier(n_workers + 1), context.SimpleQueue()
    processes = [context.Process(target=_work, args=(url, n_trials, barrier, answers)) for _ in range(n_workers)]
    for process in processes:
        process.start()
    barrier.wait(timeout=300)
    before = _server_seconds(url)
    waits = _sample_waits(url, answers.empty)  # until the first worker has ended
    server_seconds = _server_seconds(url) - before
    parts = sum((Counter(answers.get()) for _ in processes), Counter())
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError("a worker failed")
    trials = study.get_trials(deepcopy=False)
    storage.engine.dispose()
    ended = [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    excess = abs(len(ended) - n_trials) + len(trials) - len({trial.number for trial in trials})
    starts = [trial.datetime_start.timestamp() for trial in ended if trial.datetime_start]
    seconds = max(t.datetime_complete.timestamp() for t in ended if t.datetime_complete) - min(starts)
    figures = {("throughput", "trials/s"): n_trials / seconds, ("beyond the budget", "trials"): float(excess)}
    for part, value in {**parts, "CPU of PostgreSQL": server_seconds}.items():
        figures[part, "ms a trial"] = 1e3 * value / n_trials
    total = sum(waits.values()) or 1
    return figures | {(f"active on the server: {what}", "%"): 100 * n / total for what, n in waits.most_common(5)}


def _sample_waits(url: str, goes_on: Callable[[], bool]) -> Counter[str]:
    """What the connections of workers that are not idle wait for, looked at a hundred times a second."""
    seen: Counter[str] = Counter()
    with psycopg.connect(url, autocommit=True) as connection:
        while goes_on():
            seen.update(row[0] for row in connection.execute(_WAITING).fetchall())
            time.sleep(0.01)
    return seen


def _server_seconds(url: str) -> float:
    """The seconds of CPU that PostgreSQL has used."""
    with psycopg.connect(url) as connection:
        server = psutil.Process(connection.info.backend_pid).parent()
    assert server
    times = server.cpu_times()
    seconds = times.user + times.system + times.children_user + times.children_system
    for process in server.children():
        with suppress(psutil.NoSuchProcess):
            seconds += sum(process.cpu_times()[:2])
    return float(seconds)


def _work(url: str, n_trials: int, barrier: Barrier, answers: Any) -> None:
    drain = Drain()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    definition = define(url, n_trials)
    storage = open_worker_storage(definition, drain, waits=True)
    worker = Worker(definition, storage, storage.join(load_study(definition, storage)._study_id), drain)
    seconds: dict[str, float] = {}
    objective: Any = Objective(definition, seconds)
    worker.objective = objective
    for name in ("_ask", "_tell"):
        setattr(worker, name, _timed(getattr(worker, name), name.removeprefix("_"), seconds))
    barrier.wait(timeout=300)
    cpu = time.process_time()
    worker.run()
    answers.put(seconds | {"CPU of workers": time.process_time() - cpu})


def _timed(function: Callable[..., Any], name: str, seconds: dict[str, float]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*arguments)
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start

    return call


class Objective:
    """Reports a few epochs that took no time."""

    def __init__(self, definition: StudyDefinition, seconds: dict[str, float]) -> None:
        self.definition, self.seconds = definition, seconds

    def __call__(self, trial: optuna.Trial, check: Callable[..., None]) -> float:
        value: float = _timed(self._run, "objective", self.seconds)(trial, check)
        return value

    def _run(self, trial: optuna.Trial, check: Callable[..., None]) -> float:
        suggest(trial, self.definition.space)
        for epoch in range(1, N_EPOCHS + 1):
            check()
            trial.report(1 - 1 / (epoch + trial.number), epoch)
            if trial.should_prune():
                raise optuna.TrialPruned
        return 1 - 1 / (N_EPOCHS + trial.number)
