"""The training loop, its resumable state, and the results that it passes to callbacks."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from hpsearch.config.space import Hyperparameters
from hpsearch.data.augment import augment
from hpsearch.data.dataset import Split
from hpsearch.errors import Diverged, Drained, StorageUnavailable
from hpsearch.training.gradients import choose_gradients, fast_matmul, join_parameters
from hpsearch.training.networks import Network
from hpsearch.training.optimizers import build_optimizer, build_schedule


@dataclass(frozen=True)
class EpochResult:
    """The result of an epoch: its number, starting at 1, mean loss, and accuracy (None without a validation split)."""

    epoch: int
    loss: float
    accuracy: float | None

    @property
    def value(self) -> float:
        """Return the validation accuracy. Raises `ValueError` without a validation split."""
        if self.accuracy is None:
            raise ValueError("a search needs a validation split")
        return self.accuracy


Callback = Callable[[EpochResult], None]
State = dict[str, Any]


class Checkpoint(Protocol):
    """Saves training states; `storage/checkpoints.py` implements it with files."""

    def write_if_due(self, capture: Callable[[], State]) -> None: ...

    def write(self, state: State) -> None: ...


@dataclass
class Progress:
    """The state of a training, from which it can be resumed between any two batches.

    `order` is the state of `generator` at the start of the current epoch, `n_batches` is the number of batches trained
    in it, and `total_loss` is the sum of their losses.
    """

    network: Network
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    generator: torch.Generator
    total_loss: Tensor
    order: Tensor
    n_batches: int = 0
    results: list[EpochResult] = field(default_factory=list)

    def finish_epoch(self, result: EpochResult) -> None:
        self.results.append(result)
        self.order = self.generator.get_state()
        self.n_batches = 0
        self.total_loss.zero_()

    def capture(self) -> State:
        """Return the state for `torch.save`; after `restore`, training continues bit for bit (on the CPU)."""
        algorithm, key, *rest = np.random.get_state()
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "order": self.order,
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None,
            "numpy": (algorithm, torch.from_numpy(key), *rest),
            "total_loss": self.total_loss,
            "n_batches": self.n_batches,
            "results": [astuple(result) for result in self.results],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.order = state["order"]
        self.generator.set_state(self.order)
        torch.set_rng_state(state["torch"])
        if state["cuda"] is not None and self._device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self._device)
        algorithm, key, *rest = state["numpy"]
        np.random.set_state((algorithm, key.numpy(), *rest))
        self.total_loss.copy_(state["total_loss"])
        self.n_batches = state["n_batches"]
        self.results = read_results(state)

    @property
    def _device(self) -> torch.device:
        return self.total_loss.device


def read_results(state: Mapping[str, Any]) -> list[EpochResult]:
    """Return the results of the epochs that a captured state has finished."""
    return [EpochResult(*values) for values in state["results"]]


def train(
    network: Network,
    train_split: Split,
    hyperparameters: Hyperparameters,
    epochs: int,
    *,
    validation: Split | None = None,
    generator: torch.Generator | None = None,
    callbacks: Sequence[Callback] = (),
    before_batch: Callable[[], None] = lambda: None,
    checkpoint: Checkpoint | None = None,
    resumed: State | None = None,
) -> EpochResult:
    """Train the network in place, on its current device, where the data must be; return the result of the last epoch.

    `generator` draws the order of the images. `before_batch` is called before each batch and may raise to end the
    training. `checkpoint` is written after epochs, and when `Drained` or `StorageUnavailable` ends the training;
    `resumed` is the state to continue from. Raises `Diverged` after an epoch whose loss is not finite.
    """
    generator = generator or torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    loader = train_split.loader(hyperparameters.batch_size, shuffle=True, generator=generator)
    network.to(memory_format=torch.channels_last)  # faster for convolutions
    joined = join_parameters(network)
    optimizer = build_optimizer([joined], hyperparameters)
    schedule = build_schedule(optimizer, hyperparameters, n_steps=epochs * len(loader))
    gradients = choose_gradients(network, hyperparameters.label_smoothing)
    total_loss = torch.zeros((), device=train_split.labels.device)
    progress = Progress(network, optimizer, schedule, generator, total_loss, order=generator.get_state())
    if resumed:
        progress.restore(resumed)

    try:
        for epoch in range(len(progress.results) + 1, epochs + 1):
            network.train()
            with fast_matmul(joined.numel()):
                for images, labels in islice(loader, progress.n_batches, None):
                    before_batch()
                    if hyperparameters.augment:
                        images = augment(images, hyperparameters.augment)
                    total_loss += gradients(images, labels)
                    optimizer.step()
                    schedule.step()
                    progress.n_batches += 1

            mean_loss = total_loss.item() / len(loader)
            if not math.isfinite(mean_loss):
                raise Diverged(f"training diverged: loss is {mean_loss} in epoch {epoch}")
            accuracy = None if validation is None else measure_accuracy(network, validation)
            progress.finish_epoch(EpochResult(epoch, mean_loss, accuracy))
            for callback in callbacks:
                callback(progress.results[-1])
            if checkpoint:
                checkpoint.write_if_due(progress.capture)
    except (Drained, StorageUnavailable):  # raised by `before_batch` or a callback, between batches
        if checkpoint:
            checkpoint.write(progress.capture())
        raise
    return progress.results[-1]


def measure_accuracy(network: Network, split: Split) -> float:
    """Return the share of images whose most likely class is their label, in [0, 1]."""
    predicted = network.predict_proba(split.images).argmax(dim=1)
    return int((predicted == split.labels).sum()) / len(split)


def seed_everything(seed: int) -> torch.Generator:
    """Seed torch's global random state, and return a seeded generator for the order of the images."""
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)
