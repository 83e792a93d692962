"""How unlike the training images an image is: a network that has never seen a cat is sure that one is a 7.

Probabilities only compare the classes. So a model folder has small copies of training images, and an image that is far
from all of them gets a warning. The network is not asked: validation images have trained it, too, so that they look
more familiar to it than new images do. Their pixels, which this file compares, do not.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, normalize

from hpsearch.data.dataset import ImageData, Split, denormalise
from hpsearch.errors import BundleError

FILE = "likeness.safetensors"
_N_IMAGES = 5_000  # references, and validation images to calibrate with
_N_COMPONENTS = 64
_FALSE_ALARMS = 0.01
_SIDE = 28  # larger images are shrunk
_BATCH_SIZE = 512


@dataclass(frozen=True)
class Likeness:
    """Training images to compare with, and how far from them other images of the data set are.

    `references` are training images in grey and blurred, uint8, shape (N, 14 * 14), and `components` the first
    principal components of them in full, float16, shape (28 * 28, 64). `limits`, float32, shape (3,), belong to three
    distances:

    - in shape: of the blurred image scaled to length 1 to the nearest reference (the nearest neighbour of Sun et al.
      2022, https://arxiv.org/abs/2204.06507, in pixels instead of features), which finds two digits side by side;
    - in ink: of the image blurred twice, with its brightness, to the nearest reference, which finds filled areas;
    - in detail: what the principal components leave of the image, which finds drawings of many lines.

    In each distance, 1/3% of the validation images, which are no references, are beyond the limit.
    """

    references: Tensor
    components: Tensor
    limits: Tensor

    @classmethod
    def fit(cls, data: ImageData) -> Self:
        """Choose references and components from the training images, and limits that suit the validation images."""
        grey, validation = (_sample(split, data) for split in (data.train, data.validation))
        flat = grey.flatten(1).double()  # in float32, LAPACK may not converge: pixels at the edge are always 0
        components = torch.linalg.eigh(flat.T @ flat).eigenvectors[:, -_N_COMPONENTS:]
        unlimited = cls(_blur(grey).round().byte(), components.half().contiguous(), torch.ones(3))
        limits = unlimited.distances(validation).quantile(1 - _FALSE_ALARMS / 3, dim=0)
        return replace(unlimited, limits=limits.clamp(min=1e-6))

    def measure(self, images: Tensor) -> Tensor:
        """Return the distance of raw pixels (0 to 255, shape (N, C, H, W)): float32, shape (N,).

        It is the largest of the three, each divided by its limit: about 1% of the data set's images are above 1.
        """
        return (self.distances(images) / self.limits).amax(dim=1)

    @torch.inference_mode()
    def distances(self, images: Tensor) -> Tensor:
        """Return the distances in shape, ink and detail: float32, shape (N, 3)."""
        references, components = self.references.float(), self.components.float()
        shapes, inks = normalize(references), _blur_again(references)
        rows = [torch.empty(0, 3)]
        for batch in images.float().split(_BATCH_SIZE):
            grey = _grey(batch)
            flat, small = grey.flatten(1), _blur(grey)
            shape = torch.cdist(normalize(small), shapes).amin(dim=1)
            ink = torch.cdist(_blur_again(small), inks).amin(dim=1)
            detail = (flat - flat @ components @ components.T).norm(dim=1)
            rows.append(torch.stack([shape, ink, detail], dim=1))
        return torch.cat(rows)

    def save(self, folder: Path) -> None:
        """Write `likeness.safetensors`."""
        (folder / FILE).write_bytes(to_safetensors({name: getattr(self, name) for name in _DTYPES}))


_DTYPES = {"references": torch.uint8, "components": torch.float16, "limits": torch.float32}


def read_likeness(content: bytes, file: Path) -> Likeness:
    """Return what `Likeness.save` wrote; raises `BundleError`."""
    try:
        tensors = from_safetensors(content)
    except (SafetensorError, RuntimeError, ValueError, KeyError) as error:
        raise BundleError(f"{file} is invalid: {error}") from error
    sizes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = {
        "references": (*sizes.get("references", ())[:1], (_SIDE // 2) ** 2),
        "components": (_SIDE**2, _N_COMPONENTS),
        "limits": (3,),
    }
    if sizes != expected or {name: tensor.dtype for name, tensor in tensors.items()} != _DTYPES:
        raise BundleError(f"{file} is invalid: tensor names, shapes or types differ")
    if not len(tensors["references"]) or not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise BundleError(f"{file} is invalid: it is empty, or has NaN or infinite values")
    return Likeness(**tensors)


def _sample(split: Split, data: ImageData) -> Tensor:
    """Return images of the split as `_grey` does, a few at a time."""
    parts = _some(len(split)).to(split.labels.device).split(_BATCH_SIZE)
    return torch.cat([_grey(denormalise(split.take(rows).cpu(), data.mean, data.std)) for rows in parts])


def _some(n_images: int) -> Tensor:
    """Return the numbers of at most `_N_IMAGES` images, evenly spaced because they may be sorted by class."""
    return torch.linspace(0, n_images - 1, min(n_images, _N_IMAGES)).long()


def _grey(images: Tensor) -> Tensor:
    """Return images of 28x28 shades, shape (N, 1, 28, 28)."""
    return adaptive_avg_pool2d(images.mean(dim=1, keepdim=True), _SIDE)


def _blur(grey: Tensor) -> Tensor:
    """Return 14x14 shades, shape (N, 196), in which a pen of another width hardly makes another shape."""
    return avg_pool2d(grey, 4, stride=2, padding=1).flatten(1)


def _blur_again(small: Tensor) -> Tensor:
    """Return 7x7 shades, shape (N, 49)."""
    return avg_pool2d(small.view(-1, 1, _SIDE // 2, _SIDE // 2), 2).flatten(1)
