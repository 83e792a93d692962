"""The storage on SQLite and PostgreSQL: exact budget, first heartbeat, one retry, no password shown."""

import pickle
import re
import sqlite3
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from alembic.runtime.migration import MigrationContext
from optuna.storages._rdb import models
from optuna.trial import TrialState
from sqlalchemy.exc import OperationalError

from hpsearch.errors import (
    BudgetInFlight,
    BudgetSpent,
    HpsearchError,
    Stopped,
    StorageError,
    StorageUnavailable,
    StudyNotFound,
    TooManyFailures,
    TrialLost,
    UsageError,
)
from hpsearch.monitor.status import Watch
from hpsearch.search.study import open_study, resume_study, stop_study
from hpsearch.storage import retry, tables
from hpsearch.storage.rdb import Storage, open_storage
from hpsearch.storage.tables import INDEXES, BufferedTrial

from ..conftest import fill, make_definition

pytestmark = pytest.mark.filterwarnings("ignore:Heartbeat of storage is supposed")


def start_study(storage: Storage, **budget: float) -> optuna.Study:
    study = open_study(make_definition(budget=budget), storage)
    storage.worker = "me-0"
    return study


def test_a_trial_starts_with_its_worker_and_a_heartbeat(storage: Storage) -> None:
    study = start_study(storage)
    study.enqueue_trial({"width": 9})
    for _ in range(2):  # the queued one is claimed, the other created
        trial = study.ask()
        assert trial.user_attrs == {"worker": "me-0"}
    with storage.engine.connect() as connection:
        beats = connection.execute(sqlalchemy.text("SELECT trial_id FROM trial_heartbeats")).all()
    assert len(beats) == 2


def test_the_budget_counts_complete_and_pruned_trials_and_those_that_run(storage: Storage) -> None:
    study = start_study(storage, trials=3)
    first, second, third = study.ask(), study.ask(), study.ask()
    study.tell(first, 0.5)
    with pytest.raises(BudgetInFlight):
        study.ask()
    storage.end_attempt(second._trial_id, 0, "exception", "broken")
    fourth = study.ask()
    study.tell(third, state=TrialState.PRUNED)
    study.tell(fourth, 0.6)
    with pytest.raises(BudgetSpent, match="all 3 trials are finished"):
        study.ask()
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL", "PRUNED", "COMPLETE"]


def test_a_queued_trial_needs_room_in_the_budget_too(storage: Storage) -> None:
    study = start_study(storage, trials=1)
    study.tell(study.ask(), 0.5)
    study.enqueue_trial({"width": 9})
    with pytest.raises(BudgetSpent):
        study.ask()
    assert study.trials[1].state == TrialState.WAITING


def test_trials_that_wait_use_up_no_budget(storage: Storage) -> None:
    study = start_study(storage, trials=2)
    for width in (9, 10, 11):
        study.enqueue_trial({"width": width})
    storage.end_attempt(study.ask()._trial_id, 0, "interrupted", "Ctrl-C")  # it waits again
    for _ in range(2):
        study.tell(study.ask(), 0.5)
    with pytest.raises(BudgetSpent, match="all 2 trials are finished"):
        study.ask()
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE", "WAITING"]


def add_retried(study: optuna.Study) -> None:
    """Add a trial that an older version failed and retried as another one."""
    failure = {"kind": "killed", "message": "gone", "retried": True}
    study.add_trial(optuna.trial.create_trial(state=TrialState.FAIL, user_attrs={"failure": failure}))


def test_a_failure_that_an_older_version_retried_does_not_count(storage: Storage) -> None:
    study = start_study(storage, failures=1)
    add_retried(study)
    storage.end_attempt(study.ask()._trial_id, 0, "exception", "broken")
    with pytest.raises(TooManyFailures, match="1 trials failed"):
        study.ask()


