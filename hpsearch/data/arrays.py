"""The user's own images as arrays: an .npz file, or what a function of theirs returns."""

import hashlib
import logging
import math
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hpsearch.data.inventory import N_DIGITS, Inventory, list_names, show_name
from hpsearch.data.own import DEFAULT_SHARE, OwnImages, divide, list_problems
from hpsearch.data.tensors import OnRead, Pixels, check_space, recall
from hpsearch.errors import DataError, HpsearchError
from hpsearch.plugins import OwnCode

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

_N_BYTES = 2**24  # of the arrays that are read at once
_MOST_CLASSES = 2**16
_CORRUPT = (zipfile.BadZipFile, zlib.error, ValueError, EOFError, NotImplementedError, RuntimeError)
_CHANNELS = (1, 3)


@dataclass(frozen=True)
class _Images:
    """The images of a part: what messages call them, their shape and type, and a function that yields blocks of them.

    A block has the shape of the whole, but for the number of images.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], Iterator[NDArray[Any]]]

    def find_problem(self) -> str:
        """Return why these are no images, and what to do; or nothing."""
        shape = "x".join(map(str, self.shape)) or "a single number"
        if self.dtype.hasobject:
            return f"{self.name}: has Python objects; images must be one array of uint8, all of one size"
        if self.dtype != np.uint8:
            return f"{self.name}: images must be uint8, from 0 to 255, but are {self.dtype}{_advise(self.dtype)}"
        if len(self.shape) == 2:
            side = math.isqrt(self.shape[1])
            hint = f"; x.reshape(-1, {side}, {side}) would do, if they are square" * (side**2 == self.shape[1])
            return f"{self.name}: has shape {shape}; images must be (N, H, W), (N, H, W, C) or (N, C, H, W){hint}"
        if len(self.shape) not in (3, 4):
            return f"{self.name}: has shape {shape}; images must be (N, H, W), (N, H, W, C) or (N, C, H, W)"
        if 0 in self.shape:
            return f"{self.name}: has shape {shape}; there are no images in it"
        if len(self.shape) == 4 and not {self.shape[1], self.shape[3]} & set(_CHANNELS):
            hint = "; x[..., :3] leaves out transparency" if self.shape[3] == 4 else ""
            return f"{self.name}: has shape {shape}; C must be 1 or 3 in (N, H, W, C) or (N, C, H, W){hint}"
        return ""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of an image."""
        if len(self.shape) == 3:
            return 1, self.shape[1], self.shape[2]
        first, second, last = self.shape[1:]
        return (last, first, second) if last in _CHANNELS else (first, second, last)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Pixels]:
        """Yield each image, shape (C, H, W)."""
        for block in self.read():
            if block.ndim == 3:
                block = block[:, np.newaxis]
            elif self.shape[3] in _CHANNELS:
                block = block.transpose(0, 3, 1, 2)
            yield from np.ascontiguousarray(block)


@dataclass(frozen=True)
class _Part:
    """The training or the test part as the user gives it: images, labels, and the names of the classes, if given."""

    images: _Images
    labels: _Images
    class_names: Sequence[str] | None = None


