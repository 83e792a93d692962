"""PostgreSQL for many workers: few connections, patience with a full server, and passwords that stay secret."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy
from psutil import process_iter
from sqlalchemy.engine import make_url
from sqlalchemy.pool import NullPool

from hpsearch.config.urls import parse_url
from hpsearch.errors import StorageError, StorageUnavailable
from hpsearch.search.study import open_study
from hpsearch.search.trials import TrialEvent
from hpsearch.storage import engine
from hpsearch.storage.engine import creation_lock
from hpsearch.storage.rdb import Storage, open_storage
from hpsearch.storage.retry import is_transient
from hpsearch.workers.processes import run_pool
from hpsearch.workers.shutdown import Drain

from ..acceptance.commands import wait_for
from ..conftest import make_definition
from .tls import tls_server, write_certificate

pytestmark = pytest.mark.filterwarnings("ignore:Heartbeat of storage is supposed")
SECRET = "pass{w}ord"


@pytest.fixture
def guarded(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[sqlalchemy.URL]:
    """The URL of a new database, without the password that its only user needs."""
    for name in ("PGPASSWORD", "PGPASSFILE", "PGSSLMODE"):
        monkeypatch.delenv(name, raising=False)
    name = f"guarded{time.monotonic_ns()}"
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        execute: Callable[..., Any] = connection.execute
        execute(f"CREATE ROLE {name} LOGIN PASSWORD '{SECRET}' CONNECTION LIMIT 20")
        execute(f"CREATE DATABASE {name} OWNER {name}")
        hba = Path(execute("SHOW hba_file").fetchone()[0])
        before = hba.read_text()
        hba.write_text(f"local {name} {name} scram-sha-256\n{before}")
        url = make_url(postgres_url).set(username=name, password=None, database=name)
        execute("SELECT pg_reload_conf()")
        while _connects(url):  # until it is reloaded
            pass
        yield url
        hba.write_text(before)
        execute("SELECT pg_reload_conf()")


def _connects(url: sqlalchemy.URL) -> bool:
    try:
        psycopg.connect(url.render_as_string(hide_password=False)).close()
    except psycopg.OperationalError:
        return False
    return True


def echo(url: sqlalchemy.URL) -> str:
    return url.render_as_string(hide_password=False)


def count_connections(storage: Storage) -> int:
    """The connections to the storage's database, but for the one that asks."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    url = storage.engine.url.set(drivername="postgresql")
    with psycopg.connect(echo(url), autocommit=True, application_name="test") as connection:
        return int(connection.execute(query).fetchall()[0][0])  # type: ignore[arg-type,unused-ignore]


@pytest.mark.parametrize("new_url", ["postgresql"], indirect=True)
def test_all_threads_of_a_worker_share_one_connection(url: str) -> None:
    storage = open_storage(url)
    study = open_study(make_definition(budget={"trials": 99}), storage)
    storage.worker = "me-0"
    trial = study.ask()

    def work(_: int) -> None:
        for _ in range(20):
            storage.beat(trial._trial_id)
            storage.reap(study._study_id, 2)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert count_connections(storage) == 1
    with storage.engine.connect() as connection:
        name = connection.execute(sqlalchemy.text("SELECT current_setting('application_name')")).scalar()
        assert name == "hpsearch"
        prepared = connection.execute(sqlalchemy.text("SELECT count(*) FROM pg_prepared_statements")).scalar()
        assert prepared == 0, "PgBouncer could not give each transaction another connection"
    storage.engine.dispose()


@pytest.mark.parametrize("new_url", ["postgresql"], indirect=True)
def test_a_read_only_storage_reads_in_several_threads_at_once(url: str) -> None:
    open_storage(url).engine.dispose()
    storage = open_storage(url, reads_only=True)
    with storage.engine.connect(), storage.engine.connect(), storage.engine.connect():
        wait_for(lambda: count_connections(storage) == 3, "one connection for each reader")
    wait_for(lambda: count_connections(storage) == 1, "the end of the others")
    storage.engine.dispose()


