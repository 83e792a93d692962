"""The built-in kinds of network: a multilayer perceptron and a small convolutional network.

A network is just a list of `torch.nn` layers: it can be stored as JSON, and plain PyTorch can rebuild the network from
it. Checking a study file imports this module, so it does not import torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from hpsearch.config.space import Table, TrainingHyperparameters

Layer = tuple[str, dict[str, Any]]  # a name in torch.nn, and keyword arguments
_ACTIVATIONS = {"relu": "ReLU", "gelu": "GELU", "silu": "SiLU"}


@dataclass(frozen=True)
class NetworkKind:
    """A kind of network: its title in reports, its hyperparameters, and the layers that they describe.

    `hyperparameters` joins those of the kind with those of training. `describe` takes them, the shape of an image
    (C, H, W), and the number of classes.
    """

    title: str
    hyperparameters: type[TrainingHyperparameters]
    describe: Callable[[Any, tuple[int, int, int], int], list[Layer]]


class LayerHyperparameters(Table):
    """The hyperparameters of both kinds of network."""

    depth: int = Field(2, ge=1, le=64, description="number of hidden layers (MLP) or blocks (CNN)")
    width: int = Field(128, ge=1, le=65_536, description="units per layer (MLP) or channels of the first block (CNN)")
    activation: Literal["relu", "gelu", "silu"] = "relu"
    dropout: float = Field(0.0, ge=0, lt=1)
    batch_norm: bool = True


class MLPHyperparameters(TrainingHyperparameters, LayerHyperparameters):
    """The hyperparameters of an MLP and its training; each can be searched or fixed."""


class Hyperparameters(MLPHyperparameters):
    """The hyperparameters of a CNN and its training, which include those of an MLP; each can be searched or fixed."""

    stem_stride: int = Field(2, ge=1, le=2, description="of a CNN's first convolution; 1: its block keeps all pixels")


def _describe_mlp(hp: LayerHyperparameters, image_shape: tuple[int, int, int], n_classes: int) -> list[Layer]:
    """Return `depth` hidden layers of `width` units."""
    layers: list[Layer] = [("Flatten", {})]
    n_inputs = image_shape[0] * image_shape[1] * image_shape[2]
    for _ in range(hp.depth):
        layers.append(("Linear", {"in_features": n_inputs, "out_features": hp.width, "bias": not hp.batch_norm}))
        layers += _norm_and_activation(hp, "BatchNorm1d", hp.width)
        layers += _dropout(hp)
        n_inputs = hp.width
    return [*layers, ("Linear", {"in_features": n_inputs, "out_features": n_classes})]


def _describe_cnn(hp: Hyperparameters, image_shape: tuple[int, int, int], n_classes: int) -> list[Layer]:
    """Return `depth` blocks; starting from `width`, every second block doubles the channels and has stride 2.

    With `stem_stride` 2, the first kernel is 5x5 and all later layers work on a quarter of the pixels; with 1, it is
    3x3. In both cases, the channels stop doubling when a side is an eighth of the image's.
    """
    layers: list[Layer] = []
    n_inputs = image_shape[0]
    for block in range(hp.depth):
        n_outputs = min(hp.width * 2 ** ((block + 1) // 2), 8 * hp.width // hp.stem_stride)
        stride = hp.stem_stride if block == 0 else 2 if n_outputs != n_inputs else 1
        kernel = 5 if block == 0 and stride == 2 else 3
        sizes = {"in_channels": n_inputs, "out_channels": n_outputs, "kernel_size": kernel}
        layers.append(("Conv2d", sizes | {"stride": stride, "padding": kernel // 2, "bias": not hp.batch_norm}))
        layers += _norm_and_activation(hp, "BatchNorm2d", n_outputs)
        n_inputs = n_outputs
    layers += [("AdaptiveAvgPool2d", {"output_size": 1}), ("Flatten", {}), *_dropout(hp)]
    return [*layers, ("Linear", {"in_features": n_inputs, "out_features": n_classes})]


def _norm_and_activation(hp: LayerHyperparameters, norm: str, n_features: int) -> list[Layer]:
    norms: list[Layer] = [(norm, {"num_features": n_features})] if hp.batch_norm else []
    return [*norms, (_ACTIVATIONS[hp.activation], {})]


def _dropout(hp: LayerHyperparameters) -> list[Layer]:
    return [("Dropout", {"p": hp.dropout})] if hp.dropout else []


MLP = NetworkKind("multilayer perceptron", MLPHyperparameters, _describe_mlp)
CNN = NetworkKind("convolutional network", Hyperparameters, _describe_cnn)
