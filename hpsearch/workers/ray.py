"""Workers in a Ray cluster: one task per worker, and one per node that loads the data."""

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
from optuna.trial import TrialState

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
_MAX_RETRIES = 20  # how often Ray restarts a worker's task after its node died
_KNOWN_WITHIN = 20.0  # seconds a new supervisor waits until `detach` has seen it start
_POLL = 1.0  # seconds between two checks of the tasks
_CONNECT_TIMEOUT = 5.0  # seconds
_NAMESPACE = "hpsearch"
_ADVICE = (
    "start one with `ray start --head`, or give --address "
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
    """A connected Ray cluster, in which the workers of a study are launched."""

    def __init__(self, definition: StudyDefinition, resources: Resources) -> None:
        self.definition, self.resources = definition, resources
        self.nodes = [node for node in import_ray().nodes() if node["Alive"]]
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
        with _as_cluster_errors("the cluster failed"):
            return Tasks(self.definition, self.resources, self._required_node).run(n_workers, drain, on_poll)

    def detach(self, n_workers: int) -> str:
        """Start a detached actor that does the work of `run` after this process has exited; return its name."""
        ray = import_ray()
        name = f"{self.definition.study.name}-{uuid.uuid4().hex[:8]}"
        study, node = self.definition.study, self._required_node
        options = {"name": name, "lifetime": "detached", "max_restarts": -1, "num_cpus": 0, **stay_on(node)}
        places = study.storage, study.artifacts
        actor = ray.remote(Supervisor).options(**options).remote(name, places, self.resources, node, n_workers)
        with _as_cluster_errors("could not start the supervisor in the cluster"):
            ray.get(actor.confirm_start.remote())
        return name

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

    Ray's runtime environment takes this package, the study file and the data folder's path to the nodes, but no
    secrets. Raises `UsageError` if the storage URL contains a password or other nodes cannot reach a path, and
    `ClusterError` if no cluster responds.
    """
    ray = import_ray()
    if find_secrets(definition.study.storage):
        raise UsageError(
            "the storage URL contains a password, which would be visible in Ray; remove it, and set PGPASSWORD or "
            "~/.pgpass on each node before ray start"
        )
    address = address or os.environ.get("RAY_ADDRESS") or "auto"
    _check_port(address)
    data = folder or os.environ.get("HPSEARCH_DATA")
    with tempfile.TemporaryDirectory(prefix="hpsearch-") as files:
        Path(files, STUDY_FILE).write_text(definition.to_toml(), encoding="utf-8")
        environment = {
            "py_modules": [str(Path(__file__).parents[1])],
            "working_dir": files,
            "env_vars": {"HPSEARCH_DATA": _path_on_nodes(str(data))} if data else {},
        }
        options = {"namespace": _NAMESPACE, "log_to_driver": False, "logging_level": logging.ERROR}
        try:
            ray.init(address, runtime_env=environment, **options)
        except ConnectionError as error:
            where = "" if address == "auto" else f" at {address} ({last_line(error)})"
            raise ClusterError(f"no running Ray cluster found{where}; {_ADVICE}") from error
        except (ValueError, RuntimeError) as error:  # other versions of Ray or Python, among others
            where = "" if address == "auto" else f" at {address}"
            raise ClusterError(f"cannot use the Ray cluster{where}: {' '.join(str(error).split())}") from error
        try:
            yield Cluster(definition, resources)
        finally:
            ray.shutdown()


def _path_on_nodes(folder: str) -> str:
    """Return the absolute path of the folder; `~` stays, since each node has its own home."""
    return folder if folder.startswith("~") else str(Path(folder).absolute())


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
    import ray

    try:
        yield
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise ClusterError(f"{what}: {last_line(error)}") from error


class Tasks:
    """The worker tasks of a study, owned by this process (the command or a detached actor)."""

    def __init__(self, definition: StudyDefinition, resources: Resources, node: str | None) -> None:
        self.ray, self.definition, self.resources, self.node = import_ray(), definition, resources, node
        self.data: dict[str, Any] = {}
        self.exits: list[WorkerExit] = []

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
                    running.append(self._start())  # only its node was drained, not the search
            if not is_cancelled and (drain.event.is_set() or self._is_over()):
                is_cancelled = True  # including tasks that still wait for resources
                for task in running:
                    self.ray.cancel(task, force=False)
            on_poll()
        for end in self.exits:
            if end.error is None:  # this worker saw the budget used up, so the search is over
                return end.reason
        drain.check()
        raise self.exits[0].error or ClusterError

    def _is_over(self) -> bool:
        """Whether a worker has seen the budget used up and no trial is running."""
        if all(end.error for end in self.exits):
            return False
        try:
            storage = open_storage(self.definition.study.storage, reads_only=True)
            study = load_study(self.definition, storage)
            running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            storage.engine.dispose()
        except StorageError:  # the workers retry as well
            return False
        return not running

    def _read_exit(self, task: Any) -> WorkerExit:
        """Record and return how the task ended; log each distinct error once."""
        exceptions = self.ray.exceptions
        try:
            end: WorkerExit = self.ray.get(task)
        except (exceptions.TaskCancelledError, KeyboardInterrupt):
            end = WorkerExit("stopped", Interrupted())
        except exceptions.RayError as error:
            reason = f"a worker task failed: {last_line(error)}"
            end = WorkerExit(reason, ClusterError(reason))
        if (
            end.error
            and not isinstance(end.error, Drained)
            and end.reason not in {other.reason for other in self.exits}
        ):
            logger.warning("a worker stopped: %s", end.error)  # the others may continue
        self.exits.append(end)
        return end

    def _start(self) -> Any:
        options = {"num_cpus": self.resources.cpus, "num_gpus": self.resources.gpus, "max_retries": _MAX_RETRIES}
        study = self.definition.study
        task = self.ray.remote(_work).options(name=f"worker of {study.name}", **options, **stay_on(self.node))
        return task.remote(study.storage, study.artifacts, self.data, self.resources)

    def _read_data(self) -> None:
        """Load (or download) the data once on each node, where its workers map it into memory."""
        for node in self.ray.nodes():
            name = node["NodeID"]
            if node["Alive"] and self.node in (None, name):
                reader = self.ray.remote(_read).options(num_cpus=0, **stay_on(name, is_soft=True))
                self.data[name] = reader.remote()


class Supervisor:
    """A detached actor that owns the tasks of a search; Ray restarts it if its node dies."""

    def __init__(
        self, name: str, places: tuple[str, str], resources: Resources, node: str | None, n_workers: int
    ) -> None:
        self.name = name
        definition = load_definition(STUDY_FILE, storage=places[0], artifacts=places[1])
        tasks = Tasks(definition, resources, node)
        self.is_known = threading.Event()
        threading.Thread(target=self._run, args=(tasks, n_workers), daemon=True).start()

    def confirm_start(self) -> None:
        self.is_known.set()

    def _run(self, tasks: Tasks, n_workers: int) -> None:
        self.is_known.wait(_KNOWN_WITHIN)
        end = capture_exit(lambda: tasks.run(n_workers, Drain(), lambda: None))
        logger.warning("%s", end.reason)  # in Ray's log of this actor
        tasks.ray.kill(tasks.ray.get_actor(self.name), no_restart=True)


def _read() -> tuple[Any, ...]:
    """Load the study's data as arrays, which Ray stores once per node and maps into its processes."""
    with _signals_restored():
        data = load_study_data(load_definition(STUDY_FILE))
    splits = (data.train, data.validation)
    arrays = [tensor.numpy() for split in splits for tensor in (split.images, split.labels)]
    return (*arrays, data.mean, data.std, data.class_names)


def _work(url: str, artifacts: str, data: Mapping[str, Any], resources: Resources) -> WorkerExit:
    """Run a worker as a Ray task; `data` maps node ids to references of their data."""
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
            except (KeyError, ray.exceptions.RayError):  # the node joined later, or its data could not be loaded
                images = load_study_data(definition)
            stream = storage.join(study._study_id)
            device = list_devices()[0] if resources.gpus else "cpu"
            worker = Worker(definition, storage, stream, drain, data=images, device=device, node=node[:6])
            return worker.run()

        return capture_exit(run)


def _map(parts: tuple[Any, ...]) -> ImageData:
    """Wrap the arrays that all workers of the node share, without copying; nothing writes to them."""
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


def stay_on(node: str | None, *, is_soft: bool = False) -> dict[str, Any]:
    """Return the Ray options that pin a task to the node; empty if `node` is None."""
    if node is None:
        return {}
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=is_soft)}


def import_ray() -> Any:
    """Import Ray; raises `UsageError` if it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise UsageError("Ray is not installed; run: pip install 'hpsearch[ray]'") from error
    return ray


def last_line(error: BaseException) -> str:
    """Return the last line of a Ray error, without the tracebacks of other processes."""
    return ([line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[-1]
