"""What happens to a search: a killed worker, signals, a second worker, a terminal and a pipe that is closed."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hpsearch.config.definition import load_definition
from hpsearch.errors import StudyNotFound
from hpsearch.monitor.trials import read_status
from hpsearch.search.study import load_study, open_study
from hpsearch.storage.artifacts import Folder
from hpsearch.storage.checkpoints import read
from hpsearch.storage.rdb import open_storage

from ..search.test_images import write_own_study
from .commands import HPSEARCH, environment, epochs_of, hpsearch, processes_of, start, wait_for, workers_of

WriteStudy = Callable[..., Path]
SLOW = "trials = 2\nepochs = 100_000"  # a trial never ends by itself while a test looks
RECOVERY = "[recovery]\nheartbeat = 1\ngrace = 4"
UNPRUNED = f'[pruner]\nkind = "none"\n{RECOVERY}'


def status(file: Path) -> Any:
    return json.loads(hpsearch("status", file.name, "--json", cwd=file.parent).stdout)


def runs_a_trial(file: Path, n: int = 1, above: int = 0) -> Callable[[], bool]:
    """Whether `n` workers have finished an epoch of their trials, and more than `above`."""

    def check() -> bool:
        definition = load_definition(file)
        try:
            storage = open_storage(f"sqlite:///{file.with_suffix('.db')}", must_exist=True)
            workers = read_status(definition, load_study(definition, storage))["workers"]
        except StudyNotFound:
            return False
        storage.engine.dispose()
        return len([worker for worker in workers if worker["epoch"] > above]) >= n

    return check


def test_a_killed_workers_trial_goes_on_and_gets_the_value_that_it_would_have_had(study_file: WriteStudy) -> None:
    file = study_file(
        f"dropout = 0.2\n{RECOVERY}\ncheckpoint = 0.1", budget=f"trials = 1\nepochs = {epochs_of(seconds=2)}"
    )
    undisturbed = file.parent / "undisturbed"
    undisturbed.mkdir()
    shutil.copy(file, undisturbed)
    run = start("run", file.name, "--workers", 1, cwd=file.parent, log=file.parent / "log")
    wait_for(runs_a_trial(file), "a trial that runs")
    os.kill(workers_of(run)[0], signal.SIGKILL)
    assert run.wait(timeout=120) == 0
    [trial] = json.loads(hpsearch("trials", file.name, "--json", cwd=file.parent).stdout)
    assert trial["attempts"] == 2
    log = (file.parent / "log").read_text()
    assert re.search(r"(?m)^trial 0 requeued killed: worker \S+ was killed \(SIGKILL\)  [\d:]{8}$", log)
    hpsearch("run", file.name, "--workers", 1, cwd=undisturbed)
    [expected] = json.loads(hpsearch("trials", file.name, "--json", cwd=undisturbed).stdout)
    for key in ("state", "params", "value"):
        assert trial[key] == expected[key]
    states = [
        read(Folder(next((folder / "artifacts/small").glob(f"*/{name}")).parent), name)["state"]
        for folder, name in [(file.parent, "trial-0-1.ckpt"), (undisturbed, "trial-0.ckpt")]
    ]
    assert states[0]["results"] == states[1]["results"]
    assert states[0]["averaged"] == states[1]["averaged"] != {}
    weights = [state["network"] for state in states]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def test_with_own_images_and_an_own_network_a_killed_workers_trial_gets_the_value_that_it_would_have_had(
    tmp_path: Path,
) -> None:
    file = write_own_study(tmp_path, f"{UNPRUNED}\ncheckpoint = 0.1", "trials = 1\nepochs = 150")
    run = start("run", file.name, "--workers", 1, cwd=tmp_path, log=tmp_path / "log")
    wait_for(lambda: any(tmp_path.glob("artifacts/pets/*/trial-0.ckpt")), "a checkpoint")
    os.kill(workers_of(run)[0], signal.SIGKILL)
    assert run.wait(timeout=120) == 0, (tmp_path / "log").read_text()
    to = ("--storage", "sqlite:///copy.db", "--artifacts", "copied")
    hpsearch("copy", file.name, "--to", "copy.db", "--artifacts-to", "copied", cwd=tmp_path)
    [trial] = json.loads(hpsearch("trials", file.name, *to[:2], "--json", cwd=tmp_path).stdout)
    assert trial["attempts"] == 2
    replayed = json.loads(hpsearch("trials", file.name, 0, "--replay", "--json", *to[:2], cwd=tmp_path).stdout)
    assert replayed["identical"], replayed
    (tmp_path / "pets" / "tiger" / "007.png").unlink()
    refused = hpsearch("run", file.name, "--trials", 2, *to, cwd=tmp_path, expect=2).stderr
    assert "1 image removed: tiger/007.png" in refused


def test_ctrl_c_ends_a_run_cleanly_and_the_next_run_goes_on(study_file: WriteStudy) -> None:
    file = study_file(UNPRUNED, budget=SLOW)
    run = start("run", file.name, "--workers", 2, cwd=file.parent, log=file.parent / "log")
    wait_for(runs_a_trial(file, 2), "two trials that run")
    os.killpg(run.pid, signal.SIGINT)  # a terminal sends Ctrl-C to the whole group
    assert run.wait(timeout=120) == 130
    wait_for(lambda: not processes_of(run.pid), "the end of all processes")
    document = status(file)
    assert document["trials"] == {"complete": 0, "pruned": 0, "failed": 0, "running": 0, "waiting": 2}
    log = (file.parent / "log").read_text()
    assert "Traceback" not in log
    assert log.splitlines()[-1] == "Interrupted; run the same command to continue."
    reached = {row["epoch"] for row in json.loads(hpsearch("trials", file.name, "--json", cwd=file.parent).stdout)}
    run = start("run", file.name, "--workers", 2, cwd=file.parent, log=file.parent / "log")
    wait_for(runs_a_trial(file, 2, above=max(reached)), "both trials that go on from there")
    os.killpg(run.pid, signal.SIGHUP)  # a terminal that is closed signals the group, and its shell does: one request
    run.send_signal(signal.SIGHUP)
    assert run.wait(timeout=120) == 75
    assert status(file)["trials"] == {"complete": 0, "pruned": 0, "failed": 0, "running": 0, "waiting": 2}
    rows = json.loads(hpsearch("trials", file.name, "--state", "waiting", "--json", cwd=file.parent).stdout)
    assert {row["note"].split(":")[0] for row in rows} == {"interrupted"}


def test_a_second_ctrl_c_ends_a_run_at_once_and_leaves_nothing_running(study_file: WriteStudy) -> None:
    file = study_file(UNPRUNED, budget=SLOW)
    run = start("run", file.name, "--workers", 2, cwd=file.parent, log=file.parent / "log")
    wait_for(runs_a_trial(file, 2), "two trials that run")
    for pid in workers_of(run):
        os.kill(pid, signal.SIGSTOP)  # they cannot react to the first one
    run.send_signal(signal.SIGINT)
    for _ in range(5):  # impatiently, and until it is over
        time.sleep(0.6)  # a repetition within half a second would count as the same signal
        if run.poll() is None:
            run.send_signal(signal.SIGINT)
    assert run.wait(timeout=120) == 130
    wait_for(lambda: not processes_of(run.pid), "the end of all processes")
    counts = status(file)["trials"]
    assert (counts["running"], counts["failed"], counts["waiting"]) == (0, 0, 2)


def test_a_run_that_is_refused_leaves_no_process_that_still_imports(study_file: WriteStudy) -> None:
    file = study_file(UNPRUNED)
    open_study(load_definition(file), open_storage(f"sqlite:///{file.with_suffix('.db')}"))
    study_file(f"dropout = 0.5\n{UNPRUNED}")
    run = start("run", file.name, cwd=file.parent, log=file.parent / "log")
    assert run.wait(timeout=120) == 2
    wait_for(lambda: not processes_of(run.pid), "the end of all processes", seconds=1)
    assert "was started with different settings" in (file.parent / "log").read_text().splitlines()[1]


def test_one_more_worker_joins_from_another_terminal(study_file: WriteStudy) -> None:
    file = study_file(UNPRUNED, budget=f"trials = 6\nepochs = {epochs_of(seconds=1.5)}")
    hpsearch("worker", file.name, cwd=file.parent, expect=1)
    run = start("run", file.name, "--workers", 2, cwd=file.parent, log=file.parent / "log")
    wait_for(runs_a_trial(file), "a trial that runs")
    worker = hpsearch("worker", file.name, "--threads", 1, "--max-trials", 1, cwd=file.parent)
    assert re.match(r"third worker on \d+ cores?: ", worker.stderr)
    assert "--max-trials reached (1)" in worker.stderr
    assert run.wait(timeout=200) == 0
    rows = json.loads(hpsearch("trials", file.name, "--json", cwd=file.parent).stdout)
    assert len(rows) == 6
    assert len({row["worker"] for row in rows}) == 3


def test_a_signal_ends_a_worker_cleanly(study_file: WriteStudy) -> None:
    file = study_file(UNPRUNED, budget=SLOW)
    run = start("run", file.name, "--workers", 1, cwd=file.parent, log=file.parent / "log")
    wait_for(runs_a_trial(file), "the run's trial")
    for number, exit_status in ((signal.SIGINT, 130), (signal.SIGTERM, 75)):
        worker = start("worker", file.name, "--threads", 1, cwd=file.parent, log=file.parent / "worker.log")
        wait_for(runs_a_trial(file, 2), "the worker's trial")
        worker.send_signal(number)
        assert worker.wait(timeout=120) == exit_status
        assert "Traceback" not in (file.parent / "worker.log").read_text()
    run.send_signal(signal.SIGTERM)
    run.wait(timeout=120)
    assert status(file)["trials"]["running"] == 0


def test_a_reader_that_goes_away_ends_the_run_and_leaves_nothing_running(study_file: WriteStudy) -> None:
    file = study_file(UNPRUNED, budget="trials = 50\nepochs = 10")
    process = subprocess.Popen(
        [*HPSEARCH, "run", file.name, "--workers", "2"],
        cwd=file.parent,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stderr is not None
    process.stderr.readline()
    process.stderr.close()  # what `| head -1` does
    assert process.wait(timeout=120) == 1
    wait_for(lambda: not processes_of(process.pid), "the end of all processes")
    assert status(file)["trials"]["running"] == 0
