"""The built-in data sets: what is known of each before it is read, and how images and image files become pixels.

What reads them is imported at first use, because checking a study file imports this module.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


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

    def read_image(self, file: Path | str) -> "NDArray[np.uint8]":
        """Return an image file as pixels like those of the data set, shape (C, H, W). Raises `ImageError`."""
        from hpsearch.data.image_files import read_image

        return read_image(file, self.image_shape, is_digit=self.is_digit)

    def find_missing(self, folder: Path | str | None) -> tuple[list[str], bool]:
        """Return the archives that `read` would download, and whether all files are unpacked; changes nothing."""
        return [], True


@dataclass(frozen=True)
class Torchvision(DataSet):
    """A data set in MNIST's file format, which a class of torchvision downloads."""

    class_name: str

    def read(self, folder: Path | str | None, *, is_train: bool) -> "tuple[Tensor, Tensor]":
        from hpsearch.data.mnist import read_idx

        return read_idx(self.class_name, folder, self.n_train if is_train else self.n_test, is_train=is_train)

    def find_missing(self, folder: Path | str | None) -> tuple[list[str], bool]:
        from hpsearch.data.mnist import find_missing

        return find_missing(self.class_name, folder)


class Digits(DataSet):
    """scikit-learn's digits, which need no download."""

    def read(self, folder: Path | str | None, *, is_train: bool) -> "tuple[Tensor, Tensor]":
        from hpsearch.data.digits import read_digits

        return read_digits(self.n_test, is_train=is_train)


_DIGITS = tuple("0123456789")
_KANA = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
_CLOTHES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
MNIST = Torchvision(60_000, 10_000, _DIGITS, (1, 28, 28), is_digit=True, class_name="MNIST")
FASHION_MNIST = Torchvision(60_000, 10_000, _CLOTHES, (1, 28, 28), is_digit=False, class_name="FashionMNIST")
KMNIST = Torchvision(60_000, 10_000, _KANA, (1, 28, 28), is_digit=False, class_name="KMNIST")
DIGITS = Digits(1_437, 360, _DIGITS, (1, 28, 28), is_digit=True)
