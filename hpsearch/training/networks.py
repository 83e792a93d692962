"""Networks: plain sequences of torch layers that a built-in kind describes, a module of the user's, or several."""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parameter import is_lazy

from hpsearch.config import definition
from hpsearch.config.signature import OwnHyperparameters
from hpsearch.config.space import TrainingHyperparameters
from hpsearch.data.dataset import Split
from hpsearch.errors import OwnCodeError
from hpsearch.plugins import NETWORKS, OwnCode, find
from hpsearch.training.kinds import Layer
from hpsearch.training.randomness import GlobalRandom

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


class OwnNetwork(Network):
    """A module of the user's as a network. It stays in the memory format and the precision that it was built with."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)

    @property
    def module(self) -> nn.Module:
        return self[0]

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.module(images).float()  # a module may use autocast
        return logits


class Ensemble(Network):
    """Networks whose probabilities are averaged, also over copies of the image that are shifted by `shift` pixels."""

    def __init__(self, *members: Network, shift: int = 0) -> None:
        super().__init__(*members)
        self.shift = shift

    @property
    def members(self) -> list[Network]:
        return cast(list[Network], [*self])

    def forward(self, images: Tensor) -> Tensor:
        views = shift_images(images, self.shift) if self.shift else [images]
        log_probabilities = torch.stack([member(view).log_softmax(dim=1) for member in self.members for view in views])
        return log_probabilities.logsumexp(dim=0)  # the softmax of which is the mean of the probabilities


def combine(networks: Sequence[Network], shift: int) -> Network:
    """Return the only network as it is, or an `Ensemble` if there are several or images are to be shifted."""
    return Ensemble(*networks, shift=shift) if len(networks) > 1 or shift else networks[0]


def shift_images(images: Tensor, n_pixels: int) -> list[Tensor]:
    """Return images (N, C, H, W), and copies shifted by `n_pixels` down, up, right and left; their border repeats."""
    height, width = images.shape[2:]
    padded = functional.pad(images, [n_pixels] * 4, mode="replicate")
    starts = ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2))
    views = (padded[:, :, y * n_pixels :, x * n_pixels :][:, :, :height, :width] for y, x in starts)
    return [view.contiguous() for view in views]  # as what networks are trained with


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
    kind: definition.Network | str,
    hyperparameters: TrainingHyperparameters,
    image_shape: tuple[int, int, int],
    n_classes: int,
) -> Network:
    """Build a network with new random weights, for images of shape (C, H, W).

    `kind` is the table of a study file, or the name of a built-in kind. Raises `OwnCodeError` if a function of the
    user's returns no module; its own errors are raised as they are.
    """
    if isinstance(kind, definition.Network) and kind.code:
        return OwnNetwork(_call_build(kind.code, cast(OwnHyperparameters, hyperparameters), image_shape, n_classes))
    name = kind if isinstance(kind, str) else kind.kind
    return from_layers(find(NETWORKS, name).describe(hyperparameters, image_shape, n_classes))


def _call_build(
    code: OwnCode, hyperparameters: OwnHyperparameters, image_shape: tuple[int, int, int], n_classes: int
) -> nn.Module:
    with GlobalRandom(0).used():  # what a file draws when it is loaded does not shift the numbers of a network
        build = code.load()
    module = build(image_shape, n_classes, **hyperparameters.arguments())
    if not isinstance(module, nn.Module):
        raise OwnCodeError(f"{code.path} must return a torch.nn.Module, but returned {_describe(module)}")
    if any(map(is_lazy, module.parameters())):
        with torch.no_grad():
            module.eval()(torch.zeros(2, *image_shape))  # gives lazy parameters their shapes
    return module


def _describe(value: object) -> str:
    if value is None:
        return "None; is there a return?"
    return f"the class {value.__name__}; call it" if isinstance(value, type) else f"a {type(value).__name__}"


def from_layers(layers: list[Layer]) -> Network:
    """Build the network that a list of (name in torch.nn, keyword arguments) describes."""
    return Network(*((Dropout if name == "Dropout" else getattr(nn, name))(**arguments) for name, arguments in layers))
