"""Workers in a Ray cluster: one task per worker, and one per node that loads the data."""

import logging
import math
import os
import signal
import socket
import sys
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpsearch.config.definition import StudyDefinition, evolve
from hpsearch.config.urls import find_secrets, parse_url, show_url
from hpsearch.data.dataset import ImageData, Split
from hpsearch.errors import ClusterError, DataError, Interrupted, UsageError
from hpsearch.search.study import load_study
from hpsearch.storage.artifacts import Folder
from hpsearch.storage.engine import network_file_system
from hpsearch.training.run import load_study_data
from hpsearch.workers.executor import Handle, Supervisor
from hpsearch.workers.forkserver import signals_ignored
from hpsearch.workers.shutdown import Drain
from hpsearch.workers.worker import WorkerExit, capture_exit, open_worker_storage, run_worker

try:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ImportError as error:
    raise UsageError("Ray is not installed; run: pip install 'hpsearch[ray]'") from error

logger = logging.getLogger(__name__)

_MAX_RETRIES = 20  # how often Ray restarts a worker's task after its node died
_KNOWN_WITHIN = 20.0  # seconds a new supervisor waits until `detach` has seen it start
_POLL = 1.0  # seconds between two checks of the tasks
_CONNECT_TIMEOUT = 5.0  # seconds
_NAMESPACE = "hpsearch"
_ADVICE = (
    "start one with `ray start --head`, or give its address, as in `--ray host:6379` "
    "(for clusters with token authentication also set RAY_AUTH_MODE=token)"
)


@dataclass(frozen=True)
class Resources:
    """CPU cores and GPUs per worker; values below 1 may be fractions."""

    cpus: float = 1.0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        for option, amount in (("--cpus-per-worker", self.cpus), ("--gpus-per-worker", self.gpus)):
            if amount > 1 and amount != int(amount):
                raise UsageError(f"{option} {amount}: must be a fraction below 1 or a whole number; use {int(amount)}")


class Cluster:
    """A connected Ray cluster, in which the workers of a study run as tasks; an `Executor`.

    Ray itself restarts a task whose process or node died. A task joins the study itself, so its name is not known.
    """

    def __init__(self, definition: StudyDefinition, resources: Resources) -> None:
        self.definition, self.resources = definition, resources
        self.running: dict[Any, Handle] = {}  # by task
        self.data: dict[str, Any] = {}  # references, by node
        self.nodes = [node for node in ray.nodes() if node["Alive"]]
        if problems := list(self._find_local_paths()):
            raise UsageError("\n".join(problems))

    @property
    def n_fitting(self) -> int:
        """How many workers fit on the nodes if nothing else runs there."""
        n_fitting = 0
        for node in self.nodes:
            has = node["Resources"]
            by_cpus = has.get("CPU", 0) / self.resources.cpus if self.resources.cpus else math.inf
            by_gpus = has.get("GPU", 0) / self.resources.gpus if self.resources.gpus else math.inf
            n_fitting += int(min(by_cpus, by_gpus, 10_000))
        return n_fitting

    def remark_on(self, n_workers: int) -> Iterator[str]:
        """Yield what the user should know about running `n_workers` workers in this cluster."""
        if n_workers > self.n_fitting:
            yield f"the cluster has room for {self.n_fitting} of {n_workers} workers; the rest wait for free resources"
        n_gpus = sum(node["Resources"].get("GPU", 0) for node in self.nodes)
        if n_gpus and not self.resources.gpus:
            yield f"the cluster has {n_gpus:.0f} unused GPUs; use them with --gpus-per-worker"

    def run(self, n_workers: int, drain: Drain, on_poll: Callable[[], None] = lambda: None) -> str:
        """Run the study with `n_workers` tasks until its budget is used up. Returns the reason it ended.

        When drained, all workers re-queue their trials, and `Drained` or `Interrupted` is raised. `on_poll` is called
        about once a second.
        """
        storage = open_worker_storage(self.definition, drain, waits=True)
        study = load_study(self.definition, storage)
        with _as_cluster_errors("the cluster failed"):
            self._load_data()
            return Supervisor(self, n_workers, self.definition, study, storage, drain, on_poll=on_poll).run()

    def detach(self, n_workers: int) -> str:
        """Start a detached actor that does the work of `run` after this process has exited; return its name."""
        name = f"{self.definition.study.name}-{uuid.uuid4().hex[:8]}"
        options = {"name": name, "lifetime": "detached", "max_restarts": -1, "num_cpus": 0}
        supervisor = ray.remote(SupervisorActor).options(**options, **_on_node(self._required_node))
        actor = supervisor.remote(name, self, n_workers)
        with _as_cluster_errors("could not start the supervisor in the cluster"):
            ray.get(actor.confirm_start.remote())
        return name

    def start(self, slot: int) -> Handle:
        options = {"num_cpus": self.resources.cpus, "num_gpus": self.resources.gpus, "max_retries": _MAX_RETRIES}
        name = f"worker of {self.definition.study.name}"
        work = ray.remote(_work).options(name=name, **options, **_on_node(self._required_node))
        task = work.remote(self.definition, self.data, self.resources)
        self.running[task] = Handle(slot)
        return self.running[task]

    def wait(self) -> Iterator[tuple[Handle, WorkerExit]]:
        for task in ray.wait([*self.running], num_returns=1, timeout=_POLL)[0]:
            yield self.running.pop(task), _read_exit(task)

    def stop(self) -> None:
        for task in self.running:  # including those that still wait for resources
            ray.cancel(task, force=False)

    def kill(self) -> None:
        for task in self.running:
            ray.cancel(task, force=True)

    def _load_data(self) -> None:
        """Load (or download) the data once on each node, where its workers map it into memory."""
        for node in ray.nodes():
            name = node["NodeID"]
            if node["Alive"] and self._required_node in (None, name):
                load = ray.remote(_load).options(num_cpus=0, **_on_node(name, is_soft=True))
                self.data[name] = load.remote(self.definition)

    def _find_local_paths(self) -> Iterator[str]:
        """Yield a problem for each path of the study that other nodes of the cluster cannot reach."""
        hosts = {node["NodeManagerHostname"] for node in self.nodes}
        if len(self.nodes) == 1 and hosts == {socket.gethostname()}:
            return
        where = f"the cluster has {len(self.nodes)} nodes" if len(self.nodes) > 1 else f"the cluster is {min(hosts)}"
        url, artifacts = parse_url(self.definition.study.storage), Folder(self.definition.study.artifacts)
        if url.get_backend_name() == "sqlite":
            yield (
                f"{show_url(url)} is a local file, but {where}; use PostgreSQL (--storage or HPSEARCH_STORAGE). "
                "`hpsearch copy` can move the study"
            )
        if artifacts.path and not network_file_system(artifacts.path):
            yield (
                f"artifacts folder {artifacts} is local, but {where}; use a URL such as s3://bucket/prefix or a "
                "network folder (--artifacts or HPSEARCH_ARTIFACTS)"
            )

    @property
    def _required_node(self) -> str | None:
        """The node on which workers must run if the database or the artifacts are local files, else None."""
        is_sqlite = parse_url(self.definition.study.storage).get_backend_name() == "sqlite"
        path = Folder(self.definition.study.artifacts).path
        is_local = is_sqlite or (path is not None and not network_file_system(path))
        return self.nodes[0]["NodeID"] if is_local and len(self.nodes) == 1 else None


