"""The built-in data sets: what is known of each before it is read, and how images and image files become pixels.

Checking a study file imports this module, so the packages that read images are imported at first use.
"""

import os
import zlib
from abc import ABC, abstractmethod
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpsearch.errors import DataError

if TYPE_CHECKING:
    from numpy import uint8
    from numpy.typing import NDArray
    from torch import Tensor


def data_folder(folder: Path | str | None = None) -> Path:
    """Return the folder of the data sets: the argument, else HPSEARCH_DATA, else the user's cache folder."""
    import platformdirs

    chosen = folder or os.environ.get("HPSEARCH_DATA")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("hpsearch")


@dataclass(frozen=True)
class DataSet(ABC):
    """A data set. An image file is prepared like MNIST's digits if `is_digit`, else like Fashion-MNIST's pictures."""

    n_train: int
    n_test: int
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    is_digit: bool

    @abstractmethod
    def read(self, folder: Path | str | None, *, is_train: bool) -> "tuple[Tensor, Tensor]":
        """Return the images of a part, uint8, shape (N, C, H, W), and their labels, int64. Raises `DataError`."""

    def read_image(self, file: Path | str) -> "NDArray[uint8]":
        """Return an image file as pixels like those of the data set, shape (C, H, W). Raises `ImageError`."""
        from hpsearch.data.image_files import read_image

        return read_image(file, self.image_shape, is_digit=self.is_digit)

    def find_missing(self, folder: Path | str | None) -> tuple[list[str], bool]:
        """Return the archives that are missing or corrupt, and whether all files are unpacked; downloads nothing."""
        return [], True


@dataclass(frozen=True)
class Torchvision(DataSet):
    """A data set in MNIST's file format, which a class of torchvision downloads if necessary."""

    class_name: str

    def read(self, folder: Path | str | None, *, is_train: bool) -> "tuple[Tensor, Tensor]":
        from filelock import FileLock

        root = data_folder(folder)
        raw = root / self.class_name / "raw"
        part, n_images = ("train", self.n_train) if is_train else ("t10k", self.n_test)
        files = [raw / f"{part}-images-idx3-ubyte", raw / f"{part}-labels-idx1-ubyte"]
        try:
            raw.mkdir(parents=True, exist_ok=True)
            # Other processes must not read half-unpacked files, and stdout is reserved for results.
            with FileLock(raw.parent / ".lock"), redirect_stdout(None):
                _check_unpacked(raw)
                if not all(file.exists() for file in files):
                    import torchvision  # takes as long to import as torch

                    getattr(torchvision.datasets, self.class_name)(root, train=is_train, download=True)
            images, labels = (_parse_idx(file.read_bytes()) for file in files)
            if not len(images) == len(labels) == n_images:
                raise ValueError(f"unexpected size: {len(images)} images, {len(labels)} labels")
        except (RuntimeError, OSError, EOFError, zlib.error, ValueError, AssertionError, TypeError) as error:
            # torchvision checks file headers with assertions, and torch raises RuntimeError for truncated data.
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"could not load {self.class_name} from {raw} or download it ({reason}). To work offline, put only its "
                "four *-ubyte.gz files into that folder, point --data or HPSEARCH_DATA at a folder with "
                f'{self.class_name}/raw, or set data.name = "digits" in the study file (no download)'
            ) from error
        return images.unsqueeze(1), labels.long()

    def find_missing(self, folder: Path | str | None) -> tuple[list[str], bool]:
        import torchvision

        raw = data_folder(folder) / self.class_name / "raw"
        resources = [(raw / name, md5) for name, md5 in getattr(torchvision.datasets, self.class_name).resources]
        if all(archive.with_suffix("").exists() for archive, _ in resources):
            return [], True
        is_complete = torchvision.datasets.utils.check_integrity
        return [archive.name for archive, md5 in resources if not is_complete(archive, md5)], False


def _parse_idx(content: bytes) -> "Tensor":
    """Parse an array of bytes in the IDX format: magic number, sizes, values (http://yann.lecun.com/exdb/mnist)."""
    import numpy as np
    import torch

    if content[:3] != b"\0\0\x08" or len(content) < 4:
        raise ValueError("not an IDX file")
    header = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:header], ">i4")
    return torch.from_numpy(np.frombuffer(content[header:], np.uint8).reshape(shape).copy())


def _check_unpacked(raw: Path) -> None:
    """Compare unpacked files with the CRC-32 and length in their archives' trailers (RFC 1952, 2.3.1)."""
    for archive in raw.glob("*.gz"):
        if not archive.with_suffix("").exists():
            continue
        content = archive.with_suffix("").read_bytes()
        trailer = archive.read_bytes()[-8:]
        if (zlib.crc32(content), len(content)) != tuple(int.from_bytes(trailer[i : i + 4], "little") for i in (0, 4)):
            raise ValueError(f"{archive.stem} is corrupt (does not match its archive)")


class Digits(DataSet):
    """scikit-learn's 8x8 digits, upscaled and centered like MNIST; they need no download.

    The test images are stratified by class, and always the same.
    """

    def read(self, folder: Path | str | None, *, is_train: bool) -> "tuple[Tensor, Tensor]":
        import numpy as np
        import torch
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        from hpsearch.data.image_files import scale_and_center

        bunch: Any = load_digits()
        parts = train_test_split(range(len(bunch.target)), test_size=self.n_test, stratify=bunch.target, random_state=0)
        rows = sorted(parts[0 if is_train else 1])
        images = np.stack([scale_and_center(image.astype(np.float32)) for image in bunch.images[rows]]).round()
        return torch.from_numpy(images.astype(np.uint8)).unsqueeze(1), torch.from_numpy(bunch.target[rows]).long()


_DIGITS = tuple("0123456789")
_KANA = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
_CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
MNIST = Torchvision(60_000, 10_000, _DIGITS, (1, 28, 28), is_digit=True, class_name="MNIST")
FASHION_MNIST = Torchvision(60_000, 10_000, _CLOTHES, (1, 28, 28), is_digit=False, class_name="FashionMNIST")
KMNIST = Torchvision(60_000, 10_000, _KANA, (1, 28, 28), is_digit=False, class_name="KMNIST")
DIGITS = Digits(1_437, 360, _DIGITS, (1, 28, 28), is_digit=True)
