"""The workers of a study in a Ray cluster: a task for each, and one on each node that reads the data."""

import logging
import math
import os
import signal
import socket
import tempfile
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpsearch.config.definition import StudyDefinition, load_definition
from hpsearch.config.urls import find_secrets, parse_url, show_url
from hpsearch.data.dataset import ImageData, Split
from hpsearch.errors import ClusterError, Drained, Interrupted, Stopped, StorageError, UsageError
from hpsearch.search.study import load_study
from hpsearch.storage.artifacts import Folder
from hpsearch.storage.engine import network_file_system
from hpsearch.storage.rdb import open_storage
from hpsearch.training.devices import list_devices
from hpsearch.training.run import load_study_data
from hpsearch.workers.shutdown import Drain
from hpsearch.workers.worker import Worker, WorkerExit, capture_exit, open_worker_storage

logger = logging.getLogger(__name__)

STUDY_FILE = "study.toml"  # in the working directory of all tasks
_MAX_RETRIES = 20  # of a worker's task, by Ray, each for a node that died
_KNOWN_WITHIN = 20.0  # seconds in which the command that made a supervisor hears of it
_POLL = 1.0  # seconds between two looks at the tasks
_CONNECT_TIMEOUT = 5.0  # seconds
_NAMESPACE = "hpsearch"
_ADVICE = (
    "start one with ray start --head, or name another with --address; "
    "one that asks for a token needs RAY_AUTH_MODE=token here, too"
)


@dataclass(frozen=True)
class Resources:
    """What each worker has of its node: processor cores and GPUs, which may be fractions."""

    cpus: float = 1.0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        for name, resources in (("--cpus-per-worker", self.cpus), ("--gpus-per-worker", self.gpus)):
            if resources > 1 and resources != int(resources):
                raise UsageError(f"{name} {resources}: Ray gives a part of one, or whole ones, so use {int(resources)}")


class Cluster:
    """A Ray cluster that this process is connected to, to launch the workers of a study in."""

    def __init__(self, definition: StudyDefinition, resources: Resources) -> None:
        self.definition, self.resources = definition, resources
        self.nodes = [node for node in import_ray().nodes() if node["Alive"]]
        if problems := list(self._find_places_of_one_machine()):
            raise UsageError("\n".join(problems))

    @property
    def n_fitting(self) -> int:
        """How many workers the nodes have room for, were nothing else on them."""
        n_fitting = 0
        for node in self.nodes:
            has = node["Resources"]
            by_cpus = has.get("CPU", 0) / self.resources.cpus if self.resources.cpus else math.inf
            by_gpus = has.get("GPU", 0) / self.resources.gpus if self.resources.gpus else math.inf
            n_fitting += int(min(by_cpus, by_gpus, 10_000))
        return n_fitting

    def remark_on(self, n_workers: int) -> Iterator[str]:
        """What the user should know of so many workers in this cluster."""
        if n_workers > self.n_fitting:
            yield f"the cluster has room for {self.n_fitting} of {n_workers} workers now; the others wait for room"
        n_gpus = sum(node["Resources"].get("GPU", 0) for node in self.nodes)
        if n_gpus and not self.resources.gpus:
            yield f"the cluster has {n_gpus:.0f} GPUs that no worker uses; give them some with --gpus-per-worker"

    def run(self, n_workers: int, drain: Drain, on_poll: Callable[[], None] = lambda: None) -> str:
        """Why the search ended, after `n_workers` tasks have run the study to the end of its budget.

        When drained, all workers hand their trials back, and `Drained` or `Interrupted` is raised. `on_poll` is
        called about each second.
        """
        with _as_cluster_errors("the cluster failed"):
            return Tasks(self.definition, self.resources, self._node_for_all).run(n_workers, drain, on_poll)

    def detach(self, n_workers: int) -> str:
        """The name of an actor in the cluster that does what `run` does, after this process has gone."""
        ray = import_ray()
        name = f"{self.definition.study.name}-{uuid.uuid4().hex[:8]}"
        study, node = self.definition.study, self._node_for_all
        options = {"name": name, "lifetime": "detached", "max_restarts": -1, "num_cpus": 0, **stay_on(node)}
        places = study.storage, study.artifacts
        actor = ray.remote(Supervisor).options(**options).remote(name, places, self.resources, node, n_workers)
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
    definition: StudyDefinition, resources: Resources, *, address: str | None = None, folder: Path | str | None = None
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
            yield Cluster(definition, resources)
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


