"""The built-in data sets: what is known of each before it is read, and how images and image files become pixels.

Checking a study file imports this module, so the packages that read images are imported at first use.
"""

import gzip
import hashlib
import io
import os
import sys
import tempfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpsearch.errors import DataError
from hpsearch.plugins import DATA_SETS, find

if TYPE_CHECKING:
    from numpy import uint8
    from numpy.typing import NDArray
    from PIL import Image
    from torch import Tensor

    from hpsearch.data.inventory import Inventory
    from hpsearch.data.pixels import MappedPixels

_FILES = {part: (f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte") for part in ("train", "t10k")}
# The checksums of the archives, as in torchvision's `resources`; all three data sets have the same files and sizes.
_MD5 = {
    "MNIST": {
        "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    },
    "FashionMNIST": {
        "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    },
    "KMNIST": {
        "train-images-idx3-ubyte.gz": "bdb82020997e1d708af4cf47b453dcf7",
        "train-labels-idx1-ubyte.gz": "e144d726b3acfaa3e44228e80efcd344",
        "t10k-images-idx3-ubyte.gz": "5c965bf0a639b31b8f53240b1b52f4d7",
        "t10k-labels-idx1-ubyte.gz": "7320c461ea6c1c855c0b718fb2a4b134",
    },
}


def data_folder(folder: Path | str | None = None) -> Path:
    """Return the folder of the data sets: the argument, else HPSEARCH_DATA, else the user's cache folder.

    Raises `DataError` if that is in a home folder that is unknown.
    """
    import platformdirs

    chosen = folder or os.environ.get("HPSEARCH_DATA")
    try:
        path = Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("hpsearch")
    except RuntimeError:
        path = Path("~")
    if str(path).startswith("~"):
        raise DataError(
            f"no home folder found for {chosen or '~/.cache'}; set HOME, or point HPSEARCH_DATA at the data"
        )
    return path


@dataclass(frozen=True)
class DataSet(ABC):
    """A data set. An image file is prepared like MNIST's digits if `is_digit`, else like Fashion-MNIST's pictures.

    `title` is what messages call it, and `folder` where its files are: see `data_folder`. `hub_id` is its id at
    https://huggingface.co/datasets, which a model card names. The user's own images have an
    `inventory` that lists them.
    """

    n_train: int
    n_test: int
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    is_digit: bool
    title: str = field(default="", kw_only=True)
    folder: Path | str | None = field(default=None, kw_only=True)
    hub_id: str | None = field(default=None, kw_only=True)
    inventory: "Inventory | None" = field(default=None, kw_only=True)

    @abstractmethod
    def read(self, *, is_train: bool) -> "tuple[Tensor, Tensor]":
        """Return the images of a part, uint8, shape (N, C, H, W), and their labels, int64. Raises `DataError`."""

    def map_training(
        self, on_read: Callable[[int, int], None] = lambda n_done, n_total: None
    ) -> "tuple[MappedPixels, Tensor] | None":
        """Return what `read` does for the training part as a file that processes share, if there is one.

        `on_read` gets the number of images read and of all, if it is read.
        """
        return None

    def split(self, labels: "Tensor", validation: int, train: int | None, seed: int) -> "tuple[Tensor, Tensor]":
        """Return the row numbers of the training and of the validation images, both stratified by class.

        They are drawn with the seed. `validation` and `train` are numbers of images; without `train`, all remaining
        ones are used for training. Raises `DataError`.
        """
        import torch
        from sklearn.model_selection import train_test_split

        try:
            training, held_out = train_test_split(
                range(len(labels)), train_size=train, test_size=validation, stratify=labels, random_state=seed
            )
        except ValueError as error:
            raise DataError(
                f"cannot split {len(labels)} images into data.train = {train or 'the rest'} and "
                f"data.validation = {validation} with every class in both: {error}"
            ) from error
        return torch.tensor(sorted(training)), torch.tensor(sorted(held_out))

    @property
    def preparation(self) -> dict[str, Any]:
        """Return how an image file becomes pixels, for the config of a model."""
        return {"kind": "digit" if self.is_digit else "picture"}

    def read_image(self, image: "Path | str | Image.Image") -> "NDArray[uint8]":
        """Return an image file or Pillow image as pixels like those of the data set, shape (C, H, W).

        Raises `ImageError`.
        """
        from hpsearch.data.image_files import read_image

        return read_image(image, self.image_shape, is_digit=self.is_digit)

    def locate(self) -> Path | None:
        """Return the folder in which `read` looks for files, or None if it needs none."""
        return None

    def find_missing(self) -> list[str]:
        """Return the archives that `read` would download; changes nothing."""
        return []


@dataclass(frozen=True)
class Torchvision(DataSet):
    """A data set in MNIST's file format, which a class of torchvision downloads if necessary."""

    class_name: str

    def read(self, *, is_train: bool) -> "tuple[Tensor, Tensor]":
        """Read unpacked files or archives, and write nothing, unless one of them is missing and is downloaded."""
        raw, n_images, problem = self.locate(), self.n_train if is_train else self.n_test, ""
        files = [raw / name for name in _FILES["train" if is_train else "t10k"]]
        try:
            try:
                contents = [_read(file) for file in files]
            except _Missing as missing:
                problem = f"{missing}; "
                self._download(raw, files)
                contents = [_read(file) for file in files]
            for file in files:
                self._check_archive(file)
            images, labels = map(_parse_idx, contents)
            if not len(images) == len(labels) == n_images:
                raise ValueError(f"unexpected size: {len(images)} images, {len(labels)} labels")
        except (RuntimeError, OSError, EOFError, ValueError, AssertionError, TypeError) as error:
            # torchvision checks file headers with assertions, and torch raises RuntimeError for truncated data.
            # A message about a download lists the failure of each mirror; the last one is enough.
            reason = " ".join(str(error).split()).rpartition("got: ")[2] or type(error).__name__
            raise DataError(
                f"could not load {self.class_name} from {raw} or download it ({problem}{reason})\n"
                "To work offline, put only its four *-ubyte.gz files into it, point --data or HPSEARCH_DATA at "
                f'a folder with {self.class_name}/raw, or set data.name = "digits" in the study file (no download).'
            ) from error
        return images.unsqueeze(1), labels.long()

    def find_missing(self) -> list[str]:
        raw = self.locate()
        return [f"{name}.gz" for names in _FILES.values() for name in names if not _is_there(raw / name)]

    def locate(self) -> Path:
        return data_folder(self.folder) / self.class_name / "raw"

    def _check_archive(self, file: Path) -> None:
        """Raise `ValueError` if a file is read from an archive that is not one of this data set."""
        archive = file.with_name(f"{file.name}.gz")
        if file.exists():
            return
        digest = hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest()
        if digest != _MD5[self.class_name][archive.name]:
            raise ValueError(f"{archive.name} is not that of {self.class_name} (its MD5 differs); remove it")

    def _download(self, raw: Path, files: list[Path]) -> None:
        """Download the archives that are missing; each appears complete."""
        import torchvision  # takes as long to import as torch
        from filelock import FileLock

        raw.mkdir(parents=True, exist_ok=True)
        with (
            FileLock(raw.parent / ".lock"),
            tempfile.TemporaryDirectory(dir=raw.parent) as temporary,
            redirect_stdout(None),  # stdout is reserved for results
            # torchvision draws a bar for each archive, in a pipe as well
            nullcontext() if sys.stderr and sys.stderr.isatty() else redirect_stderr(io.StringIO()),
        ):
            if all(_is_there(file) for file in files):  # another process has downloaded them
                return
            getattr(torchvision.datasets, self.class_name)(temporary, download=True)
            for archive in Path(temporary, self.class_name, "raw").glob("*.gz"):
                if not _is_there(raw / archive.stem):
                    archive.replace(raw / archive.name)


class _Missing(ValueError):
    """A file is missing, and so is an intact archive of it."""


def _read(file: Path) -> bytes:
    """Return the content of an unpacked file, else of its archive; if there are both, they must agree."""
    archive = file.with_name(f"{file.name}.gz")
    if not file.exists():
        try:
            return gzip.decompress(archive.read_bytes())
        except FileNotFoundError as error:
            raise _Missing(f"{archive.name} is missing") from error
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise _Missing(f"{archive.name} is damaged") from error
    content = file.read_bytes()
    if archive.exists():  # its trailer has the CRC-32 and the length (RFC 1952, 2.3.1)
        trailer = archive.read_bytes()[-8:]
        if (zlib.crc32(content), len(content)) != tuple(int.from_bytes(trailer[i : i + 4], "little") for i in (0, 4)):
            raise ValueError(f"{file.name} is corrupt (does not match its archive)")
    return content


def _is_there(file: Path) -> bool:
    try:
        return file.exists() or bool(_read(file))
    except _Missing:
        return False


def _parse_idx(content: bytes) -> "Tensor":
    """Parse an array of bytes in the IDX format: magic number, sizes, values (http://yann.lecun.com/exdb/mnist)."""
    import numpy as np
    import torch

    if content[:3] != b"\0\0\x08" or len(content) < 4:
        raise ValueError("not an IDX file")
    header = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:header], ">i4")
    return torch.from_numpy(np.frombuffer(content[header:], np.uint8).reshape(shape).copy())


class Digits(DataSet):
    """scikit-learn's 8x8 digits, upscaled and centered like MNIST; they need no download.

    The test images are stratified by class, and always the same.
    """

    def read(self, *, is_train: bool) -> "tuple[Tensor, Tensor]":
        import numpy as np
        import torch
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        from hpsearch.data.mnist_images import scale_and_center

        bunch: Any = load_digits()
        parts = train_test_split(range(len(bunch.target)), test_size=self.n_test, stratify=bunch.target, random_state=0)
        rows = sorted(parts[0 if is_train else 1])
        images = np.stack([scale_and_center(image.astype(np.float32)) for image in bunch.images[rows]]).round()
        return torch.from_numpy(images.astype(np.uint8)).unsqueeze(1), torch.from_numpy(bunch.target[rows]).long()


_DIGITS = tuple("0123456789")
_KANA = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
_CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
MNIST = Torchvision(60_000, 10_000, _DIGITS, (1, 28, 28), is_digit=True, class_name="MNIST", hub_id="ylecun/mnist")
FASHION_MNIST = Torchvision(
    *(60_000, 10_000, _CLOTHES, (1, 28, 28)),
    is_digit=False,
    class_name="FashionMNIST",
    hub_id="zalando-datasets/fashion_mnist",
)
KMNIST = Torchvision(60_000, 10_000, _KANA, (1, 28, 28), is_digit=False, class_name="KMNIST", hub_id="tanganke/kmnist")
DIGITS = Digits(1_437, 360, _DIGITS, (1, 28, 28), is_digit=True)


def find_data_set(name: str, folder: Path | str | None = None) -> DataSet:
    """Return a built-in data set, whose files are in `folder`: see `data_folder`."""
    data_set: DataSet = find(DATA_SETS, name)
    return replace(data_set, title=name, folder=folder)
