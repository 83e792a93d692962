"""The global random numbers of torch, NumPy and Python, from which networks of the user's may draw."""

import random
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

turn = threading.RLock()  # held by the one thread that trains, or builds a network: threads share torch's settings


class GlobalRandom:
    """A state of the global generators. Inside `used` they continue from it, and afterwards are as they were before."""

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._is_used = False
        self._state: dict[str, Any] = {
            "torch": torch.Generator().manual_seed(seed).get_state(),
            "numpy": _numpy_state(np.random.RandomState(seed % 2**32).get_state(legacy=False)),
            "python": random.Random(seed).getstate(),  # noqa: S311 - no secret
        }
        if self.device.type == "cuda":
            self._state["cuda"] = torch.Generator(self.device).manual_seed(seed).get_state()

    @contextmanager
    def used(self) -> Iterator[None]:
        """Let the global generators continue from this state in the `with` block. One thread at a time is inside."""
        with turn, self.kept():
            self._write(self._state)
            self._is_used = True
            try:
                yield
            finally:
                self._state, self._is_used = self._read(), False

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Afterwards, the global generators are as they were before the `with` block."""
        before = self._read()
        try:
            yield
        finally:
            self._write(before)

    def state_dict(self) -> dict[str, Any]:
        """Return the state, for `torch.save`."""
        return self._read() if self._is_used else self._state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the state of another; generators of other devices have other states."""
        self._state |= {name: each for name, each in state.items() if name in self._state}

    def _read(self) -> dict[str, Any]:
        numpy = _numpy_state(np.random.get_state(legacy=False))
        state = {"torch": torch.get_rng_state(), "numpy": numpy, "python": random.getstate()}
        return state | ({"cuda": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else {})

    def _write(self, state: Mapping[str, Any]) -> None:
        torch.set_rng_state(state["torch"])
        np.random.set_state(state["numpy"])
        random.setstate(state["python"])
        if "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.device)


def _numpy_state(state: Any) -> dict[str, Any]:
    """Return a state of NumPy's legacy generator as plain numbers, which `torch.load` reads with `weights_only`."""
    inner = state["state"]
    return {**state, "state": {"key": inner["key"].tolist(), "pos": int(inner["pos"])}}
