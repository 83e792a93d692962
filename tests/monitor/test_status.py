"""Snapshots of a search are right, cheap to read, and take no lock."""

import heapq
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import sqlalchemy
from optuna.trial import FrozenTrial, TrialState

from hpsearch.config.definition import StudyDefinition
from hpsearch.monitor.status import Watch, estimate_seconds_left, summarize_search
from hpsearch.monitor.text import describe_patience
from hpsearch.search.study import open_study
from hpsearch.storage import tables
from hpsearch.storage.budget import seconds_searched
from hpsearch.storage.rdb import open_storage

from ..conftest import fill, make_definition


@pytest.fixture
def definition(url: str) -> StudyDefinition:
    return make_definition(url, budget={"trials": 60, "epochs": 10, "failures": 9})


@pytest.fixture
def study(definition: StudyDefinition) -> optuna.Study:
    storage = open_storage(definition.study.storage)
    study = open_study(definition, storage)
    fill(storage, study, 40)
    return study


@pytest.fixture
def watch(definition: StudyDefinition, study: optuna.Study) -> Iterator[Watch]:
    opened = Watch(definition)
    yield opened
    opened.storage.engine.dispose()


def test_a_scene_has_the_workers_and_what_became_of_the_last_trials(watch: Watch, study: optuna.Study) -> None:
    snapshot = watch.poll()
    assert snapshot.status["trials"] == {"complete": 21, "pruned": 10, "failed": 5, "running": 4, "waiting": 0}
    assert snapshot.n_finished == 31
    assert not snapshot.is_over
    assert [worker["trial"] for worker in snapshot.workers] == [36, 37, 38, 39]
    first = snapshot.workers[0]
    running = study.trials[36]
    assert first["worker"] == "machine-0"
    assert first["epoch"] == running.last_step == len(first["curve"]) == 7
    assert first["accuracy"] == running.intermediate_values[7] == first["curve"][-1]
    assert first["images_per_second"] == 40_036
    assert not first["is_lost"]
    assert [row["number"] for row in snapshot.finished[:3]] == [35, 34, 32]
    assert snapshot.finished[0]["note"].endswith(" (median of 12 trials) at epoch 9")
    assert [row["number"] for row in snapshot.failed] == [33, 26, 19, 12, 5]
    assert snapshot.failed[0]["note"] == "exception: ValueError: =trial 33"
    assert snapshot.describe_progress().startswith("31 of 60 trials done, best 0.9")
    assert snapshot.n_alive == 4
    assert snapshot.suggest_next("small") == "running workers will pick it up"


def test_what_ended_since_the_last_look_is_news_once_and_in_order(watch: Watch, study: optuna.Study) -> None:
    assert watch.poll().news == []
    study.tell(36, 0.75)
    study.tell(38, 0.5, state=TrialState.COMPLETE)
    news = watch.poll().news
    assert [(event.number, event.state, event.value, event.worker) for event in news] == [
        (36, "complete", 0.75, "machine-0"),
        (38, "complete", 0.5, "machine-2"),
    ]
    assert watch.poll().news == []


def test_only_what_is_new_is_read_again(watch: Watch, study: optuna.Study, monkeypatch: pytest.MonkeyPatch) -> None:
    watch.poll()
    read: list[int] = []
    original = tables._read_details

    def spy(connection: Any, trials: Any, ids: list[int]) -> None:
        read.extend(trials[i].number for i in ids)
        original(connection, trials, ids)

    monkeypatch.setattr(tables, "_read_details", spy)
    watch.poll()
    assert set(read) == {36, 37, 38, 39}


def test_a_worker_without_a_heartbeat_is_shown_as_lost_and_not_counted_on(
    watch: Watch, study: optuna.Study, definition: StudyDefinition
) -> None:
    storage = open_storage(definition.study.storage)
    with storage.engine.begin() as connection:
        old = datetime(2020, 1, 1)
        connection.execute(sqlalchemy.update(tables.HEARTBEATS).values(heartbeat=old))
    snapshot = watch.poll()
    assert all(worker["is_lost"] for worker in snapshot.workers)
    assert snapshot.seconds_left is None
    assert snapshot.suggest_next("small") == "no workers running; start some with: hpsearch run small"


