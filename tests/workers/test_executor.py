"""The loop that starts, watches, replaces and stops workers, with workers in memory that do what a test says."""

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import IntDistribution
from optuna.trial import TrialState, create_trial

from hpsearch.errors import (
    Drained,
    HpsearchError,
    Interrupted,
    RepeatedFailures,
    Stopped,
    StorageUnavailable,
    TooManyFailures,
    WorkerError,
)
from hpsearch.search.study import load_study, open_study
from hpsearch.search.trials import TrialEvent
from hpsearch.storage.rdb import open_storage
from hpsearch.workers.executor import Handle, Supervisor
from hpsearch.workers.shutdown import Drain
from hpsearch.workers.worker import WorkerExit

from ..conftest import make_definition

KILLED = WorkerExit("was killed (SIGKILL)", is_dead=True)
SPENT = WorkerExit("all trials are finished")
Script = Callable[["Fake", Handle], Iterator[TrialEvent | WorkerExit | None]]


class Fake:
    """An executor in memory. At each `wait`, every worker takes one step of its script: a message, or None.

    `scripts` are those of the workers in the order of their starts; the last one is for all that follow.
    """

    def __init__(self, file: Path, *scripts: Script, n_workers: int = 1) -> None:
        self.definition = make_definition(f"sqlite:///{file}")
        self.storage = open_storage(self.definition.study.storage)
        self.study = load_study(self.definition, self.storage)
        self.drain, self.scripts = Drain(), list(scripts)
        self.running: dict[Handle, Any] = {}
        self.started: list[Handle] = []
        self.n_stops = 0
        self.killed: list[Handle] = []
        self.events: list[TrialEvent] = []
        self.supervisor = Supervisor(
            self, n_workers, self.definition, self.study, self.storage, self.drain, self.events.append
        )

    def start(self, slot: int) -> Handle:
        handle = Handle(slot, f"worker-{len(self.started)}")
        script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
        self.started.append(handle)
        self.running[handle] = script(self, handle)
        return handle

    def wait(self) -> Iterator[tuple[Handle, Any]]:
        for handle, steps in list(self.running.items()):
            message = next(steps)
            if isinstance(message, WorkerExit):
                del self.running[handle]
            if message:
                yield handle, message

    def stop(self) -> None:
        self.n_stops += 1

    def kill(self) -> None:
        self.killed += self.running
        self.running.clear()

    def begin(self, handle: Handle) -> TrialEvent:
        """Start a trial in the study."""
        self.study.add_trial(
            create_trial(
                state=TrialState.RUNNING,
                user_attrs={"worker": handle.name},
                params={"width": 8},
                distributions={"width": IntDistribution(8, 32)},
            )
        )
        return TrialEvent(handle.name, len(self.study.trials) - 1, "running")

    def reasons(self) -> list[str]:
        return [event.message for event in self.events if event.state == "requeued"]

    def n_waiting(self) -> int:
        assert not self.study.get_trials(states=(TrialState.RUNNING,))
        return len(self.study.get_trials(states=(TrialState.WAITING,)))


@pytest.fixture(scope="module")
def new_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("new") / "study.db"
    definition = make_definition(f"sqlite:///{file}")
    storage = open_storage(definition.study.storage)
    open_study(definition, storage)
    storage.engine.dispose()
    return file


@pytest.fixture
def file(new_study: Path, tmp_path: Path) -> Path:
    """The database of a new study; to copy it is much faster than to create one."""
    return Path(shutil.copy(new_study, tmp_path))


def ends(*messages: WorkerExit) -> Script:
    """A worker that ends before it has a trial."""
    return lambda fake, handle: iter(messages)


def trains(end: WorkerExit) -> Script:
    """A worker that begins a trial, then ends."""

    def steps(fake: Fake, handle: Handle) -> Iterator[TrialEvent | WorkerExit]:
        yield fake.begin(handle)
        yield end

    return steps


def works_until_asked(fake: Fake, handle: Handle) -> Iterator[WorkerExit | None]:
    while not fake.n_stops:
        yield None
    yield WorkerExit("stopped", Drained())


def signals(error: Drained, then: Script) -> Script:
    """What `then` does, after a signal to the supervisor."""

    def steps(fake: Fake, handle: Handle) -> Iterator[Any]:
        fake.drain.set(error)
        yield from then(fake, handle)

    return steps


def failing(error: HpsearchError) -> WorkerExit:
    return WorkerExit(str(error), error)


