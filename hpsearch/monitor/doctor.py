"""Checks for problems of a study, its database, its data and this machine, and fixes some of them."""

import os
import shutil
import socket
import sqlite3
import statistics
import time
import timeit
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import optuna
import psutil
import torch
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError

from hpsearch.config.definition import StudyDefinition
from hpsearch.config.urls import parse_url, show_url
from hpsearch.data.tensors import cache_folder
from hpsearch.errors import HpsearchError, OwnCodeError, StorageUnavailable
from hpsearch.search.study import check_data, load_study
from hpsearch.storage import tables
from hpsearch.storage.artifacts import Folder
from hpsearch.storage.backup import check_integrity, find_journal
from hpsearch.storage.checkpoints import (
    artifact_folder,
    checkpoint_folder,
    find_export_checkpoints,
    find_unneeded_checkpoints,
    remove_checkpoints,
    sweep_checkpoints,
)
from hpsearch.storage.engine import network_file_system, safe_journal
from hpsearch.storage.rdb import Storage, open_storage, storage_of
from hpsearch.storage.retry import describe_cause
from hpsearch.training.devices import count_cores, list_devices
from hpsearch.training.run import load_study_data, open_data_set
from hpsearch.training.tryout import try_network

_MAX_LATENCY = 1.0  # seconds
_MAX_CLOCK_DIFFERENCE = 5.0  # seconds
_MIN_FREE = 500  # megabytes
_MAX_LOAD = 1.5  # runnable processes per core


@dataclass(frozen=True)
class Finding:
    """The result of one check; if it is not ok, the message says what is wrong and how to fix it."""

    check: str
    is_ok: bool
    message: str

    @property
    def is_news(self) -> bool:
        """Whether it is worth a look: a problem, or something that was fixed."""
        return not self.is_ok or self.message.startswith("fixed")


def run_checks(
    definition: StudyDefinition, *, folder: Path | str | None = None, fix: bool = False
) -> Iterator[Finding]:
    """Run all checks one by one. With `fix`, also fix what can be fixed safely; the findings report it.

    Without `fix`, nothing in the study is changed. Nothing is ever downloaded.
    """
    url = parse_url(definition.study.storage)
    file = Path(url.database or "") if url.get_backend_name() == "sqlite" else None
    if file and file.exists():
        yield from _check_file(file, fix)
    store = Folder(definition.study.artifacts)
    artifacts, study = _check_store(store), None
    try:
        recovery = definition.recovery
        storage = open_storage(
            definition.study.storage, heartbeat=recovery.heartbeat, grace=recovery.grace, must_exist=True
        )
        study = load_study(definition, storage)
    except HpsearchError as error:
        yield Finding("study", False, str(error))
    else:
        yield Finding("study", True, f"'{study.study_name}' in {show_url(url)}")
        try:
            yield from _check_clock(storage)
            yield _check_stale(definition, storage, study, fix)
            if artifacts.is_ok:
                yield _check_checkpoints(definition, study, fix)
            yield _check_threads(study)
        except (StorageUnavailable, SQLAlchemyError) as error:
            yield Finding("study", False, f"the database stopped responding: {describe_cause(url, error)}")
        finally:
            storage.engine.dispose()
    if store.path is None:
        yield artifacts
    if file:
        yield _check_folder("database", file.parent)
    if store.path:
        yield _check_folder("artifacts", store.path)
    if definition.data.name is None:
        yield _check_cache()
    yield from _check_data(definition, study, folder)
    yield _check_devices()


def _check_file(file: Path, fix: bool) -> Iterator[Finding]:
    with closing(sqlite3.connect(file, timeout=_MAX_LATENCY)) as connection:
        try:
            problems = check_integrity(connection)
            journal = find_journal(connection, repairs=fix)
        except sqlite3.Error as error:
            is_locked = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY
            advice = (
                f"another program has locked it; find it with `fuser {file}` and close it"
                if is_locked
                else "restore the last backup"
            )
            yield Finding("integrity", False, f"{file}: {error}; {advice}")
            return
    advice = f"stop all workers, then restore a backup (made with `hpsearch copy`) or try `sqlite3 {file} .recover`"
    yield Finding("integrity", not problems, f"{problems}; {advice}" if problems else "passed (SQLite integrity check)")
    version = f"SQLite {sqlite3.sqlite_version}"
    if journal == "wal" != safe_journal():
        advice = "stop all programs using it, then run doctor --fix"
        yield Finding("journal", False, f"WAL mode can corrupt the database with {version}; {advice}")
    else:
        yield Finding("journal", True, f"journal mode {safe_journal().upper()}, safe with {version}")


