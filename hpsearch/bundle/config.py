"""`config.json`: what a model folder says of its network, and of the images that it classifies."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, StringConstraints, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from hpsearch.bundle.manifest import parse
from hpsearch.config.definition import MAX_SHIFT
from hpsearch.config.space import Table
from hpsearch.data.own import MAX_CLASSES
from hpsearch.errors import BundleError
from hpsearch.plugins import NETWORKS, find
from hpsearch.training.networks import Network, combine, from_layers

VERSION = 2
_CHANNELS = {"grey": 1, "rgb": 3}
_DIGITS = ("mnist", "digits")  # of version 1, whose other data sets are pictures

_Name = Annotated[str, StringConstraints(max_length=1000)]
_Side = Annotated[int, Field(ge=1, le=4096)]
_Share = Annotated[float, Field(ge=0, le=1)]


class Preparation(Table):
    """How an image file becomes pixels: like a digit of MNIST, or like a picture of Fashion-MNIST, or as a photo.

    A photo is scaled to fill `size`, height and width, and its centre is cropped.
    """

    kind: Literal["digit", "picture", "photo"]
    size: tuple[_Side, _Side] | None = None
    color: Literal["grey", "rgb"] | None = None


class Config(Table):
    """What is needed to rebuild the network and to prepare images for it.

    `mean` and `std` have a number for each channel. `layers` is for users without hpsearch; a network of the user's own
    has none, and its `model.pt2` is loaded instead. `build` has the keyword arguments of the function that built it.
    The probabilities of `n_members` such networks are averaged; with `shift`, also over copies of an image that are
    shifted by so many pixels.
    """

    format_version: Literal[1, 2]
    data: _Name
    kind: _Name
    hyperparameters: dict[_Name, bool | int | float | _Name | None] = Field(max_length=1000)
    image_shape: tuple[_Side, _Side, _Side]
    mean: list[_Share]
    std: list[Annotated[_Share, Field(gt=0)]]
    class_names: list[_Name] = Field(min_length=2, max_length=MAX_CLASSES)
    preparation: Preparation
    layers: list[Any] | None = None
    build: dict[_Name, bool | int | float | _Name] | None = None
    n_members: int = Field(1, ge=1, le=100)
    shift: int = Field(0, ge=0, le=MAX_SHIFT)

    @model_validator(mode="after")
    def _check(self) -> Self:
        n_channels, *size = self.image_shape
        if not len(self.mean) == len(self.std) == n_channels:
            raise PydanticCustomError("bounds", "image_shape needs as many channels as mean and std")
        preparation = self.preparation
        if preparation.kind == "photo":
            is_right = preparation.size == tuple(size) and _CHANNELS.get(preparation.color or "") == n_channels
        else:
            is_right = n_channels == 1
        if not is_right:
            raise PydanticCustomError("bounds", "preparation does not give images of image_shape")
        if (self.layers is None) == (self.kind in NETWORKS):
            raise PydanticCustomError("bounds", "kind: unknown, or without layers")
        return self


def read_config(content: bytes, file: Path) -> Config:
    """Return the config in a `config.json`; one of version 1 as one of version 2. Raises `BundleError`."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):  # `parse` says what is wrong
        document = None
    if isinstance(document, dict) and document.get("format_version") == 1:  # of one channel and a built-in data set
        kind = "digit" if document.get("data") in _DIGITS else "picture"
        document |= {"mean": [document.get("mean")], "std": [document.get("std")], "preparation": {"kind": kind}}
        content = json.dumps(document).encode()
    return parse(Config, content, file)


def build_empty(config: Config, file: Path) -> Network:
    """Return the network with meta tensors as weights, so that a malicious config cannot exhaust the memory.

    Raises `BundleError` if its layers are not those of its hyperparameters.
    """
    kind = find(NETWORKS, config.kind)
    try:
        hyperparameters = kind.hyperparameters.model_validate(config.hyperparameters)
    except ValidationError as error:
        raise BundleError(f"{file} is invalid: hyperparameters: {error.errors()[0]['msg']}") from error
    layers = kind.describe(hyperparameters, config.image_shape, len(config.class_names))
    if json.loads(json.dumps(layers)) != config.layers:
        raise BundleError(f"{file}: layers do not match the hyperparameters")
    with torch.device("meta"):
        members = [from_layers(layers) for _ in range(config.n_members)]
    return combine(members, config.shift)
