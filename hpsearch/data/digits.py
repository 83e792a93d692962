"""scikit-learn's digits, upscaled to 28x28 pixels."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpsearch.data.mnist_images import scale_and_center


def read_digits(n_test: int, *, is_train: bool) -> tuple[Tensor, Tensor]:
    """Load scikit-learn's 8x8 digits, upscaled and centered like MNIST: uint8, (N, 1, 28, 28), and labels, int64.

    The test images are stratified by class, and always the same.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch: Any = load_digits()
    parts = train_test_split(range(len(bunch.target)), test_size=n_test, stratify=bunch.target, random_state=0)
    rows = sorted(parts[0 if is_train else 1])
    placed = np.stack([scale_and_center(image.astype(np.float32)) for image in bunch.images[rows]])
    return torch.from_numpy(placed.round().astype(np.uint8)).unsqueeze(1), torch.from_numpy(bunch.target[rows]).long()
