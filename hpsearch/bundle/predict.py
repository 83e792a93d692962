"""Predictions for image files: found in folders and by patterns, read one by one, classified in batches."""

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from hpsearch.bundle.bundle import DIGITS, Classifier
from hpsearch.data.image_files import read_image
from hpsearch.errors import ImageError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
BATCH_SIZE = 64  # small, since nothing is shown before its batch is read

Found = tuple[str, str | None]  # a file, and the error for what names none


def predict_files(
    classifier: Classifier,
    arguments: Sequence[str | os.PathLike[str]],
    top: int = 3,
    on_duplicate: Callable[[str], None] = lambda file: None,
) -> Iterator[dict[str, Any]]:
    """For each image, in the order given, `{"image", "top": [{"class", "probability"}, ...]}` or `{"image", "error"}`.

    An argument is a file; a folder, searched with its subfolders for names that end like an image's; or a pattern with
    `*`, `?`, `[...]` or `**`, which matches files. An image that is named again is left out, and told of.
    """
    found = _distinct(arguments, on_duplicate)
    while batch := list(islice(found, BATCH_SIZE)):
        yield from _predict_batch(classifier, batch, top)


def find_images(argument: str) -> Iterator[Found]:
    """The files that an argument names, sorted, or an error; nothing is opened."""
    if os.path.isdir(argument):
        return _search_folder(argument)
    return iter([(argument, None)] if os.path.lexists(argument) or not glob.has_magic(argument) else _match(argument))


def _match(pattern: str) -> Sequence[Found]:
    files = sorted(file for file in glob.glob(pattern, recursive=True) if not os.path.isdir(file))
    return [(file, None) for file in files] or [(pattern, "no file matches this pattern")]


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
        yield folder, f"no image in this folder ({' '.join(SUFFIXES)})"


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


def _predict_batch(classifier: Classifier, batch: Sequence[Found], top: int) -> Iterator[dict[str, Any]]:
    rows, pixels = [], []
    for file, error in batch:
        try:
            if error:
                raise ImageError(f"{file}: {error}")
            pixels.append(read_image(file, classifier.image_shape, is_digit=classifier.config.data in DIGITS))
            rows.append({"image": file})
        except ImageError as caught:
            rows.append({"image": file, "error": str(caught)})
    probabilities = iter(classifier.predict_proba(np.stack(pixels)) if pixels else ())
    return (row if "error" in row else row | {"top": _rank(classifier, next(probabilities), top)} for row in rows)


def _rank(classifier: Classifier, probabilities: np.ndarray, top: int) -> list[dict[str, Any]]:
    order = probabilities.argsort()[::-1][:top]
    return [{"class": classifier.class_names[i], "probability": float(probabilities[i])} for i in order]