def test_another_study_in_the_database_uses_up_no_budget_and_is_not_touched(storage: Storage) -> None:
    other = open_study(make_definition(study={"name": "other"}), storage)
    fill(storage, other, 99)  # all limits below are reached there
    with storage.engine.begin() as connection:
        connection.execute(sqlalchemy.text("UPDATE trial_heartbeats SET heartbeat = '2026-01-01'"))
    stop_study(other)
    before = other.trials
    study = start_study(storage, trials=2, target=0.5, minutes=1, failures=1)
    add_retried(study)
    for _ in range(2):
        trial = study.ask()
        assert storage.beat(trial._trial_id)
        assert not storage.is_stopped
        assert storage.reap(study._study_id, retries=2) == []
        study.tell(trial, 0.4)
    with pytest.raises(BudgetSpent, match="all 2 trials are finished"):
        study.ask()
    assert [trial.number for trial in study.trials] == [0, 1, 2]
    assert storage.seconds_searched(study._study_id) < 30 < storage.seconds_searched(other._study_id)
    assert other.trials == before


def test_many_workers_at_once_start_exactly_the_budget(url: str) -> None:
    study = open_study(make_definition(budget={"trials": 20}), open_storage(url))
    for _ in range(10):
        study.enqueue_trial({})
    started = []

    def work(i: int) -> None:
        storage = open_storage(url)
        storage.worker = f"me-{i}"
        mine = optuna.load_study(study_name="small", storage=storage)
        while True:
            try:
                trial = mine.ask()
            except (BudgetSpent, BudgetInFlight):
                return
            started.append(trial.number)
            mine.tell(trial, 0.5)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    assert sorted(started) == list(range(20))
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 20


def test_the_target_ends_the_search(storage: Storage) -> None:
    study = start_study(storage, target=0.9)
    study.tell(study.ask(), 0.89)
    pruned = study.ask()
    pruned.report(0.95, 1)
    study.tell(pruned, state=TrialState.PRUNED)
    study.tell(study.ask(), 0.9)
    with pytest.raises(BudgetSpent, match=r"target reached: best value 0\.9000 >= "):
        study.ask()


def test_the_minutes_of_searching_end_the_search_and_pauses_do_not_count(storage: Storage) -> None:
    study = start_study(storage, minutes=3, trials=9)
    trials = models.TrialModel.__table__

    def run_trial(day: int, hour: int) -> None:
        trial = study.ask()
        study.tell(trial, 0.5)
        times = {"datetime_start": datetime(2026, 1, day, hour), "datetime_complete": datetime(2026, 1, day, hour, 1)}
        with storage.engine.begin() as connection:
            connection.execute(trials.update().where(trials.c.trial_id == trial._trial_id).values(times))

    for day, hour in ((1, 10), (1, 10), (1, 12), (2, 10)):  # two of them at the same time
        run_trial(day, hour)
    with pytest.raises(BudgetSpent, match=r"time limit reached \(3\.0 min\)"):
        study.ask()


@pytest.mark.parametrize(("kind", "retries"), [("interrupted", 0), ("killed", 1), ("exception", 0)])
def test_the_minutes_of_an_attempt_count_whoever_ended_it(storage: Storage, kind: str, retries: int) -> None:
    study = start_study(storage, minutes=3, trials=9)
    trial = study.ask()
    started = {"datetime_start": datetime.now(UTC).replace(tzinfo=None) - timedelta(minutes=4)}
    with storage.engine.begin() as connection:
        connection.execute(tables.TRIALS.update().values(started))
    storage.end_attempt(trial._trial_id, 0, kind, "gone", retries=retries)
    with pytest.raises(BudgetSpent, match=r"time limit reached \(4\.0 min\)"):
        study.ask()
    url = storage.engine.url.render_as_string(hide_password=False)
    assert Watch(make_definition(url)).poll().seconds == pytest.approx(240, abs=5)


