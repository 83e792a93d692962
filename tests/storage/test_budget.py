"""The seconds of a trial are those in which it ran, whatever clocks, time zones and machines do meanwhile."""

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import optuna
import pytest
import sqlalchemy
from optuna.trial import FrozenTrial, TrialState

from hpsearch.errors import BudgetSpent
from hpsearch.monitor.status import estimate_seconds_left
from hpsearch.search.study import open_study
from hpsearch.storage import tables
from hpsearch.storage.budget import measure_trial
from hpsearch.storage.rdb import Storage, open_storage

from ..conftest import make_definition

pytestmark = pytest.mark.filterwarnings("ignore:Heartbeat of storage is supposed")


@pytest.fixture
def in_berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Europe/Berlin")
        time.tzset()
        yield
    time.tzset()


def to_local(text: str) -> datetime:
    """Return a time in UTC as Optuna has it: local, without a time zone."""
    return datetime.fromtimestamp(datetime.fromisoformat(f"{text}+00:00").timestamp())


def make_trial(start: str, end: str | None, **attributes: Any) -> FrozenTrial:
    trial = optuna.trial.create_trial(value=0.5, user_attrs=attributes)
    trial.datetime_start = to_local(start)
    trial.datetime_complete = to_local(end) if end else None
    trial.state = TrialState.COMPLETE if end else TrialState.RUNNING
    return trial


@pytest.mark.usefixtures("in_berlin")
@pytest.mark.parametrize(
    ("start", "end"),
    [
        ("2026-03-29T00:50:00", "2026-03-29T01:10:00"),  # summer time begins
        ("2026-10-25T00:50:00", "2026-10-25T01:10:00"),  # and ends: both are 2:50 and 2:10 o'clock
        ("2026-10-25T00:10:00", "2026-10-25T00:30:00"),
    ],
)
def test_summer_time_does_not_change_how_long_a_trial_takes(url: str, start: str, end: str) -> None:
    assert measure_trial(make_trial(start, end)) == 1200
    assert measure_trial(make_trial(start, None), datetime.fromisoformat(f"{end}Z")) == 1200
    left = estimate_seconds_left([make_trial(start, end)] * 3, [make_trial(end, None)], 1, to_local(end))
    assert left == pytest.approx((1200, 1200))
    storage = open_storage(url)
    storage.worker = "me-0"
    study = open_study(make_definition(), storage)
    trial = study.ask()
    times = {
        name: datetime.fromisoformat(text) for name, text in (("datetime_start", start), ("datetime_complete", end))
    }
    with storage.engine.begin() as connection:
        connection.execute(tables.TRIALS.update().values(times | {"state": TrialState.COMPLETE}))
    storage.release(trial._trial_id)
    assert measure_trial(open_study(make_definition(), open_storage(url)).trials[0]) == 1200
    assert storage.seconds_searched(study._study_id) == 1200


@pytest.mark.usefixtures("in_berlin")
@pytest.mark.parametrize(
    "now",
    [
        "2026-03-29T01:01:00",  # summer time began a minute ago
        "2026-10-25T01:01:00",  # it ended: 1:59 before is 2:59 o'clock, and now it is 2:01
        "2026-10-25T01:30:00",  # 2:30 o'clock, for the second time
    ],
)
def test_an_attempt_ends_when_it_fell_silent_also_if_summer_time_began_or_ended_since(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, now: str
) -> None:
    study = open_study(make_definition(), storage)
    trial_ids = [study.ask()._trial_id for _ in range(2)]
    at, silence = datetime.fromisoformat(f"{now}Z"), timedelta(minutes=2)
    monkeypatch.setattr(time, "time", at.timestamp)
    killed, failed = (
        storage.end_attempt(trial_id, 0, "killed", "gone", retries=retries, silence=silence)
        for trial_id, retries in zip(trial_ids, (1, 0), strict=True)
    )
    assert killed
    assert killed.user_attrs["interruptions"][0]["ended"] == (at - silence).isoformat()
    assert failed
    assert failed.datetime_complete
    assert failed.datetime_complete.astimezone(UTC) == at - silence


def test_pauses_and_jumps_of_the_clock_are_left_out() -> None:
    slept = ["2026-01-01T10:01:00+00:00", "2026-01-01T18:00:00+00:00"]
    set_back = ["2026-01-01T18:01:00+00:00", "2026-01-01T16:00:00+00:00"]
    end = "2026-01-01T16:01:00"
    assert measure_trial(make_trial("2026-01-01T10:00:00", end, pauses=[slept, set_back])) == 180
    earlier = {
        "started": "2025-12-31T10:00:00+00:00",
        "ended": f"{end}+00:00",
        "pauses": [["2025-12-31T10:00:40Z", f"{end}Z"]],
    }
    assert measure_trial(make_trial("2026-01-01T16:00:00", end, interruptions=[earlier])) == 100
    assert measure_trial(make_trial("2026-01-01T16:02:00", end)) == 0, "started on a machine whose clock was ahead"


