"""The doctor finds problems, says how to fix them, writes nothing unless asked, and fixes what is safe."""

import gzip
import os
import re
import shutil
import sqlite3
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import sqlalchemy
from optuna.trial import TrialState

from hpsearch.config.definition import StudyDefinition, load_definition
from hpsearch.monitor import doctor
from hpsearch.monitor.doctor import run_checks
from hpsearch.search.study import check_data, open_study
from hpsearch.storage import tables
from hpsearch.storage.checkpoints import (
    Checkpoint,
    artifact_folder,
    checkpoint_folder,
    checkpoint_name,
    export_checkpoint_name,
)
from hpsearch.storage.rdb import open_storage
from hpsearch.training.run import load_study_data

from ..conftest import make_definition
from ..search.test_images import draw, write_own_study


def define(folder: Path, **sections: Any) -> StudyDefinition:
    study = {"artifacts": str(folder / "artifacts")}
    return make_definition(f"sqlite:///{folder / 'study.db'}", study=study, **sections)


def wrong(definition: StudyDefinition, **options: Any) -> dict[str, str]:
    return {finding.check: finding.message for finding in run_checks(definition, **options) if not finding.is_ok}


def test_a_healthy_study_is_in_order(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "getloadavg", lambda: (0.0, 0.0, 0.0))  # other tests run beside this one
    definition = make_definition(url, study={"artifacts": str(tmp_path / "artifacts")})
    open_study(definition, open_storage(url))
    findings = list(run_checks(definition))
    assert [finding for finding in findings if not finding.is_ok] == []
    checks = [finding.check for finding in findings]
    assert {"study", "latency", "clock", "trials", "checkpoints", "threads", "artifacts", "data", "devices"} <= {
        *checks
    }
    assert ({"integrity", "journal", "database"} <= {*checks}) == url.startswith("sqlite")


def test_a_missing_study_is_said_and_the_rest_is_checked(tmp_path: Path) -> None:
    definition = define(tmp_path)
    findings = list(run_checks(definition))
    assert "no search found" in wrong(definition)["study"]
    assert {"data", "devices", "database"} <= {finding.check for finding in findings}
    assert list(tmp_path.iterdir()) == []


def test_a_stuck_trial_is_found_and_queued_again_when_asked(url: str, tmp_path: Path) -> None:
    definition = make_definition(url, study={"artifacts": str(tmp_path)}, recovery={"heartbeat": 1, "grace": 2})
    storage = open_storage(url)
    study = open_study(definition, storage)
    storage.worker = "host-0"
    stuck = study.ask()
    with storage.engine.begin() as connection:
        connection.execute(sqlalchemy.text("UPDATE trial_heartbeats SET heartbeat = '2026-01-01'"))
    assert wrong(definition)["trials"].startswith(f"marked running but without a worker: trial {stuck.number}; any")
    assert study.trials[0].state == TrialState.RUNNING, "it only looked"
    assert "trials" not in wrong(definition, fix=True)
    assert [trial.state for trial in study.trials] == [TrialState.WAITING]


def test_a_running_trial_without_a_heartbeat_is_given_a_grace_period(url: str, tmp_path: Path) -> None:
    definition = make_definition(
        url, study={"artifacts": str(tmp_path / "artifacts")}, recovery={"heartbeat": 1, "grace": 2}
    )
    storage = open_storage(definition.study.storage)
    study = open_study(definition, storage)
    study.ask()
    assert "without a worker: trial 0" in wrong(definition)["trials"]
    assert "0 of 1 stuck trials fixed; run doctor --fix again" in wrong(definition, fix=True)["trials"]
    assert study.trials[0].state == TrialState.RUNNING


