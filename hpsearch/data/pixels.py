"""Pixels in a file that is mapped into memory, so that all processes that use it share one copy."""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class MappedPixels:
    """A file of uint8 pixels of shape (N, C, H, W). It is pickled as its path, and mapped where it is used."""

    file: Path
    shape: tuple[int, int, int, int]

    @cached_property
    def tensor(self) -> "Tensor":
        """The pixels; nothing is read before they are used."""
        import torch

        size = math.prod(self.shape)
        return torch.from_file(str(self.file), shared=False, size=size, dtype=torch.uint8).view(self.shape)

    def __getstate__(self) -> dict[str, Any]:
        return {"file": self.file, "shape": self.shape}