@pytest.mark.parametrize("end", ["told", "interrupted", "killed", "running"])
def test_an_hour_in_which_the_machine_slept_is_not_searched(url: str, end: str) -> None:
    storage = open_storage(url)
    study = open_study(make_definition(budget={"minutes": 3, "trials": 9}), storage)
    storage.worker = "me-0"
    trial_id = study.ask()._trial_id
    buffered, before = storage._buffered[trial_id], datetime.now() - timedelta(minutes=62)
    buffered.trial.datetime_start, buffered.seen_at = before, before.timestamp() + 120
    with storage.engine.begin() as connection:
        connection.execute(tables.TRIALS.update().values(datetime_start=before.astimezone(UTC).replace(tzinfo=None)))
    match end:
        case "told":
            study.tell(0, 0.5)
        case "interrupted":
            storage.end_attempt(trial_id, 0, "interrupted", "Ctrl-C")
        case "killed":
            storage.beat(trial_id)
            open_storage(url).end_attempt(trial_id, 0, "killed", "gone", retries=1)
        case "running":
            storage.beat(trial_id)
    assert storage.seconds_searched(study._study_id) == pytest.approx(120, abs=30)
    if end == "interrupted":
        study.ask()  # there is a minute left, and the pauses are those of the earlier attempt
        assert "pauses" not in study.trials[0].user_attrs
        assert len(study.trials[0].user_attrs["interruptions"][0]["pauses"]) == 1


def test_a_worker_that_notes_the_time_regularly_has_no_pauses(storage: Storage) -> None:
    study = open_study(make_definition(), storage)
    storage.worker = "me-0"
    trial = study.ask()
    storage._buffered[trial._trial_id].seen_at -= 2  # seconds
    storage.flush(trial._trial_id)
    study.tell(trial, 0.5)
    assert "pauses" not in study.trials[0].user_attrs


@pytest.mark.parametrize("new_url", ["sqlite"], indirect=True)
def test_the_time_of_a_worker_that_died_with_a_clock_ahead_counts(storage: Storage) -> None:
    study = open_study(make_definition(budget={"minutes": 3, "trials": 9}), storage)
    storage.worker = "me-0"
    trial_id = study.ask()._trial_id
    ahead = {"datetime_start": datetime.now(UTC).replace(tzinfo=None) + timedelta(minutes=116)}
    with storage.engine.begin() as connection:
        heartbeat = tables.read_clock(connection).replace(tzinfo=None) + timedelta(hours=2)
        connection.execute(tables.TRIALS.update().values(ahead))
        connection.execute(tables.HEARTBEATS.update().values(heartbeat=heartbeat))
    for _ in range(2):
        assert storage.seconds_searched(study._study_id) == pytest.approx(240, abs=30)
        storage.reap(study._study_id, retries=2)  # gives it a heartbeat of now
    storage.end_attempt(trial_id, 0, "killed", "gone", retries=2)
    assert storage.seconds_searched(study._study_id) == pytest.approx(240, abs=30)
    with pytest.raises(BudgetSpent, match="time limit reached"):
        study.ask()


@pytest.mark.parametrize("new_url", ["postgresql"], indirect=True)
def test_the_clock_of_a_server_that_was_set_back_adds_no_time(storage: Storage) -> None:
    study = open_study(make_definition(), storage)
    storage.worker = "me-0"
    study.ask()
    with storage.engine.begin() as connection:
        heartbeat = tables.read_clock(connection).replace(tzinfo=None) + timedelta(hours=2)
        connection.execute(tables.HEARTBEATS.update().values(heartbeat=heartbeat))
    storage.reap(study._study_id, retries=2)  # gives it a heartbeat of now
    assert storage.seconds_searched(study._study_id) == pytest.approx(0, abs=60)


@pytest.mark.parametrize("new_url", ["postgresql"], indirect=True)
def test_the_age_of_a_heartbeat_does_not_depend_on_time_zones(
    new_url: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = new_url()
    study = open_study(make_definition(), open_storage(url))
    for zone in ("Asia/Tokyo", "America/New_York"):
        monkeypatch.setenv("PGTZ", zone)
        storage = open_storage(url)
        storage.worker = f"in-{zone}"
        optuna.load_study(study_name="small", storage=storage).ask()
    monkeypatch.delenv("PGTZ")
    with open_storage(url).engine.begin() as connection:
        ages = [age for *_, age in tables.read_running(connection, study._study_id)]
        told = connection.execute(sqlalchemy.text("SHOW TIME ZONE")).scalar()
    assert [age and abs(age) < timedelta(minutes=1) for age in ages] == [True, True]
    assert told == "UTC"