def test_a_trial_whose_heartbeat_lies_in_the_future_is_found(url: str, tmp_path: Path) -> None:
    definition = make_definition(url, study={"artifacts": str(tmp_path)}, recovery={"heartbeat": 1, "grace": 2})
    storage = open_storage(url)
    storage.worker = "host-0"
    open_study(definition, storage).ask()
    with storage.engine.begin() as connection:
        connection.execute(tables.HEARTBEATS.update().values(heartbeat=datetime(2100, 1, 1)))
    assert "without a worker: trial 0" in wrong(definition)["trials"]
    assert "0 of 1 stuck trials fixed; run doctor --fix again in 2 s" in wrong(definition, fix=True)["trials"]


def test_checkpoints_that_no_trial_needs_are_found_and_removed_when_asked(url: str, tmp_path: Path) -> None:
    definition = make_definition(url, study={"artifacts": str(tmp_path)}, recovery={"heartbeat": 1, "grace": 2})
    study = open_study(definition, open_storage(definition.study.storage))
    trial = study.ask()
    folder = checkpoint_folder(definition, study)
    for number in (trial.number, 7):
        Checkpoint(folder, [checkpoint_name(number)], {}).write({})
    Checkpoint(artifact_folder(definition) / "another", [checkpoint_name(0)], {}).write({})
    assert wrong(definition)["checkpoints"].startswith("1 leftover checkpoints")
    assert "checkpoints" not in wrong(definition, fix=True)
    assert folder.find() == ["trial-0.ckpt"]
    assert (artifact_folder(definition) / "another").find() == ["trial-0.ckpt"]
    messages = [finding.message for finding in run_checks(definition) if finding.check == "checkpoints"]
    assert "no leftover checkpoints; 1 more in " in messages[0]
    Checkpoint(folder, [export_checkpoint_name(0, 1)], {}).write({})
    messages = [finding.message for finding in run_checks(definition) if finding.check == "checkpoints"]
    assert "; 1 of an export that did not finish: export again to go on, or remove them with --fix" in messages[0]
    assert "checkpoints" not in wrong(definition, fix=True)
    assert folder.find() == ["trial-0.ckpt"]


def test_a_damaged_database_is_found(tmp_path: Path) -> None:
    definition = define(tmp_path)
    study = open_study(definition, open_storage(definition.study.storage))
    for _ in range(50):
        study.tell(study.ask(), 0.5)
    file = tmp_path / "study.db"
    content = bytearray(file.read_bytes())
    content[-8192:] = bytes(8192)
    file.write_bytes(content)
    assert "restore" in wrong(definition)["integrity"]
    file.write_bytes(b"something else" * 1000)
    found = wrong(definition, fix=True)
    assert "file is not a database" in found["integrity"]
    assert "file is not a database" in found["study"]
    assert file.read_bytes() == b"something else" * 1000


def test_a_database_that_is_locked_is_told_from_a_damaged_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpsearch.storage.engine.BUSY_TIMEOUT", 0.1)
    definition = define(tmp_path)
    open_study(definition, open_storage(definition.study.storage))
    connection = sqlite3.connect(tmp_path / "study.db", isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    found = wrong(definition)
    connection.close()
    assert "database is locked; another program has locked it" in found["integrity"]
    assert "database is locked" in found["study"]


@pytest.mark.skipif(sqlite3.sqlite_version_info >= (3, 51, 3), reason="WAL is safe with this SQLite")
def test_a_journal_mode_that_can_lose_data_is_fixed(tmp_path: Path) -> None:
    definition = define(tmp_path)
    storage = open_storage(definition.study.storage)
    open_study(definition, storage)
    storage.engine.dispose()
    with sqlite3.connect(tmp_path / "study.db") as connection:
        connection.execute("PRAGMA journal_mode = WAL")
    connection.close()
    assert "WAL mode can corrupt" in wrong(definition)["journal"], "looking changes nothing"
    assert "journal" not in wrong(definition, fix=True)
    assert "journal" not in wrong(definition)


def test_a_slow_lock_a_wrong_clock_a_full_disk_and_a_busy_machine_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    definition = define(tmp_path)
    open_study(definition, open_storage(definition.study.storage))
    for name, value in (("_MAX_LATENCY", 0.0), ("_MAX_CLOCK_DIFFERENCE", -1.0), ("_MIN_FREE", 10**12)):
        monkeypatch.setattr(doctor, name, value)
    monkeypatch.setattr(psutil, "getloadavg", lambda: (1000.0, 0.0, 0.0))
    found = wrong(definition)
    assert "use fewer workers or PostgreSQL" in found["latency"]
    assert "synchronize both clocks with NTP" in found["clock"]
    assert "free some space" in found["database"]
    assert "CPU overloaded" in found["threads"]
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    assert "OMP_NUM_THREADS=4096" in wrong(definition)["threads"]
    monkeypatch.setenv("OMP_NUM_THREADS", "4096,2")  # for nested regions, as OpenMP allows
    assert "OMP_NUM_THREADS=4096" in wrong(definition)["threads"]


def test_a_database_on_a_network_file_system_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [SimpleNamespace(mountpoint=str(tmp_path), fstype="nfs4")]  # there is no file server to be had here
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: parts)  # noqa: A006 - psutil's name
    assert "network file system (nfs4)" in wrong(define(tmp_path))["database"]