def _check_clock(storage: Storage) -> Iterator[Finding]:
    """Read the clock of the database: how long it takes to lock it, and whether the clock is right."""

    def read_clock() -> datetime:
        with storage.engine.begin() as connection:
            return tables.read_clock(connection)

    seconds = statistics.median(timeit.repeat(read_clock, number=1, repeat=5))
    message = f"{seconds * 1000:.1f} ms to acquire the database lock"
    advice = "too many workers or a slow disk; use fewer workers or PostgreSQL"
    yield _judge("latency", seconds < _MAX_LATENCY, message, advice)
    time_there = read_clock()
    time_there = time_there if time_there.tzinfo else time_there.replace(tzinfo=UTC)  # SQLite's is in UTC
    difference = abs((datetime.now(UTC) - time_there).total_seconds())
    message = f"clock difference to the database: {difference:.0f} s"
    yield _judge("clock", difference <= _MAX_CLOCK_DIFFERENCE, message, "synchronize both clocks with NTP")


def _check_stale(definition: StudyDefinition, storage: Storage, study: optuna.Study, fix: bool) -> Finding:
    stale = storage.find_stale(study._study_id)
    if stale and fix:
        time.sleep(definition.recovery.heartbeat)  # after an outage, workers that are alive send a heartbeat now
        n_stale, n_fixed = len(stale), len(storage.reap(study._study_id, definition.recovery.retries))
        if n_fixed == n_stale:
            advice = "or failed, where retries were used up"
            return Finding("trials", True, f"fixed: {n_fixed} stuck trials re-queued ({advice})")
        advice = f"run doctor --fix again in {definition.recovery.grace} s for the rest"
        return Finding("trials", False, f"{n_fixed} of {n_stale} stuck trials fixed; {advice}")
    numbers = ", ".join(str(storage.get_trial(trial_id).number) for trial_id in stale)
    advice = f"any worker will re-queue them within {definition.recovery.grace} s, or use --fix"
    message = f"marked running but without a worker: trial {numbers}; {advice}"
    return Finding("trials", not stale, message if stale else "no stuck trials")


def _check_checkpoints(definition: StudyDefinition, study: optuna.Study, fix: bool) -> Finding:
    own, keep = checkpoint_folder(definition, study), definition.recovery.keep
    files, exports = find_unneeded_checkpoints(own, study, keep), find_export_checkpoints(own)
    if files and not fix:
        advice = "removed when the next trial finishes, or now with --fix"
        return Finding("checkpoints", False, f"{len(files)} leftover checkpoints in {own}; {advice}")
    if fix:
        sweep_checkpoints(own, study, keep)
        remove_checkpoints(own, exports)
        files, exports = [*files, *exports], []
    root = artifact_folder(definition)
    others = [name for name in root.find() if name.endswith(".ckpt") and not str(root / name).startswith(f"{own}/")]
    message = f"fixed: removed {len(files)} leftover checkpoints" if files else "no leftover checkpoints"
    hint = f"; {len(others)} more in {root} belong to other databases with a study of this name" if others else ""
    if exports:
        hint += f"; {len(exports)} of an export that did not finish: export again to go on, or remove them with --fix"
    return Finding("checkpoints", True, message + hint)


def _check_threads(study: optuna.Study) -> Finding:
    n_cores, load = count_cores(), psutil.getloadavg()[0]
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # a list has a number per nested level
    n_threads = int(first) if first.isdecimal() else 1
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    here = [trial for trial in running if str(trial.user_attrs.get("worker")).startswith(f"{socket.gethostname()}-")]
    message = f"{n_cores} CPU cores, {len(here)} workers of this study here, load average {load:.1f}"
    if len(here) > n_cores and not torch.cuda.is_available():
        return Finding("threads", False, f"{message}; more workers than cores; use --workers {n_cores}")
    if n_threads > n_cores:
        message = f"OMP_NUM_THREADS={n_threads} exceeds the {n_cores} available cores; unset it"
        return Finding("threads", False, message)
    advice = "CPU overloaded; stop other programs or use fewer workers"
    return _judge("threads", load <= _MAX_LOAD * n_cores, message, advice)