def test_trials_that_have_ended_are_read_once_for_the_minutes_that_they_took(storage: Storage) -> None:
    study = start_study(storage, minutes=3, trials=99)
    n_read = list[int]()
    sqlalchemy.event.listen(
        storage.engine,
        "after_cursor_execute",
        lambda connection, cursor, statement, *_: n_read.extend([cursor.rowcount] * ("heartbeat" in statement)),
    )
    running = study.ask()
    for _ in range(3):
        study.tell(study.ask(), 0.5)
    study.tell(running, 0.5)
    reads = []
    for _ in range(3):
        n_read.clear()
        study.tell(study.ask(), 0.5)
        reads.append(max(n_read))
    if storage.engine.name == "postgresql":  # SQLite does not count them
        assert reads == [4, 1, 1]
    assert next(iter(storage._past.values())).time.until == 6


def test_the_queries_of_each_trial_use_an_index(storage: Storage) -> None:
    study = start_study(storage, target=0.9, patience=9, trials=99)
    statements: dict[str, Any] = {}
    sqlalchemy.event.listen(
        storage.engine,
        "before_cursor_execute",
        lambda connection, cursor, statement, parameters, *_: statements.update({statement: parameters}),
    )
    trial = study.ask()
    storage.beat(trial._trial_id)
    storage.reap(study._study_id, 2)
    study.tell(trial, 0.5)
    looked_at = [statement for statement in statements if statement.startswith("SELECT") and "trials" in statement]
    assert len(looked_at) >= 5
    explain = "EXPLAIN QUERY PLAN" if storage.engine.name == "sqlite" else "EXPLAIN"
    with storage.engine.connect() as connection:
        if storage.engine.name == "postgresql":
            connection.exec_driver_sql("SET enable_seqscan = off")  # it is quicker for so few rows
        for statement in looked_at:
            plan = connection.exec_driver_sql(f"{explain} {statement}", statements[statement]).all()
            text = "\n".join(str(row[-1]) for row in plan)
            assert not re.search(r"(?i)^SCAN |Seq Scan", text, re.MULTILINE), f"{statement}\n{text}"


def test_a_database_without_the_indexes_can_be_read_and_gets_them_at_the_next_run(url: str) -> None:
    storage = open_storage(url)
    study = start_study(storage)
    with storage.engine.begin() as connection:
        for index in INDEXES:
            index.drop(connection)
    storage.engine.dispose()
    worker = open_storage(url, must_exist=True)
    worker.worker = "me-0"
    optuna.load_study(study_name=study.study_name, storage=worker).ask()

    def names() -> set[str | None]:
        found = sqlalchemy.inspect(worker.engine)
        return {index["name"] for table in ("trials", "trial_values") for index in found.get_indexes(table)}

    ours = {index.name for index in INDEXES}
    assert not names() & ours
    open_storage(url).engine.dispose()
    assert ours <= names()
    worker.engine.dispose()


def test_a_trial_whose_worker_died_counts_only_until_its_last_heartbeat(storage: Storage) -> None:
    study = start_study(storage, minutes=3, trials=9)
    trial_id = study.ask()._trial_id
    trials, heartbeats = tables.TRIALS, tables.HEARTBEATS
    with storage.engine.begin() as connection:
        now = connection.execute(sqlalchemy.select(sqlalchemy.func.now())).scalar_one().replace(tzinfo=None)
        long_ago = {"datetime_start": datetime.now(UTC).replace(tzinfo=None) - timedelta(hours=60, minutes=2)}
        connection.execute(trials.update().where(trials.c.trial_id == trial_id).values(long_ago))
        connection.execute(heartbeats.update().values(heartbeat=now - timedelta(hours=60)))
    study.ask()
    with storage.engine.begin() as connection:
        connection.execute(heartbeats.update().values(heartbeat=now - timedelta(hours=59)))
    with pytest.raises(BudgetSpent, match=r"time limit reached \(6\d\.\d min\)"):
        study.ask()


def test_an_attempt_that_is_reaped_has_ended_at_its_last_heartbeat(storage: Storage) -> None:
    study = start_study(storage)
    study.ask()
    with storage.engine.begin() as connection:
        now = tables.read_clock(connection).replace(tzinfo=None)
        started = datetime.now(UTC).replace(tzinfo=None) - timedelta(minutes=62)
        connection.execute(tables.TRIALS.update().values(datetime_start=started))
        connection.execute(tables.HEARTBEATS.update().values(heartbeat=now - timedelta(minutes=60)))
    [reaped] = storage.reap(study._study_id, retries=1)
    [attempt] = reaped.user_attrs["interruptions"]
    took = datetime.fromisoformat(attempt["ended"]) - datetime.fromisoformat(attempt["started"])
    assert took.total_seconds() == pytest.approx(120, abs=10)


