"""Hyperparameter search for PyTorch image classifiers.

Nine rooms; each imports only from the rooms below it, and two on one line do not import each other. `README.md` in this
folder leads through them:

    cli                  the commands: each parses its arguments, calls one function and prints the result
    monitor              what users see of a search: status, live table, report, doctor, dashboard
    bundle               from the best trial to a verified model folder
    workers              the processes that run trials, on this machine or in a Ray cluster
    search               the study, its objective, sampler and pruner, and the choice of the best trial
    storage | training   what survives: trials, budget, checkpoints, files
                         from hyperparameters and data to a trained network
    data | config        data sets as tensors in memory, image files as pixels
                         the study file and the search space

    >>> hpsearch.run("studies/digits.toml", n_workers=2).best_trial

    >>> definition = hpsearch.load_definition("studies/digits.toml")
    >>> study = optuna.create_study(direction="maximize")
    >>> study.optimize(hpsearch.Objective(definition), n_trials=3)

    >>> hpsearch.load("models/mnist-mlp").predict_proba(images)
"""

import sys

# `python -m hpsearch` imports nothing but its own source from the current folder: not the user's torch.py.
if (
    sys.argv[:1] == ["-m"]  # while Python looks for the module
    and sys.orig_argv[-len(sys.argv)].endswith("hpsearch")
    and not sys.flags.safe_path
    and __file__ != f"{sys.path[0]}/hpsearch/__init__.py"
):
    del sys.path[0]

import re
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpsearch.bundle.bundle import Classifier as Classifier
    from hpsearch.bundle.bundle import Prediction as Prediction
    from hpsearch.bundle.bundle import load as load
    from hpsearch.bundle.confirm import confirm as confirm
    from hpsearch.bundle.evaluation import Evaluation as Evaluation
    from hpsearch.bundle.retrain import export as export
    from hpsearch.config.definition import StudyDefinition as StudyDefinition
    from hpsearch.config.definition import load_definition as load_definition
    from hpsearch.config.space import suggest as suggest
    from hpsearch.data.dataset import ImageData as ImageData
    from hpsearch.data.dataset import Split as Split
    from hpsearch.data.dataset import load_data as load_data
    from hpsearch.data.dataset import load_test as load_test
    from hpsearch.errors import HpsearchError as HpsearchError
    from hpsearch.search.objective import Objective as Objective
    from hpsearch.search.pruning import PruningCallback as PruningCallback
    from hpsearch.search.study import open_study as open_study
    from hpsearch.storage.rdb import open_storage as open_storage
    from hpsearch.training.kinds import Hyperparameters as Hyperparameters
    from hpsearch.training.networks import build_network as build_network
    from hpsearch.training.trainer import Trainer as Trainer
    from hpsearch.workers.run import run as run

# At run time, these lines only say where each name is: executed, they would make `import hpsearch` wait for torch.
_HOMES = {name: module for module, name in re.findall(r"from (\S+) import (\w+) as", Path(__file__).read_text("utf-8"))}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a public name at its first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'hpsearch' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
