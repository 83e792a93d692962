"""scikit-learn's digits, upscaled to 28x28 pixels."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpsearch.data.mnist_images import scale_and_center


def read_digits() -> tuple[Tensor, Tensor]:
    """Load scikit-learn's 8x8 digits, upscaled and centered like MNIST: uint8, (N, 1, 28, 28), and labels, int64."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    placed = np.stack([scale_and_center(image.astype(np.float32)) for image in bunch.images])
    images = torch.from_numpy(placed.round().astype(np.uint8)).unsqueeze(1)
    return images, torch.from_numpy(bunch.target).long()