def test_a_stopped_study_starts_no_trial_and_its_workers_see_it_until_it_is_resumed(
    storage: Storage,
) -> None:
    study = start_study(storage, trials=9)
    trial = study.ask()
    stop_study(study)
    assert not storage.is_stopped
    assert storage.beat(trial._trial_id)
    assert storage.is_stopped
    study.tell(trial, 0.5)
    with pytest.raises(Stopped):
        study.ask()
    resume_study(study)
    study.ask()
    assert not storage.is_stopped


def test_a_storage_that_only_reads_cannot_be_written_to(url: str) -> None:
    study = start_study(open_storage(url))
    reading = open_storage(url, reads_only=True)
    assert reading.get_study_name_from_id(study._study_id) == study.study_name
    with pytest.raises(StorageError, match=r"readonly|read-only"):
        reading.set_study_user_attr(study._study_id, "budget", {})
    assert study.user_attrs["budget"]
    reading.engine.dispose()


def test_failures_end_the_search_and_trials_that_wait_for_another_attempt_are_none(storage: Storage) -> None:
    study = start_study(storage, failures=2, trials=9)
    trial = study.ask()
    storage.end_attempt(trial._trial_id, 0, "killed", "gone", retries=1)
    trial = study.ask()
    storage.end_attempt(trial._trial_id, 1, "exception", "broken")
    trial = study.ask()
    storage.end_attempt(trial._trial_id, 0, "exception", "broken again")
    with pytest.raises(TooManyFailures, match="2 trials failed, most recently: exception: broken again"):
        study.ask()


def test_a_killed_trial_waits_on_its_own_row_at_most_retries_times_and_then_fails(storage: Storage) -> None:
    study = start_study(storage, trials=9)
    trial = study.ask()
    width = trial.suggest_int("width", 8, 32)
    trial.report(0.5, 1)
    for attempt in range(3):
        ended = storage.end_attempt(trial._trial_id, attempt, "killed", "gone", retries=2)
        assert not storage.end_attempt(trial._trial_id, attempt, "killed", "gone", retries=2), "it has ended already"
        [stored] = study.trials
        assert ended == stored
        assert (stored.params, stored.intermediate_values) == ({"width": width}, {1: 0.5})
        if attempt < 2:
            assert (stored.state, stored.datetime_start) == (TrialState.WAITING, None)
            trial = study.ask()
            assert trial.suggest_int("width", 8, 32) == width
    assert stored.state == TrialState.FAIL
    assert stored.user_attrs["failure"] == {"kind": "killed", "message": "gone"}
    assert [each["epoch"] for each in stored.user_attrs["interruptions"]] == [1, 1]


def test_only_the_latest_attempt_may_write_to_a_trial(url: str) -> None:
    first, second = open_storage(url), open_storage(url)
    study = start_study(first)
    trial = study.ask()
    second.worker = "thief-1"
    second.end_attempt(trial._trial_id, 0, "killed", "gone", retries=1)
    for is_taken in (False, True):  # it waits; then it runs elsewhere
        if is_taken:
            assert second.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
        assert not first.beat(trial._trial_id)
        buffered = BufferedTrial(first.get_trial(trial._trial_id))
        buffered.attempt = 0
        first._buffered[trial._trial_id] = buffered
        trial.report(0.25, is_taken)
        for write in (
            partial(first._flush, buffered),
            lambda: first.set_trial_state_values(trial._trial_id, TrialState.COMPLETE, [0.25]),
        ):
            first._buffered[trial._trial_id] = buffered  # each alone has to notice
            with pytest.raises(TrialLost):
                write()
        with pytest.raises(TrialLost):
            first.set_trial_user_attr(trial._trial_id, "late", 1)
        assert first.end_attempt(trial._trial_id, 0, "interrupted", "late") is None
    second.set_trial_intermediate_value(trial._trial_id, 7, 0.75)
    second.set_trial_state_values(trial._trial_id, TrialState.COMPLETE, [0.75])
    stored = open_storage(url).get_trial(trial._trial_id)
    assert (stored.state, stored.value, stored.intermediate_values) == (TrialState.COMPLETE, 0.75, {7: 0.75})
    assert stored.user_attrs["worker"] == "thief-1"
    assert "late" not in stored.user_attrs