@contextmanager
def connect(
    definition: StudyDefinition, resources: Resources, *, address: str | None = None, folder: Path | str | None = None
) -> Iterator[Cluster]:
    """Connect to the Ray cluster at `address`, else at RAY_ADDRESS, else of this machine; "local" starts one.

    Ray's runtime environment takes this package and the data folder's path to the nodes, but no secrets. The user's own
    images must be at the same path on each node. Raises `UsageError` if the storage URL contains a password, other
    nodes cannot reach a path, or there is a `folder` for images that a function loads, and `ClusterError` if no cluster
    responds.
    """
    if find_secrets(definition.study.storage):
        raise UsageError(
            "the storage URL contains a password, which would be visible in Ray; remove it, and set PGPASSWORD or "
            "~/.pgpass on each node before ray start"
        )
    address = address or os.environ.get("RAY_ADDRESS") or "auto"
    _check_port(address)
    if folder and not definition.data.name:
        if definition.data.code:
            raise UsageError(f"--data has no effect: {definition.data.title} knows where its images are; leave it out")
        key = "folder" if definition.data.folder else "file"
        definition, folder = evolve(definition, "data", **{key: str(Path(folder).absolute())}), None
    data = str(folder or os.environ.get("HPSEARCH_DATA", ""))
    path = data if data.startswith("~") else str(Path(data).absolute())  # each node has its own home
    environment = {
        "py_modules": [str(Path(__file__).parents[1])],
        "env_vars": {"HPSEARCH_DATA": path} if data else {},
    }
    options = {"namespace": _NAMESPACE, "log_to_driver": False, "logging_level": logging.ERROR}
    try:
        # Workers import from the folder in which Ray is initialized, before all others. Ray itself keeps only Ctrl-C
        # from the processes of its own that it starts here.
        with chdir(sys.prefix), signals_ignored(*([signal.SIGHUP] if address == "local" else [])):
            ray.init(address, runtime_env=environment, **options)
    except ConnectionError as error:
        where = "" if address == "auto" else f" at {address} ({last_line(error)})"
        raise ClusterError(f"no running Ray cluster found{where}; {_ADVICE}") from error
    except OSError as error:
        advice = "Ray needs a short path of a local disk in RAY_TMPDIR or TMPDIR"
        raise ClusterError(f"cannot start Ray: {error}; {advice}") from error
    except (ValueError, RuntimeError) as error:  # other versions of Ray or Python, among others
        where = "" if address == "auto" else f" at {address}"
        raise ClusterError(f"cannot use the Ray cluster{where}: {' '.join(str(error).split())}") from error
    try:
        yield Cluster(definition, resources)
    finally:
        ray.shutdown()


