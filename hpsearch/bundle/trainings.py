"""Trains several networks at once, in processes of this machine."""

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hpsearch.config.definition import StudyDefinition
from hpsearch.data.dataset import ImageData
from hpsearch.data.sets import DataSet
from hpsearch.errors import HpsearchError, WorkerError
from hpsearch.training.run import load_study_data
from hpsearch.workers.processes import Processes, Send, Task, share
from hpsearch.workers.shutdown import Drain
from hpsearch.workers.worker import WorkerExit

Train = Callable[[int, ImageData, Callable[[], None]], Iterator[Any]]
"""Trains the network of an index on the data, and yields what it has to tell; calls the function before each batch."""
_SAVE_SECONDS = 10  # in which networks in training are saved when another one failed, or after Ctrl-C


def train_all(
    definition: StudyDefinition,
    data: ImageData,
    train: Train,
    indices: Sequence[int],
    *,
    n_workers: int,
    devices: Sequence[str],
    folder: DataSet | Path | str | None,
    merges: bool = False,
) -> Iterator[tuple[int, Any]]:
    """Train the networks of all indices, and yield the index with each value that `train` yields.

    `n_workers` processes share the work, the devices and the cores. `train` must be picklable, and `folder` is that of
    the data. With `merges`, the training split has the validation images, too. No process outlives the iteration.
    Raises the errors of `train`, and `WorkerError` if a process dies.
    """
    n_workers = min(n_workers, len(indices))
    if merges:
        data = replace(data, train=data.merged())
    if n_workers <= 1:
        here = data.to(devices[0])
        for i in indices:
            yield from ((i, value) for value in train(i, here, lambda: None))
        return
    shared = share(data, folder)
    n_threads = max(1, torch.get_num_threads() // n_workers)

    def prepare(slot: int) -> tuple[str, Task]:
        device = devices[slot % len(devices)]
        options: dict[str, Any] = {"device": device, "n_threads": n_threads, "merges": merges}
        return f"training {slot}", partial(_work, definition, shared, train, [*indices], n_started, **options)

    processes = Processes(prepare)
    n_started = multiprocessing.get_context("forkserver").Value("i")
    try:
        for slot in range(n_workers):
            processes.start(slot)
        while processes.running:
            for _, message in processes.wait():
                match message:
                    case (i, value):
                        yield i, value
                    case WorkerExit(error=HpsearchError() as error):
                        raise error
                    case WorkerExit(is_dead=True):
                        raise WorkerError(
                            "a training process was killed (out of memory?); run the command again, it repeats nothing "
                            "that is finished"
                        )
    finally:
        try:
            processes.stop()
            end = time.monotonic() + _SAVE_SECONDS
            while processes.running and time.monotonic() < end:
                list(processes.wait())
        finally:
            processes.kill()


def _work(
    definition: StudyDefinition,
    data: ImageData | DataSet | Path | str | None,
    train: Train,
    indices: Sequence[int],
    n_started: Any,
    drain: Drain,
    send: Send,
    *,
    device: str,
    n_threads: int,
    merges: bool,
) -> str:
    """Train what no other process has taken. `data` is the data, or the folder to load them from."""
    torch.set_num_threads(n_threads)
    if not isinstance(data, ImageData):
        loaded = load_study_data(definition, data)
        data = replace(loaded, train=loaded.merged()) if merges else loaded
    here = data.to(device)
    while True:
        with n_started.get_lock():
            place = n_started.value
            n_started.value += 1
        if place >= len(indices):
            return "all networks are trained"
        for value in train(indices[place], here, drain.check):
            send((indices[place], value))
