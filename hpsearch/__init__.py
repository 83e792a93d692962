"""Hyperparameter search for PyTorch image classifiers.

Nine rooms; each imports only from the rooms below it. `README.md` in this folder leads through them:

    cli        the commands: parse, call one function, print
    monitor    what a search looks like: status, live table, report, doctor, dashboard
    bundle     from the best trial to a verified model folder
    workers    who runs trials, and where: processes here, tasks in Ray
    search     the search loop: study, objective, samplers, pruners, steering
    storage    what survives: trials, budget, checkpoints, files
    training   hyperparameters and data to a trained network
    data       data sets as tensors in memory, image files as pixels
    config     the study file and the search space

    >>> definition = hpsearch.load_definition("studies/digits.toml")
    >>> study = optuna.create_study(direction="maximize")
    >>> study.optimize(hpsearch.Objective(definition), n_trials=3)

    >>> hpsearch.load("dist/mnist-mlp").predict_proba(images)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpsearch.bundle.bundle import Classifier, load
    from hpsearch.bundle.confirm import confirm
    from hpsearch.bundle.evaluation import Evaluation
    from hpsearch.bundle.retrain import export
    from hpsearch.config.definition import StudyDefinition, load_definition
    from hpsearch.config.space import Hyperparameters, suggest
    from hpsearch.data.dataset import ImageData, Split, load_data, load_test
    from hpsearch.errors import HpsearchError
    from hpsearch.search.objective import Objective
    from hpsearch.search.pruning import PruningCallback
    from hpsearch.search.study import open_study
    from hpsearch.storage.rdb import open_storage
    from hpsearch.training.networks import build_network
    from hpsearch.training.trainer import train

_HOMES = {
    "Classifier": "bundle.bundle",
    "Evaluation": "bundle.evaluation",
    "HpsearchError": "errors",
    "Hyperparameters": "config.space",
    "ImageData": "data.dataset",
    "Objective": "search.objective",
    "PruningCallback": "search.pruning",
    "Split": "data.dataset",
    "StudyDefinition": "config.definition",
    "build_network": "training.networks",
    "confirm": "bundle.confirm",
    "export": "bundle.retrain",
    "load": "bundle.bundle",
    "load_data": "data.dataset",
    "load_definition": "config.definition",
    "load_test": "data.dataset",
    "open_storage": "storage.rdb",
    "open_study": "search.study",
    "suggest": "config.space",
    "train": "training.trainer",
}

__all__ = [
    "Classifier",
    "Evaluation",
    "HpsearchError",
    "Hyperparameters",
    "ImageData",
    "Objective",
    "PruningCallback",
    "Split",
    "StudyDefinition",
    "build_network",
    "confirm",
    "export",
    "load",
    "load_data",
    "load_definition",
    "load_test",
    "open_storage",
    "open_study",
    "suggest",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a public name at its first use, so that `import hpsearch` does not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'hpsearch' has no attribute '{name}'")
    return getattr(import_module(f"hpsearch.{_HOMES[name]}"), name)
