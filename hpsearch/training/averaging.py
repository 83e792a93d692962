"""The moving average of a network's weights, which is more accurate in mid-training than the weights themselves."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

_WARMUP = 10  # steps: the average of n steps has a horizon of at most n / 10 + 1


class WeightAverage:
    """The exponential moving average of tensors over about the last `n_steps` calls of `update`.

    It is in `tensors`. Those of which it is made, a network's parameters and buffers, are `live`, and it leaves them as
    they are. Tensors that are not floating-point numbers, such as counters, are not averaged.
    """

    def __init__(self, tensors: Sequence[Tensor], n_steps: int) -> None:
        self.live = [tensor.detach() for tensor in tensors if tensor.is_floating_point()]
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
            own.copy_(other)

    @contextmanager
    @torch.no_grad()
    def used(self) -> Iterator[None]:
        """Give the network the average inside the `with` block."""
        saved = [live.clone() for live in self.live]
        self._copy(self.tensors)
        try:
            yield
        finally:
            self._copy(saved)

    def _copy(self, tensors: Sequence[Tensor]) -> None:
        for live, tensor in zip(self.live, tensors, strict=True):
            live.copy_(tensor)
