"""One worker: what it tells, when it stops, and what it does about failures and lost trials."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
import torch
from optuna.trial import TrialState
from sqlalchemy import Connection
from sqlalchemy.exc import OperationalError

from hpsearch.data.dataset import ImageData
from hpsearch.errors import Drained, Interrupted, RepeatedFailures, Stopped, StorageUnavailable, TooManyFailures
from hpsearch.search.study import open_study, resume_study, stop_study
from hpsearch.search.trials import TrialEvent
from hpsearch.storage import tables
from hpsearch.storage.budget import measure_trial
from hpsearch.storage.checkpoints import artifact_folder, checkpoint_folder, find_checkpoints, read
from hpsearch.storage.rdb import Storage, open_storage
from hpsearch.storage.tables import BufferedTrial
from hpsearch.workers.shutdown import Drain
from hpsearch.workers.worker import Heartbeat, Worker, open_worker_storage, worker_name

from ..acceptance.commands import wait_for
from ..conftest import make_definition


class Bench:
    """A study on a database of each kind, a worker on it, and what the worker said."""

    def __init__(self, folder: Path, url: str, data: ImageData, **sections: Any) -> None:
        study = {"artifacts": str(folder / "artifacts")}
        self.definition = make_definition(url, study=study, **sections)
        self.storage = open_storage(self.definition.study.storage)
        self.study = open_study(self.definition, self.storage)
        self.drain = Drain()
        self.events: list[TrialEvent] = []
        self.states_when_told: list[TrialState] = []
        self.data = data

    def worker(self, **options: Any) -> Worker:
        storage = open_storage(self.definition.study.storage, heartbeat=1, grace=2)
        stream = storage.join(self.study._study_id)
        return Worker(self.definition, storage, stream, self.drain, data=self.data, emit=self._listen, **options)

    def _listen(self, event: TrialEvent) -> None:
        self.events.append(event)
        self.states_when_told.append(self.study.trials[event.number].state)

    def ends(self) -> list[str]:
        return [event.state for event in self.events if event.state != "running"]


@pytest.fixture
def bench(tmp_path: Path, url: str, digits: ImageData) -> Callable[..., Bench]:
    return lambda **sections: Bench(tmp_path, url, digits, **sections)


def test_a_worker_runs_the_budget_and_names_itself_in_each_trial(bench: Callable[..., Bench]) -> None:
    b = bench(pruner={"kind": "none"})
    reason = b.worker().run()
    assert "all 4 trials are finished" in reason
    assert [trial.state for trial in b.study.trials] == [TrialState.COMPLETE] * 4
    assert {trial.user_attrs["worker"] for trial in b.study.trials} == {worker_name(0)}


def test_a_result_is_announced_after_the_storage_has_it(bench: Callable[..., Bench]) -> None:
    b = bench(budget={"trials": 6, "epochs": 3})
    b.worker().run()
    told = [(e.state, s) for e, s in zip(b.events, b.states_when_told, strict=True) if e.state != "running"]
    assert len(told) == 6
    assert all(state.name.lower() == name for name, state in told)
    for event in b.events:
        if event.state == "complete":
            assert event.value == b.study.trials[event.number].value
            assert event.epoch == 3


def test_a_single_worker_repeats_a_study_of_the_same_seed(
    tmp_path: Path, new_url: Callable[[], str], digits: ImageData
) -> None:
    trials = []
    for name in ("one", "two"):
        b = Bench(tmp_path / name, new_url(), digits, budget={"trials": 3})
        b.worker().run()
        trials.append([(trial.params, trial.value) for trial in b.study.trials])
    assert trials[0] == trials[1]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("the network\nexploded"), "exception"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 TB"), "out-of-memory"),
        (MemoryError("no memory"), "out-of-memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out-of-memory"),
    ],
)
def test_a_failed_trial_says_why_and_the_worker_goes_on(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, kind: str
) -> None:
    b = bench(budget={"trials": 2})
    worker = b.worker()
    objective, calls = worker.objective, []

    def fail_once(trial: optuna.Trial, check: Callable[..., None]) -> float:
        calls.append(trial.number)
        if len(calls) == 1:
            raise error
        return objective(trial, check)

    monkeypatch.setattr(worker, "objective", fail_once)
    worker.run()
    first = b.study.trials[0]
    assert first.state == TrialState.FAIL
    assert first.user_attrs["failure"]["kind"] == kind
    assert str(error) in first.user_attrs["failure"]["message"]
    assert b.ends().count("failed") == 1
    tracebacks = list((tmp_path / "artifacts" / "small").glob("*/trial-0.txt"))
    assert [str(error) in file.read_text() for file in tracebacks] == [True]
    assert len([trial for trial in b.study.trials if trial.state.is_finished()]) == 3


def test_a_trial_that_fails_in_a_network_of_the_users_says_in_which_line(
    bench: Callable[..., Bench], tmp_path: Path
) -> None:
    source = "def build(image_shape, n_classes, *, depth: int, width: int):\n    return [][width]\n"
    (tmp_path / "nets.py").write_text(source)
    b = bench(network={"kind": f"{tmp_path}/nets.py:build"}, budget={"failures": 1})
    with pytest.raises(TooManyFailures):
        b.worker().run()
    message = b.study.trials[0].user_attrs["failure"]["message"]
    assert message.startswith("nets.py:2: IndexError: list index out of range; ")


def test_three_failures_in_a_row_end_a_worker_and_say_what_to_do(bench: Callable[..., Bench]) -> None:
    b = bench(budget={"trials": 9, "failures": 9})
    worker = b.worker()
    worker.objective._data = "no data"  # type: ignore[assignment]
    with pytest.raises(
        RepeatedFailures, match=r"^[^\n]*after 3 failed trials in a row, .* AttributeError.*; fix the cause"
    ):
        worker.run()
    assert len(b.study.trials) == 3


def test_failures_with_a_result_in_between_are_not_in_a_row(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    b = bench(budget={"trials": 9, "failures": 9})
    worker = b.worker(max_trials=6)

    def fail_each_second(trial: optuna.Trial, _check: object) -> float:
        if trial.number % 2:
            raise RuntimeError("odd")
        return 0.5

    monkeypatch.setattr(worker, "objective", fail_each_second)
    assert worker.run() == "--max-trials reached (6)"
    assert b.ends() == ["complete", "failed"] * 3


def test_too_many_failures_end_the_worker(bench: Callable[..., Bench]) -> None:
    b = bench(budget={"trials": 9, "failures": 2})
    worker = b.worker()
    worker.objective._data = "no data"  # type: ignore[assignment]
    with pytest.raises(TooManyFailures, match="2 trials failed, most recently: exception: AttributeError"):
        worker.run()
    assert len(b.study.trials) == 2


def test_a_trial_that_was_taken_away_is_dropped_and_not_overwritten(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    b = bench(budget={"trials": 1})
    thief = open_storage(b.definition.study.storage)

    check = Heartbeat.check

    def steal(heartbeat: Heartbeat, *, between_epochs: bool = False) -> None:
        if between_epochs and thief.end_attempt(heartbeat.trial_id, 0, "killed", "no heartbeat", retries=2):
            assert b.study.trials[0].state == TrialState.WAITING
        check(heartbeat, between_epochs=between_epochs)

    monkeypatch.setattr(Heartbeat, "check", steal)
    b.worker().run()
    assert b.ends() == ["dropped", "complete"]
    [trial] = b.study.trials
    assert trial.state == TrialState.COMPLETE
    assert [each["message"] for each in trial.user_attrs["interruptions"]] == ["no heartbeat"]


def test_an_error_in_a_trial_that_is_lost_is_no_failure_and_leaves_no_traceback(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    b = bench(budget={"trials": 1})
    worker = b.worker(max_trials=1)
    thief = open_storage(b.definition.study.storage)

    def fail(trial: optuna.Trial, _check: object) -> float:
        assert thief.end_attempt(trial._trial_id, 0, "killed", "gone", retries=1)
        raise RuntimeError("late")

    monkeypatch.setattr(worker, "objective", fail)
    worker.run()
    assert b.ends() == ["dropped"]
    assert worker._failures == []
    assert not [name for name in artifact_folder(b.definition).find() if name.endswith(".txt")]


def test_a_worker_beats_and_notices_that_its_trial_was_taken(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    b = bench(budget={"trials": 1}, recovery={"heartbeat": 1, "grace": 30})
    worker = b.worker(max_trials=1)
    thief = open_storage(b.definition.study.storage)

    def train_for_ever(trial: optuna.Trial, check: Callable[..., None]) -> float:
        assert thief.end_attempt(trial._trial_id, 0, "killed", "gone")
        while True:  # no report, so that only the heartbeat can notice
            check()
            time.sleep(0.01)

    monkeypatch.setattr(worker, "objective", train_for_ever)
    worker.run()
    assert b.ends() == ["dropped"]


def test_a_worker_beats_on_after_an_outage_and_reaps_others_during_its_training(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    b = bench(budget={"trials": 2}, recovery={"heartbeat": 1, "grace": 2})
    worker = b.worker(max_trials=1)
    beat, outages = worker.storage.beat, [StorageUnavailable("away")]

    def fail_once(trial_id: int) -> bool:
        if outages:
            raise outages.pop()
        return bool(beat(trial_id))

    def train_until_the_other_is_reaped(trial: optuna.Trial, _check: object) -> float:
        b.storage.worker = "dead-0"
        with pytest.warns(UserWarning, match="Heartbeat"):
            number = b.study.ask().number
        with b.storage.engine.begin() as connection:
            connection.execute(
                sqlalchemy.text("UPDATE trial_heartbeats SET heartbeat = '2026-01-01' WHERE trial_id = 2")
            )
        wait_for(lambda: b.study.trials[number].state == TrialState.WAITING, "the reaping", seconds=60)
        return 0.5

    monkeypatch.setattr(worker.storage, "beat", fail_once)
    monkeypatch.setattr(worker, "objective", train_until_the_other_is_reaped)
    worker.run()
    assert b.ends() == ["requeued", "complete"]
    assert outages == []


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, Drained), (signal.SIGINT, Interrupted)])
def test_a_signal_finishes_the_batch_and_hands_the_trial_back(
    bench: Callable[..., Bench], number: signal.Signals, error: type[Drained]
) -> None:
    b = bench(budget={"trials": 1, "epochs": 100_000})
    worker = b.worker()
    before = signal.getsignal(number)
    try:
        b.drain.listen(number)
        threading.Timer(0.5, lambda: signal.pthread_kill(threading.main_thread().ident or 0, number)).start()
        with pytest.raises(error) as caught:
            worker.run()
    finally:
        signal.signal(number, before)
    assert type(caught.value) is error
    [trial] = b.study.trials
    assert trial.state == TrialState.WAITING
    assert [each["kind"] for each in trial.user_attrs["interruptions"]] == ["interrupted"]
    assert trial.params


def test_a_worker_that_stops_hands_back_its_own_trial_only(bench: Callable[..., Bench]) -> None:
    b = bench()
    workers = [b.worker(), b.worker()]
    for worker in workers:
        worker._ask()
    workers[1]._requeue_own()
    assert [trial.state for trial in b.study.trials] == [TrialState.RUNNING, TrialState.WAITING]


def test_a_worker_that_stops_in_an_outage_retries_to_hand_its_trial_back(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    b = bench()
    worker = b.worker()
    worker._ask()
    lock, outages = tables.lock_trial, [OperationalError("SELECT", {}, Exception("database is locked"))]

    def fail_once(connection: Connection, trial_id: int) -> tuple[TrialState, int, bool]:
        if outages:
            raise outages.pop()
        return lock(connection, trial_id)

    monkeypatch.setattr(tables, "lock_trial", fail_once)
    worker.storage.giving_up.set()
    worker._requeue_own()
    assert [trial.state for trial in b.study.trials] == [TrialState.WAITING]
    assert outages == []


def test_workers_draw_other_values(bench: Callable[..., Bench]) -> None:
    b = bench()
    values = [worker._ask().suggest_float("lr", 1e-3, 1e-1, log=True) for worker in (b.worker(), b.worker())]
    assert values[0] != values[1]


def test_a_second_signal_stops_at_once_and_still_hands_the_trial_back(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    b = bench(budget={"trials": 1})

    def receive_two(_heartbeat: Heartbeat) -> None:
        b.drain._receive(signal.SIGINT, None)
        b.drain._receive(signal.SIGINT, None)  # at once: the same wish, as `timeout` sends it twice
        b.drain._since -= 1
        with pytest.raises(KeyboardInterrupt):
            b.drain._receive(signal.SIGINT, None)
        raise KeyboardInterrupt

    monkeypatch.setattr(Heartbeat, "check", receive_two)
    with pytest.raises(Interrupted):
        b.worker().run()
    b.drain._receive(signal.SIGINT, None)  # handing back is not interrupted
    assert [trial.state for trial in b.study.trials] == [TrialState.WAITING]


def test_a_stopped_study_ends_its_workers_after_a_whole_epoch_until_it_is_resumed(bench: Callable[..., Bench]) -> None:
    b = bench(budget={"trials": 1, "epochs": 100_000})

    def stop_after_epoch(n: int) -> None:
        def reached() -> bool:
            running = b.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            return any((trial.last_step or 0) > n for trial in running)

        wait_for(reached, f"the epoch after {n}")
        stop_study(b.study)

    threading.Thread(target=stop_after_epoch, args=[0]).start()
    with pytest.raises(Stopped, match="resume it with: hpsearch run"):
        b.worker().run()
    [waiting] = b.study.trials
    assert waiting.state == TrialState.WAITING
    assert [each["kind"] for each in waiting.user_attrs["interruptions"]] == ["interrupted"]
    folder = checkpoint_folder(b.definition, b.study)
    [name] = find_checkpoints(folder)
    state = read(folder, name)["state"]
    assert state["n_batches"] == 0
    assert [epoch for epoch, *_ in state["results"]] == list(waiting.intermediate_values)
    with pytest.raises(Stopped):
        b.worker().run()
    assert len(b.study.trials) == 1
    resume_study(b.study)
    threading.Thread(target=stop_after_epoch, args=[waiting.last_step]).start()
    with pytest.raises(Stopped):
        b.worker().run()
    [resumed] = b.study.trials
    assert len(resumed.user_attrs["interruptions"]) == 2
    assert (resumed.last_step or 0) > (waiting.last_step or 0) > 0


@pytest.mark.parametrize("error", [Drained, Interrupted])
def test_a_worker_that_is_stopped_in_an_outage_hands_its_trial_back_with_a_checkpoint(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, error: type[Drained]
) -> None:
    b = bench(budget={"trials": 1, "epochs": 9})
    worker = b.worker()
    report = worker.storage.set_trial_intermediate_value

    def stop_in_epoch_two(trial_id: int, step: int, value: float) -> None:
        if step == 2:
            b.drain.set(error())
            raise StorageUnavailable
        report(trial_id, step, value)

    monkeypatch.setattr(worker.storage, "set_trial_intermediate_value", stop_in_epoch_two)
    with pytest.raises(error) as caught:
        worker.run()
    assert type(caught.value) is error
    assert [trial.state for trial in b.study.trials] == [TrialState.WAITING]
    folder = checkpoint_folder(b.definition, b.study)
    [name] = find_checkpoints(folder)
    assert len(read(folder, name)["state"]["results"]) == 2


def test_a_worker_that_starts_after_an_outage_gives_the_others_a_grace_period(bench: Callable[..., Bench]) -> None:
    b = bench(recovery={"heartbeat": 1, "grace": 2})
    b.storage.worker = "alive-0"
    with pytest.warns(UserWarning, match="Heartbeat"):
        b.study.ask()
    with b.storage.engine.begin() as connection:
        connection.execute(sqlalchemy.text("UPDATE trial_heartbeats SET heartbeat = '2026-01-01'"))
    storage = open_worker_storage(b.definition, b.drain)
    assert storage.reap(b.study._study_id, 2) == []
    storage.trusts_heartbeats_from = 0.0
    assert len(storage.reap(b.study._study_id, 2)) == 1


def test_nobody_is_judged_right_after_a_silence_of_the_storage(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    b = bench()
    storage = open_storage(b.definition.study.storage, heartbeat=1, grace=4)
    storage.worker = "me-0"
    with pytest.warns(UserWarning, match="Heartbeat"):
        optuna.load_study(study_name="small", storage=storage).ask()
    with storage.engine.begin() as connection:
        connection.execute(sqlalchemy.text("UPDATE trial_heartbeats SET heartbeat = '2026-01-01'"))
    clocks = {"time": time.time(), "monotonic": time.monotonic()}
    for name in clocks:
        monkeypatch.setattr(f"hpsearch.storage.rdb.time.{name}", lambda name=name: clocks[name])
    jumps: dict[str, dict[str, float]] = {  # seconds that each clock moves
        "a laptop that slept": {"time": 3},
        "an outage": {"time": 3, "monotonic": 3},
        "an outage in which the clock was set back": {"time": -7200, "monotonic": 3},
    }
    for jump in jumps.values():
        clocks |= {name: clocks[name] + seconds for name, seconds in jump.items()}
        assert storage.reap(b.study._study_id, 2) == []
    for _ in range(4):
        clocks |= {"time": clocks["time"] + 1, "monotonic": clocks["monotonic"] + 1}
        storage.get_all_trials(b.study._study_id)
    assert [trial.number for trial in storage.reap(b.study._study_id, 2)] == [0]


@pytest.mark.parametrize("method", ["infer_relative_search_space", "after_trial"])
def test_a_worker_sends_heartbeats_while_its_sampler_takes_its_time(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    b = bench(budget={"trials": 1}, recovery={"heartbeat": 1, "grace": 2})
    worker, has_beaten = b.worker(), threading.Event()
    beat, original = worker.storage.beat, getattr(worker.study.sampler, method)

    def beat_and_tell(trial_id: int) -> bool:
        has_beaten.set()
        return bool(beat(trial_id))

    def wait_for_heartbeat(*arguments: Any) -> Any:
        has_beaten.clear()
        assert has_beaten.wait(20)
        return original(*arguments)

    monkeypatch.setattr(worker.storage, "beat", beat_and_tell)
    monkeypatch.setattr(worker.study.sampler, method, wait_for_heartbeat)
    worker.run()
    assert b.ends() == ["complete"]


def test_time_in_which_a_machine_slept_is_no_time_of_its_trial(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    b = bench(budget={"trials": 1}, recovery={"heartbeat": 600, "grace": 700})  # the time is noted more often
    worker = b.worker()
    begun = worker.storage._start

    def sleep_and_train(trial: optuna.Trial, check: Callable[..., None]) -> float:
        buffered = worker.storage._buffered[trial._trial_id]
        buffered.seen_at -= 3600  # as if nothing had run for an hour
        wait_for(lambda: "pauses" in buffered.trial.user_attrs, "the thread that notes the time", 20)
        return 0.5

    def start_an_hour_ago(*arguments: Any) -> Any:
        trial = begun(*arguments)
        worker.storage._buffered[trial._trial_id].trial.datetime_start = datetime.now() - timedelta(hours=1)
        return trial

    monkeypatch.setattr(worker.storage, "_start", start_an_hour_ago)
    monkeypatch.setattr(worker, "objective", sleep_and_train)
    worker.run()
    [trial] = b.study.trials
    assert trial.duration
    assert trial.duration > timedelta(hours=1)
    assert (measure_trial(trial) or 3600) < 60
    assert b.storage.seconds_searched(b.study._study_id) < 60


def test_a_result_whose_acknowledgement_was_lost_counts_once(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    b = bench(budget={"trials": 1})
    worker = b.worker()
    original = Storage._writing
    lost: list[int] = []

    @contextmanager
    def lose_the_answer(storage: Storage, buffered: BufferedTrial) -> Iterator[Connection]:
        with original(storage, buffered) as connection:
            yield connection
        if not lost and storage._read_trial(buffered.trial._trial_id).state == TrialState.COMPLETE:
            lost.append(buffered.trial._trial_id)
            raise OperationalError("COMMIT", {}, Exception("server closed the connection"))

    monkeypatch.setattr(Storage, "_writing", lose_the_answer)
    worker.storage.patience = 30
    worker.run()
    assert len(lost) == 1
    assert b.ends() == ["complete"]
    assert len(b.study.trials) == 1


def test_a_worker_ends_after_max_trials(bench: Callable[..., Bench]) -> None:
    b = bench()
    assert b.worker(max_trials=2).run() == "--max-trials reached (2)"
    assert len(b.study.trials) == 2


def test_a_worker_reaps_the_trials_of_the_dead_and_runs_them_again(bench: Callable[..., Bench]) -> None:
    b = bench(budget={"trials": 1}, recovery={"heartbeat": 1, "grace": 2})
    dead = open_storage(b.definition.study.storage)
    dead.worker = "dead-0"
    with pytest.warns(UserWarning, match="Heartbeat"):
        asked = optuna.load_study(study_name="small", storage=dead).ask()
    width = asked.suggest_int("width", 8, 32)
    dead.flush(asked._trial_id)  # as a worker does before the first batch
    b.worker().run()  # waits until the grace of 2 s is over
    [trial] = b.study.trials
    assert [each["message"] for each in trial.user_attrs["interruptions"]] == ["no heartbeat for 2 s"]
    assert (trial.state, trial.params["width"]) == (TrialState.COMPLETE, width)
    assert b.ends() == ["requeued", "complete"]


def test_a_storage_that_is_gone_ends_the_worker_without_failing_the_trial(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    b = bench()
    worker = b.worker()

    def unreachable(*_: object) -> None:
        raise StorageUnavailable

    monkeypatch.setattr(worker.storage, "set_trial_intermediate_value", unreachable)
    with pytest.raises(StorageUnavailable):
        worker.run()
    assert b.study.trials[0].state == TrialState.RUNNING
    assert "failure" not in b.study.trials[0].user_attrs


def test_a_trial_that_diverges_in_its_first_epoch_is_pruned_and_the_search_goes_on(
    bench: Callable[..., Bench], digits: ImageData
) -> None:
    b = bench(budget={"trials": 2})
    b.data = replace(digits, train=replace(digits.train, images=digits.train.images * float("inf")))
    b.worker().run()
    assert [trial.state for trial in b.study.trials] == [TrialState.PRUNED] * 2
    assert [event.state for event in b.events if event.state != "running"] == ["pruned"] * 2
    assert all(trial.value is None and "nan" in trial.user_attrs["diverged"] for trial in b.study.trials)
