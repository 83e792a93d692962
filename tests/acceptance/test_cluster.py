"""Searches in a Ray cluster of simulated nodes, with PostgreSQL and an S3 server: a node dies, a user interrupts."""

import os
import signal
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from hpsearch.config.definition import StudyDefinition, load_definition
from hpsearch.errors import HpsearchError
from hpsearch.search.study import load_study
from hpsearch.storage.checkpoints import checkpoint_folder
from hpsearch.storage.rdb import open_storage

from ..conftest import aws_environment
from ..search.test_images import write_own_study
from .commands import Command, epochs_of, hpsearch, processes_of, start, wait_for

WriteStudy = Callable[..., Path]
RECOVERY = "[recovery]\nheartbeat = 1\ngrace = 4\ncheckpoint = 0.3\n[pruner]\nkind = 'none'"


SIZE: dict[str, Any] = {"num_cpus": 2, "object_store_memory": 100_000_000}


@pytest.fixture(scope="module")
def cluster(s3_server: str) -> Iterator[Any]:
    """Three nodes with two cores each, which have the environment of this process."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        for name, value in (aws_environment(s3_server) | {"HPSEARCH_ARTIFACTS": "s3://artifacts"}).items():
            patch.setenv(name, value)
        for name in ("COLUMNS", "LINES"):
            patch.delenv(name, raising=False)
        opened = Cluster(initialize_head=True, head_node_args={"include_dashboard": False, **SIZE})
        for _ in range(2):
            opened.add_node(**SIZE)
        yield opened
        opened.shutdown()


class Search:
    """A study file in a folder of its own, launched in a cluster, and what its study has."""

    def __init__(self, file: Path, url: str, address: str) -> None:
        self.file, self.url, self.folder, self.log = file, url, file.parent, file.parent / "log"
        self.options = ("--ray", address, "--storage", url)

    def launch(self, n_workers: int) -> Command:
        arguments = ("run", self.file.name, "--workers", n_workers, *self.options)
        return start(*arguments, cwd=self.folder, log=self.log)

    @cached_property
    def definition(self) -> StudyDefinition:
        return load_definition(self.file, storage=self.url)

    @cached_property
    def study(self) -> optuna.Study:
        return load_study(self.definition, open_storage(self.url, must_exist=True))

    def trials(self) -> list[FrozenTrial]:
        try:
            return self.study.get_trials(deepcopy=False)
        except HpsearchError:  # not there yet
            return []

    def running(self) -> list[FrozenTrial]:
        return [trial for trial in self.trials() if trial.state == TrialState.RUNNING and (trial.last_step or 0) > 1]

    def is_kept(self, trial: FrozenTrial) -> bool:
        return f"trial-{trial.number}.ckpt" in checkpoint_folder(self.definition, self.study).find()


@pytest.fixture
def search(study_file: WriteStudy, cluster: Any, url: str) -> Callable[..., Search]:
    def define(trials: int, seconds: float) -> Search:
        budget = f"trials = {trials}\nepochs = {epochs_of(seconds)}"
        return Search(study_file(RECOVERY, budget=budget), url, cluster.address)

    return define


def node_of(trial: FrozenTrial) -> str:
    return str(trial.user_attrs["worker"].split("-")[-2])


@pytest.mark.parametrize("new_url", ["postgresql"], indirect=True)
def test_a_node_that_dies_costs_no_trial_and_its_trials_go_on_elsewhere(
    cluster: Any, search: Callable[..., Search]
) -> None:
    s = search(trials=6, seconds=4)
    run = s.launch(n_workers=3)
    nodes = {node.node_id[:6]: node for node in cluster.worker_nodes}
    chosen: list[FrozenTrial] = []

    half = s.definition.budget.epochs / 2  # so that it is not over before its node is

    def trains_on_a_worker_node() -> bool:
        begun = [trial for trial in s.running() if node_of(trial) in nodes and (trial.last_step or 0) < half]
        chosen[:] = [trial for trial in begun if s.is_kept(trial)]
        assert run.poll() is None, s.log.read_text()
        return bool(chosen)

    wait_for(trains_on_a_worker_node, "a trial with a checkpoint on a worker node")
    dead = node_of(chosen[0])
    cluster.remove_node(nodes[dead], allow_graceful=False)
    assert run.wait(timeout=150) == 0, s.log.read_text()
    trials = s.trials()
    assert sum(trial.state == TrialState.COMPLETE for trial in trials) == 6
    assert len(trials) == 6
    retried = [trial for trial in trials if "interruptions" in trial.user_attrs]
    reasons = [each for trial in retried for each in trial.user_attrs["interruptions"]]
    assert {each["kind"] for each in reasons} == {"killed"}
    assert {each["worker"].split("-")[-2] for each in reasons} == {dead}
    assert all(node_of(trial) != dead for trial in retried)
    assert any(trial.user_attrs.get("resumed_after") for trial in retried), "no trial went on from its checkpoint"
    told = s.log.read_text().splitlines()
    assert sum(" complete 0." in line for line in told) == 6, "a result was not told, or twice"
    cluster.add_node(**SIZE)  # for the next tests


@pytest.mark.parametrize("new_url", ["postgresql"], indirect=True)
def test_an_interrupted_run_hands_its_trials_back_and_a_detached_one_goes_on(
    search: Callable[..., Search],
) -> None:
    s = search(trials=1, seconds=5)
    run = s.launch(n_workers=1)
    wait_for(lambda: bool(s.running()), "a trial that runs")
    os.killpg(run.pid, signal.SIGINT)
    assert run.wait(timeout=120) == 130, s.log.read_text()
    assert not processes_of(run.pid)
    [waiting] = s.trials()
    assert waiting.state == TrialState.WAITING
    assert {each["kind"] for each in waiting.user_attrs["interruptions"]} == {"interrupted"}

    detached = hpsearch("run", s.file.name, "--workers", 1, *s.options, "--detach", cwd=s.folder)
    assert "next: hpsearch status" in detached.stderr
    wait_for(lambda: any(trial.user_attrs.get("resumed_after") for trial in s.running()), "a trial that goes on")
    watched = hpsearch("status", s.file.name, "--storage", s.url, "--watch", cwd=s.folder)
    assert watched.stdout.count(" complete 0.") == 1
    assert sum(trial.state == TrialState.COMPLETE for trial in s.trials()) == 1


def test_places_of_one_machine_are_refused_with_what_to_use_instead(cluster: Any, study_file: WriteStudy) -> None:
    file = study_file()
    arguments = ("run", file.name, "--ray", cluster.address, "--artifacts", "here")
    refused = hpsearch(*arguments, cwd=file.parent, expect=2).stderr
    assert "small.db is a local file, but the cluster has 3 nodes; use PostgreSQL" in refused
    assert "/here is local, but the cluster has 3 nodes; use a URL such as s3://bucket/prefix" in refused
    assert not (file.parent / "small.db").exists()


@pytest.mark.parametrize("new_url", ["postgresql"], indirect=True)
def test_own_images_and_an_own_network_are_searched_in_a_cluster_which_refuses_changed_images(
    cluster: Any, url: str, tmp_path: Path
) -> None:
    file = write_own_study(tmp_path, RECOVERY, "trials = 2\nepochs = 1")
    s = Search(file, url, cluster.address)
    assert s.launch(n_workers=2).wait(timeout=150) == 0, s.log.read_text()
    assert [trial.state for trial in s.trials()] == [TrialState.COMPLETE] * 2
    assert s.study.user_attrs["data"]["class_names"] == ["cat", "tiger"]
    (tmp_path / "pets" / "cat" / "009.png").unlink()
    refused = hpsearch("run", file.name, "--workers", 1, "--trials", 3, *s.options, cwd=tmp_path, expect=2)
    assert "1 image removed: cat/009.png" in refused.stderr