def open_file(
    file: Path | str,
    *,
    test: float | None = None,
    validation: float | None = None,
    split_seed: int = 0,
    on_read: OnRead = lambda n_done, n_total: None,
) -> OwnImages:
    """Return the data set of an .npz file with arrays `x_train` and `y_train`, and `x_test` and `y_test` if it has any.

    Images are uint8, shape (N, H, W), (N, H, W, C) or (N, C, H, W); labels are numbers from 0 on, or names of classes.
    Without a test part, the side of each image is chosen: `test` and `validation` are numbers or shares of the images.
    Nothing of the test part is read before `read(is_train=False)`. Raises `DataError` with everything that is wrong.
    """
    file = Path(file).absolute()
    title = show_name(file.name)
    members = _list_members(file)
    has_test = bool({"x_test", "y_test"} & members.keys())
    needed = ["x_train", "y_train", *(("x_test", "y_test") if has_test else ())]
    missing = [f"{name}: missing" for name in needed if name not in members]
    if missing:
        found = f"it has {', '.join(map(show_name, members)) or 'no arrays'}"
        raise DataError(list_problems(str(file), [f"{line}; {found}" for line in missing]))
    names = _read_names(members["class_names"], title) if "class_names" in members else None
    train = _Part(members["x_train"], members["y_train"], names)

    def read_test() -> _Part:
        return _Part(members["x_test"], members["y_test"], names)

    problems: list[str] = []
    if has_test:
        problems += filter(None, [members["x_test"].find_problem(), _find_label_problem(read_test())])
        if not problems and not train.images.find_problem():
            problems += _compare_shapes(members["x_test"], train.images.image_shape)
    return _open(
        train,
        title=title,
        source=file,
        digest=lambda images, note: recall(file, lambda: _digest(images, note)),
        read_test=read_test if has_test else None,
        test=test,
        validation=validation,
        split_seed=split_seed,
        on_read=on_read,
        problems=problems,
        n_test=members["x_test"].shape[0] if has_test and members["x_test"].shape else 0,
    )


def open_function(
    code: OwnCode,
    *,
    test: float | None = None,
    validation: float | None = None,
    split_seed: int = 0,
    on_read: OnRead = lambda n_done, n_total: None,
) -> OwnImages:
    """Return the data set of a function of the user's, called with "train", and with "test" only to test a model.

    It returns images and labels, like those of `open_file`, and the names of the classes. With `test`, a number or
    share of the images, the test side is chosen among the training images, and "test" is never asked for.
    Raises `DataError` with everything that is wrong.
    """
    part = _call(code, "train")
    opened = _open(
        part,
        title=code.path,
        source=None,
        digest=_digest,
        read_test=None if test else partial(_call, code, "test"),
        test=test,
        validation=validation,
        split_seed=split_seed,
        on_read=on_read,
    )
    opened.map_training()  # so that the arrays can be forgotten
    load = partial(_load, lambda: _call(code, "train").images, code.path, opened.inventory)
    return replace(opened, load=load)


def _read_names(member: _Images, title: str) -> list[str]:
    """Return the names of the classes in an array. Raises `DataError`."""
    if len(member.shape) != 1 or member.dtype.kind not in "US":
        problem = f"class_names: must be a list of texts, but has {member.dtype} of shape {member.shape}"
        raise DataError(list_problems(title, [problem]))
    return [_as_text(name) for name in _read_all(member).tolist()]


def _as_text(name: str | bytes) -> str:
    return name.decode(errors="replace") if isinstance(name, bytes) else str(name)


def _open(
    train: _Part,
    *,
    title: str,
    source: Path | None,
    digest: Callable[[_Images, OnRead], list[str]],
    read_test: Callable[[], _Part] | None,
    test: float | None,
    validation: float | None,
    split_seed: int,
    on_read: OnRead,
    problems: Sequence[str] = (),
    n_test: int = 0,
) -> OwnImages:
    """Return the data set of a training part, and of a test part if there is one."""
    images = train.images
    labels, class_names, found = _read_labels(train)
    problems = [*filter(None, [images.find_problem()]), *found, *problems]
    if not found:
        problems += _find_empty_classes(images.name, labels, class_names)
    if read_test and test:
        problems.append(f"data.test = {test:g}, but there is a test part; remove one of them")
    if problems:
        raise DataError(list_problems(title, problems))
    check_space(len(images), images.image_shape, is_scalable=False)
    digests = digest(images, on_read)
    sizes = {} if read_test else {"test": test or DEFAULT_SHARE, "validation": validation or DEFAULT_SHARE}
    sides, problems = divide(digests, labels, class_names, sizes, 2 if read_test else 3, split_seed)
    if problems:
        raise DataError(list_problems(title, problems))
    names = [f"{images.name}[{row}]" for row in range(len(digests))]
    inventory = Inventory(names, digests, labels, sides, list(class_names))
    _warn_of_conflicts(title, inventory)
    return OwnImages.of(
        inventory,
        partial(_load, lambda: images, title, inventory),
        title=title,
        folder=source,
        image_shape=images.image_shape,
        validation=validation or DEFAULT_SHARE,
        read_test=partial(_read_test, read_test, title, images.image_shape, inventory) if read_test else None,
        n_test=n_test,
    )