def test_the_search_is_over_when_one_worker_has_seen_the_budget_spent_and_no_trial_runs(file: Path) -> None:
    fake = Fake(file, ends(SPENT), works_until_asked, works_until_asked, n_workers=3)
    assert fake.supervisor.run() == "all trials are finished"
    assert [handle.slot for handle in fake.started] == [0, 1, 2]
    assert (fake.n_stops, fake.killed) == (1, [])


def test_a_trial_that_runs_when_the_budget_is_spent_is_waited_for(file: Path) -> None:
    def finishes(fake: Fake, handle: Handle) -> Iterator[Any]:
        event = fake.begin(handle)
        yield event
        for _ in range(3):
            assert not fake.n_stops
            yield None
        trial = fake.study.trials[event.number]
        fake.storage.set_trial_state_values(trial._trial_id, TrialState.COMPLETE, [0.9])
        yield TrialEvent(handle.name, event.number, "complete", value=0.9)
        yield SPENT

    fake = Fake(file, finishes, ends(SPENT), n_workers=2)
    assert fake.supervisor.run() == "all trials are finished"
    assert [event.state for event in fake.events] == ["running", "complete"]


def test_a_worker_that_is_killed_is_replaced_and_its_trial_re_queued_at_once(file: Path) -> None:
    def looks(fake: Fake, handle: Handle) -> Iterator[Any]:
        assert handle.slot == 1
        assert fake.n_waiting() == 1
        yield SPENT

    fake = Fake(file, works_until_asked, trains(KILLED), looks, n_workers=2)
    assert fake.supervisor.run() == "all trials are finished"
    assert fake.reasons() == ["killed: worker worker-1 was killed (SIGKILL)"]


def test_the_trial_of_a_worker_elsewhere_goes_on_when_one_of_these_is_killed(file: Path) -> None:
    fake = Fake(file, trains(KILLED), ends(SPENT))
    fake.begin(Handle(0, "elsewhere-0"))
    fake.supervisor.run()
    assert [trial.state.name for trial in fake.study.trials] == ["RUNNING", "WAITING"]


@pytest.mark.parametrize("n_workers", [1, 2])
def test_workers_that_die_before_a_trial_are_not_replaced_for_ever(file: Path, n_workers: int) -> None:
    fake = Fake(file, ends(WorkerExit("exited with status 3", is_dead=True)), n_workers=n_workers)
    n = 3 * n_workers
    with pytest.raises(WorkerError, match=f"^{n} workers in a row died .* trial; the last exited with status 3$"):
        fake.supervisor.run()
    assert len(fake.started) == n_workers + n - 1


def test_a_worker_that_begins_a_trial_ends_the_row_of_those_that_died(file: Path) -> None:
    early, late = [ends(KILLED)] * 2, trains(KILLED)
    fake = Fake(file, *early, late, *early, late, ends(SPENT))
    assert fake.supervisor.run() == "all trials are finished"
    assert len(fake.started) == 7


def test_a_worker_that_is_drained_alone_is_replaced(file: Path) -> None:
    fake = Fake(file, *[ends(failing(Drained()))] * 9, ends(SPENT))
    assert fake.supervisor.run() == "all trials are finished"
    assert len(fake.started) == 10


@pytest.mark.parametrize("error", [Drained(), Interrupted()])
def test_a_signal_asks_each_worker_once_to_stop_and_replaces_none(file: Path, error: Drained) -> None:
    fake = Fake(file, signals(error, works_until_asked), works_until_asked, n_workers=2)
    with pytest.raises(type(error)) as caught:
        fake.supervisor.run()
    assert caught.value is error
    assert (len(fake.started), fake.n_stops, fake.killed) == (2, 1, [])


def test_workers_that_are_killed_while_they_stop_leave_no_trial_running(file: Path) -> None:
    dies_early = signals(Interrupted(), ends(KILLED))
    fake = Fake(file, trains(KILLED), *[dies_early] * 3, n_workers=4)
    with pytest.raises(Interrupted):
        fake.supervisor.run()
    assert len(fake.started) == 4
    assert fake.n_waiting() == 1
    assert fake.reasons() == ["interrupted: worker stopped"]


def test_a_second_signal_kills_the_workers_and_re_queues_their_trials(file: Path) -> None:
    def second_signal(fake: Fake, handle: Handle) -> Iterator[Any]:
        yield fake.begin(handle)
        yield None
        raise KeyboardInterrupt

    fake = Fake(file, second_signal, signals(Interrupted(), works_until_asked), n_workers=2)
    with pytest.raises(Interrupted):
        fake.supervisor.run()
    assert fake.killed == fake.started[:1]
    assert fake.n_waiting() == 1
    assert fake.drain.ignores_signals


