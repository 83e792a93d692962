"""The supervisor: shares the cores out, ends with the study, and does not restart what can never work."""

import logging
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hpsearch.config.definition import StudyDefinition
from hpsearch.data.dataset import ImageData
from hpsearch.errors import DataError, Drained, TooManyFailures, WorkerError
from hpsearch.search.study import load_study, open_study
from hpsearch.search.trials import TrialEvent
from hpsearch.storage.rdb import open_storage
from hpsearch.training import devices
from hpsearch.training.devices import count_cores, default_workers
from hpsearch.workers import processes
from hpsearch.workers.executor import Handle
from hpsearch.workers.processes import Processes, Send
from hpsearch.workers.shutdown import Drain
from hpsearch.workers.worker import WorkerExit

from ..acceptance.commands import epochs_of
from ..conftest import make_definition


def define(folder: Path, url: str, **sections: Any) -> StudyDefinition:
    study = {"artifacts": str(folder / "artifacts")}
    definition = make_definition(url, study=study, **sections)
    open_study(definition, open_storage(definition.study.storage))
    return definition


def test_two_workers_share_a_study_and_tell_what_they_do(tmp_path: Path, url: str) -> None:
    events: list[TrialEvent] = []
    definition = define(tmp_path, url, budget={"epochs": epochs_of(1)})  # so that none of them has all trials
    assert "all 4 trials are finished" in processes.run_pool(definition, Drain(), 2, emit=events.append)
    finished = sorted(event.number for event in events if event.state in ("complete", "pruned"))
    assert finished == [0, 1, 2, 3]
    assert len({event.worker for event in events}) == 2


def test_one_worker_in_a_process_of_its_own_does_what_it_does_in_this_one(
    tmp_path: Path, new_url: Callable[[], str]
) -> None:
    trials = []
    for name in ("one", "two"):
        definition = define(tmp_path / name, new_url())
        processes.run_pool(definition, Drain(), 1)
        study = load_study(definition, open_storage(definition.study.storage))
        trials.append([(trial.params, trial.value) for trial in study.trials])
    assert trials[0] == trials[1]


def test_trials_that_all_fail_end_the_search_with_the_reason(
    tmp_path: Path, url: str, digits: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = replace(digits, train=replace(digits.train, labels=digits.train.labels + 90))
    monkeypatch.setattr(processes, "load_study_data", lambda definition, folder: broken)
    with pytest.raises(
        TooManyFailures, match="2 trials failed, most recently: exception: IndexError: index out of range"
    ):
        processes.run_pool(define(tmp_path, url, budget={"failures": 2}), Drain(), 1)
    assert "IndexError" in next((tmp_path / "artifacts" / "small").glob("*/trial-0.txt")).read_text()


def test_workers_read_the_data_themselves_where_shared_memory_is_too_small(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_: ImageData) -> ImageData:
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device")

    monkeypatch.setattr(ImageData, "share_memory", refuse)
    assert "all 4 trials are finished" in processes.run_pool(define(tmp_path, url), Drain(), 1)
    assert "each worker loads its own copy" in caplog.text


def test_an_error_outside_of_a_trial_ends_the_run_with_one_line(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "list_devices", lambda: ["no-such-device:99"])
    with pytest.raises(WorkerError, match=r"a worker failed: RuntimeError: .*no-such-device"):
        processes.run_pool(define(tmp_path, url), Drain(), 1)


def talk(drain: Drain, send: Send, *, end: Callable[[], Any]) -> str:
    send("begun")
    logging.getLogger("talker").warning("as its supervisor prints it")
    return str(end())


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (partial(str, "done"), WorkerExit("done")),
        (partial(os._exit, 3), WorkerExit("exited with status 3", is_dead=True)),
        (partial(signal.raise_signal, signal.SIGKILL), WorkerExit("was killed (SIGKILL)", is_dead=True)),
    ],
    ids=["returns", "exits", "killed"],
)
def test_what_a_process_says_and_how_it_ends_is_told(
    caplog: pytest.LogCaptureFixture, end: Callable[[], Any], expected: WorkerExit
) -> None:
    executor = Processes(lambda slot: (f"talker-{slot}", partial(talk, end=end)))
    handle = executor.start(0)
    told: list[tuple[Handle, Any]] = []
    while executor.running:
        told += executor.wait()
    assert told == [(handle, "begun"), (handle, expected)]
    assert handle.name == "talker-0"
    assert [record.message for record in caplog.records] == ["as its supervisor prints it"]


def wait_until_asked(drain: Drain, send: Send) -> str:
    send("begun")
    drain.event.wait()
    drain.check()
    return "not asked"


def test_a_process_is_asked_to_stop_and_one_that_does_not_is_killed() -> None:
    executor = Processes(lambda slot: ("sleeper", wait_until_asked))
    handles = [executor.start(slot) for slot in range(2)]
    begun: list[Handle] = []
    while len(begun) < 2:
        begun += [handle for handle, _ in executor.wait()]
    os.kill(handles[1].process.pid, signal.SIGSTOP)
    executor.stop()
    ended: list[tuple[Handle, WorkerExit]] = []
    while not ended:
        ended += executor.wait()
    [(handle, end)] = ended
    assert (handle, type(end.error)) == (handles[0], Drained)
    executor.kill()
    assert not handles[1].process.is_alive()


def test_missing_data_are_named_before_any_worker_starts(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    definition = define(tmp_path, url, data={"name": "kmnist", "validation": 10_000, "train": 1000})
    with pytest.raises(DataError, match="could not load KMNIST"):
        processes.run_pool(definition, Drain(), 1, folder=tmp_path / "data")


def test_the_default_is_a_worker_per_core_or_per_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "may_have_gpu", lambda: True)
    monkeypatch.setattr(devices, "list_devices", lambda: ["cpu"])
    assert default_workers() == count_cores()
    monkeypatch.setattr(devices, "list_devices", lambda: ["cuda:0", "cuda:1", "cuda:2"])
    assert default_workers() == 3
