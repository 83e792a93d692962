"""Trials are read as Optuna reads them; a worker's reports are buffered, and flushed in time and once."""

import math
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import optuna
import pytest
import sqlalchemy
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from hpsearch.errors import TrialLost
from hpsearch.search.study import open_study
from hpsearch.storage import tables
from hpsearch.storage.rdb import Storage, open_storage

from ..conftest import make_definition

pytestmark = pytest.mark.filterwarnings("ignore:Heartbeat of storage")


def open_worker(url: str) -> tuple[optuna.Study, Storage]:
    storage = open_storage(url)
    study = open_study(make_definition(url, budget={"trials": 50}), storage)
    storage.worker = "host-0"
    return study, storage


def seen_by_others(url: str, trial: optuna.Trial) -> FrozenTrial:
    return optuna.load_study(study_name="small", storage=open_storage(url)).trials[trial.number]


def text_of(trial: FrozenTrial) -> str:
    """All of a trial; the order of attributes has no meaning, and NaN is not equal to itself."""
    return repr({k: sorted(v.items()) if isinstance(v, dict) else v for k, v in vars(trial).items()})


def test_every_trial_is_read_as_optuna_reads_it(storage: Storage) -> None:
    study = optuna.create_study(storage=storage)
    distributions = {
        "width": IntDistribution(8, 32, log=True),
        "lr": FloatDistribution(1e-3, 1e-1, log=True),
        "optimizer": CategoricalDistribution(["adam", "sgd"]),
    }
    params = {"width": 9, "lr": 0.01, "optimizer": "sgd"}
    reports = {1: 0.25, 2: math.inf, 3: -math.inf, 7: 0.5}
    for state, value in ((TrialState.COMPLETE, 0.5), (TrialState.COMPLETE, math.inf), (TrialState.PRUNED, None)):
        attrs = {"worker": "host-0", "attempts": [1, 2]}
        study.add_trial(
            create_trial(
                state=state,
                value=value,
                params=params,
                distributions=distributions,
                user_attrs=attrs,
                system_attrs={"completed_rung_0": 0.25},
                intermediate_values=reports,
            )
        )
    study.enqueue_trial({"width": 8})
    running = study.ask()
    running.report(math.nan, 1)
    study.tell(study.ask(), state=TrialState.FAIL)
    study.enqueue_trial({"width": 9})
    quick = storage._get_trials(study._study_id, None, set(), -1)
    reference = RDBStorage._get_trials(storage, study._study_id, None, set(), -1)
    assert list(map(text_of, quick)) == list(map(text_of, reference))
    assert len(quick) == 6
    some = storage._get_trials(study._study_id, (TrialState.PRUNED, TrialState.FAIL), {1, 2, 3}, 4)
    assert [trial.number for trial in some] == [2, 4]
    assert text_of(storage.get_trial(quick[0]._trial_id)) == text_of(reference[0])
    with pytest.raises(KeyError):
        storage.get_trial(10_000)