def _load(read: Callable[[], _Images], title: str, inventory: Inventory, rows: Sequence[int]) -> Iterator[Pixels]:
    """Yield the images with these numbers, which ascend. Raises `DataError` if they are not those of the inventory."""
    wanted = set(rows)
    for row, pixels in enumerate(read()):
        if row in wanted:
            if row >= len(inventory.digests) or _digest_one(pixels) != inventory.digests[row]:
                raise DataError(f"{title}: {inventory.names[row]} has changed since it was read; run the command again")
            wanted.remove(row)
            yield pixels
    if wanted:
        raise DataError(f"{title}: {inventory.names[min(wanted)]} is gone since it was read; run the command again")


def _read_test(
    read: Callable[[], _Part], title: str, image_shape: tuple[int, int, int], inventory: Inventory
) -> "tuple[Tensor, Tensor]":
    """Return the images and labels of the user's own test part. Raises `DataError`."""
    import torch

    part = read()
    problems = list(filter(None, [part.images.find_problem()])) or _compare_shapes(part.images, image_shape)
    given = list(part.class_names) if part.class_names is not None else None
    if given and given != inventory.class_names:
        problems.append(f"{part.images.name}: the classes {list_names(given)} are not those of the training part")
    labels, _, found = _read_labels(replace(part, class_names=inventory.class_names))
    if problems or found:
        raise DataError(list_problems(title, [*problems, *found]))
    check_space(len(part.images), part.images.image_shape, is_scalable=False)
    images = np.stack(list(part.images))
    known = set(inventory.digests)
    copies = [row for row, pixels in enumerate(images) if _digest_one(pixels) in known]
    if len(copies) == len(images):
        raise DataError(
            f"{title}: all images of the test part are training images; give others, or set data.test in a new study "
            "and leave the test part out"
        )
    if copies:
        names = list_names([f"{part.images.name}[{row}]" for row in copies])
        subject = "1 test image is also a training image" if len(copies) == 1 else None
        subject = subject or f"{len(copies):,} test images are also training images"
        logger.warning("%s: %s, which makes results look better than they are: %s", title, subject, names)
    return torch.from_numpy(images), torch.tensor(labels, dtype=torch.int64)


def _compare_shapes(test: _Images, image_shape: tuple[int, int, int]) -> list[str]:
    if test.image_shape == image_shape:
        return []
    found, wanted = ("x".join(map(str, shape)) for shape in (test.image_shape, image_shape))
    return [f"{test.name}: images of {found}, but those to train on are {wanted} (channels, height, width)"]


