"""The workers of a study on one machine: how they count each other, and who waits for a core."""

import logging
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest

from hpsearch.bundle.replay import replay
from hpsearch.data.dataset import ImageData
from hpsearch.errors import BudgetSpent, Drained, Stopped
from hpsearch.search.study import open_study, stop_study
from hpsearch.storage.rdb import open_storage, storage_of
from hpsearch.workers import cores
from hpsearch.workers.cores import Neighbors, wait_for_core
from hpsearch.workers.shutdown import Drain
from hpsearch.workers.worker import Worker, open_worker_storage

from ..conftest import make_definition


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[optuna.Study]:
    """A study on a machine of two cores without a GPU; its workers are counted in a folder of the test's own."""
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(cores, "count_cores", lambda: 2)
    monkeypatch.setattr("hpsearch.training.devices.count_cores", lambda: 2)
    monkeypatch.setattr(cores, "may_have_gpu", lambda: False)
    monkeypatch.setattr(cores, "_POLL", 0.01)
    storage = open_storage(f"sqlite:///{tmp_path / 'small.db'}")
    yield open_study(make_definition(f"sqlite:///{tmp_path / 'small.db'}"), storage)
    storage.engine.dispose()


def _join(study_id: str, pipe: Any) -> None:
    neighbors = Neighbors.__new__(Neighbors)
    neighbors._folder, neighbors._study = Path(study_id).parent, Path(study_id).name
    with neighbors.joined():
        pipe.send("joined")
        pipe.recv()


def start_neighbor(neighbors: Neighbors) -> tuple[Any, Any]:
    """Another process that joins; it leaves when told to, and its pipe."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_join, args=(str(neighbors._folder / neighbors._study), theirs), daemon=True)
    process.start()
    assert ours.recv() == "joined"
    return process, ours


def test_workers_count_each_other_until_they_leave_or_are_killed(study: optuna.Study, tmp_path: Path) -> None:
    neighbors = Neighbors(study)
    assert neighbors.count() == 0
    with neighbors.joined():
        assert neighbors.count() == 1
        (killed, _), (leaves, pipe) = start_neighbor(neighbors), start_neighbor(neighbors)
        assert neighbors.count() == 3
        os.kill(killed.pid, signal.SIGKILL)
        killed.join()
        assert neighbors.count() == 2
        pipe.send("leave")
        leaves.join()
        assert neighbors.count() == 1
    assert neighbors.count() == 0
    [folder] = tmp_path.glob("hpsearch-*")
    assert [*folder.iterdir()] == []


def test_workers_of_another_study_or_on_other_cores_do_not_count(
    study: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Neighbors(study)
    other._study = "another"
    with other.joined():
        assert (Neighbors(study).count(), other.count()) == (0, 1)
    with Neighbors(study).joined():
        monkeypatch.setattr(cores, "_own_cores", lambda: {4096, 4097})  # as Slurm pins two tasks of a node
        assert Neighbors(study).count() == 0


def test_a_worker_that_cannot_be_counted_says_what_to_do_and_works(
    study: optuna.Study, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / f"hpsearch-{os.getuid()}"
    folder.symlink_to(tmp_path)  # as another user may have done in /tmp
    with caplog.at_level(logging.WARNING), Neighbors(study).joined():
        assert Neighbors(study).count() == 0
    assert caplog.messages == [
        "workers of this machine do not know of each other "
        f"(cannot write {folder}: the folder belongs to another user); set --threads for each"
    ]


def test_a_third_worker_on_two_cores_waits_until_one_is_free(study: optuna.Study) -> None:
    neighbors = Neighbors(study)
    with neighbors.joined():
        wait_for_core(neighbors, study, Drain())  # the second does not wait
        _, pipe = start_neighbor(neighbors)
        waiting = threading.Thread(target=wait_for_core, args=(neighbors, study, Drain()))
        waiting.start()
        waiting.join(0.1)
        assert waiting.is_alive()
        pipe.send("leave")
        waiting.join(60)
        assert not waiting.is_alive()


def test_a_worker_that_waits_ends_with_the_search_and_when_asked_to(study: optuna.Study, digits: ImageData) -> None:
    neighbors, drain = Neighbors(study), Drain()
    with neighbors.joined():
        start_neighbor(neighbors)
        drain.set(Drained())
        with pytest.raises(Drained):
            wait_for_core(neighbors, study, drain)
        stop_study(study)
        with pytest.raises(Stopped):
            wait_for_core(neighbors, study, Drain())
        study._storage.set_study_user_attr(study._study_id, "budget", {"trials": 0})
        with pytest.raises(BudgetSpent, match="all 0 trials are finished"):
            wait_for_core(neighbors, study, Drain())


def test_a_worker_gives_way_in_the_middle_of_a_trial_which_is_replayed_with_the_same_threads(
    study: optuna.Study, digits: ImageData, tmp_path: Path
) -> None:
    definition = make_definition(str(storage_of(study).engine.url), study={"artifacts": str(tmp_path / "artifacts")})
    n_threads = 2
    options: dict[str, Any] = {"data": digits, "count_threads": lambda: n_threads, "max_trials": 1}
    worker = Worker(definition, open_worker_storage(definition, Drain()), 0, Drain(), **options)
    objective, n_checks = worker.objective, 0

    def join_and_leave(trial: optuna.Trial, check: Any) -> float:
        def check_and_count(**options: Any) -> None:
            nonlocal n_checks, n_threads
            n_checks += not options
            n_threads = 1 if 3 < n_checks <= 8 else 2
            worker.update_threads()  # as the heartbeat does
            check(**options)

        return objective(trial, check_and_count)

    worker.objective = join_and_leave  # type: ignore[assignment]
    worker.run()
    environment = study.trials[0].user_attrs["environment"]
    assert (environment["threads"], environment["thread_changes"]) == (2, [[1, 0, 2], [1, 3, 1], [2, 3, 2]])
    assert replay(definition, study, 0)["identical"]
