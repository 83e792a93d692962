"""The user's own images as a data set, and on which side each image is: training, validation or test."""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpsearch.data.inventory import Inventory, show_name
from hpsearch.data.sets import DataSet
from hpsearch.errors import DataError

if TYPE_CHECKING:
    from numpy import uint8
    from numpy.typing import NDArray
    from PIL import Image
    from torch import Tensor

    from hpsearch.data.pixels import MappedPixels

DEFAULT_SHARE = 0.15  # of the images, for validation and for the test side each
MAX_CLASSES = 1_000  # the confusion matrix of more is larger than a model folder may have it
_N_NAMED = 20


@dataclass(frozen=True)
class OwnImages(DataSet):
    """The user's own images. `inventory` lists all of them, and has the side of each.

    `load` yields the pixels of the images with these numbers, uint8, shape (C, H, W). `validation` is the share of the
    training part that is held out, or the number of images, where the inventory has no validation images. `read_test`
    returns the images and labels of a test part that is not in the inventory.
    """

    inventory: Inventory = field(kw_only=True)
    load: "Callable[[Sequence[int]], Iterable[NDArray[uint8]]]" = field(kw_only=True, repr=False)
    validation: float = field(kw_only=True)
    read_test: "Callable[[], tuple[Tensor, Tensor]] | None" = field(default=None, kw_only=True, repr=False)

    @classmethod
    def of(
        cls,
        inventory: Inventory,
        load: "Callable[[Sequence[int]], Iterable[NDArray[uint8]]]",
        *,
        title: str,
        folder: Path | str | None,
        image_shape: tuple[int, int, int],
        validation: float,
        read_test: "Callable[[], tuple[Tensor, Tensor]] | None" = None,
        n_test: int = 0,
    ) -> "OwnImages":
        """Return the data set of the images in the inventory, and `n_test` others that `read_test` returns."""
        n_listed = inventory.sides.count("test")
        return cls(
            len(inventory.sides) - n_listed,
            n_listed + n_test,
            tuple(inventory.class_names),
            image_shape,
            is_digit=False,
            title=title,
            folder=folder,
            inventory=inventory,
            load=load,
            validation=validation,
            read_test=read_test,
        )

    def read(self, *, is_train: bool) -> "tuple[Tensor, Tensor]":
        """Return the images and labels of a part: the training images are mapped from a file, test images in memory."""
        import numpy as np
        import torch

        if is_train:
            pixels, labels = self.map_training()
            return pixels.tensor, labels
        if self.read_test:
            return self.read_test()
        rows = self.rows(is_train=False)
        images = np.empty((len(rows), *self.image_shape), dtype=np.uint8)
        for i, image in enumerate(self.load(rows)):
            images[i] = image
        return torch.from_numpy(images), self._labels(rows)

    def map_training(
        self, on_read: Callable[[int, int], None] = lambda n_done, n_total: None
    ) -> "tuple[MappedPixels, Tensor]":
        from hpsearch.data.tensors import store_pixels

        rows = self.rows(is_train=True)

        def read() -> "Iterator[NDArray[uint8]]":
            for n_done, image in enumerate(self.load(rows), 1):
                yield image
                on_read(n_done, len(rows))

        digests = [self.inventory.digests[row] for row in rows]
        return store_pixels(digests, self.image_shape, read), self._labels(rows)

    def _labels(self, rows: Sequence[int]) -> "Tensor":
        import torch

        return torch.tensor([self.inventory.labels[row] for row in rows], dtype=torch.int64)

    def locate(self) -> Path | None:
        return None if self.folder is None else Path(self.folder)

    def rows(self, *, is_train: bool) -> list[int]:
        """Return the numbers of the images in a part; the training part includes the validation images."""
        return [row for row, side in enumerate(self.inventory.sides) if (side != "test") == is_train]

    def split(self, labels: "Tensor", validation: float, train: int | None, seed: int) -> "tuple[Tensor, Tensor]":
        """Return the row numbers of the training and of the validation images.

        Where the inventory says which they are, that holds, and `train` chooses some of the training images within
        each class. Otherwise they are drawn as for a built-in data set, from the different images; copies of an image
        join it. `validation` is a number of images or a share of them; 0 stands for that of the data set.
        """
        import torch

        rows = self.rows(is_train=True)
        digests = [self.inventory.digests[row] for row in rows]
        sides = [self.inventory.sides[row] for row in rows]
        if "validation" in sides:
            training = [row for row, side in enumerate(sides) if side != "validation"]
            held_out = [row for row, side in enumerate(sides) if side == "validation"]
            if train is not None:
                training = self._choose(training, digests, labels.tolist(), train, seed)
            return torch.tensor(training), torch.tensor(held_out)
        wanted = validation or self.validation
        first = {digest: row for row, digest in reversed([*enumerate(digests)])}
        distinct = torch.tensor(sorted(first.values()))
        share = wanted if wanted < 1 else wanted / len(rows)
        n_held_out = max(round(share * len(distinct)), len(self.class_names))
        n_training = None if train is None else round(train * len(distinct) / len(rows))
        parts = super().split(labels[distinct], n_held_out, n_training, seed)
        contents = [{digests[row] for row in distinct[part].tolist()} for part in parts]
        both = [[row for row, digest in enumerate(digests) if digest in content] for content in contents]
        return torch.tensor(both[0]), torch.tensor(both[1])

    def _choose(
        self, rows: Sequence[int], digests: Sequence[str], labels: Sequence[int], n: int, seed: int
    ) -> list[int]:
        if n > len(rows):
            raise DataError(f"{self.title} has only {len(rows)} training images, but data.train = {n}")
        if n == len(rows):
            return list(rows)
        chosen = choose_sides([digests[row] for row in rows], [labels[row] for row in rows], {"train": n}, seed)
        return [row for row, side in zip(rows, chosen, strict=True) if side]

    @property
    def preparation(self) -> dict[str, Any]:
        channels, height, width = self.image_shape
        return {"kind": "photo", "size": [height, width], "color": "grey" if channels == 1 else "rgb"}

    def read_image(self, image: "Path | str | Image.Image") -> "NDArray[uint8]":
        from hpsearch.data.photos import read_photo

        preparation = self.preparation
        return read_photo(image, size=tuple(preparation["size"]), color=preparation["color"])