def _digest(images: _Images, on_read: OnRead) -> list[str]:
    digests, step = [], max(1, len(images) // 200)
    for row, pixels in enumerate(images):
        digests.append(_digest_one(pixels))
        if (row + 1) % step == 0 or row + 1 == len(images):
            on_read(row + 1, len(images))
    return digests


def _digest_one(pixels: Pixels) -> str:
    return hashlib.sha256(pixels.data).hexdigest()[:N_DIGITS]


def _read_labels(part: _Part) -> tuple[list[int], tuple[str, ...], list[str]]:
    """Return the labels as numbers, the names of the classes, and what is wrong with either."""
    name, dtype, given = part.labels.name, part.labels.dtype, part.class_names
    problems = []
    if given is not None and (len(set(given)) < len(given) or "" in given):
        problems.append(f"class_names: {list_names(list(given))} are not all different and not empty")
    if problem := _find_label_problem(part):
        return [], (), [*problems, problem]
    values = _read_all(part.labels).reshape(-1)
    if dtype.kind in "US":
        texts = [_as_text(each) for each in values.tolist()]
        class_names = tuple(given) if given is not None else tuple(sorted(set(texts)))
        numbers = {class_name: number for number, class_name in enumerate(class_names)}
        unknown = sorted({text for text in texts if text not in numbers})
        if unknown:
            problems.append(f"{name}: no classes of these names: {list_names(unknown)}")
        labels = [numbers.get(text, 0) for text in texts]
    else:
        labels = [int(value) for value in values.tolist()]
        n_classes = len(given) if given is not None else max([*labels, 0]) + 1
        class_names = tuple(given) if given is not None else tuple(map(str, range(min(n_classes, _MOST_CLASSES))))
        outside = [row for row, label in enumerate(labels) if not 0 <= label < len(class_names)]
        if outside:
            examples = list_names([f"{name}[{row}] = {labels[row]}" for row in outside])
            limit = f"from 0 to {len(class_names) - 1}" if given is not None else "from 0 on, without gaps"
            problems.append(f"{name}: labels must be whole numbers {limit}, but {examples}")
    return labels, class_names, problems


def _find_label_problem(part: _Part) -> str:
    """Return why these cannot be the labels of the images, by their shape and type; or nothing."""
    name, shape, dtype = part.labels.name, part.labels.shape, part.labels.dtype
    if dtype.hasobject:
        return f"{name}: has Python objects; labels must be whole numbers or y.astype(str)"
    if dtype.kind not in "biuUS":
        return f"{name}: labels must be whole numbers or names, but are {dtype}{_advise(dtype)}"
    if len(shape) == 2 and shape[1] > 1:
        hint = "y.argmax(axis=1) would do, if they are one-hot"
        return f"{name}: has shape {shape[0]}x{shape[1]}, but an image has one label; {hint}"
    if len(shape) not in (1, 2):
        return f"{name}: has shape {'x'.join(map(str, shape)) or '()'}, but must be (N,)"
    n_images = part.images.shape[0] if part.images.shape else 0
    return "" if shape[0] == n_images else f"{name}: {shape[0]:,} labels for {n_images:,} images of {part.images.name}"


def _find_empty_classes(name: str, labels: Sequence[int], class_names: Sequence[str]) -> list[str]:
    found = set(labels)
    if len(found) == 1:
        return [f"{name}: all images are of one class; there must be two classes at least"]
    empty = [class_name for label, class_name in enumerate(class_names) if label not in found]
    return [f"{name}: no images of {len(empty):,} of {len(class_names):,} classes: {list_names(empty)}"] * bool(empty)


def _advise(dtype: np.dtype[Any]) -> str:
    if dtype.kind == "f":
        return "; (x * 255).round().astype('uint8') would do, if they are from 0 to 1 and not NaN"
    return "; x.astype('uint8') would do, if they are from 0 to 255" if dtype.kind in "iu" else ""


def _warn_of_conflicts(title: str, inventory: Inventory) -> None:
    first: dict[str, int] = {}
    pairs = []
    for row, digest in enumerate(inventory.digests):
        other = first.setdefault(digest, row)
        if inventory.labels[other] != inventory.labels[row]:
            pairs.append(f"{inventory.names[other]} = {inventory.names[row]}")
    if pairs:
        subject = "1 image has" if len(pairs) == 1 else f"{len(pairs):,} images have"
        logger.warning("%s: %s a copy in another class: %s", title, subject, list_names(pairs))


def _list_members(file: Path) -> dict[str, _Images]:
    """Return the arrays of an .npz file, of which nothing but the shapes and types are read. Raises `DataError`."""
    title = show_name(str(file))
    if not file.is_file():
        raise DataError(
            f"{title}: no such file; give an .npz file, such as numpy.savez_compressed writes (if it has moved: in "
            "data.file, or with --data)"
        )
    try:
        with zipfile.ZipFile(file) as archive:
            names = [name for name in archive.namelist() if name.endswith(".npy")]
            return {name.removesuffix(".npy"): _describe(archive, file, name) for name in names}
    except OSError as error:
        raise DataError(f"{title}: {error.strerror or error}") from error
    except _CORRUPT as error:
        reason = "not an .npz file" if not zipfile.is_zipfile(file) else f"damaged ({error})"
        raise DataError(f"{title}: {reason}; write it again with numpy.savez_compressed") from error


def _describe(archive: zipfile.ZipFile, file: Path, member: str) -> _Images:
    with archive.open(member) as stream:
        shape, is_fortran, dtype = _read_header(stream)
    read = partial(_read_member, file, member, is_fortran=is_fortran)
    return _Images(member.removesuffix(".npy"), shape, dtype, read)


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    return np.lib.format.read_array_header_2_0(stream)


def _read_member(file: Path, member: str, *, is_fortran: bool) -> Iterator[NDArray[Any]]:
    """Yield an array of an .npz file in blocks. Raises `DataError` if it is damaged."""
    try:
        with zipfile.ZipFile(file) as archive, archive.open(member) as stream:
            shape, _, dtype = _read_header(stream)
            size = math.prod(shape[1:]) * dtype.itemsize
            n_rows = shape[0] if is_fortran else max(1, _N_BYTES // max(size, 1))
            for start in range(0, shape[0], n_rows):
                block = (min(n_rows, shape[0] - start), *shape[1:])
                content = stream.read(block[0] * size)
                yield np.frombuffer(content, dtype).reshape(block, order="F" if is_fortran else "C")
            if stream.read(1):  # this also compares the checksum
                raise ValueError("it is longer than its shape says")
    except OSError as error:
        raise DataError(f"{show_name(str(file))}: {error.strerror or error}") from error
    except _CORRUPT as error:
        advice = "write it again with numpy.savez_compressed"
        raise DataError(f"{show_name(str(file))}: {member} is damaged ({error}); {advice}") from error


def _read_all(array: _Images) -> NDArray[Any]:
    blocks = list(array.read())
    return np.concatenate(blocks) if blocks else np.empty(array.shape, array.dtype)


def _call(code: OwnCode, split: str) -> _Part:
    """Return what a function of the user's loads. Raises `DataError`."""
    call = f'{code.function}("{split}")'
    function = code.load()
    try:
        with redirect_stdout(sys.stderr):  # stdout is reserved for results
            loaded = function(split)
    except HpsearchError:
        raise
    except Exception as error:
        raise DataError(f"{code.locate(error)}; it was called as {call}") from error
    if loaded is None and split == "test":
        raise DataError(
            f'{code.path}: {call} returned None; to choose test images among those of {code.function}("train"), '
            "set data.test in a new study, such as test = 0.15"
        )
    if not isinstance(loaded, tuple | list) or len(loaded) != 3:
        found = f"{len(loaded)} values" if isinstance(loaded, tuple | list) else f"a {type(loaded).__name__}"
        raise DataError(f"{code.path}: {call} must return images, labels and class names, but returned {found}")
    images, labels, names = loaded
    if isinstance(names, str) or not (names is None or all(isinstance(name, str) for name in names)):
        raise DataError(f"{code.path}: {call} must return a list of class names, but they are {names!r:.80}")
    return _Part(
        _as_array(images, f"{split}_images", code.path),
        _as_array(labels, f"{split}_labels", code.path),
        names if names is None else [str(name) for name in names],
    )


def _as_array(values: Any, name: str, title: str) -> _Images:
    """Return an array, a tensor or a list as an array. Raises `DataError`."""
    tensor = values.detach().cpu() if hasattr(values, "detach") else values
    try:
        array = np.asarray(tensor)
    except (ValueError, TypeError, RuntimeError) as error:  # a ragged list
        raise DataError(f"{title}: {name} must be an array, but {error}") from error
    return _Images(name, array.shape, array.dtype, lambda: iter((array,)))
