"""The trainer: trains a network an epoch at a time, from a state that can be saved between any two batches."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import astuple, dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from hpsearch.config.definition import Metric
from hpsearch.config.space import TrainingHyperparameters
from hpsearch.data.augment import augment, erase, flip, jitter_color
from hpsearch.data.dataset import Split
from hpsearch.errors import Diverged
from hpsearch.training.averaging import WeightAverage
from hpsearch.training.gradients import choose_gradients, fast_matmul, join_parameters
from hpsearch.training.metrics import Score
from hpsearch.training.networks import Dropout, Network, OwnNetwork
from hpsearch.training.optimizers import build_optimizer, build_schedule
from hpsearch.training.randomness import GlobalRandom


@dataclass(frozen=True)
class EpochResult:
    """The result of an epoch: its number, starting at 1, mean loss, and accuracies (None without validation split).

    The `value` of the epoch is that of the `metric`.
    """

    epoch: int
    loss: float
    accuracy: float | None
    balanced_accuracy: float | None = None
    metric: Metric = "accuracy"

    @property
    def value(self) -> float:
        """Return the metric on the validation split. Raises `ValueError` without one."""
        value = self.accuracy if self.metric == "accuracy" else self.balanced_accuracy
        if value is None:
            raise ValueError("a search needs a validation split")
        return value


class Trainer:
    """Trains a network in place, an epoch at a time, on its current device, where the data must be.

    `for result in trainer` trains to the end; `run_epoch` is for those who want more control. The random numbers follow
    from `seed` and belong to the trainer: the `order` of the images, and the `noise` of dropout and augmentation. So
    trainers do not disturb each other, and a state that was saved and loaded continues bit for bit (on the CPU). A
    network of the user's may draw from the global generators, which continue from a state of the trainer's in an epoch.
    `mean` and `std`, one number a channel, normalized the images; `color_jitter` needs to know.
    `results` are those of the finished epochs; `n_batches` counts the batches trained in the current one. `threads` has
    `[epoch, n_batches, threads]` for the start and for each change of torch's number of threads, on which the last bits
    depend. `metric` is the value of a result, and `score` the latest measurement on the validation split.

    With the hyperparameter `ema`, the moving average of the weights is what is validated, and at the end the network
    has it. After the epochs in `averaged_after`, `averaged` has the metric of averaged weights: those of `ema`, or
    without it those over an epoch, which are not averaged after the last of these epochs. The training is the same.
    """

    def __init__(
        self,
        network: Network,
        split: Split,
        hyperparameters: TrainingHyperparameters,
        epochs: int,
        *,
        validation: Split | None = None,
        metric: Metric = "accuracy",
        seed: int = 0,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        averaged_after: Collection[int] = (),
    ) -> None:
        device = split.labels.device
        self.network, self.epochs, self.validation, self.metric = network, epochs, validation, metric
        self.score: Score | None = None
        self.results: list[EpochResult] = []
        self.n_batches = 0
        self.threads: list[list[int]] = []
        self.order = torch.Generator().manual_seed(seed)
        self.noise = torch.Generator(device).manual_seed(seed ^ 1)
        for layer in network.modules():
            if isinstance(layer, Dropout):
                layer.generator = self.noise
        self._global_random = GlobalRandom(seed ^ 2, device) if isinstance(network, OwnNetwork) else None
        if not isinstance(network, OwnNetwork):
            network.to(memory_format=torch.channels_last)  # faster for convolutions
        joined = join_parameters(network)
        self._hyperparameters, self._mean, self._std = hyperparameters, mean, std
        self._loader = split.loader(hyperparameters.batch_size, shuffle=True, generator=self.order)
        self._optimizer = build_optimizer([joined], hyperparameters)
        self._schedule = build_schedule(self._optimizer, hyperparameters, n_steps=epochs * len(self._loader))
        self._gradients = choose_gradients(network, hyperparameters.label_smoothing)
        self._n_parameters = 0 if isinstance(network, OwnNetwork) else joined.numel()  # for `fast_matmul`
        self._averaged_after, self._uses_average = averaged_after, hyperparameters.ema > 0
        n_averaged = 1 / (1 - hyperparameters.ema) if self._uses_average else len(self._loader)  # steps
        is_averaged = averaged_after or self._uses_average
        self._average = WeightAverage(network, joined, n_averaged) if is_averaged else None
        self.averaged: dict[int, float] = {}
        self._total_loss = torch.zeros((), device=device)  # of the current epoch
        self._epoch_order = self.order.get_state()  # at the start of the current epoch

    @property
    def is_done(self) -> bool:
        return len(self.results) >= self.epochs

    def __iter__(self) -> Iterator[EpochResult]:
        """Run the remaining epochs, and yield the result of each. Raises `Diverged`."""
        while not self.is_done:
            yield self.run_epoch()

    def run_epoch(self, check: Callable[[], None] = lambda: None) -> EpochResult:
        """Train to the end of the current epoch, validate, and return the result.

        `check` is called before each batch and may raise. The state can then be saved, and the next call continues in
        the middle of the epoch. Raises `Diverged` if the loss is not finite, and `ValueError` if the training is done.
        """
        if self.is_done:
            raise ValueError(f"the training is done after {self.epochs} epochs")
        with self._global_random.used() if self._global_random else nullcontext():
            return self._run_epoch(check)

    def _run_epoch(self, check: Callable[[], None]) -> EpochResult:
        gradients, optimizer, schedule, total_loss = self._gradients, self._optimizer, self._schedule, self._total_loss
        self.network.train()
        self.order.set_state(self._epoch_order)
        with fast_matmul(self._n_parameters):
            for images, labels in islice(self._loader, self.n_batches, None):
                check()
                self._note_threads()
                total_loss += gradients(self._change(images), labels)
                optimizer.step()
                schedule.step()
                self.n_batches += 1
                if self._average:
                    self._average.update(len(self.results) * len(self._loader) + self.n_batches)

        epoch, mean_loss = len(self.results) + 1, total_loss.item() / len(self._loader)
        if not math.isfinite(mean_loss):
            raise Diverged(f"training diverged: loss is {mean_loss} in epoch {epoch}")
        score = self.score = self._validate()
        accuracy, balanced = (None, None) if score is None else (score.accuracy, score.balanced_accuracy)
        if self._average and self.validation and epoch in self._averaged_after:
            with self._average.used(), self._global_random.kept() if self._global_random else nullcontext():
                self.averaged[epoch] = measure(self.network, self.validation).of(self.metric)
        self.results.append(EpochResult(epoch, mean_loss, accuracy, balanced, self.metric))
        self._end_averaging()
        self.n_batches, self._epoch_order = 0, self.order.get_state()
        total_loss.zero_()
        return self.results[-1]

    def _validate(self) -> Score | None:
        if self.validation is None:
            return None
        with self._average.used() if self._average and self._uses_average else nullcontext():
            return measure(self.network, self.validation)

    def _end_averaging(self) -> None:
        if self._average and self._uses_average:
            if self.is_done:
                self._average.keep()
        elif len(self.results) >= max(self._averaged_after, default=0):
            self._average = None

    def _change(self, images: Tensor) -> Tensor:
        """Return the images of a batch, changed at random as the hyperparameters say."""
        chosen = self._hyperparameters
        if chosen.flip:
            images = flip(images, self.noise)
        if chosen.augment or chosen.shear:
            images = augment(images, chosen.augment, self.noise, shear=chosen.shear)
        if chosen.color_jitter:
            images = jitter_color(images, chosen.color_jitter, self._mean, self._std, self.noise)
        if chosen.erase:
            images = erase(images, chosen.erase, self.noise)
        return images

    def _note_threads(self) -> None:
        n_threads = torch.get_num_threads()
        if not self.threads or self.threads[-1][-1] != n_threads:
            self.threads.append([len(self.results) + 1, self.n_batches, n_threads])

    def state_dict(self) -> dict[str, Any]:
        """Return the state, for `torch.save`. As with torch's modules, training on changes its tensors."""
        state = {
            "network": self.network.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "order": self._epoch_order,
            "noise": (self.noise.device.type, self.noise.get_state()),
            "total_loss": self._total_loss,
            "n_batches": self.n_batches,
            "threads": self.threads,
            "results": [astuple(result)[:4] for result in self.results],  # without the metric
        }
        if self._averaged_after:
            state["averaged"] = self.averaged
        if self._average and not self.is_done:
            state["average"] = self._average.tensors
        return state | ({"global_random": self._global_random.state_dict()} if self._global_random else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the state of a trainer with the same arguments."""
        self.network.load_state_dict(state["network"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._epoch_order = state["order"]
        device, noise = state["noise"]
        if device == self.noise.device.type:  # generators of other devices have other states
            self.noise.set_state(noise)
        if self._global_random:
            self._global_random.load_state_dict(state["global_random"])
        self.averaged = {**state.get("averaged", {})}  # unknown in older versions, so the average starts from here
        if self._average:
            self._average.load(state.get("average", self._average.live))
        self._total_loss.copy_(state["total_loss"])
        self.n_batches = state["n_batches"]
        self.threads = [[*each] for each in state.get("threads", ())]  # unknown in older versions
        # Older versions have the first three.
        self.results = [replace(EpochResult(*values[:4]), metric=self.metric) for values in state["results"]]
        self._end_averaging()


def measure(network: Network, split: Split) -> Score:
    """Return how many images of each class have their label as the most likely class."""
    with fast_matmul(0):  # in no other thread, but at the usual precision
        is_correct = network.predict_split(split).argmax(dim=1) == split.labels
    n_images = split.labels.bincount()
    correct = split.labels[is_correct].bincount(minlength=len(n_images))
    return Score(correct.tolist(), n_images.tolist())