@pytest.mark.parametrize("zone", ["America/St_Johns", "Asia/Tokyo"])
def test_times_are_stored_in_utc_and_read_in_the_time_zone_of_the_reader(
    url: str, zone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, storage = open_worker(url)
    with monkeypatch.context() as patch:
        patch.setenv("TZ", zone)
        time.tzset()
        trial = study.ask()
        study.tell(trial, 0.5)
        told = storage._read_trial(trial._trial_id)
        read = [moment.astimezone(UTC) for moment in (told.datetime_start, told.datetime_complete)]
    time.tzset()
    with storage.engine.connect() as connection:
        stored = connection.execute(sqlalchemy.select(tables.TRIALS)).one()
    assert read == [moment.replace(tzinfo=UTC) for moment in (stored.datetime_start, stored.datetime_complete)]
    assert abs(read[0] - datetime.now(UTC)) < timedelta(minutes=5)


def test_a_trial_of_many_reports_is_written_in_three_transactions(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "WRITE_INTERVAL", 1000.0)
    study, storage = open_worker(url)
    commits: list[object] = []
    writing: set[int] = set()

    @sqlalchemy.event.listens_for(storage.engine, "before_cursor_execute")
    def note_writing(*arguments: Any) -> None:
        if arguments[2].startswith(("INSERT", "UPDATE", "WITH")):
            writing.add(len(commits))

    sqlalchemy.event.listen(storage.engine, "commit", commits.append)
    trial = study.ask()
    assert len(writing) == 1
    width = trial.suggest_int("width", 8, 32)
    storage.flush(trial._trial_id)
    assert len(writing) == 2
    assert seen_by_others(url, trial).params == {"width": width}
    for step in range(1, 11):
        trial.report(step / 10, step)
        trial.set_user_attr("note", step)
        storage.flush(trial._trial_id)
    assert len(writing) == 2
    study.tell(trial, 1.0)
    assert len(writing) == 3
    told = seen_by_others(url, trial)
    assert text_of(told) == text_of(storage.get_trial(trial._trial_id))
    assert (told.state, told.value, told.user_attrs) == (TrialState.COMPLETE, 1.0, {"worker": "host-0", "note": 10})
    assert told.intermediate_values == {step: step / 10 for step in range(1, 11)}
    assert told.datetime_complete is not None


def test_a_report_is_seen_by_others_at_the_first_call_after_the_interval(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    study, storage = open_worker(url)
    trial = study.ask()
    trial.report(0.5, 1)
    assert trial.should_prune() is False
    storage.flush(trial._trial_id)
    assert seen_by_others(url, trial).intermediate_values == {}
    assert study.trials[0].intermediate_values == {1: 0.5}, "its own worker sees it"
    now += tables.WRITE_INTERVAL
    storage.flush(trial._trial_id)
    assert seen_by_others(url, trial).intermediate_values == {1: 0.5}
    now += tables.WRITE_INTERVAL
    trial.report(0.6, 2)  # nothing was written for so long, so it does not wait
    storage.flush(trial._trial_id)
    assert seen_by_others(url, trial).intermediate_values == {1: 0.5, 2: 0.6}


def test_a_worker_sees_the_reports_of_others_half_a_second_later(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    (study, _), (others, _) = open_worker(url), open_worker(url)
    study.ask()
    trial = others.ask()
    for step in (1, 2):
        now += 0.5
        trial.report(step / 10, step)
        assert study.trials[trial.number].last_step == step


@pytest.mark.parametrize("late", ["store", "tell"])
def test_nothing_is_written_to_a_trial_that_another_worker_failed(url: str, late: str) -> None:
    study, storage = open_worker(url)
    trial = study.ask()
    trial.suggest_int("width", 8, 32)
    assert open_storage(url).end_attempt(trial._trial_id, 0, "killed", "gone")
    write: dict[str, Callable[[], object]] = {
        "store": lambda: storage.flush(trial._trial_id),
        "tell": lambda: study.tell(trial, 1.0),
    }
    with pytest.raises(TrialLost):
        write[late]()
    assert not storage.beat(trial._trial_id)
    taken = seen_by_others(url, trial)
    assert (taken.state, taken.value, taken.params) == (TrialState.FAIL, None, {})
    assert text_of(study.trials[0]) == text_of(taken), "its worker knows"


def test_a_re_queued_trial_keeps_its_buffered_reports(url: str) -> None:
    study, storage = open_worker(url)
    trial = study.ask()
    width = trial.suggest_int("width", 8, 32)
    trial.report(0.5, 1)
    storage.end_attempt(trial._trial_id, 0, "interrupted", "Ctrl-C")
    [waiting] = study.trials
    assert (waiting.params, waiting.intermediate_values, waiting.state) == (
        {"width": width},
        {1: 0.5},
        TrialState.WAITING,
    )


def test_a_claimed_trial_draws_the_values_that_it_was_queued_with(url: str) -> None:
    study, storage = open_worker(url)
    study.enqueue_trial({"width": 11})
    trial = study.ask()
    assert trial.suggest_int("width", 8, 32) == 11
    study.tell(trial, 0.5)
    told = seen_by_others(url, trial)
    assert (told.params, told.value, told.user_attrs) == ({"width": 11}, 0.5, {"worker": "host-0"})
    assert storage.get_trial(trial._trial_id).state == TrialState.COMPLETE


def test_what_was_read_of_a_running_trial_does_not_change(url: str) -> None:
    study, storage = open_worker(url)
    trial = study.ask()
    read = storage.get_trial(trial._trial_id)
    trial.report(0.5, 1)
    assert (read.intermediate_values, storage.get_trial(trial._trial_id).intermediate_values) == ({}, {1: 0.5})


def test_a_trial_that_is_pruned_before_its_first_report_has_no_value(url: str) -> None:
    study, _ = open_worker(url)
    trial = study.ask()
    told = study.tell(trial, state=TrialState.PRUNED)
    assert (told.value, told.values) == (None, None)
    assert text_of(told) == text_of(seen_by_others(url, trial))


def test_a_result_that_could_not_be_written_leaves_no_value_with_the_trial(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, storage = open_worker(url)
    trial = study.ask()
    with monkeypatch.context() as broken:
        broken.setattr(tables, "write_values", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("gone")))
        with pytest.raises(ConnectionError):
            study.tell(trial, 0.7)
    storage.end_attempt(trial._trial_id, 0, "interrupted", "Ctrl-C")
    waiting = seen_by_others(url, trial)
    assert (waiting.state, waiting.values) == (TrialState.WAITING, None)


def test_no_trial_starts_in_a_study_that_was_deleted(url: str) -> None:
    study, _ = open_worker(url)
    optuna.delete_study(study_name="small", storage=open_storage(url))
    with pytest.raises(KeyError):
        study.ask()