@pytest.mark.parametrize("new_url", ["postgresql"], indirect=True)
def test_a_thread_that_gets_no_connection_reports_an_outage(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_POOL_TIMEOUT", 0)
    storage = open_storage(url)
    with storage.engine.connect(), pytest.raises(StorageUnavailable, match="QueuePool limit"):
        storage.get_all_studies()
    storage.engine.dispose()


@pytest.mark.parametrize("new_url", ["postgresql"], indirect=True)
def test_connection_settings_of_the_user_are_kept(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGCONNECT_TIMEOUT", "7")
    mine = make_url(url).update_query_dict({"application_name": "mine", "keepalives_idle": "5"})
    storage = open_storage(echo(mine))
    with storage.engine.connect() as connection:
        parameters = connection.connection.driver_connection.info.get_parameters()  # type: ignore[union-attr]
    assert (parameters["application_name"], parameters["keepalives_idle"]) == ("mine", "5")
    assert (parameters["connect_timeout"], parameters["keepalives_count"]) == ("7", "3")
    storage.engine.dispose()


def test_a_server_that_has_no_connection_left_is_waited_for(guarded: sqlalchemy.URL) -> None:
    url = echo(guarded.set(password=SECRET))
    open_storage(url).engine.dispose()
    taken = [psycopg.connect(url) for _ in range(20)]
    with pytest.raises(StorageUnavailable, match="too many connections"):
        open_storage(url, must_exist=True)
    free = threading.Timer(0.3, taken[0].close)
    free.start()
    storage = open_storage(url, must_exist=True, patience=60)  # a single one will do
    assert storage.get_all_studies() == []
    storage.engine.dispose()
    for connection in taken:
        connection.close()


@pytest.mark.parametrize("new_url", ["postgresql"], indirect=True)
def test_one_process_at_a_time_creates_and_others_wait_without_a_transaction(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpsearch.storage.engine.LOCK_TIMEOUT", 0.3)
    parsed = parse_url(url)
    engine = sqlalchemy.create_engine(parsed, poolclass=NullPool)

    def wait() -> None:
        with pytest.raises(StorageUnavailable, match="timed out"), creation_lock(parsed):
            pass

    in_transaction = "SELECT count(*) FROM pg_stat_activity WHERE state = 'idle in transaction'"
    with creation_lock(parsed):
        waiting = threading.Thread(target=wait)
        waiting.start()
        seen = list[int]()
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            while waiting.is_alive():
                seen.append(connection.execute(sqlalchemy.text(in_transaction)).scalar_one())
        waiting.join()
        assert min(seen) == 1, "the one that has the lock, and no other"
    with creation_lock(parsed):
        pass


def test_a_password_comes_from_the_environment_or_a_password_file(
    guarded: sqlalchemy.URL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = f"*:*:*:{guarded.username}:{SECRET}\n"
    places: list[tuple[str, str]] = [
        ("PGPASSWORD", SECRET),
        ("PGPASSFILE", str(tmp_path / "mine")),
        ("HOME", str(tmp_path)),
    ]
    for file in (tmp_path / "mine", tmp_path / ".pgpass"):
        file.write_text(line)
        file.chmod(0o600)
    for name, value in places:
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            storage = open_storage(echo(guarded))
            assert storage.get_all_studies() == []
            storage.engine.dispose()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"password": None}, "no password supplied; set PGPASSWORD or add the password to ~/.pgpass"),
        ({"password": "wrong-secret"}, "password authentication failed .*; set PGPASSWORD"),
        ({"username": "nobody"}, 'role "nobody" does not exist; check the user name in the URL'),
        (
            {"username": "postgres", "database": "nothing"},
            'database "nothing" does not exist; create it with: createdb nothing',
        ),
    ],
)
def test_a_refusal_is_reported_at_once_with_advice(
    guarded: sqlalchemy.URL, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(StorageError, match=f"cannot use the database .*{message}") as caught:
        open_storage(echo(guarded.set(**change)), patience=600)
    assert not is_transient(caught.value)
    assert "secret" not in str(caught.value)


def test_a_password_that_is_changed_ends_a_worker_with_the_reason(guarded: sqlalchemy.URL, postgres_url: str) -> None:
    storage = open_storage(echo(guarded.set(password=SECRET)), patience=600)
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        execute: Callable[..., Any] = connection.execute
        execute(f"ALTER ROLE {guarded.username} PASSWORD 'another'")
        execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s", [guarded.username])
    with pytest.raises(StorageError, match=r"password authentication failed .*; set PGPASSWORD") as caught:
        storage.get_all_studies()
    assert not isinstance(caught.value, StorageUnavailable)


def test_a_server_is_known_by_its_certificate(
    guarded: sqlalchemy.URL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPASSWORD", SECRET)
    right, wrong = write_certificate(tmp_path, "right"), write_certificate(tmp_path, "wrong")
    socket = f"{guarded.query['host']}/.s.PGSQL.5432"
    with tls_server(right, socket) as port:
        url = guarded.set(host="127.0.0.1", port=port, query={"sslmode": "verify-full"})
        storage = open_storage(echo(url.update_query_dict({"sslrootcert": str(right)})))
        with storage.engine.connect() as connection:
            assert connection.connection.driver_connection.pgconn.ssl_in_use  # type: ignore[union-attr]
        storage.engine.dispose()
        with pytest.raises(StorageError, match=r"certificate verify failed.*; check sslmode and sslrootcert") as caught:
            open_storage(echo(url.update_query_dict({"sslrootcert": str(wrong)})), patience=600)
        assert not isinstance(caught.value, StorageUnavailable)
        monkeypatch.setenv("PGSSLMODE", "verify-ca")
        monkeypatch.setenv("PGSSLROOTCERT", str(wrong))
        with pytest.raises(StorageError, match="certificate verify failed"):
            open_storage(echo(url.set(query={})))
        monkeypatch.setenv("PGSSLROOTCERT", str(right))
        open_storage(echo(url.set(query={}))).engine.dispose()


def test_the_password_reaches_the_workers_of_a_pool_by_no_command_line(guarded: sqlalchemy.URL, tmp_path: Path) -> None:
    url = echo(guarded.set(password=SECRET))
    definition = make_definition(url, study={"artifacts": str(tmp_path)}, budget={"trials": 2})
    open_study(definition, open_storage(url))
    seen = list[bool]()

    def look(_: TrialEvent) -> None:
        seen.append(any(SECRET in " ".join(process.info["cmdline"] or ()) for process in process_iter(["cmdline"])))

    assert "all 2 trials are finished" in run_pool(definition, Drain(), 2, emit=look)
    assert seen
    assert not any(seen)
