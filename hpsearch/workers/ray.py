"""A Ray cluster, to launch the workers of a study in."""

import logging
import math
import os
import socket
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hpsearch.config.definition import StudyDefinition
from hpsearch.errors import ClusterError, UsageError
from hpsearch.storage.artifacts import Folder
from hpsearch.storage.engine import find_secrets, network_file_system, parse_url, show_url
from hpsearch.workers.shutdown import Drain
from hpsearch.workers.tasks import STUDY_FILE, Share, Supervisor, Tasks, import_ray, last_line, stay_on

_CONNECT_TIMEOUT = 5.0  # seconds
_NAMESPACE = "hpsearch"
_ADVICE = (
    "start one with ray start --head, or name another with --address; "
    "one that asks for a token needs RAY_AUTH_MODE=token here, too"
)


class Cluster:
    """A Ray cluster that this process is connected to, to launch the workers of a study in."""

    def __init__(self, definition: StudyDefinition, share: Share) -> None:
        self.definition, self.share = definition, share
        self.nodes = [node for node in import_ray().nodes() if node["Alive"]]
        if problems := list(self._find_places_of_one_machine()):
            raise UsageError("\n".join(problems))

    @property
    def n_fitting(self) -> int:
        """How many workers the nodes have room for, were nothing else on them."""
        n_fitting = 0
        for node in self.nodes:
            has = node["Resources"]
            by_cpus = has.get("CPU", 0) / self.share.cpus if self.share.cpus else math.inf
            by_gpus = has.get("GPU", 0) / self.share.gpus if self.share.gpus else math.inf
            n_fitting += int(min(by_cpus, by_gpus, 10_000))
        return n_fitting

    def remark_on(self, n_workers: int) -> Iterator[str]:
        """What the user should know of so many workers in this cluster."""
        if n_workers > self.n_fitting:
            yield f"the cluster has room for {self.n_fitting} of {n_workers} workers now; the others wait for room"
        n_gpus = sum(node["Resources"].get("GPU", 0) for node in self.nodes)
        if n_gpus and not self.share.gpus:
            yield f"the cluster has {n_gpus:.0f} GPUs that no worker uses; give them some with --gpus-per-worker"

    def run(self, n_workers: int, drain: Drain, on_poll: Callable[[], None] = lambda: None) -> str:
        """Why the search ended, after `n_workers` tasks have run the study to the end of its budget.

        When drained, all workers hand their trials back, and `Drained` or `Interrupted` is raised. `on_poll` is
        called about each second.
        """
        with _as_cluster_errors("the cluster failed"):
            return Tasks(self.definition, self.share, self._node_for_all).run(n_workers, drain, on_poll)

    def detach(self, n_workers: int) -> str:
        """The name of an actor in the cluster that does what `run` does, after this process has gone."""
        ray = import_ray()
        name = f"{self.definition.study.name}-{uuid.uuid4().hex[:8]}"
        study, node = self.definition.study, self._node_for_all
        options = {"name": name, "lifetime": "detached", "max_restarts": -1, "num_cpus": 0, **stay_on(node)}
        places = study.storage, study.artifacts
        actor = ray.remote(Supervisor).options(**options).remote(name, places, self.share, node, n_workers)
        with _as_cluster_errors("the cluster cannot hold the search's supervisor"):
            ray.get(actor.is_there.remote())
        return name

    def _find_places_of_one_machine(self) -> Iterator[str]:
        """What keeps the study on this machine, where the cluster is more than that."""
        hosts = {node["NodeManagerHostname"] for node in self.nodes}
        if len(self.nodes) == 1 and hosts == {socket.gethostname()}:
            return
        where = f"the cluster has {len(self.nodes)} nodes" if len(self.nodes) > 1 else f"the cluster is {min(hosts)}"
        url, artifacts = parse_url(self.definition.study.storage), Folder(self.definition.study.artifacts)
        if url.get_backend_name() == "sqlite":
            yield (
                f"{show_url(url)} is a file of this machine, but {where}: give a PostgreSQL URL with --storage or "
                "HPSEARCH_STORAGE; hpsearch copy moves a study there"
            )
        if artifacts.path and not network_file_system(artifacts.path):
            yield (
                f"the artifacts folder {artifacts} is on this machine, but {where}: give a URL such as "
                "s3://bucket/prefix, or a folder of a network file system, with --artifacts or HPSEARCH_ARTIFACTS"
            )

    @property
    def _node_for_all(self) -> str | None:
        """The node that workers must stay on since the study's places are on this machine, if they are."""
        is_sqlite = parse_url(self.definition.study.storage).get_backend_name() == "sqlite"
        path = Folder(self.definition.study.artifacts).path
        is_local = is_sqlite or (path is not None and not network_file_system(path))
        return self.nodes[0]["NodeID"] if is_local and len(self.nodes) == 1 else None


@contextmanager
def connect(
    definition: StudyDefinition, share: Share, *, address: str | None = None, folder: Path | str | None = None
) -> Iterator[Cluster]:
    """The Ray cluster at an address, else the one of RAY_ADDRESS or of this machine; "local" starts one here.

    This package, the study file and the place of the data reach its nodes by Ray's runtime environment. Secrets do
    not: a password in the storage's URL is refused with `UsageError`, as are places that other nodes cannot reach.
    `ClusterError` is raised where no cluster answers.
    """
    ray = import_ray()
    if find_secrets(definition.study.storage):
        raise UsageError(
            "the storage's URL has a password, which would be readable in Ray; leave it out, and give each node "
            "PGPASSWORD or a password file (~/.pgpass) before ray start"
        )
    address = address or os.environ.get("RAY_ADDRESS") or "auto"
    _check_port(address)
    data = folder or os.environ.get("HPSEARCH_DATA")
    with tempfile.TemporaryDirectory(prefix="hpsearch-") as files:
        Path(files, STUDY_FILE).write_text(definition.to_toml(), encoding="utf-8")
        environment = {
            "py_modules": [str(Path(__file__).parents[1])],
            "working_dir": files,
            "env_vars": {"HPSEARCH_DATA": _place_of(str(data))} if data else {},
        }
        options = {"namespace": _NAMESPACE, "log_to_driver": False, "logging_level": logging.ERROR}
        try:
            ray.init(address, runtime_env=environment, **options)
        except ConnectionError as error:
            raise ClusterError(f"no Ray cluster at {address}: {last_line(error)}; {_ADVICE}") from error
        except (ValueError, RuntimeError) as error:  # other versions of Ray or Python, among others
            text = " ".join(str(error).split())
            raise ClusterError(f"the Ray cluster at {address} cannot be used: {text}") from error
        try:
            yield Cluster(definition, share)
        finally:
            ray.shutdown()


def _place_of(folder: str) -> str:
    """The folder as nodes are to look for it; the home of each is its own."""
    return folder if folder.startswith("~") else str(Path(folder).absolute())


def _check_port(address: str) -> None:
    """Raise `ClusterError` where nothing listens at the address; Ray itself would wait for minutes."""
    if address.startswith("http"):
        raise ClusterError(f"{address} is Ray's dashboard; name the cluster as host:6379 or ray://host:10001")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT).close()
    except OSError as error:
        raise ClusterError(f"no Ray cluster answers at {address} ({error.strerror or error}); {_ADVICE}") from error


@contextmanager
def _as_cluster_errors(what: str) -> Iterator[None]:
    import ray

    try:
        yield
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise ClusterError(f"{what}: {last_line(error)}") from error
