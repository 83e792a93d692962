"""What a study file names: data sets and kinds of network. A name stands for the Python path of an object.

Checking a study file imports the objects that it names, so their modules import torch only in functions that need it.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

DATA_SETS = {
    "mnist": "hpsearch.data.sets:MNIST",
    "fashion-mnist": "hpsearch.data.sets:FASHION_MNIST",
    "kmnist": "hpsearch.data.sets:KMNIST",
    "digits": "hpsearch.data.sets:DIGITS",
}
NETWORKS = {"mlp": "hpsearch.training.kinds:MLP", "cnn": "hpsearch.training.kinds:CNN"}


def find(registry: Mapping[str, str], name: str) -> Any:
    """Import the `DataSet` that a name in `DATA_SETS` stands for, or the `NetworkKind` that one in `NETWORKS` does."""
    module, _, attribute = registry[name].partition(":")
    return getattr(import_module(module), attribute)