@pytest.mark.parametrize("new_url", ["postgresql"], indirect=True)
def test_a_claim_that_is_repeated_while_the_trial_is_reaped_never_shares_its_attempt(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = open_storage(url), open_storage(url)
    study = start_study(first)
    study.enqueue_trial({})
    trial_id = study.trials[0]._trial_id
    second.worker = "other-1"
    assert first.set_trial_state_values(trial_id, TrialState.RUNNING)  # its answer is lost, so it is called again
    read = tables._read_details
    reaper = threading.Thread(target=second.end_attempt, args=(trial_id, 0, "interrupted", ""))

    def read_after_the_reaper(*arguments: Any) -> None:
        if not reaper.ident:
            reaper.start()
            reaper.join(0.2)  # it has to wait for the claim
        read(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(tables, "_read_details", read_after_the_reaper)
        first.set_trial_state_values(trial_id, TrialState.RUNNING)
    reaper.join()
    second.set_trial_state_values(trial_id, TrialState.RUNNING)
    assert [storage.beat(trial_id) for storage in (first, second)].count(True) == 1


def test_whoever_claims_a_re_queued_trial_is_not_taken_for_its_earlier_worker(storage: Storage) -> None:
    study = start_study(storage)
    trial_id = study.ask()._trial_id
    with storage.engine.begin() as connection:
        connection.execute(tables.HEARTBEATS.update().values(heartbeat=datetime(2026, 1, 1)))
    storage.end_attempt(trial_id, 0, "interrupted", "Ctrl-C")
    storage.worker = None  # plain Optuna
    trial = study.ask()
    assert trial.number == 0
    assert "worker" not in trial.user_attrs
    assert storage.reap(study._study_id, retries=2) == []
    study.tell(trial, 0.5)
    assert study.trials[0].state == TrialState.COMPLETE


def test_re_queuing_a_trial_leaves_the_worker_and_the_heartbeat_of_another(storage: Storage) -> None:
    study = start_study(storage)
    gone, other = study.ask(), study.ask()
    storage.end_attempt(gone._trial_id, 0, "interrupted", "Ctrl-C")
    assert storage._read_trial(other._trial_id).user_attrs["worker"] == "me-0"
    with storage.engine.connect() as connection:
        [(trial_id, _, age)] = tables.read_running(connection, study._study_id)
    assert (trial_id, age is None) == (other._trial_id, False)


def test_a_trial_of_an_older_study_counts_the_kills_of_its_earlier_rows(storage: Storage) -> None:
    study = start_study(storage, trials=9)
    earlier = {"failed_trial": 0, "retry_history": [0, 1]}
    study.add_trial(optuna.trial.create_trial(state=TrialState.WAITING, system_attrs=earlier))
    storage.end_attempt(study.ask()._trial_id, 0, "killed", "gone", retries=2)
    assert study.trials[0].state == TrialState.FAIL


def test_a_claim_whose_acknowledgement_was_lost_is_this_workers(storage: Storage) -> None:
    study = start_study(storage)
    study.enqueue_trial({"width": 9})
    trial_id = study.trials[0]._trial_id
    assert storage.set_trial_state_values(trial_id, TrialState.RUNNING)
    assert storage.set_trial_state_values(trial_id, TrialState.RUNNING)
    storage.worker = "another-1"
    assert not storage.set_trial_state_values(trial_id, TrialState.RUNNING)


def test_an_interruption_uses_up_no_retry(storage: Storage) -> None:
    study = start_study(storage, trials=9)
    for attempt in range(4):
        storage.end_attempt(study.ask()._trial_id, attempt, "interrupted", "Ctrl-C", retries=0)
    storage.end_attempt(study.ask()._trial_id, 4, "killed", "gone", retries=1)
    assert [trial.state.name for trial in study.trials] == ["WAITING"]


def test_stale_trials_are_reaped_and_orphans_a_grace_period_later(storage: Storage) -> None:
    study = start_study(storage)
    stale = study.ask()
    live = study.ask()
    orphan = storage.create_new_trial(study._study_id)
    with storage.engine.begin() as connection:
        connection.execute(sqlalchemy.text("UPDATE trial_heartbeats SET heartbeat = '2026-01-01' WHERE trial_id = 1"))
        connection.execute(sqlalchemy.text(f"DELETE FROM trial_heartbeats WHERE trial_id = {orphan}"))
    assert [trial.number for trial in storage.reap(study._study_id, retries=2)] == [stale.number]
    assert storage.reap(study._study_id, retries=2) == []
    with storage.engine.begin() as connection:
        connection.execute(
            sqlalchemy.text(f"UPDATE trial_heartbeats SET heartbeat = '2026-01-01' WHERE trial_id = {orphan}")
        )
    assert [trial._trial_id for trial in storage.reap(study._study_id, retries=2)] == [orphan]
    assert storage.get_trial(live._trial_id).state == TrialState.RUNNING


def test_a_heartbeat_in_the_future_is_no_sign_of_life_and_a_worker_that_lives_replaces_it(storage: Storage) -> None:
    study = start_study(storage)
    dead, live, fresh = (study.ask()._trial_id for _ in range(3))
    with storage.engine.begin() as connection:
        now = tables.read_clock(connection).replace(tzinfo=None)
        is_ahead = tables.HEARTBEATS.c.trial_id != fresh
        connection.execute(tables.HEARTBEATS.update().where(is_ahead).values(heartbeat=now + timedelta(hours=2)))
    assert storage.find_stale(study._study_id) == [dead, live]
    assert storage.reap(study._study_id, retries=2) == []
    assert storage.find_stale(study._study_id) == [], "each has a grace period from now on"
    with storage.engine.begin() as connection:
        connection.execute(tables.HEARTBEATS.update().values(heartbeat=now - timedelta(hours=1)))
    for trial_id in (live, fresh):
        storage.beat(trial_id)
    assert [trial._trial_id for trial in storage.reap(study._study_id, retries=2)] == [dead]


def test_no_two_workers_get_the_same_stream(url: str) -> None:
    storages = [open_storage(url) for _ in range(4)]
    study = open_study(make_definition(), storages[0])
    with ThreadPoolExecutor(4) as pool:
        streams = list(pool.map(lambda storage: [storage.join(study._study_id) for _ in range(5)], storages))
    assert sorted(number for stream in streams for number in stream) == list(range(20))


def test_plain_optuna_works_on_the_storage(storage: Storage) -> None:
    study = optuna.create_study(storage=storage)
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=3)
    assert len(study.trials) == 3


def test_many_processes_may_create_the_same_database_at_once(url: str) -> None:
    with ThreadPoolExecutor(6) as pool:
        studies = list(pool.map(lambda _: open_study(make_definition(), open_storage(url)), range(6)))
    assert len({study._study_id for study in studies}) == 1


def test_sqlite_takes_the_lock_at_the_start_of_every_transaction(tmp_path: Path) -> None:
    storage = open_storage(f"sqlite:///{tmp_path / 'study.db'}")
    statements: list[str] = []
    with storage.engine.connect() as connection:
        raw = connection.connection.driver_connection
        assert isinstance(raw, sqlite3.Connection)
        raw.set_trace_callback(statements.append)
        connection.rollback()
        connection.execute(sqlalchemy.text("SELECT 1"))
        raw.set_trace_callback(None)
    assert statements[0] == "BEGIN IMMEDIATE"
    journal = "wal" if sqlite3.sqlite_version_info >= (3, 51, 3) else "truncate"
    with storage.engine.connect() as connection:
        assert connection.execute(sqlalchemy.text("PRAGMA journal_mode")).scalar() == journal
        assert connection.execute(sqlalchemy.text("PRAGMA busy_timeout")).scalar() == 15_000


@pytest.fixture
def failures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Each entry makes one transaction fail after it was committed."""
    left: list[int] = []
    original = sqlalchemy.Connection.close

    def close(connection: sqlalchemy.Connection) -> None:
        original(connection)
        if left:
            left.pop()
            raise OperationalError("SELECT", {}, Exception("database is locked"))

    monkeypatch.setattr(sqlalchemy.Connection, "close", close)
    return left


def test_calls_are_retried_until_patience_ends(
    url: str, failures: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    storage = open_storage(url, patience=60)
    study = open_study(make_definition(), storage)
    monkeypatch.setattr(retry, "_next_message", 0.0)  # another test may just have been told
    failures += [1, 2]
    assert storage.get_all_trials(study._study_id) == []
    assert failures == []
    assert "database is locked" in caplog.text


def test_giving_up_ends_the_patience_at_once(url: str, failures: list[int]) -> None:
    storage = open_storage(url, patience=600)
    study = open_study(make_definition(), storage)
    failures += range(1000)
    threading.Timer(0.3, storage.giving_up.set).start()
    with pytest.raises(StorageUnavailable, match="database is locked"):
        storage.get_all_trials(study._study_id)


@pytest.mark.parametrize(
    "name", ["get_all_trials", "get_trial", "record_heartbeat", "join", "end_attempt", "find_stale", "reap"]
)
def test_every_call_reports_an_outage(url: str, failures: list[int], name: str) -> None:
    storage = open_storage(url)
    open_study(make_definition(), storage).ask()
    failures += range(1000)
    details = {"end_attempt": (0, "killed", "gone"), "reap": (2,)}.get(name, ())
    with pytest.raises(StorageUnavailable, match="database is locked"):
        getattr(storage, name)(1, *details)


def test_a_permanent_error_is_not_retried(url: str) -> None:
    storage = open_storage(url, patience=600)
    study = open_study(make_definition(), storage)
    with storage.engine.begin() as connection:
        connection.execute(sqlalchemy.text("DROP TABLE trials" + " CASCADE" * (storage.engine.name == "postgresql")))
    with pytest.raises(StorageError, match=r'no such table: trials|relation "trials" does not exist'):
        storage.get_all_trials(study._study_id)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ("sqlite:///{folder}/no/such/study.db", UsageError, "does not exist; create it first"),
        ("sqlite://", UsageError, "cannot be shared between workers"),
        ("mysql://me:secret@host/db", UsageError, "use SQLite or PostgreSQL"),
        ("nonsense", UsageError, "invalid database URL"),
        ("postgresql://me:se/cret@host:secret/db", UsageError, "invalid database URL"),
        ("postgresql://me:pa@secret@host/db", UsageError, "encode an '@' in the password as %40"),
        ("postgresql://127.0.0.1:9/db?user=me&password=secret", StorageUnavailable, "cannot reach the database"),
        ("sqlite:///{folder}/text.db", StorageError, "cannot use the database .*: file is not a database"),
        ("postgresql://me:secret@127.0.0.1:9/db?connect_timeout=2", StorageUnavailable, "cannot reach the database"),
    ],
)
def test_a_storage_that_cannot_be_used_is_refused_without_its_password(
    bad: str, error: type[HpsearchError], message: str, tmp_path: Path
) -> None:
    (tmp_path / "text.db").write_text("this is no database, but long enough to look like one" * 20)
    with pytest.raises(error, match=message) as caught:
        open_storage(bad.format(folder=tmp_path))
    assert "secret" not in str(caught.value)


def test_a_database_that_must_exist_is_not_created(tmp_path: Path) -> None:
    with pytest.raises(StudyNotFound, match="hpsearch run"):
        open_storage(f"sqlite:///{tmp_path / 'study.db'}", must_exist=True)
    assert list(tmp_path.iterdir()) == []


def test_reading_a_foreign_database_does_not_change_it(tmp_path: Path) -> None:
    file = tmp_path / "music.db"
    with sqlite3.connect(file) as connection:
        connection.execute("CREATE TABLE albums (title TEXT)")
    before = file.read_bytes()
    with pytest.raises(StudyNotFound, match="contains no study"):
        open_storage(f"sqlite:///{file}", must_exist=True)
    assert file.read_bytes() == before


def test_reading_a_database_that_is_being_created_does_not_change_it(url: str) -> None:
    engine = sqlalchemy.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    models.BaseModel.metadata.create_all(engine)
    tables = sqlalchemy.inspect(engine).get_table_names()
    with pytest.raises(StudyNotFound, match="contains no study"):
        open_storage(url, reads_only=True)
    with pytest.raises(StudyNotFound, match="contains no study"):
        open_storage(url, must_exist=True)
    assert sqlalchemy.inspect(engine).get_table_names() == tables
    with engine.begin() as connection:
        assert connection.execute(sqlalchemy.select(models.VersionInfoModel)).first() is None
    engine.dispose()


def test_creating_a_database_is_repeated_where_another_program_creates_it_at_the_same_moment(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = MigrationContext.get_current_heads

    def read_before_others_write(self: MigrationContext) -> tuple[str, ...]:
        heads = read(self)
        if any(frame.name == "stamp" for frame in traceback.extract_stack()):
            monkeypatch.setattr(MigrationContext, "get_current_heads", read)
            optuna.storages.RDBStorage(url.replace("postgresql:", "postgresql+psycopg:")).engine.dispose()
        return heads

    monkeypatch.setattr(MigrationContext, "get_current_heads", read_before_others_write)
    storage = open_storage(url)
    assert MigrationContext.get_current_heads is read
    assert storage.get_all_studies() == []
    storage.engine.dispose()


def test_a_password_with_braces_and_other_signs_reaches_the_server(postgres_url: str) -> None:
    import psycopg
    from sqlalchemy.engine import make_url

    password = "a{b}%c/d@e"
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("DROP ROLE IF EXISTS braced")
        connection.execute(f"CREATE ROLE braced LOGIN SUPERUSER PASSWORD '{password}'")  # type: ignore[arg-type,unused-ignore]
    url = make_url(postgres_url).set(username="braced", password=password)
    storage = open_storage(url.render_as_string(hide_password=False))
    assert storage.get_all_studies() is not None
    assert storage.engine.url.password == password
    assert password not in repr(storage) + repr(storage.engine)


def test_a_storage_is_not_pickled_since_that_would_carry_the_password(url: str) -> None:
    with pytest.raises(TypeError, match="open a new one"):
        pickle.dumps(open_storage(url))


def test_a_database_with_other_tables_of_those_names_is_refused_and_left_alone(url: str) -> None:
    driver_url = url.replace("postgresql:", "postgresql+psycopg:")
    engine = sqlalchemy.create_engine(driver_url, poolclass=sqlalchemy.NullPool)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("CREATE TABLE trials (precious INTEGER)"))
    with pytest.raises(StorageError, match=r"is not an Optuna/hpsearch database \(it has the tables trials\)"):
        open_storage(url)
    with engine.connect() as connection:
        assert sqlalchemy.inspect(connection).get_table_names() == ["trials"]


def test_a_database_whose_creation_was_killed_is_completed(url: str) -> None:
    engine = sqlalchemy.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    models.BaseModel.metadata.tables["studies"].create(engine)
    engine.dispose()
    assert open_study(make_definition(), open_storage(url)).trials == []


def test_opening_retries_for_the_given_patience(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "_next_message", 0.0)
    with pytest.raises(StorageUnavailable, match="cannot reach the database"):
        open_storage("postgresql://me:secret@127.0.0.1:9/db")
    assert caplog.text == ""
    with pytest.raises(StorageUnavailable, match="cannot reach the database"):
        open_storage("postgresql://me:secret@127.0.0.1:9/db", patience=1)
    assert "database not responding" in caplog.text
    assert "secret" not in caplog.text
