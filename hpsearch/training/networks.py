"""Networks as plain sequences of torch layers, built from the layers that their kind describes."""

import math

import torch
from torch import Tensor, nn

from hpsearch.config.space import TrainingHyperparameters
from hpsearch.data.dataset import Split
from hpsearch.plugins import NETWORKS, find
from hpsearch.training.kinds import Layer

_N_IMAGES, _N_PIXELS = 512, 512 * 28**2  # of a batch


class Network(nn.Sequential):
    """A sequence of layers; `forward` maps normalized images (N, C, H, W) to logits (N, classes)."""

    @torch.inference_mode()
    def predict_proba(self, images: Tensor, batch_size: int | None = None) -> Tensor:
        """Return softmax probabilities (N, classes) of normalized images, computed in evaluation mode.

        The default batches are small enough for the CPU caches: see `fit_batch`.
        """
        was_training = self.training
        self.eval()
        batches = images.split(batch_size or fit_batch(images))
        probabilities = torch.cat([self(batch).softmax(dim=1) for batch in batches])
        self.train(was_training)
        return probabilities

    def predict_split(self, split: Split) -> Tensor:
        """Return what `predict_proba` does for a split, without normalizing all of its images at once."""
        batches = split.loader(fit_batch(split.take(slice(0, 1))))
        return torch.cat([self.predict_proba(images) for images, _ in batches])


def fit_batch(images: Tensor) -> int:
    """Return how many of such images (N, C, H, W) to predict at once: at most 512, and with as many pixels as 28x28.

    So the memory of the activations does not grow with the size of the images.
    """
    return min(max(_N_PIXELS // math.prod(images.shape[2:]), 1), _N_IMAGES)


class Dropout(nn.Dropout):
    """torch's dropout with cheaper random numbers: 16 bits per element, twice as fast on a CPU.

    `generator` draws them if it is set (torch's global one otherwise); it must be on the device of the network.
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__(p)
        self.generator: torch.Generator | None = None
        self._n_dropped = min(round(p * 2**16), 2**16 - 1)  # of 65,536
        self._bits = torch.empty(0, dtype=torch.int64)

    def forward(self, values: Tensor) -> Tensor:
        return values * self.draw_mask(values) if self.training else values

    def draw_mask(self, values: Tensor) -> Tensor:
        """Return a factor for each value: 0 with probability `p`, otherwise 1 / (1 - p) to keep the mean."""
        n_words = -(-values.numel() // 4)
        if len(self._bits) != n_words or self._bits.device != values.device:
            self._bits = torch.empty(n_words, dtype=torch.int64, device=values.device)
        self._bits.random_(-(2**63), None, generator=self.generator)
        numbers = self._bits.view(torch.int16)[: values.numel()].view_as(values)
        mask = torch.empty_like(values)
        return torch.ge(numbers, self._n_dropped - 2**15, out=mask).mul_(2**16 / (2**16 - self._n_dropped))


def build_network(
    kind: str, hyperparameters: TrainingHyperparameters, image_shape: tuple[int, int, int], n_classes: int
) -> Network:
    """Build a network with new random weights, for images of shape (C, H, W)."""
    return from_layers(find(NETWORKS, kind).describe(hyperparameters, image_shape, n_classes))


def from_layers(layers: list[Layer]) -> Network:
    """Build the network that a list of (name in torch.nn, keyword arguments) describes."""
    return Network(*((Dropout if name == "Dropout" else getattr(nn, name))(**arguments) for name, arguments in layers))