def test_data_that_cannot_be_read_or_downloaded_are_one_finding_of_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    definition = define(tmp_path, data={"name": "mnist", "validation": 10_000, "train": 1000})
    file = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte.gz"
    file.mkdir(parents=True)  # no permission would stop root
    findings = wrong(definition, folder=tmp_path)
    assert f"cannot read {file}: Is a directory; fix its permissions" in findings["data"]
    assert "no search found" in findings["study"]
    file.rmdir()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as for a user who is not root
    assert "the folder is not writable: copy them there yourself" in wrong(definition, folder=tmp_path)["data"]


def test_missing_and_damaged_data_are_named_and_nothing_is_downloaded(tmp_path: Path) -> None:
    definition = define(tmp_path, data={"name": "mnist", "validation": 10_000, "train": 1000})
    message = wrong(definition, folder=tmp_path)["data"]
    assert f"missing or corrupt in {tmp_path / 'MNIST' / 'raw'}: " in message
    assert "train-images-idx3-ubyte.gz" in message
    assert "the next run downloads them" in message
    assert not (tmp_path / "MNIST").exists()
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw / f"{name}-ubyte.gz").write_bytes(gzip.compress(b"something else")[:-9])
    assert ": train-images-idx3-ubyte.gz" in wrong(definition, folder=tmp_path)["data"]
    for archive in raw.iterdir():
        archive.write_bytes(gzip.compress(b"something else"))
    assert "train-images-idx3-ubyte.gz is not that of MNIST" in wrong(definition, folder=tmp_path)["data"]
    for archive in list(raw.iterdir()):
        archive.with_suffix("").write_bytes(b"damaged")
    assert "is corrupt" in wrong(definition, folder=tmp_path)["data"]


def test_own_images_that_are_gone_or_not_those_of_the_study_are_named_and_the_place_of_their_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    definition = load_definition(write_own_study(tmp_path, "", "trials = 1\nepochs = 1"))
    study = open_study(definition, open_storage(definition.study.storage))
    check_data(definition, study, load_study_data(definition), stores=True)
    said = {finding.check: finding.message for finding in run_checks(definition)}
    assert (said["data"].split(":")[0], said["network"]) == ("pets", "nets.py:build: a batch was trained")
    assert re.match(r"0 MB of pixels of images, and [\d,]+ MB free in .*/cache/hpsearch/images", said["cache"])
    (tmp_path / "cache.txt").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache.txt"))
    unwritable = wrong(definition)
    assert "cache.txt, the place for pixels of images, is not writable; set XDG_CACHE_HOME" in unwritable["cache"]
    assert "cannot keep pixels in" in unwritable["data"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    draw(tmp_path / "pets", "lion", range(20))
    found = wrong(definition)["data"]
    assert "searched on other images than these" in found
    assert "1 class added: lion" in found
    shutil.rmtree(tmp_path / "pets")
    assert wrong(definition)["data"].startswith(str(tmp_path / "pets"))
