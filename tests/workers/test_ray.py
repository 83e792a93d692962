"""Launching in a Ray cluster: what cannot work is refused before anything starts; one machine is a cluster too."""

import importlib
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpsearch.config.definition import load_definition
from hpsearch.errors import ClusterError, UsageError
from hpsearch.workers.ray import Cluster, Resources, connect

from ..acceptance.commands import hpsearch
from ..conftest import make_definition


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9"])
def test_a_cluster_that_does_not_answer_is_named_with_what_to_do(address: str) -> None:
    message = f".*Ray cluster .*{address}.*start one with `ray start --head`, or give its address"
    with (
        pytest.raises(ClusterError, match=message),
        connect(make_definition("sqlite:///x.db"), Resources(), address=address),
    ):
        pass


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("nonsense", "cannot use the Ray cluster at nonsense: Invalid"),
        ("http://host:8265", "use host:6379"),
    ],
)
def test_what_is_no_address_of_a_cluster_is_told_apart(address: str, message: str) -> None:
    definition = make_definition("sqlite:///x.db")
    with pytest.raises(ClusterError, match=message), connect(definition, Resources(), address=address):
        pass


def test_without_ray_it_is_said_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "hpsearch.workers.ray")
    with pytest.raises(UsageError, match=r"pip install 'hpsearch\[ray\]'"):
        importlib.import_module("hpsearch.workers.ray")


@pytest.mark.parametrize("url", ["postgresql://me:secret@host/db", "postgresql://host/db?password=secret"])
def test_a_password_is_not_given_to_ray(url: str) -> None:
    with (
        pytest.raises(UsageError, match=r"PGPASSWORD or ~/\.pgpass") as caught,
        connect(make_definition(url), Resources(), address="local"),
    ):
        pass
    assert "secret" not in str(caught.value)


def test_a_folder_for_images_that_a_function_loads_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def load(): ...")
    file = tmp_path / "mine.toml"
    file.write_text('[data]\nload = "mine.py:load"\n[search]\nlr = { float = [0.1, 0.2] }\n')
    with (
        pytest.raises(
            UsageError, match=r"--data has no effect: mine\.py:load knows where its images are; leave it out"
        ),
        connect(load_definition(file, storage="sqlite:///x.db"), Resources(), address="local", folder=tmp_path),
    ):
        pass


def node(name: str, cpus: float, gpus: float = 0) -> dict[str, Any]:
    return {"Alive": True, "NodeID": name, "NodeManagerHostname": name, "Resources": {"CPU": cpus, "GPU": gpus}}


@pytest.mark.parametrize(
    ("resources", "n_fitting"),
    [
        (Resources(), 12),
        (Resources(cpus=3), 3),
        (Resources(gpus=0.25), 8),
        (Resources(cpus=2, gpus=0.5), 4),
        (Resources(gpus=3), 0),
    ],
)
def test_as_many_workers_fit_as_cores_and_gpus_of_each_node_allow(
    resources: Resources, n_fitting: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.nodes", lambda: [node("a", 4), node("b", 8, 2)])
    cluster = Cluster(make_definition("postgresql://host/db", study={"artifacts": "s3://bucket"}), resources)
    assert cluster.n_fitting == n_fitting
    remarks = " ".join(cluster.remark_on(12))
    assert ("the rest wait for free resources" in remarks) == (n_fitting < 12)
    assert ("2 unused GPUs" in remarks) == (resources.gpus == 0)


def test_one_node_that_is_another_machine_needs_shared_places_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.nodes", lambda: [node("far-away", 4)])
    with pytest.raises(UsageError, match="is a local file, but the cluster is far-away; use PostgreSQL"):
        Cluster(make_definition("sqlite:///x.db"), Resources())


def test_a_temporary_folder_whose_path_is_too_long_for_ray_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("scratch-of-job-" * 6)))
    definition = make_definition(f"sqlite:///{tmp_path}/study.db")
    with (
        pytest.raises(ClusterError, match=r"cannot start Ray: .*scratch-of-job.*TMPDIR"),
        connect(definition, Resources(), address="local"),
    ):
        pass


@pytest.mark.parametrize(("address", "is_ignored"), [("local", True), ("auto", False)])
def test_a_closed_terminal_does_not_reach_the_processes_of_a_cluster_that_starts_here(
    address: str, is_ignored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers = []

    def stop_here(*_: object, **__: object) -> None:
        handlers.append(signal.getsignal(signal.SIGHUP))
        raise ConnectionError

    monkeypatch.setattr("ray.init", stop_here)
    before = signal.getsignal(signal.SIGHUP)
    with pytest.raises(ClusterError), connect(make_definition("sqlite:///x.db"), Resources(), address=address):
        pass
    assert handlers == [signal.SIG_IGN if is_ignored else before]
    assert signal.getsignal(signal.SIGHUP) == before


def test_a_machine_by_itself_is_a_cluster_where_sqlite_and_a_folder_will_do(study_file: Callable[..., Path]) -> None:
    file = study_file('[pruner]\nkind = "none"')
    (file.parent / "torch.py").write_text("raise SystemExit('this file of the user is not torch')")
    arguments = ("run", file.name, "--ray", "local", "--workers", 2, "--trials", 3, "--json")
    launched = hpsearch(*arguments, cwd=file.parent)
    assert json.loads(launched.stdout)["trials"]["complete"] == 3
    assert launched.stderr.count(" complete 0.") == 3
    assert "small: starting 2 workers in the cluster\n" in launched.stderr
