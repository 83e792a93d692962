"""Image data as resident tensors: read, split, normalised, loaded in batches, augmented.

The training split of a data set is divided into training and validation images. The test set is read by `load_test`
alone, which a search never calls.
"""

import os
import zlib
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np
import platformdirs
import torch
from filelock import FileLock
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset

from hpsearch.data.image_files import place
from hpsearch.errors import DataError

CLASS_NAMES = {
    "mnist": tuple("0123456789"),
    "fashion-mnist": (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
    "kmnist": ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
    "digits": tuple("0123456789"),
}
_TORCHVISION_NAMES = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}
_N_DIGITS_TEST = 360


@dataclass(frozen=True)
class Split:
    """Images, float32 and normalised, shape (N, 1, H, W), and their labels, int64, shape (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Self:
        return type(self)(self.images.to(device), self.labels.to(device))

    def loader(
        self, batch_size: int, *, shuffle: bool = False, generator: torch.Generator | None = None
    ) -> DataLoader[tuple[Tensor, Tensor]]:
        """A DataLoader of (images, labels) batches; each batch is one indexing of the resident tensors."""
        return _Loader(_Batches(self, batch_size, shuffle=shuffle, generator=generator), batch_size=None)


@dataclass(frozen=True)
class ImageData:
    """What a search may see: the training and the validation split, and how their pixels were normalised.

    `mean` and `std` are those of the training split's pixels, scaled to [0, 1].
    """

    train: Split
    validation: Split
    mean: float
    std: float
    class_names: tuple[str, ...]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    def to(self, device: torch.device | str) -> Self:
        return type(self)(self.train.to(device), self.validation.to(device), self.mean, self.std, self.class_names)

    def share_memory(self) -> Self:
        """The same data, moved into memory that other processes can map."""
        for split in (self.train, self.validation):
            split.images.share_memory_()
            split.labels.share_memory_()
        return self

    def split_of(self, images: Tensor, labels: Tensor) -> Split:
        """Raw pixels (uint8) and labels, such as those of `load_test`, normalised like the training split."""
        return Split(normalise(images, self.mean, self.std), labels)

    def merged(self) -> Split:
        """Training and validation images together, for the retraining of the winner."""
        return Split(
            torch.cat([self.train.images, self.validation.images]),
            torch.cat([self.train.labels, self.validation.labels]),
        )


def data_folder(folder: Path | str | None = None) -> Path:
    """The folder that holds the data sets: the argument, else HPSEARCH_DATA, else the user's cache folder."""
    chosen = folder or os.environ.get("HPSEARCH_DATA")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("hpsearch")


def load_data(
    name: str, folder: Path | str | None = None, *, validation: int, train: int | None = None, split_seed: int = 0
) -> ImageData:
    """The training and validation split of a data set, stratified by class and drawn with `split_seed`.

    `validation` and `train` are numbers of images; without `train`, all that remain are trained on. Raises
    `DataError` where the data are missing and cannot be had, or are damaged.
    """
    images, labels = _read(name, folder, is_train=True)
    training, held_out = _stratified(labels, validation, train, split_seed)
    pixels = images[training].float().div_(255)
    mean, std = pixels.mean().item(), pixels.std().item()
    return ImageData(
        train=Split(normalise(images[training], mean, std), labels[training]),
        validation=Split(normalise(images[held_out], mean, std), labels[held_out]),
        mean=mean,
        std=std,
        class_names=CLASS_NAMES[name],
    )


def load_test(name: str, folder: Path | str | None = None) -> tuple[Tensor, Tensor]:
    """The sealed test set as raw pixels, uint8, shape (N, 1, H, W), and labels, int64; raises `DataError`."""
    return _read(name, folder, is_train=False)


def inspect_files(name: str, folder: Path | str | None = None) -> tuple[list[str], bool]:
    """The archives that would have to be downloaded, being absent or damaged; and whether all files are unpacked.

    Nothing is downloaded or unpacked.
    """
    if name == "digits":
        return [], True
    import torchvision

    class_name = _TORCHVISION_NAMES[name]
    raw = data_folder(folder) / class_name / "raw"
    resources = [(raw / archive, md5) for archive, md5 in getattr(torchvision.datasets, class_name).resources]
    if all(archive.with_suffix("").exists() for archive, _ in resources):
        return [], True
    is_whole = torchvision.datasets.utils.check_integrity
    return [archive.name for archive, md5 in resources if not is_whole(archive, md5)], False


def normalise(images: Tensor, mean: float, std: float) -> Tensor:
    """Raw pixels (uint8) as float32 with the given mean and deviation taken out, same shape."""
    return images.float().div_(255).sub_(mean).div_(std)


def augment(images: Tensor, strength: float) -> Tensor:
    """The images, each shifted, rotated and scaled by random amounts of its own, in one resampling of the batch.

    At strength 1 the amounts are uniform up to 1/7 of the image (4 pixels of 28), 20 degrees and 20 percent; other
    strengths scale them. Pixels from outside repeat the border. Shape (N, C, H, W), unchanged.
    """
    n, device = len(images), images.device
    angle, scale, *shift = (torch.rand(4, n, device=device) * 2 - 1) * strength
    angle, scale = angle * (torch.pi / 9), 1 + scale * 0.2
    cosine, sine = torch.cos(angle) / scale, torch.sin(angle) / scale
    # The coordinates span 2 across the image, so 2/7 of them are 1/7 of the image.
    x, y = shift[0] * (2 / 7), shift[1] * (2 / 7)
    height, width = images.shape[2:]
    row, column = (torch.arange(1, 2 * size, 2, device=device) / size - 1 for size in (height, width))
    # As affine_grid, which multiplies one small matrix after the other and takes longer than the resampling.
    across = (torch.outer(cosine, column) + x[:, None])[:, None, :] - torch.outer(sine, row)[:, :, None]
    down = (torch.outer(sine, column) + y[:, None])[:, None, :] + torch.outer(cosine, row)[:, :, None]
    grid = torch.stack([across, down], dim=-1)
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