def _check_port(address: str) -> None:
    """Raise `ClusterError` if nothing listens at the address; Ray itself would wait for minutes."""
    if address.startswith("http"):
        raise ClusterError(f"{address} is the Ray dashboard; use host:6379 or ray://host:10001")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT).close()
    except OSError as error:
        reason = error.strerror or error
        raise ClusterError(f"no response from a Ray cluster at {address} ({reason}); {_ADVICE}") from error


@contextmanager
def _as_cluster_errors(what: str) -> Iterator[None]:
    try:
        yield
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise ClusterError(f"{what}: {last_line(error)}") from error


def _read_exit(task: Any) -> WorkerExit:
    try:
        end: WorkerExit = ray.get(task)
    except (ray.exceptions.TaskCancelledError, KeyboardInterrupt):
        return WorkerExit("stopped", Interrupted())
    except ray.exceptions.RayError as error:
        reason = f"a worker task failed: {last_line(error)}"
        return WorkerExit(reason, ClusterError(reason))
    return end


class SupervisorActor:
    """A detached actor that owns the tasks of a search; Ray restarts it if its node dies."""

    def __init__(self, name: str, cluster: Cluster, n_workers: int) -> None:
        self.is_known = threading.Event()
        threading.Thread(target=self._run, args=(name, cluster, n_workers), daemon=True).start()

    def confirm_start(self) -> None:
        self.is_known.set()

    def _run(self, name: str, cluster: Cluster, n_workers: int) -> None:
        self.is_known.wait(_KNOWN_WITHIN)
        end = capture_exit(lambda: cluster.run(n_workers, Drain()))
        logger.warning("%s", end.reason)  # in Ray's log of this actor
        ray.kill(ray.get_actor(name), no_restart=True)


def _load(definition: StudyDefinition) -> ImageData | tuple[Any, ...]:
    """Load the study's data as arrays, which Ray stores once per node and maps into its processes.

    The user's own images are in a file of the node already, which its processes map.
    """
    with _signals_restored():
        data = load_study_data(definition)
    if data.inventory:
        return data
    splits = (data.train, data.validation)
    arrays = [tensor.numpy() for split in splits for tensor in (split.images, split.labels)]
    return (*arrays, data.mean, data.std, data.class_names)


def _work(definition: StudyDefinition, data: Mapping[str, Any], resources: Resources) -> WorkerExit:
    """Run a worker as a Ray task; `data` maps node ids to references of their data."""
    with _signals_restored():
        drain = Drain().listen(signal.SIGINT, signal.SIGTERM)
        node = ray.get_runtime_context().get_node_id()
        try:
            images = _map(ray.get(data[node]))
            images.train.take(slice(0, 1))  # fails if own images were read on another node
        except (KeyError, DataError, ray.exceptions.RayError):  # the node joined later, or cannot load the data
            images = None
        device, n_threads = None if resources.gpus else "cpu", max(1, int(resources.cpus))
        options = {"data": images, "device": device, "n_threads": n_threads, "node": node[:6], "waits": True}
        return capture_exit(lambda: run_worker(definition, drain, **options))


def _map(parts: ImageData | tuple[Any, ...]) -> ImageData:
    """Wrap the arrays that all workers of the node share, without copying; nothing writes to them."""
    if isinstance(parts, ImageData):
        return parts
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        tensors = [torch.from_numpy(part) for part in parts if isinstance(part, np.ndarray)]
    return ImageData(Split(*tensors[:2]), Split(*tensors[2:]), *parts[4:])


@contextmanager
def _signals_restored() -> Iterator[None]:
    """Restore the signal handlers on exit, since Ray reuses the process for other tasks."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _on_node(node: str | None, *, is_soft: bool = False) -> dict[str, Any]:
    """Return the Ray options that pin a task to the node; empty if `node` is None."""
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=is_soft)} if node else {}


def last_line(error: BaseException) -> str:
    """Return the last line of a Ray error, without the tracebacks of other processes."""
    return ([line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[-1]