def choose_sides(
    digests: Sequence[str], labels: Sequence[int], sizes: Mapping[str, float], seed: int, rest: str = ""
) -> list[str]:
    """Return the side of each image: one of `sizes`, which have a share or number of images each, or else `rest`.

    A place in [0, 1) follows from the seed and the image's digest alone. If all sizes are shares, it decides: so an
    image stays on its side whatever is added, and copies of one image are on one side. Numbers are divided among the
    classes in proportion, and within a class the images with the first places are taken. A side without an image of a
    class gets the next one, if the class has enough different images: see `find_small_classes`. Only such an image of
    a small class may go back to its own side when images are added.
    """
    places = {digest: _place(digest, seed) for digest in digests}
    classes = _group(digests, labels)
    if any(size >= 1 for size in sizes.values()):
        n_images = {label: members.total() for label, members in classes.items()}
        quotas = {side: _divide(size, n_images) for side, size in sizes.items()}
    sides: dict[str, str] = {}
    for label, members in classes.items():
        order = sorted(members, key=lambda digest: (places[digest], digest))
        start, bound, n_later = 0, 0.0, len(sizes)
        for side, size in sizes.items():
            if any(each >= 1 for each in sizes.values()):
                n = _count_images(order[start:], members, quotas[side][label])
            else:
                bound += size
                n = sum(places[digest] < bound for digest in order[start:])
            n = max(1, min(n, len(order) - start - n_later))
            sides |= dict.fromkeys(order[start : start + n], side)
            start, n_later = start + n, n_later - 1
    return [sides.get(digest, rest) for digest in digests]