class _Batches(IterableDataset[tuple[Tensor, Tensor]]):
    """A split in batches, each gathered from the resident tensors at once; their order is drawn on the CPU.

    When shuffling, a last batch of a single image is left out: batch norm cannot train on it.
    """

    def __init__(self, split: Split, batch_size: int, *, shuffle: bool, generator: torch.Generator | None) -> None:
        self.split, self.batch_size, self.shuffle, self.generator = split, batch_size, shuffle, generator

    def __len__(self) -> int:
        n_rows = len(self.split)
        drops_last = self.shuffle and n_rows > self.batch_size and n_rows % self.batch_size == 1
        return -(-n_rows // self.batch_size) - drops_last

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels, n_rows = self.split.images, self.split.labels, len(self.split)
        if self.shuffle:
            rows = torch.randperm(n_rows, generator=self.generator).to(labels.device)
            labels = labels.index_select(0, rows)
            image_batches = (images.index_select(0, batch) for batch in rows.split(self.batch_size))
        else:
            image_batches = iter(images.split(self.batch_size))
        return islice(zip(image_batches, labels.split(self.batch_size), strict=True), len(self))


class _Loader(DataLoader[tuple[Tensor, Tensor]]):
    """A DataLoader that hands out ready batches; without worker processes, torch's own loop would only take time."""

    def __iter__(self) -> Any:
        return iter(self.dataset)


def _read(name: str, folder: Path | str | None, *, is_train: bool) -> tuple[Tensor, Tensor]:
    if name == "digits":
        return _read_digits(is_train=is_train)
    images, labels = _read_idx(_TORCHVISION_NAMES[name], data_folder(folder), is_train=is_train)
    return images.unsqueeze(1), labels


def _read_idx(class_name: str, root: Path, *, is_train: bool) -> tuple[Tensor, Tensor]:
    """The images (N, H, W) and labels of an MNIST-like data set, which torchvision fetches and unpacks if need be."""
    raw = root / class_name / "raw"
    part = "train" if is_train else "t10k"
    files = [raw / f"{part}-images-idx3-ubyte", raw / f"{part}-labels-idx1-ubyte"]
    try:
        raw.mkdir(parents=True, exist_ok=True)
        # A second process would read half-unpacked files; and torchvision prints on stdout, which belongs to data.
        with FileLock(raw.parent / ".lock"), redirect_stdout(None):
            _check_unpacked(raw)
            if not all(file.exists() for file in files):
                import torchvision  # takes as long to import as torch

                getattr(torchvision.datasets, class_name)(root, train=is_train, download=True)
        images, labels = (_parse_idx(file.read_bytes()) for file in files)
        if not len(images) == len(labels) == (60_000 if is_train else 10_000):
            raise ValueError(f"it has {len(images)} images and {len(labels)} labels")
    except (RuntimeError, OSError, EOFError, zlib.error, ValueError, AssertionError, TypeError) as error:
        # torchvision asserts what a file's header says, and torch raises RuntimeError for too few bytes.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{class_name} can neither be read from {raw} nor be downloaded to it ({reason}). Put its four archives "
            "(*-ubyte.gz), and nothing else, into that folder, name another data folder with --data or HPSEARCH_DATA, "
            'or use data.name = "digits", which needs no download'
        ) from error
    return images, labels.long()


def _parse_idx(content: bytes) -> Tensor:
    """An array of bytes in the format of http://yann.lecun.com/exdb/mnist: magic number, sizes, values."""
    if content[:3] != b"\0\0\x08" or len(content) < 4:
        raise ValueError("an unpacked file is not in the IDX format")
    header = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:header], ">i4")
    return torch.from_numpy(np.frombuffer(content[header:], np.uint8).reshape(shape).copy())


def _check_unpacked(raw: Path) -> None:
    """Compare unpacked files with the CRC-32 and length at the end of their archives (RFC 1952, 2.3.1)."""
    for archive in raw.glob("*.gz"):
        if not archive.with_suffix("").exists():
            continue
        content = archive.with_suffix("").read_bytes()
        trailer = archive.read_bytes()[-8:]
        if (zlib.crc32(content), len(content)) != tuple(int.from_bytes(trailer[i : i + 4], "little") for i in (0, 4)):
            raise ValueError(f"{archive.stem} is damaged: it differs from its archive")


def _read_digits(*, is_train: bool) -> tuple[Tensor, Tensor]:
    """scikit-learn's 8x8 digits, enlarged and placed in 28x28 pixels the way of MNIST."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    placed = np.stack([place(image.astype(np.float32)) for image in bunch.images])
    images = torch.from_numpy(placed.round().astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    training, test = _stratified(labels, _N_DIGITS_TEST, None, seed=0)
    chosen = training if is_train else test
    return images[chosen], labels[chosen]


def _stratified(labels: Tensor, n_held_out: int, n_training: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """Row numbers of two disjoint parts with the class proportions of the labels, in the data set's order."""
    from sklearn.model_selection import train_test_split

    try:
        training, held_out = train_test_split(
            range(len(labels)), train_size=n_training, test_size=n_held_out, stratify=labels, random_state=seed
        )
    except ValueError as error:
        raise DataError(
            f"{len(labels)} images cannot be split into data.train = {n_training or 'the rest'} and "
            f"data.validation = {n_held_out} with every class in both: {error}"
        ) from error
    return torch.tensor(sorted(training)), torch.tensor(sorted(held_out))
