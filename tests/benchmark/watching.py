"""What it costs to watch a study of many trials: the worker that is watched, and the one who watches."""

import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pexpect
import psutil

from hpsearch.config.definition import load_definition
from hpsearch.search.study import load_study, open_study
from hpsearch.storage.rdb import open_storage
from tests.acceptance.commands import HPSEARCH, environment
from tests.benchmark.report import Options, Row, ratios, summarize
from tests.conftest import fill

_STUDY = """
budget = { trials = 99_999, epochs = 10, failures = 99_999 }
data = { name = "digits", validation = 200, train = 1_200 }
search = { width = { int = [8, 32] }, lr = { float = [1e-3, 1e-1], log = true } }
fixed = { depth = 2, batch_size = 64 }
sampler = { kind = "random" }
pruner = { kind = "none" }
"""


def watching(folder: Path, options: Options, n_before: int = 2_000, n_trials: int = 400) -> list[Row]:
    """A worker's time for some trials more, alone and watched in turn; the watcher's time; that of one look."""
    (folder / "watched.toml").write_text(_STUDY)
    definition = load_definition(folder / "watched.toml")
    storage = open_storage(definition.study.storage)
    fill(storage, open_study(definition, storage), n_before, n_running=0)
    storage.engine.dispose()
    shutil.copy(folder / "watched.db", folder / "before.db")
    alone, watched, looks = list[float](), list[float](), list[float]()
    shares: list[float] = []
    for _ in range(options.repeats):
        shutil.copy(folder / "before.db", folder / "watched.db")
        alone.append(_time_worker(folder, n_before, n_trials))
        shutil.copy(folder / "before.db", folder / "watched.db")
        with _watching(folder, shares):
            watched.append(_time_worker(folder, n_before, n_trials))
        start = time.perf_counter()
        command = [*HPSEARCH, "status", "watched.toml", "--json"]
        subprocess.run(command, cwd=folder, env=environment(), stdout=subprocess.DEVNULL, check=True)
        looks.append(time.perf_counter() - start)
    return [
        summarize("watching", "a worker's time, watched over alone", "x", ratios(watched, alone), "nothing measurable"),
        summarize("watching", f"status --watch, {n_before} trials, 200 x 50: share of a core", "%", shares, "5 %"),
        summarize("watching", f"status --json, {n_before} trials", "s", looks, "1 s"),
    ]


def _time_worker(folder: Path, n_before: int, n_trials: int) -> float:
    """Seconds from the start of the first to the end of the last of a worker's trials."""
    command = [*HPSEARCH, "worker", "watched.toml", "--max-trials", str(n_trials)]
    env = environment(OMP_NUM_THREADS="1")
    subprocess.run(command, cwd=folder, env=env, stderr=subprocess.DEVNULL, check=True)
    definition = load_definition(folder / "watched.toml")
    storage = open_storage(definition.study.storage, reads_only=True)
    trials = load_study(definition, storage).trials[n_before:]
    storage.engine.dispose()
    starts = [trial.datetime_start for trial in trials if trial.datetime_start]
    ends = [trial.datetime_complete for trial in trials if trial.datetime_complete]
    return (max(ends) - min(starts)).total_seconds()


@contextmanager
def _watching(folder: Path, shares: list[float]) -> Iterator[None]:
    """`status --watch` on a terminal of 200 x 50; its share of a core, after it has read the study, is appended."""
    command = [*HPSEARCH, "status", "watched.toml", "--watch"]
    watch = pexpect.spawn(command[0], command[1:], cwd=folder, env=environment(), dimensions=(50, 200))
    watch.expect("elapsed", timeout=60)
    threading.Thread(target=_read, args=(watch,), daemon=True).start()
    process = psutil.Process(watch.pid)
    start, before = time.perf_counter(), process.cpu_times()
    yield
    after = process.cpu_times()
    used = after.user + after.system - before.user - before.system
    shares.append(100 * used / (time.perf_counter() - start))
    watch.close(force=True)


def _read(watch: pexpect.spawn) -> None:
    with suppress(pexpect.EOF, ValueError, OSError):
        while True:
            watch.read_nonblocking(65_536, timeout=None)
