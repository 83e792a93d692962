"""Loads, splits, normalizes and batches image data that stays in memory as tensors.

The training split of a data set is divided into training and validation images. Only `load_test` reads the test set,
and a search never calls it.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hpsearch.data.inventory import Inventory
from hpsearch.data.pixels import MappedPixels
from hpsearch.data.sets import DataSet, find_data_set

_N_HASHED = 4096  # least images of a split, if it has as many
_N_COUNTED = 2**26  # pixels, from which on their counts are measured instead of floats
_N_PART = 64  # images at a time, where all could fill the memory


@dataclass(frozen=True)
class Split(Dataset[tuple[Tensor, ...]]):
    """Normalized images, float32, shape (N, C, H, W), and their labels, int64, shape (N,); a dataset of torch."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, ...]:
        return self.take(slice(i, i + 1))[0], self.labels[i]

    def take(self, rows: Tensor | slice) -> Tensor:
        """Return the normalized images with these row numbers, which are on the device of the images."""
        return self.images[rows] if isinstance(rows, slice) else self.images.index_select(0, rows)

    def share_memory(self) -> None:
        """Move the split to shared memory."""
        self.images.share_memory_()
        self.labels.share_memory_()

    def to(self, device: torch.device | str) -> Self:
        return type(self)(self.images.to(device), self.labels.to(device))

    def loader(
        self, batch_size: int, *, shuffle: bool = False, generator: torch.Generator | None = None
    ) -> DataLoader[tuple[Tensor, ...]]:
        """Return a DataLoader of (images, labels) batches, each indexed from the tensors in memory."""
        return _Loader(self, batch_size, shuffle=shuffle, generator=generator)


class RawSplit(Split):
    """A split of raw pixels, uint8, shape (N, C, H, W), each batch of which is normalized when it is taken.

    It takes a quarter of the memory, and pixels in a file are not copied. `rows` are the numbers of its images; None
    means all. `images` are all of them, normalized now.
    """

    pixels: MappedPixels | Tensor
    rows: Tensor | None
    mean: Sequence[float]
    std: Sequence[float]

    def __init__(
        self,
        pixels: MappedPixels | Tensor,
        labels: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        rows: Tensor | None = None,
    ) -> None:
        self.__dict__.update(pixels=pixels, labels=labels, mean=mean, std=std, rows=rows)

    @property
    def images(self) -> Tensor:
        return self.take(slice(None))

    def take(self, rows: Tensor | slice) -> Tensor:
        pixels = self.pixels.tensor if isinstance(self.pixels, MappedPixels) else self.pixels
        if self.rows is not None:
            rows = self.rows[rows]
        chosen = pixels[rows] if isinstance(rows, slice) else pixels.index_select(0, rows)
        return normalise(chosen, self.mean, self.std)

    def share_memory(self) -> None:
        if isinstance(self.pixels, Tensor):
            self.pixels.share_memory_()
        self.labels.share_memory_()

    def to(self, device: torch.device | str) -> Self:
        """Return the split with its pixels in the memory of a device; on the CPU, those in a file stay there."""
        if torch.device(device).type == "cpu" and self.labels.device.type == "cpu":
            return self
        pixels = self.pixels.tensor if isinstance(self.pixels, MappedPixels) else self.pixels
        chosen = pixels if self.rows is None else pixels.index_select(0, self.rows)
        return type(self)(chosen.to(device), self.labels.to(device), self.mean, self.std)


