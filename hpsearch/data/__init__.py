"""Data sets as tensors in memory, image files as pixels.

sets           the built-in data sets: what is known of each, and how it is downloaded and read
pixels         pixels in a file that all processes share
dataset        splits and batches
augment        random changes of a batch: shifts, mirrors, erases, recolours
image_files    converts image files of any size, depth and color to a network's input
mnist_images   converts handwriting to MNIST's format: removes paper, thickens strokes, centers digits
page_lines     removes ruled lines, frames and edges from the ink of a page
photos         converts one image file of the user's own to pixels, and says what is wrong with a file
inventory      the list of the user's own images, and what differs between two lists
tensors        many image files to pixels, read once and kept in one file of the cache
own            the user's own images as a data set: on which side each image is
image_folder   a folder of the user's own images, a subfolder a class: what it holds, and its data set
arrays         the user's own images as arrays: an .npz file, or what a function of theirs returns

Scripts import `load_data` and `load_test` from here; `import hpsearch.data` alone does not import torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpsearch.data.dataset import load_data, load_test

__all__ = ["load_data", "load_test"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hpsearch.data import dataset

    return getattr(dataset, name)