def test_a_trial_that_was_queued_again_is_no_failure_to_look_at(watch: Watch, definition: StudyDefinition) -> None:
    storage = open_storage(definition.study.storage)
    watch.poll()
    for number, kind in ((36, "interrupted"), (37, "killed"), (38, "exception")):
        assert storage.end_attempt(watch.study.trials[number]._trial_id, 0, kind, "gone", retries=1)
    snapshot = watch.poll()
    assert [row["number"] for row in snapshot.failed[:2]] == [38, 33]
    assert (snapshot.n_failed, snapshot.status["trials"]["waiting"]) == (6, 2)
    assert {(event.number, event.state, event.message) for event in snapshot.news} == {
        (36, "requeued", "interrupted: gone"),
        (37, "requeued", "killed: gone"),
        (38, "failed", "exception: gone"),
    }


def test_watching_needs_no_lock_that_a_worker_holds(url: str) -> None:
    definition = make_definition(url)
    storage = open_storage(definition.study.storage)
    fill(storage, open_study(definition, storage), 5)
    watch = Watch(definition)
    with storage.engine.begin() as connection:  # on SQLite no other writer could begin now
        connection.execute(sqlalchemy.update(tables.TRIALS).values(number=tables.TRIALS.c.number))
        assert watch.poll().n_finished == 1


def test_a_watch_writes_nothing(tmp_path: Path) -> None:
    definition = make_definition(f"sqlite:///{tmp_path / 'study.db'}")
    storage = open_storage(definition.study.storage)
    fill(storage, open_study(definition, storage), 5)
    storage.engine.dispose()
    before = (tmp_path / "study.db").read_bytes()
    Watch(definition).poll()
    assert (tmp_path / "study.db").read_bytes() == before


def test_the_budget_is_over_by_trials_minutes_target_or_failures(url: str) -> None:
    usual = {"trials": 99, "epochs": 10, "failures": 6}
    for limits in ({"trials": 20}, {"minutes": 0.1}, {"target": 0.5}, {"failures": 5}):
        definition = make_definition(url, budget=usual | limits)
        storage = open_storage(definition.study.storage)
        study = open_study(definition, storage)
        fill(storage, study, 40)
        assert Watch(definition).poll().is_over, limits
    open_study(make_definition(definition.study.storage, budget=usual), storage)
    assert not Watch(make_definition(definition.study.storage, budget=usual)).poll().is_over


def test_patience_is_over_only_once_no_trial_runs_and_makes_an_early_end_possible(
    watch: Watch, study: optuna.Study
) -> None:
    plenty = {"trials": 600, "epochs": 10}
    study.set_user_attr("budget", plenty)
    without = watch.poll().seconds_left
    study.set_user_attr("budget", plenty | {"patience": 5})
    snapshot = watch.poll()
    assert snapshot.status["since_gain"] > 5
    assert not snapshot.is_over
    assert snapshot.seconds_left
    assert without
    assert snapshot.seconds_left[0] < without[0]
    assert snapshot.seconds_left[1] == pytest.approx(without[1], rel=0.1)
    n = snapshot.status["since_gain"]
    assert describe_patience(snapshot.status) == f"{n} trials since the last gain beyond chance (limit 5)"
    ended = {**snapshot.status, "trials": snapshot.status["trials"] | {"running": 0}}
    assert replace(snapshot, status=ended, workers=[]).is_over


def test_seconds_searched_leave_pauses_out_and_count_parallel_trials_once() -> None:
    start = datetime(2026, 1, 1)
    moments = [start + timedelta(seconds=s) for s in range(100)]
    spans = [
        (moments[90], moments[95]),
        (moments[0], moments[10]),
        (moments[5], moments[20]),
        (moments[6], moments[8]),
        (moments[50], moments[60]),
    ]
    assert seconds_searched(spans) == 20 + 10 + 5


def lasting(seconds: float, start: datetime, *, is_running: bool = False) -> FrozenTrial:
    trial = optuna.trial.create_trial(value=0.5)
    trial.state = TrialState.RUNNING if is_running else TrialState.COMPLETE
    trial.datetime_start = start
    trial.datetime_complete = None if is_running else start + timedelta(seconds=seconds)
    return trial


