"""Hyperparameter search for PyTorch image classifiers.

The package, to be read downwards; a file imports only from lines below its own:

    __main__                              runs a verb, catches errors, exits
    cli                                   the verbs that search
    cli_upkeep                            the verbs that look after a study
    cli_watch                             the verbs to watch a search, and to steer it
    cli_winner                            the verbs for what was found
    arguments                             what the verbs take
    live                                  a search while it runs: a table on a terminal, lines in a pipe
    console | report | dashboard          text rendering; a study as one HTML file; Optuna's dashboard, guarded
    plots | notes                         the pictures of a report; what the dashboard says of study and trials
    pool | cluster                        N workers on this machine under one supervisor; on many, placed by Ray
    doctor | tasks                        what is wrong with a study; what a search has running in a Ray cluster
    worker | retrain                      one worker; the best trial to a bundle
    confirmation | replay                 the best few from fresh seeds; a trial once more from its own
    copying                               a study copied to another database, and compared
    watching | steering                   what there is to see of a search; stopped, extended, given values to try
    study | listing | prediction          the studies in a storage; trials as rows; the classes of image files
    lease                                 what keeps a running trial with its worker
    objective | strategy                  trial to value; sampler and pruner
    storage | bundle                      safe RDBStorage; what a user takes away
    recovery | pictures                   RDBStorage that outlasts outages and the ends of workers; figures drawn
    tally                                 what `status` says, counted by the database
    pruning                               ends hopeless trials, and says what they were measured against
    definition | evaluation | training    the study file; figures; the training loop
    mistakes                              what is wrong in a study file, and where
    formats                               the files that hold a model, each verified in a fresh process
    gradients                             of a training step, by autograd or written out
    checkpoint | space | network | data | budget | database | rows
    artifacts | postgresql                a folder here or by URL in a store; what is particular about PostgreSQL
    serving                               a web application at an address of this machine
    devices | forking | signals           what there is to compute with; what workers are forked from; a wish to stop
    images                                image files to pixels
    guard | sealed                        who may ask a web application; a folder read only if it is what it was
    errors

    >>> definition = hpsearch.load_definition("studies/digits.toml")
    >>> study = optuna.create_study(direction="maximize")
    >>> study.optimize(hpsearch.Objective(definition), n_trials=3)

    >>> hpsearch.load("dist/mnist-mlp").predict_proba(images)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpsearch.bundle import Classifier, load
    from hpsearch.confirmation import confirm
    from hpsearch.data import ImageData, Split, load_data, load_test
    from hpsearch.definition import StudyDefinition, load_definition
    from hpsearch.errors import HpsearchError
    from hpsearch.evaluation import Evaluation
    from hpsearch.network import build_network
    from hpsearch.objective import Objective
    from hpsearch.pruning import PruningCallback
    from hpsearch.retrain import export
    from hpsearch.space import Hyperparameters, suggest
    from hpsearch.storage import open_storage
    from hpsearch.study import open_study
    from hpsearch.training import train

_HOMES = {
    "Classifier": "bundle",
    "Evaluation": "evaluation",
    "HpsearchError": "errors",
    "Hyperparameters": "space",
    "ImageData": "data",
    "Objective": "objective",
    "PruningCallback": "pruning",
    "Split": "data",
    "StudyDefinition": "definition",
    "build_network": "network",
    "confirm": "confirmation",
    "export": "retrain",
    "load": "bundle",
    "load_data": "data",
    "load_definition": "definition",
    "load_test": "data",
    "open_storage": "storage",
    "open_study": "study",
    "suggest": "space",
    "train": "training",
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
