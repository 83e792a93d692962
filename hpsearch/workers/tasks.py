"""What a search has running in a Ray cluster: a task for each worker, and one on each node that reads the data."""

import logging
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hpsearch.config.definition import StudyDefinition, load_definition
from hpsearch.data.dataset import ImageData, Split
from hpsearch.errors import ClusterError, Drained, Interrupted, Stopped, StorageError, UsageError
from hpsearch.search.objective import load_study_data
from hpsearch.search.study import load_study
from hpsearch.storage.artifacts import Folder
from hpsearch.storage.rdb import open_storage
from hpsearch.training.devices import list_devices
from hpsearch.workers.shutdown import Drain
from hpsearch.workers.worker import End, Worker, end_of, open_worker_storage

logger = logging.getLogger(__name__)

STUDY_FILE = "study.toml"  # in the working directory of all tasks
_MAX_RETRIES = 20  # of a worker's task, by Ray, each for a node that died
_KNOWN_WITHIN = 20.0  # seconds in which the command that made a supervisor hears of it
_POLL = 1.0  # seconds between two looks at the tasks


@dataclass(frozen=True)
class Share:
    """What each worker has of its node: processor cores and GPUs, which may be fractions."""

    cpus: float = 1.0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        for name, share in (("--cpus-per-worker", self.cpus), ("--gpus-per-worker", self.gpus)):
            if share > 1 and share != int(share):
                raise UsageError(f"{name} {share}: Ray gives a part of one, or whole ones, so use {int(share)}")


class Tasks:
    """The tasks of a study's workers, owned by this process: the command's, or a detached actor's."""

    def __init__(self, definition: StudyDefinition, share: Share, node: str | None) -> None:
        self.ray, self.definition, self.share, self.node = import_ray(), definition, share, node
        self.data: dict[str, Any] = {}
        self.ends: list[End] = []

    def run(self, n_workers: int, drain: Drain, on_poll: Callable[[], None]) -> str:
        self._read_data()
        running = [self._start() for _ in range(n_workers)]
        is_cancelled = False
        while running:
            ended, running = self.ray.wait(running, num_returns=1, timeout=_POLL)
            for task in ended:
                error = self._end_of(task).error
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
            tally = storage.tally(load_study(self.definition, storage)._study_id)
            storage.engine.dispose()
        except StorageError:  # the workers wait for it as well
            return False
        return not tally.running

    def _end_of(self, task: Any) -> End:
        """How the task ended; whatever is no end of a search is remembered, and told where others go on."""
        exceptions = self.ray.exceptions
        try:
            end: End = self.ray.get(task)
        except (exceptions.TaskCancelledError, KeyboardInterrupt):
            end = End("stopped", Interrupted())
        except exceptions.RayError as error:
            reason = f"a worker's task failed: {last_line(error)}"
            end = End(reason, ClusterError(reason))
        if end.error and not isinstance(end.error, Drained) and end.reason not in {other.reason for other in self.ends}:
            logger.warning("a worker has ended: %s", end.error)  # the others may go on
        self.ends.append(end)
        return end

    def _start(self) -> Any:
        options = {"num_cpus": self.share.cpus, "num_gpus": self.share.gpus, "max_retries": _MAX_RETRIES}
        study = self.definition.study
        task = self.ray.remote(_work).options(name=f"worker of {study.name}", **options, **stay_on(self.node))
        return task.remote(study.storage, study.artifacts, self.data, self.share)

    def _read_data(self) -> None:
        """Have the data read, or downloaded, once on each node, to be mapped by its workers."""
        for node in self.ray.nodes():
            name = node["NodeID"]
            if node["Alive"] and self.node in (None, name):
                reader = self.ray.remote(_read).options(num_cpus=0, **stay_on(name, is_soft=True))
                self.data[name] = reader.remote()


class Supervisor:
    """A detached actor that owns the tasks of a search; begun anew by Ray where its node dies."""

    def __init__(self, name: str, places: tuple[str, str], share: Share, node: str | None, n_workers: int) -> None:
        self.name = name
        definition = load_definition(STUDY_FILE, storage=places[0], artifacts=places[1])
        tasks = Tasks(definition, share, node)
        self.is_known = threading.Event()
        threading.Thread(target=self._run, args=(tasks, n_workers), daemon=True).start()

    def is_there(self) -> None:
        self.is_known.set()

    def _run(self, tasks: Tasks, n_workers: int) -> None:
        self.is_known.wait(_KNOWN_WITHIN)
        end = end_of(lambda: tasks.run(n_workers, Drain(), lambda: None))
        logger.warning("%s", end.reason)  # in Ray's log of this actor
        tasks.ray.kill(tasks.ray.get_actor(self.name), no_restart=True)


def _read() -> tuple[Any, ...]:
    """The study's data as arrays, which Ray keeps once on each node, and maps into its processes."""
    with _signals_restored():
        data = load_study_data(load_definition(STUDY_FILE))
    splits = (data.train, data.validation)
    arrays = [tensor.numpy() for split in splits for tensor in (split.images, split.labels)]
    return (*arrays, data.mean, data.std, data.class_names)


def _work(url: str, artifacts: str, data: Mapping[str, Any], share: Share) -> End:
    """The task of a worker, on whatever node it is placed; `data` are references, by node."""
    ray = import_ray()
    with _signals_restored():
        drain = Drain().listen(signal.SIGINT, signal.SIGTERM)
        torch.set_num_threads(max(1, int(share.cpus)))
        definition = load_definition(STUDY_FILE, storage=url, artifacts=artifacts)
        node = ray.get_runtime_context().get_node_id()

        def run() -> str:
            Folder(artifacts).check()
            storage = open_worker_storage(definition, drain, must_exist=True, is_patient=True)
            study = load_study(definition, storage)
            try:
                images = _map(ray.get(data[node]))
            except (KeyError, ray.exceptions.RayError):  # of a node that joined later, or they could not be read
                images = load_study_data(definition)
            stream = storage.join(study._study_id)
            device = list_devices()[0] if share.gpus else "cpu"
            worker = Worker(definition, storage, stream, drain, data=images, device=device, node=node[:6])
            return worker.run()

        return end_of(run)


def _map(parts: tuple[Any, ...]) -> ImageData:
    """The data in memory that all workers of the node share; nothing writes to it."""
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