@pytest.mark.parametrize("n_workers", [1, 2, 4, 8])
def test_the_time_left_is_mostly_within_the_range_that_is_told(n_workers: int) -> None:
    generator = np.random.default_rng(n_workers)
    n_trials, n_right, n_told, now = 60, 0, 0, datetime(2026, 1, 1)
    for _ in range(200):
        # A third of the trials is pruned early; the others last up to twice as long as each other.
        durations = np.where(generator.random(n_trials) < 0.33, 2.0, generator.uniform(10, 20, n_trials))
        free, ends = [0.0] * n_workers, np.zeros(n_trials)
        for i, duration in enumerate(durations):
            ends[i] = heapq.heappop(free) + duration
            heapq.heappush(free, ends[i])
        moment = float(generator.uniform(0.1, 0.9)) * ends.max()
        spans = list(zip(ends - durations, ends, durations, strict=True))
        finished = [lasting(d, now + timedelta(seconds=b)) for b, e, d in spans if e <= moment][-40:]
        running = [lasting(0, now + timedelta(seconds=b), is_running=True) for b, e, _ in spans if b <= moment < e]
        n_left = sum(e > moment for _, e, _ in spans)
        told = estimate_seconds_left(finished, running, n_left, now + timedelta(seconds=moment))
        if told:
            n_told += 1
            n_right += told[0] <= ends.max() - moment <= told[1]
    assert n_told > 120
    assert n_right / n_told > 0.85


def test_nothing_is_told_of_the_time_left_without_workers_or_trials_to_judge_by() -> None:
    now = datetime(2026, 1, 1)
    done, running = [lasting(5, now)] * 3, [lasting(0, now, is_running=True)]
    assert estimate_seconds_left(done, running, 10, now) == pytest.approx((50, 50))
    assert estimate_seconds_left(done, [], 10, now) is None
    assert estimate_seconds_left(done[:2], running, 10, now) is None
    assert estimate_seconds_left(done, running, 0, now) is None


def test_the_end_says_what_was_found_how_sure_and_what_to_type(watch: Watch, study: optuna.Study) -> None:
    study.set_user_attr("budget", {"trials": 31, "epochs": 10})
    found, sure, following = summarize_search(watch, "small")
    best = study.best_trial
    assert found.startswith(f"best:  trial {best.number}: {best.value:.4f} on 200 validation images (95% CI ")
    low = float(found.split("CI ")[1].split(" to ")[0])
    alike = sum(t.value >= low for t in study.trials if t.state == TrialState.COMPLETE and t.value) - 1
    assert sure.startswith(f"tied:  {alike} of the other 20 completed trials lie in that interval")
    assert ("it may be luck" in sure) == (alike > 0)
    assert following == "next:  hpsearch confirm small  |  hpsearch export small"


@pytest.mark.parametrize(
    ("other", "tied"),
    [
        (0.95, "the other completed trial lies in that interval: it may be luck"),
        (0.5, "the other completed trial does not lie in that interval"),
    ],
)
def test_a_single_other_trial_is_not_counted(tmp_path: Path, other: float, tied: str) -> None:
    definition = make_definition(f"sqlite:///{tmp_path / 'small.db'}", budget={"trials": 2})
    study = open_study(definition, open_storage(definition.study.storage))
    for value in (0.96, other):
        study.tell(study.ask(), value)
    assert summarize_search(Watch(definition), "small")[1] == f"tied:  {tied}"


def test_an_end_with_budget_left_says_how_to_go_on(watch: Watch, definition: StudyDefinition) -> None:
    others = "next: other workers are still running; watch them with: hpsearch status small --watch"
    assert summarize_search(watch, "small")[1] == others
    with open_storage(definition.study.storage).engine.begin() as connection:
        connection.execute(sqlalchemy.update(tables.HEARTBEATS).values(heartbeat=datetime(2020, 1, 1)))
    reached, following = summarize_search(watch, "small")
    assert reached.startswith("31 of 60 trials done, best 0.9")
    assert following == "next: no workers running; start some with: hpsearch run small"


def test_a_limit_other_than_trials_is_not_lifted_by_more_trials(watch: Watch, study: optuna.Study) -> None:
    study.set_user_attr("budget", {"trials": 60, "epochs": 10, "target": 0.5})
    snapshot = replace(watch.poll(), workers=[])
    assert (
        snapshot.suggest_next("small")
        == "a limit (minutes, target, patience or failures) has been reached; raise it in the study file to continue"
    )
    study.set_user_attr("budget", {"trials": 31, "epochs": 10})
    assert "hpsearch add small" in replace(watch.poll(), workers=[]).suggest_next("small")


def test_an_end_without_a_complete_trial_says_so(watch: Watch) -> None:
    definition = make_definition(watch.definition.study.storage, study={"name": "empty"}, budget={"trials": 1})
    storage = open_storage(definition.study.storage)
    empty = open_study(definition, storage)
    empty.tell(empty.ask(), state=TrialState.PRUNED)
    result = "result: no trial completed; see: hpsearch trials empty"
    assert summarize_search(Watch(definition), "empty") == [result]