def test_a_listener_that_fails_ends_the_search_and_leaves_nothing_running(file: Path) -> None:
    fake = Fake(file, trains(SPENT), works_until_asked, n_workers=2)

    def is_gone(_: TrialEvent) -> None:
        raise BrokenPipeError

    fake.supervisor.emit = is_gone
    with pytest.raises(BrokenPipeError):
        fake.supervisor.run()
    assert fake.killed == fake.started
    assert fake.n_waiting() == 1


@pytest.mark.parametrize("error", [RepeatedFailures("three"), StorageUnavailable("away"), WorkerError("a bug")])
def test_an_error_of_one_worker_is_logged_and_the_others_continue(
    file: Path, error: HpsearchError, caplog: pytest.LogCaptureFixture
) -> None:
    fake = Fake(file, trains(failing(error)), ends(failing(error)), works_until_asked, n_workers=3)
    fake.scripts[2] = lambda fake, handle: iter([None, None, SPENT])
    assert fake.supervisor.run() == "all trials are finished"
    assert [record.message for record in caplog.records] == [f"{error}; the other workers continue"]
    assert len(fake.started) == 3
    assert fake.n_waiting() == 1


def test_the_first_error_is_raised_when_all_workers_have_ended(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = TooManyFailures("2 trials failed"), StorageUnavailable("away")
    fake = Fake(file, ends(failing(first)), ends(failing(second)), n_workers=2)
    with pytest.raises(TooManyFailures, match="2 trials failed"):
        fake.supervisor.run()
    assert not caplog.records


def test_a_signal_decides_the_exit_status_even_if_a_worker_had_failed_before(file: Path) -> None:
    fake = Fake(file, signals(Interrupted(), ends(failing(RepeatedFailures()))))
    with pytest.raises(Interrupted):
        fake.supervisor.run()


def test_a_study_that_is_stopped_ends_its_workers_for_good(file: Path) -> None:
    fake = Fake(file, ends(failing(Stopped())), n_workers=2)
    with pytest.raises(Stopped):
        fake.supervisor.run()
    assert (len(fake.started), fake.n_stops) == (2, 0)


@pytest.mark.parametrize("is_drained", [True, False])
def test_trials_that_cannot_be_re_queued_since_the_storage_is_away_are_left_to_the_grace_period(
    file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, is_drained: bool
) -> None:
    def loses_the_storage(fake: Fake, handle: Handle) -> Iterator[Any]:
        yield fake.begin(handle)

        def unreachable(*_: object, **__: object) -> None:
            if is_drained:
                fake.drain.set(Interrupted())
            raise StorageUnavailable("no route to host")

        monkeypatch.setattr(fake.storage, "end_attempt", unreachable)
        yield KILLED

    fake = Fake(file, loses_the_storage, ends(SPENT), n_workers=1)
    if is_drained:
        with pytest.raises(Interrupted):
            fake.supervisor.run()
    else:
        assert fake.supervisor.run() == "all trials are finished"
    assert len(fake.started) == 2 - is_drained
    assert "could not re-queue trials now (no route to host)" in caplog.text
    assert caplog.records[0].levelno == logging.WARNING
    assert [trial.state for trial in fake.study.trials] == [TrialState.RUNNING]


def test_a_signal_while_a_replacement_waits_for_the_storage_stops_the_others_gently(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake(file, ends(KILLED), works_until_asked, n_workers=2)
    start = fake.start

    def waits_for_the_storage(slot: int) -> Handle:
        if len(fake.started) < 2:
            return start(slot)
        fake.drain.set(Interrupted())
        raise StorageUnavailable("no route to host")

    monkeypatch.setattr(fake, "start", waits_for_the_storage)
    with pytest.raises(Interrupted):
        fake.supervisor.run()
    assert (fake.n_stops, fake.killed) == (1, [])


def test_the_trial_of_a_worker_that_ended_with_an_error_is_handed_back_at_once(file: Path) -> None:
    def looks(fake: Fake, _: Handle) -> Iterator[WorkerExit | None]:
        while len(fake.running) == 2:
            yield None
        assert fake.n_waiting() == 1
        yield SPENT

    fake = Fake(file, trains(failing(StorageUnavailable("gone"))), looks, n_workers=2)
    assert fake.supervisor.run() == "all trials are finished"
    assert fake.reasons() == ["interrupted: worker stopped"]
