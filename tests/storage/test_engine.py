"""Database specifics: backups, network file systems, full disks."""

import random
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import sqlalchemy
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError

from hpsearch.errors import StorageError, UsageError
from hpsearch.search.study import load_study, open_study
from hpsearch.storage.backup import backup
from hpsearch.storage.engine import check_location, create_engine, network_file_system
from hpsearch.storage.rdb import open_storage
from hpsearch.storage.retry import build_retrier, describe_cause, is_transient

from ..conftest import make_definition


def test_the_pauses_in_an_outage_draw_no_global_random_numbers_and_grow_to_the_longest() -> None:
    wait: Any = build_retrier(make_url("sqlite:///x.db"), 60.0, 10, threading.Event()).wait
    before = random.getstate()
    pauses = [wait(SimpleNamespace(attempt_number=1 + i // 50)) for i in range(1000)]
    assert random.getstate() == before
    assert max(pauses[:50]) <= 0.5
    assert 5 < max(pauses) <= 10


def test_a_backup_of_a_study_in_use_is_complete_and_can_be_resumed(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    study = open_study(make_definition(url), open_storage(url))
    is_enough = threading.Event()

    def write() -> None:
        while not is_enough.is_set():
            trial = study.ask()
            trial.report(0.5, 1)
            study.tell(trial, 0.5)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for i in range(5):
            n_before = len(study.trials)
            copy = tmp_path / f"copy-{i}.db"
            backup(make_url(url), copy)
            restored = load_study(make_definition(), open_storage(f"sqlite:///{copy}"))
            assert len(restored.trials) >= n_before
            assert [trial.number for trial in restored.trials] == list(range(len(restored.trials)))
    finally:
        is_enough.set()
        writer.join()
    restored.ask()
    assert not list(tmp_path.glob("*.tmp"))


def test_only_force_lets_a_backup_replace_a_database_and_nothing_lets_it_replace_its_own_or_another_file(
    tmp_path: Path,
) -> None:
    url = make_url(f"sqlite:///{tmp_path / 'study.db'}")
    open_study(make_definition(str(url)), open_storage(str(url)))
    open_storage(f"sqlite:///{tmp_path / 'there.db'}").engine.dispose()
    (tmp_path / "study.toml").write_text("precious")
    (tmp_path / "there.db.tmp").write_text("mine")
    (tmp_path / "link.db").symlink_to(tmp_path / "study.db")
    before = (tmp_path / "study.db").read_bytes()
    for name in ("study.db", "link.db", "study.toml"):
        with pytest.raises(UsageError, match=f"{name} already exists; choose another file name$"):
            backup(url, tmp_path / name, force=True)
    assert (tmp_path / "study.db").read_bytes() == before
    assert (tmp_path / "study.toml").read_text() == "precious"
    backup(url, tmp_path / "there.db", force=True)
    load_study(make_definition(), open_storage(f"sqlite:///{tmp_path / 'there.db'}"))
    assert (tmp_path / "there.db.tmp").read_text() == "mine"


def test_a_backup_does_not_go_beside_the_journal_of_another_database(tmp_path: Path) -> None:
    url = make_url(f"sqlite:///{tmp_path / 'study.db'}")
    open_storage(str(url)).engine.dispose()
    (tmp_path / "copy.db-journal").write_bytes(b"left by a crash")
    with pytest.raises(UsageError, match=r"copy\.db-journal belongs to another database"):
        backup(url, tmp_path / "copy.db")
    assert not (tmp_path / "copy.db").exists()


@pytest.mark.parametrize("suffix", ["-journal", "-wal", "-shm", ".lock"])
def test_a_backup_is_never_taken_for_a_log_or_lock_of_a_database(tmp_path: Path, suffix: str) -> None:
    url, file = make_url(f"sqlite:///{tmp_path / 'study.db'}"), tmp_path / f"study.db{suffix}"
    open_storage(str(url)).engine.dispose()
    file.write_text("in use")
    (tmp_path / "link").symlink_to(file)
    for target in (file, tmp_path / "link"):
        with pytest.raises(UsageError, match=r"would be taken for the .* file of study\.db; choose another file name"):
            backup(url, target, force=True)
    assert file.read_text() == "in use"


def test_a_backup_survives_a_power_loss(tmp_path: Path, survives_power_loss: Callable[[Path], bool]) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    open_study(make_definition(url), open_storage(url))
    backup(make_url(url), tmp_path / "copy.db")
    assert survives_power_loss(tmp_path / "copy.db")


@pytest.mark.parametrize("converts", [True, False])
def test_every_commit_waits_for_the_disk_even_where_sqlite_does_not_by_default(tmp_path: Path, converts: bool) -> None:
    engine = create_engine(make_url(f"sqlite:///{tmp_path / 'study.db'}"), converts=converts, reads_only=False)

    @sqlalchemy.event.listens_for(engine, "connect", insert=True)  # the default is set when SQLite is compiled
    def set_default(connection: sqlite3.Connection, _record: object) -> None:
        connection.execute("PRAGMA synchronous = NORMAL")

    with engine.connect() as connection:
        assert connection.execute(sqlalchemy.text("PRAGMA synchronous")).scalar() == 2  # FULL


def test_a_backup_overwrites_nothing_and_needs_a_folder(tmp_path: Path) -> None:
    url = make_url(f"sqlite:///{tmp_path / 'study.db'}")
    (tmp_path / "there").write_text("precious")
    with pytest.raises(UsageError, match="there already exists"):
        backup(url, tmp_path / "there")
    assert (tmp_path / "there").read_text() == "precious"
    with pytest.raises(UsageError, match="does not exist; create it first"):
        backup(url, tmp_path / "missing" / "copy.db")


def test_a_corrupt_database_is_not_backed_up(tmp_path: Path) -> None:
    file = tmp_path / "study.db"
    url = f"sqlite:///{file}"
    study = open_study(make_definition(url), open_storage(url))
    for _ in range(50):
        study.tell(study.ask(), 0.5)
    content = bytearray(file.read_bytes())
    for page in range(8, len(content) // 4096):
        content[page * 4096 : page * 4096 + 100] = bytes(100)
    file.write_bytes(content)
    with pytest.raises(StorageError, match=r"study\.db"):
        backup(make_url(url), tmp_path / "copy.db")
    assert [path.name for path in tmp_path.glob("copy*")] == []


def test_a_backup_in_which_the_integrity_check_finds_a_problem_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    open_study(make_definition(url), open_storage(url))
    monkeypatch.setattr("hpsearch.storage.backup.check_integrity", lambda connection: "row 3 missing from index")
    with pytest.raises(StorageError, match=r"study\.db is corrupt, no backup written: row 3 missing from index"):
        backup(make_url(url), tmp_path / "copy.db")
    assert [path.name for path in tmp_path.glob("copy*")] == []


def test_a_network_file_system_is_refused_for_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert network_file_system(tmp_path) is None
    # There is no file server to be had here.
    mounts = [
        ("/", "ext4"),
        (str(tmp_path), "nfs4"),
        (str(tmp_path / "disk"), "xfs"),
        (str(tmp_path / "s"), "fuse.sshfs"),
    ]
    parts = [SimpleNamespace(mountpoint=place, fstype=kind) for place, kind in mounts]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: parts)  # noqa: A006 - psutil's name
    with pytest.raises(UsageError, match=r"a network file system \(nfs4\), where SQLite can corrupt data"):
        check_location(make_url(f"sqlite:///{tmp_path}/study.db"))
    assert network_file_system(tmp_path / "s" / "x") == "fuse.sshfs"
    check_location(make_url(f"sqlite:///{tmp_path}/disk/study.db"))
    check_location(make_url("postgresql://host/db"))


def test_a_full_disk_is_retried_and_reported_with_its_free_space(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "full.db")
    connection.execute("CREATE TABLE t (x)")
    connection.execute("PRAGMA max_page_count = 2")
    with pytest.raises(sqlite3.OperationalError) as caught:
        connection.execute("INSERT INTO t VALUES (zeroblob(100000))")
    error = OperationalError("INSERT", {}, caught.value)
    assert is_transient(error)
    text = describe_cause(make_url(f"sqlite:///{tmp_path / 'full.db'}"), error)
    assert text.startswith("database or disk is full; ")
    assert text.endswith(f" MB free in {tmp_path}; free some disk space")