def divide(
    digests: Sequence[str],
    labels: Sequence[int],
    class_names: Sequence[str],
    sizes: Mapping[str, float],
    n_sides: int,
    seed: int,
) -> tuple[list[str], list[str]]:
    """Return the side of each image, "train" for those in none of `sizes`, and why that is not possible.

    `n_sides` is the number of sides that need an image of each class. See `choose_sides`.
    """
    problems = []
    if len(class_names) > MAX_CLASSES:
        problems.append(f"there are {len(class_names):,} classes, but at most {MAX_CLASSES:,} are possible")
    if sum(size if size < 1 else size / max(len(digests), 1) for size in sizes.values()) >= 1:
        settings = " and ".join(f"data.{side} = {size:g}" for side, size in sizes.items())
        problems.append(f"{settings} leave none of {len(digests)} images to train on")
    needed = "training, validation and test sides" if n_sides == 3 else "training and the other side"
    for label, n in find_small_classes(digests, labels, n_sides).items():
        lacking = f"{n} different image{'s' * (n != 1)}, but the {needed} need one each; add images"
        problems.append(f"{name_class(class_names[label])}: {lacking}")
    if problems or not sizes:
        return ["train"] * len(digests), problems
    return choose_sides(digests, labels, sizes, seed, rest="train"), problems


def list_problems(title: str, problems: Sequence[str], advice: str = "") -> str:
    """Return the message of an error that names what is wrong with the user's images, and what to do at the end."""
    lines = [f"{title}: {len(problems):,} problem{'s' * (len(problems) != 1)}"]
    lines += [f"  {problem}" for problem in problems[:_N_NAMED]]
    if len(problems) > _N_NAMED:
        lines.append(f"  ... and {len(problems) - _N_NAMED:,} more")
    return "\n".join([*lines, *filter(None, [advice])])


def find_small_classes(digests: Sequence[str], labels: Sequence[int], n_sides: int) -> dict[int, int]:
    """Return the classes with fewer different images than sides, and how many they have.

    An image that is in two classes counts for the first of them alone.
    """
    classes = _group(digests, labels)
    return {label: len(classes[label]) for label in sorted(set(labels)) if len(classes[label]) < n_sides}


def name_class(class_name: str) -> str:
    """Return what messages call a class."""
    return f'class "{show_name(class_name)}"'


def _group(digests: Sequence[str], labels: Sequence[int]) -> dict[int, Counter[str]]:
    """Return how many images with each digest a class has. Those of an image in two classes belong to the first."""
    classes: dict[int, Counter[str]] = defaultdict(Counter)
    homes: dict[str, int] = {}
    for digest, label in zip(digests, labels, strict=True):
        classes[homes.setdefault(digest, label)][digest] += 1
    return classes


def _place(digest: str, seed: int) -> float:
    return int.from_bytes(hashlib.sha256(f"{seed}:{digest}".encode()).digest()[:6], "big") / 2**48


def _divide(size: float, n_images: Mapping[int, int]) -> dict[int, int]:
    """Divide a share or number of all images among the classes in proportion, by the largest remainders."""
    total = sum(n_images.values())
    share = size if size < 1 else size / total
    quotas = {label: n * share for label, n in n_images.items()}
    divided = {label: math.floor(quota + 1e-9) for label, quota in quotas.items()}
    n_left = round(share * total) - sum(divided.values())
    for label in sorted(quotas, key=lambda label: (divided[label] - quotas[label], label))[:n_left]:
        divided[label] += 1
    return divided


def _count_images(order: Sequence[str], members: Mapping[str, int], n_images: int) -> int:
    """Return how many of the digests have so many images together."""
    n_digests = 0
    while n_images > 0 and n_digests < len(order):
        n_images -= members[order[n_digests]]
        n_digests += 1
    return n_digests