class Tasks:
    """The tasks of a study's workers, owned by this process: the command's, or a detached actor's."""

    def __init__(self, definition: StudyDefinition, resources: Resources, node: str | None) -> None:
        self.ray, self.definition, self.resources, self.node = import_ray(), definition, resources, node
        self.data: dict[str, Any] = {}
        self.ends: list[WorkerExit] = []

    def run(self, n_workers: int, drain: Drain, on_poll: Callable[[], None]) -> str:
        self._read_data()
        running = [self._start() for _ in range(n_workers)]
        is_cancelled = False
        while running:
            ended, running = self.ray.wait(running, num_returns=1, timeout=_POLL)
            for task in ended:
                error = self._read_exit(task).error
                is_drained = isinstance(error, Drained) and not isinstance(error, Stopped)
                if is_drained and not is_cancelled and not drain.event.is_set():
                    running.append(self._start())  # its node was drained, not the search
            if not is_cancelled and (drain.event.is_set() or self._is_over()):
                is_cancelled = True  # also those that still wait for room
                for task in running:
                    self.ray.cancel(task, force=False)
            on_poll()
        for end in self.ends:
            if end.error is None:  # it saw the budget spent, and speaks for all
                return end.reason
        drain.check()
        raise self.ends[0].error or ClusterError

    def _is_over(self) -> bool:
        """Whether a worker has seen the budget spent, and none has a trial in hand."""
        if all(end.error for end in self.ends):
            return False
        try:
            storage = open_storage(self.definition.study.storage, reads_only=True)
            counts = storage.read_counts(load_study(self.definition, storage)._study_id)
            storage.engine.dispose()
        except StorageError:  # the workers wait for it as well
            return False
        return not counts.running

    def _read_exit(self, task: Any) -> WorkerExit:
        """How the task ended; whatever is no end of a search is remembered, and told where others go on."""
        exceptions = self.ray.exceptions
        try:
            end: WorkerExit = self.ray.get(task)
        except (exceptions.TaskCancelledError, KeyboardInterrupt):
            end = WorkerExit("stopped", Interrupted())
        except exceptions.RayError as error:
            reason = f"a worker's task failed: {last_line(error)}"
            end = WorkerExit(reason, ClusterError(reason))
        if end.error and not isinstance(end.error, Drained) and end.reason not in {other.reason for other in self.ends}:
            logger.warning("a worker has ended: %s", end.error)  # the others may go on
        self.ends.append(end)
        return end

    def _start(self) -> Any:
        options = {"num_cpus": self.resources.cpus, "num_gpus": self.resources.gpus, "max_retries": _MAX_RETRIES}
        study = self.definition.study
        task = self.ray.remote(_work).options(name=f"worker of {study.name}", **options, **stay_on(self.node))
        return task.remote(study.storage, study.artifacts, self.data, self.resources)

    def _read_data(self) -> None:
        """Have the data read, or downloaded, once on each node, to be mapped by its workers."""
        for node in self.ray.nodes():
            name = node["NodeID"]
            if node["Alive"] and self.node in (None, name):
                reader = self.ray.remote(_read).options(num_cpus=0, **stay_on(name, is_soft=True))
                self.data[name] = reader.remote()


class Supervisor:
    """A detached actor that owns the tasks of a search; begun anew by Ray where its node dies."""

    def __init__(
        self, name: str, places: tuple[str, str], resources: Resources, node: str | None, n_workers: int
    ) -> None:
        self.name = name
        definition = load_definition(STUDY_FILE, storage=places[0], artifacts=places[1])
        tasks = Tasks(definition, resources, node)
        self.is_known = threading.Event()
        threading.Thread(target=self._run, args=(tasks, n_workers), daemon=True).start()

    def is_there(self) -> None:
        self.is_known.set()

    def _run(self, tasks: Tasks, n_workers: int) -> None:
        self.is_known.wait(_KNOWN_WITHIN)
        end = capture_exit(lambda: tasks.run(n_workers, Drain(), lambda: None))
        logger.warning("%s", end.reason)  # in Ray's log of this actor
        tasks.ray.kill(tasks.ray.get_actor(self.name), no_restart=True)


def _read() -> tuple[Any, ...]:
    """The study's data as arrays, which Ray keeps once on each node, and maps into its processes."""
    with _signals_restored():
        data = load_study_data(load_definition(STUDY_FILE))
    splits = (data.train, data.validation)
    arrays = [tensor.numpy() for split in splits for tensor in (split.images, split.labels)]
    return (*arrays, data.mean, data.std, data.class_names)


def _work(url: str, artifacts: str, data: Mapping[str, Any], resources: Resources) -> WorkerExit:
    """The task of a worker, on whatever node it is placed; `data` are references, by node."""
    ray = import_ray()
    with _signals_restored():
        drain = Drain().listen(signal.SIGINT, signal.SIGTERM)
        torch.set_num_threads(max(1, int(resources.cpus)))
        definition = load_definition(STUDY_FILE, storage=url, artifacts=artifacts)
        node = ray.get_runtime_context().get_node_id()

        def run() -> str:
            Folder(artifacts).check()
            storage = open_worker_storage(definition, drain, must_exist=True, waits=True)
            study = load_study(definition, storage)
            try:
                images = _map(ray.get(data[node]))
            except (KeyError, ray.exceptions.RayError):  # of a node that joined later, or they could not be read
                images = load_study_data(definition)
            stream = storage.join(study._study_id)
            device = list_devices()[0] if resources.gpus else "cpu"
            worker = Worker(definition, storage, stream, drain, data=images, device=device, node=node[:6])
            return worker.run()

        return capture_exit(run)


def _map(parts: tuple[Any, ...]) -> ImageData:
    """The data in memory that all workers of the node resources; nothing writes to it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        tensors = [torch.from_numpy(part) for part in parts if isinstance(part, np.ndarray)]
    return ImageData(Split(*tensors[:2]), Split(*tensors[2:]), *parts[4:])


@contextmanager
def _signals_restored() -> Iterator[None]:
    """Ray uses the process for other tasks afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stay_on(node: str | None, *, is_soft: bool = False) -> dict[str, Any]:
    """The options of a task that is to run on the node, if one is named."""
    if node is None:
        return {}
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=is_soft)}


def import_ray() -> Any:
    """Ray; raises `UsageError` where it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise UsageError("Ray is not installed here; pip install 'hpsearch[ray]'") from error
    return ray


def last_line(error: BaseException) -> str:
    """What matters in an error of Ray's, which holds tracebacks of other processes."""
    return ([line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[-1]
