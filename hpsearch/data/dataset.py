"""Loads, splits, normalizes and batches image data that stays in memory as tensors.

The training split of a data set is divided into training and validation images. Only `load_test` reads the test set,
and a search never calls it.
"""

import hashlib
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from hpsearch.data.sets import DataSet
from hpsearch.errors import DataError
from hpsearch.plugins import DATA_SETS, find

_N_HASHED = 4096  # least images of a split, if it has as many


@dataclass(frozen=True)
class Split:
    """Normalized images, float32, shape (N, 1, H, W), and their labels, int64, shape (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Self:
        return type(self)(self.images.to(device), self.labels.to(device))

    def loader(
        self, batch_size: int, *, shuffle: bool = False, generator: torch.Generator | None = None
    ) -> DataLoader[tuple[Tensor, ...]]:
        """Return a DataLoader of (images, labels) batches, each indexed from the tensors in memory."""
        return _Loader(self, batch_size, shuffle=shuffle, generator=generator)


@dataclass(frozen=True)
class ImageData:
    """The data of a search: the training and validation split, and the statistics that normalize them.

    `mean` and `std` are computed from the training split's pixels, scaled to [0, 1].
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

    def describe(self) -> dict[str, Any]:
        """Return what tells the data from others: numbers of images, image shape, classes and a SHA-256.

        The digest is of all labels and of the pixels of about 8,000 images, which takes 0.03 s. They are rounded to 8
        bits, since the last bits of `mean` and `std` depend on the machine.
        """
        digest = hashlib.sha256()
        for split in (self.train, self.validation):
            sample = split.images[:: max(len(split) // _N_HASHED, 1)].cpu()
            pixels = sample.mul(self.std * 255).add_(self.mean * 255).round_().clamp_(0, 255)
            digest.update(split.labels.cpu().numpy().tobytes() + pixels.to(torch.uint8).numpy().tobytes())
        return {
            "train": len(self.train),
            "validation": len(self.validation),
            "image_shape": list(self.image_shape),
            "class_names": list(self.class_names),
            "sha256": digest.hexdigest(),
        }

    def share_memory(self) -> Self:
        """Move the data to shared memory, and return it."""
        for split in (self.train, self.validation):
            split.images.share_memory_()
            split.labels.share_memory_()
        return self

    def split_of(self, images: Tensor, labels: Tensor) -> Split:
        """Normalize raw pixels (uint8), such as those of `load_test`, like the training split."""
        return Split(normalise(images, self.mean, self.std), labels)

    def merged(self) -> Split:
        """Return the training and validation images as one split, to retrain the winner on."""
        parts = self.train, self.validation
        return Split(torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts]))


def load_data(
    name: str, folder: Path | str | None = None, *, validation: int, train: int | None = None, split_seed: int = 0
) -> ImageData:
    """Load the training and validation split of a data set, stratified by class, with the seed `split_seed`.

    `validation` and `train` are numbers of images; without `train`, all remaining images are used for training. Raises
    `DataError` if the data cannot be loaded or downloaded.
    """
    data_set: DataSet = find(DATA_SETS, name)
    images, labels = data_set.read(folder, is_train=True)
    training, held_out = _stratify(labels, validation, train, split_seed)
    mean, std = _measure_pixels(images[training])

    def take(rows: Tensor) -> Split:
        return Split(normalise(images[rows], mean, std), labels[rows])

    return ImageData(take(training), take(held_out), mean, std, data_set.class_names)


def _measure_pixels(images: Tensor) -> tuple[float, float]:
    """Return mean and standard deviation of raw pixels, in one thread, since the last bits depend on their number."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        pixels = images.float().div_(255)
        return pixels.mean().item(), pixels.std().item()
    finally:
        torch.set_num_threads(n_threads)


def load_test(name: str, folder: Path | str | None = None) -> tuple[Tensor, Tensor]:
    """Load the test set: raw pixels, uint8, shape (N, 1, H, W), and labels, int64. Raises `DataError`."""
    data_set: DataSet = find(DATA_SETS, name)
    return data_set.read(folder, is_train=False)


def check_test(name: str, folder: Path | str | None = None) -> None:
    """Raise `DataError` if the test set cannot be read. Returns nothing of it, so that nothing can depend on it."""
    load_test(name, folder)


def normalise(images: Tensor, mean: float, std: float) -> Tensor:
    """Return raw pixels (uint8) as float32, normalized with the given mean and standard deviation."""
    return images.float().div_(255).sub_(mean).div_(std)


class _Loader(DataLoader[tuple[Tensor, ...]]):
    """A DataLoader that indexes a batch at a time, faster than torch's loop over images; the CPU draws their order.

    When shuffling, a last batch of a single image is dropped because batch norm cannot train on it.
    """

    batch_size: int

    def __init__(self, split: Split, batch_size: int, *, shuffle: bool, generator: torch.Generator | None) -> None:
        super().__init__(TensorDataset(split.images, split.labels), batch_size, generator=generator)
        self.split, self.shuffle = split, shuffle

    def __len__(self) -> int:
        n_rows = len(self.split)
        drops_last = self.shuffle and n_rows > self.batch_size and n_rows % self.batch_size == 1
        return -(-n_rows // self.batch_size) - drops_last

    def __iter__(self) -> Any:
        images, labels = self.split.images, self.split.labels
        if self.shuffle:
            rows = torch.randperm(len(labels), generator=self.generator).to(labels.device)
            labels = labels.index_select(0, rows)
            image_batches = (images.index_select(0, batch) for batch in rows.split(self.batch_size))
        else:
            image_batches = iter(images.split(self.batch_size))
        return islice(zip(image_batches, labels.split(self.batch_size), strict=True), len(self))


def _stratify(labels: Tensor, n_held_out: int, n_training: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """Return the row numbers of two disjoint parts, training and held out, sorted and stratified by label."""
    from sklearn.model_selection import train_test_split

    try:
        training, held_out = train_test_split(
            range(len(labels)), train_size=n_training, test_size=n_held_out, stratify=labels, random_state=seed
        )
    except ValueError as error:
        raise DataError(
            f"cannot split {len(labels)} images into data.train = {n_training or 'the rest'} and "
            f"data.validation = {n_held_out} with every class in both: {error}"
        ) from error
    return torch.tensor(sorted(training)), torch.tensor(sorted(held_out))