@dataclass(frozen=True)
class ImageData:
    """The data of a search: the training and validation split, and the statistics that normalize them.

    `mean` and `std` have a number for each channel. They are computed from the training split's pixels, scaled to
    [0, 1]. The user's own images have an `inventory` that lists them, test images included.
    """

    train: Split
    validation: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]
    inventory: Inventory | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.train.take(slice(0, 1)).shape[1:]
        return channels, height, width

    def to(self, device: torch.device | str) -> Self:
        return replace(self, train=self.train.to(device), validation=self.validation.to(device))

    def describe(self) -> dict[str, Any]:
        """Return what tells the data from others: numbers of images, image shape, classes and a SHA-256.

        The digest is of all labels and of the pixels of about 8,000 images, which takes 0.03 s. They are rounded to 8
        bits, since the last bits of `mean` and `std` depend on the machine. Of the user's own images, it is that of the
        inventory, and there are the numbers of images of each class, test images included.
        """
        sizes = {
            "train": len(self.train),
            "validation": len(self.validation),
            "image_shape": list(self.image_shape),
            "class_names": list(self.class_names),
        }
        if self.inventory:
            return sizes | {"counts": self.inventory.counts, "sha256": self.inventory.sha256}
        digest = hashlib.sha256()
        for split in (self.train, self.validation):
            digest.update(split.labels.cpu().numpy().tobytes())
            step = max(len(split) // _N_HASHED, 1)
            for start in range(0, len(split), step * _N_PART):
                sample = split.take(slice(start, start + step * _N_PART, step)).cpu()
                pixels = denormalise(sample, self.mean, self.std).round_().clamp_(0, 255)
                digest.update(pixels.to(torch.uint8).numpy().tobytes())
        return sizes | {"sha256": digest.hexdigest()}

    def share_memory(self) -> Self:
        """Move the data to shared memory, and return it."""
        for split in (self.train, self.validation):
            split.share_memory()
        return self

    def split_of(self, images: Tensor, labels: Tensor) -> Split:
        """Normalize raw pixels (uint8), such as those of `load_test`, like the training split."""
        return RawSplit(images, labels, self.mean, self.std)

    def merged(self) -> Split:
        """Return the training and validation images as one split, to retrain the winner on."""
        parts = self.train, self.validation
        labels = torch.cat([part.labels for part in parts])
        if isinstance(self.train, RawSplit) and isinstance(self.validation, RawSplit):
            rows = [part.rows for part in (self.train, self.validation) if part.rows is not None]
            return RawSplit(self.train.pixels, labels, self.mean, self.std, torch.cat(rows))
        return Split(torch.cat([part.images for part in parts]), labels)


def load_data(
    data_set: DataSet | str,
    folder: Path | str | None = None,
    *,
    validation: int,
    train: int | None = None,
    split_seed: int = 0,
) -> ImageData:
    """Load the training and validation split of a data set, or of the built-in one with this name in `folder`.

    They are what `DataSet.split` returns. Raises `DataError` if the data cannot be loaded or downloaded.
    """
    data_set = _find(data_set, folder)
    mapped = data_set.map_training()
    images, labels = (mapped[0].tensor, mapped[1]) if mapped else data_set.read(is_train=True)
    training, held_out = data_set.split(labels, validation, train, split_seed)
    mean, std = _measure_pixels(images, training)

    def take(rows: Tensor) -> Split:
        if mapped:
            return RawSplit(mapped[0], labels[rows], mean, std, rows)
        return Split(normalise(images[rows], mean, std), labels[rows])

    return ImageData(take(training), take(held_out), mean, std, data_set.class_names, data_set.inventory)


def _find(data_set: DataSet | str, folder: Path | str | None) -> DataSet:
    return find_data_set(data_set, folder) if isinstance(data_set, str) else data_set


def _measure_pixels(images: Tensor, rows: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel of these raw images, with pixels scaled to [0, 1].

    It uses one thread, since the last bits depend on their number.
    """
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        measured = [_measure_channel(images[:, channel], rows) for channel in range(images.shape[1])]
    finally:
        torch.set_num_threads(n_threads)
    means, deviations = zip(*measured, strict=True)
    return means, tuple(deviation or 1.0 for deviation in deviations)  # 0 if all pixels are alike


def _measure_channel(shades: Tensor, rows: Tensor) -> tuple[float, float]:
    if len(rows) * shades[0].numel() <= _N_COUNTED:
        pixels = shades[rows].float().div_(255)
        return pixels.mean().item(), pixels.std().item()
    parts = [shades[part].flatten().bincount(minlength=256) for part in rows.split(_N_PART)]
    counts = torch.stack(parts).sum(0).double()
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = (counts @ values) / counts.sum()
    return mean.item(), ((counts @ (values - mean).square()) / (counts.sum() - 1)).sqrt().item()


def load_test(data_set: DataSet | str, folder: Path | str | None = None) -> tuple[Tensor, Tensor]:
    """Load the test set of a data set, or of the built-in one with this name in `folder`.

    Returns raw pixels, uint8, shape (N, C, H, W), and labels, int64, shape (N,). Raises `DataError`.
    """
    return _find(data_set, folder).read(is_train=False)


def check_test(data_set: DataSet | str, folder: Path | str | None = None) -> None:
    """Raise `DataError` if the test set cannot be read. Returns nothing of it, so that nothing can depend on it."""
    load_test(data_set, folder)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return raw pixels, uint8, (N, C, H, W), as float32, normalized with the mean and deviation of each channel."""
    pixels = images.float().div_(255)
    if len(mean) == 1:
        return pixels.sub_(mean[0]).div_(std[0])
    return pixels.sub_(_by_channel(mean, pixels)).div_(_by_channel(std, pixels))


def denormalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return the pixels of normalized images, float32, from 0 to 255."""
    return images.mul(_by_channel([each * 255 for each in std], images)).add_(
        _by_channel([each * 255 for each in mean], images)
    )


def _by_channel(numbers: Sequence[float], images: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=images.dtype, device=images.device)[:, None, None]


class _Loader(DataLoader[tuple[Tensor, ...]]):
    """A DataLoader that indexes a batch at a time, faster than torch's loop over images; the CPU draws their order.

    When shuffling, a last batch of a single image is dropped because batch norm cannot train on it.
    """

    batch_size: int

    def __init__(self, split: Split, batch_size: int, *, shuffle: bool, generator: torch.Generator | None) -> None:
        super().__init__(split, batch_size, generator=generator)
        self.split, self.shuffle = split, shuffle

    def __len__(self) -> int:
        n_rows = len(self.split)
        drops_last = self.shuffle and n_rows > self.batch_size and n_rows % self.batch_size == 1
        return -(-n_rows // self.batch_size) - drops_last

    def __iter__(self) -> Any:
        split, labels, size = self.split, self.split.labels, self.batch_size
        if self.shuffle:
            rows = torch.randperm(len(labels), generator=self.generator).to(labels.device)
            labels = labels.index_select(0, rows)
            image_batches = (split.take(batch) for batch in rows.split(size))
        else:
            image_batches = (split.take(slice(i, i + size)) for i in range(0, len(split), size))
        return islice(zip(image_batches, labels.split(self.batch_size), strict=True), len(self))
