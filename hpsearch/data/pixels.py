"""Pixels in a file that is mapped into memory, so that all processes that use it share one copy."""

import fcntl
import math
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpsearch.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class MappedPixels:
    """A file of uint8 pixels of shape (N, C, H, W). It is pickled as its path, and mapped where it is used."""

    file: Path
    shape: tuple[int, int, int, int]

    @cached_property
    def tensor(self) -> "Tensor":
        """The pixels; nothing is read before they are used. Raises `DataError` if the file is gone or damaged."""
        import torch

        self.lock()
        size = math.prod(self.shape)
        try:
            return torch.from_file(str(self.file), shared=False, size=size, dtype=torch.uint8).view(self.shape)
        except RuntimeError as error:
            raise DataError(f"cannot map the pixels of the images: {error}; run the command again") from error

    def lock(self) -> None:
        """Keep other processes from removing the file while this object lives: see `remove_unless_used`."""
        with suppress(OSError):  # some network file systems have no locks
            if "_stream" not in self.__dict__:
                self.__dict__["_stream"] = self.file.open("rb")
                fcntl.flock(self.__dict__["_stream"], fcntl.LOCK_SH | fcntl.LOCK_NB)

    def __getstate__(self) -> dict[str, Any]:
        return {"file": self.file, "shape": self.shape}


def remove_unless_used(file: Path) -> None:
    """Remove a file, unless a process has locked it, as one does that maps its pixels."""
    with suppress(OSError), file.open("rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.unlink()
