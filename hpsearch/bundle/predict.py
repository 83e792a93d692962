"""Predictions for image files, which are found in folders and by patterns and classified in batches."""

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from hpsearch.bundle.bundle import Classifier
from hpsearch.data.photos import SUFFIXES
from hpsearch.errors import ImageError

BATCH_SIZE = 64  # small, since no result is shown before its batch is read

Found = tuple[str, str | None]  # a file, or an argument and its error


def predict_files(
    classifier: Classifier,
    arguments: Sequence[str | os.PathLike[str]],
    top: int = 3,
    on_duplicate: Callable[[str], None] = lambda file: None,
) -> Iterator[dict[str, Any]]:
    """Yield a dictionary for each image, in order.

    It has the keys `image`, `top` (a list of `{"class", "probability"}`), `unlike` (whether the image is unlike the
    training images) and `distance` (above 1 if so), the last two None for a model folder of an older version; or the
    keys `image` and `error`.

    An argument is a file, a folder (searched recursively for image suffixes), or a pattern with `*`, `?`, `[...]` or
    `**`. Duplicates are skipped and passed to `on_duplicate`.
    """
    found = _distinct(arguments, on_duplicate)
    while batch := list(islice(found, BATCH_SIZE)):
        yield from _predict_batch(classifier, batch, top)


def find_images(argument: str) -> Iterator[Found]:
    """Yield the files that an argument stands for, sorted, or an error; opens no file."""
    argument = os.path.expanduser(argument)  # a shell does not in quotes, as patterns are
    if os.path.isdir(argument):
        yield from _search_folder(argument)
    elif os.path.lexists(argument) or not glob.has_magic(argument):
        yield argument, None
    else:
        files = sorted(file for file in glob.glob(argument, recursive=True) if not os.path.isdir(file))
        found: list[Found] = [(file, None) for file in files]
        yield from found or [(argument, "no matching files")]


def _search_folder(folder: str) -> Iterator[Found]:
    is_empty, unreadable = True, list[OSError]()
    for parent, folders, files in os.walk(folder, onerror=unreadable.append):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                is_empty = False
                yield os.path.join(parent, name), None
    yield from ((str(error.filename), error.strerror) for error in unreadable)
    if is_empty and not unreadable:
        yield folder, f"no images found (looked for {' '.join(SUFFIXES)}, including subfolders)"


def _distinct(arguments: Sequence[str | os.PathLike[str]], on_duplicate: Callable[[str], None]) -> Iterator[Found]:
    seen = set[str]()
    for argument in arguments:
        for file, error in find_images(os.fspath(argument)):
            path = os.path.abspath(file)
            if path in seen:
                on_duplicate(file)
            else:
                seen.add(path)
                yield file, error


def _predict_batch(classifier: Classifier, batch: Sequence[Found], top: int) -> list[dict[str, Any]]:
    rows, pixels = list[dict[str, Any]](), []
    for file, error in batch:
        try:
            if error:
                raise ImageError(f"{file}: {error}")
            pixels.append(classifier.read_image(file))
            rows.append({"image": file})
        except ImageError as caught:
            rows.append({"image": file, "error": str(caught)})
    if not pixels:
        return rows
    images = np.stack(pixels)
    distances = classifier.measure_distances(images)
    read = (row for row in rows if "error" not in row)
    for i, (row, probabilities) in enumerate(zip(read, classifier.predict_proba(images), strict=True)):
        ranked = classifier.rank(probabilities, top)
        row["top"] = [{"class": name, "probability": probability} for name, probability in ranked]
        row["unlike"] = None if distances is None else bool(distances[i] > 1)
        row["distance"] = None if distances is None else float(distances[i])
    return rows