def _check_folder(name: str, folder: Path) -> Finding:
    existing = _find_existing(folder)
    kind, free = network_file_system(existing), shutil.disk_usage(existing).free / 1e6
    if kind and name == "database":
        advice = "where SQLite locking is unreliable; move the database to a local disk, or use PostgreSQL"
        return Finding(name, False, f"{folder} is on a network file system ({kind}), {advice}")
    if not os.access(existing, os.W_OK):
        return Finding(name, False, f"{existing} is not writable; fix its permissions or choose another folder")
    return _judge(name, free >= _MIN_FREE, f"{free:,.0f} MB free in {folder}", "low disk space; free some space")


def _find_existing(folder: Path) -> Path:
    """Return the folder, else the closest folder above it that can be seen."""
    return next(path for path in (folder, *folder.parents) if os.path.exists(path))  # noqa: PTH110 - no error


def _check_store(artifacts: Folder) -> Finding:
    try:
        artifacts.check()
    except HpsearchError as error:
        return Finding("artifacts", False, f"{error}; set its credentials and endpoint in the environment")
    return Finding("artifacts", True, f"{artifacts} is readable and writable")


def _check_cache() -> Finding:
    """Check the folder in which the pixels of the user's own images are kept, and say how much it takes."""
    try:
        folder = cache_folder()
    except HpsearchError as error:
        return Finding("cache", False, str(error))
    if not os.access(existing := _find_existing(folder), os.W_OK | os.X_OK) or not existing.is_dir():
        advice = "set XDG_CACHE_HOME to a folder that can be written"
        return Finding("cache", False, f"{existing}, the place for pixels of images, is not writable; {advice}")
    sizes = [file.stat().st_size for file in folder.glob("*.pixels")]
    free = shutil.disk_usage(existing).free / 1e6
    message = f"{sum(sizes) / 1e6:,.0f} MB of pixels of images, and {free:,.0f} MB free in {folder}"
    advice = "low disk space; free some, or set XDG_CACHE_HOME to a folder on another disk"
    return _judge("cache", free >= _MIN_FREE, message, advice)


def _check_data(
    definition: StudyDefinition, study: optuna.Study | None, folder: Path | str | None
) -> Iterator[Finding]:
    """Check that the data can be read, and are those on which the study was searched; then try a network on them."""
    name = definition.data.title
    try:
        data_set = open_data_set(definition, folder)
        place = data_set.locate()
        if place and (missing := data_set.find_missing()):
            advice = "the next run downloads them (offline: copy them there yourself)"
            if not os.access(_find_existing(place), os.W_OK | os.X_OK):
                advice = "the folder is not writable: copy them there yourself, or point HPSEARCH_DATA at another one"
            message = f"{name}: missing or corrupt in {place}: {', '.join(missing)}"
            yield Finding("data", False, f"{message}; {advice}")
            return
        data = load_study_data(definition, data_set)
        if study:
            try:
                check_data(definition, study, data)
            finally:
                storage_of(study).engine.dispose()
    except (HpsearchError, SQLAlchemyError) as error:
        yield Finding("data", False, str(error))
        return
    except OSError as error:
        option = "HPSEARCH_DATA" if definition.data.name else "--data"
        advice = f"fix its permissions, or point {option} at another folder"
        yield Finding("data", False, f"{name}: cannot read {error.filename}: {error.strerror}; {advice}")
        return
    counts = f"{len(data.train):,} training and {len(data.validation):,} validation images"
    yield Finding("data", True, f"{name}: complete{f' in {place}' if place else ''} ({counts})")
    if code := definition.network.code:
        try:
            try_network(definition, data.image_shape, len(data.class_names))
        except OwnCodeError as error:
            yield Finding("network", False, str(error))
        else:
            yield Finding("network", True, f"{code.path}: a batch was trained")


def _check_devices() -> Finding:
    devices = list_devices()
    try:
        for device in devices:
            torch.ones(8, 8, device=device).matmul(torch.ones(8, 8, device=device)).sum().item()
    except RuntimeError as error:
        return Finding("devices", False, f"{device}: {error}; check the driver with nvidia-smi")
    return Finding("devices", True, f"{', '.join(devices)} with torch {torch.__version__}")


def _judge(check: str, is_ok: bool, message: str, advice: str) -> Finding:
    """Return a finding whose message ends with the advice if it is not ok."""
    return Finding(check, is_ok, message if is_ok else f"{message}; {advice}")
