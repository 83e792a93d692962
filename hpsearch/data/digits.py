"""scikit-learn's digits, upscaled to 28x28 pixels."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpsearch.data.mnist_images import scale_and_center
from hpsearch.data.stratify import stratify

N_TEST_IMAGES = 360


def read_digits(*, is_train: bool) -> tuple[Tensor, Tensor]:
    """Load scikit-learn's 8x8 digits, upscaled and centered in 28x28 pixels like MNIST."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    placed = np.stack([scale_and_center(image.astype(np.float32)) for image in bunch.images])
    images = torch.from_numpy(placed.round().astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    training, test = stratify(labels, N_TEST_IMAGES, None, seed=0)
    chosen = training if is_train else test
    return images[chosen], labels[chosen]
