"""The moving average of a network's weights, which is more accurate in mid-training than the weights themselves."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_WARMUP = 10  # steps: the average of n steps has a horizon of at most n / 10 + 1


class WeightAverage:
    """The exponential moving average of a network's parameters over about the last `n_steps` calls of `update`.

    The running statistics of batch normalization, which belong to the parameters, are averaged too; other buffers, such
    as counters and masks, are not. The average is in `tensors`; those of which it is made are `live`. `joined` has all
    parameters of the network.
    """

    def __init__(self, network: nn.Module, joined: Tensor, n_steps: float) -> None:
        self._buffers = [*network.buffers()]
        self.live = [joined.detach(), *_running_statistics(network)]
        self.tensors = [tensor.clone() for tensor in self.live]
        self._n_steps = n_steps

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the tensors after a step, counted from 1."""
        weight = max(1 / self._n_steps, _WARMUP / (_WARMUP + step))
        for average, live in zip(self.tensors, self.live, strict=True):
            average.lerp_(live, weight)

    def load(self, tensors: Sequence[Tensor]) -> None:
        """Continue from the `tensors` of another average."""
        for own, other in zip(self.tensors, tensors, strict=True):
            own.copy_(other)  # which may be on another device

    @torch.no_grad()
    def keep(self) -> None:
        """Give the network the average for good."""
        _copy(self.tensors, self.live)

    @contextmanager
    @torch.no_grad()
    def used(self) -> Iterator[None]:
        """Give the network the average inside the `with` block; afterwards parameters and buffers are as before."""
        changed = [*self.live, *self._buffers]
        saved = [tensor.clone() for tensor in changed]
        _copy(self.tensors, self.live)
        try:
            yield
        finally:
            _copy(saved, changed)


def _copy(tensors: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    for tensor, target in zip(tensors, targets, strict=True):
        if not target.equal(tensor):  # a constant buffer may not be writable
            target.copy_(tensor)


def _running_statistics(network: nn.Module) -> Iterator[Tensor]:
    for module in network.modules():
        for name in ("running_mean", "running_var"):
            if isinstance(buffer := getattr(module, name, None), Tensor):
                yield buffer
