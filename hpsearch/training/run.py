"""Loads the data of a study, and builds trainers that depend only on a seed."""

import platform
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpsearch.config.definition import Data, StudyDefinition
from hpsearch.config.space import Suggests, TrainingHyperparameters
from hpsearch.data.arrays import open_file, open_function
from hpsearch.data.dataset import ImageData, Split, load_data
from hpsearch.data.image_folder import open_folder
from hpsearch.data.sets import DataSet, find_data_set
from hpsearch.errors import DataError
from hpsearch.training.devices import tune_malloc
from hpsearch.training.networks import build_network
from hpsearch.training.randomness import GlobalRandom
from hpsearch.training.trainer import Trainer


def open_data_set(
    definition: StudyDefinition,
    folder: DataSet | Path | str | None = None,
    on_read: Callable[[int, int], None] = lambda n_done, n_total: None,
) -> DataSet:
    """Return the data set of a study: a built-in one, whose files are in `folder`, or the user's own images.

    Own images are read unless that was done before; `on_read` gets the number of files read and of all. `folder` takes
    the place of the folder or file in the study file; if it is a data set, which is open already, it is returned.
    Raises `DataError`.
    """
    if isinstance(folder, DataSet):
        return folder
    return open_images(definition.data, folder, on_read)


def open_images(
    data: Data, folder: Path | str | None = None, on_read: Callable[[int, int], None] = lambda n_done, n_total: None
) -> DataSet:
    """Return the data set of a table [data]: see `open_data_set`."""
    if data.name:
        return find_data_set(data.name, folder)
    settings: dict[str, Any] = {"test": data.test, "validation": data.validation, "split_seed": data.split_seed}
    if data.folder:
        return open_folder(
            folder or data.folder,
            size=data.size,
            color=data.color,
            skip_unreadable=bool(data.skip_unreadable),
            on_read=on_read,
            **settings,
        )
    if data.code and folder:
        raise DataError(f"--data: has no effect, since {data.title} knows where its images are; leave it out")
    if data.code:
        return open_function(data.code, on_read=on_read, **settings)
    return open_file(folder or str(data.file), on_read=on_read, **settings)


def load_study_data(definition: StudyDefinition, folder: DataSet | Path | str | None = None) -> ImageData:
    """Load the training and validation split of a study. Raises `DataError`."""
    data, data_set = definition.data, open_data_set(definition, folder)
    n_validation = int(data.validation or 0)
    return load_data(data_set, validation=n_validation, train=data.train, split_seed=data.split_seed)


def build_trainer(
    definition: StudyDefinition,
    data: ImageData,
    hyperparameters: TrainingHyperparameters,
    seed: int,
    *,
    split: Split | None = None,
    epochs: int | None = None,
    validation: Split | None = None,
    averaged_after: Collection[int] = (),
) -> Trainer:
    """Return the trainer of a new network; its weights and its batches depend only on the seed.

    Trains on the device of the data, on the training split or `split`, for the study's epochs or `epochs`.
    `averaged_after` are epochs: see `Trainer`.
    """
    split = split or data.train
    tune_malloc()
    with GlobalRandom(seed, split.labels.device).used():
        network = build_network(definition.network, hyperparameters, data.image_shape, len(data.class_names))
        after_weights = torch.get_rng_state()
    network.to(split.labels.device)
    trainer = Trainer(
        network,
        split,
        hyperparameters,
        epochs or definition.budget.epochs,
        validation=validation,
        metric=definition.study.metric,
        seed=seed,
        mean=data.mean,
        std=data.std,
        averaged_after=averaged_after,
    )
    if trainer.noise.device.type == "cpu":  # as in earlier versions, so that their trials are replayed bit for bit
        trainer.noise.set_state(after_weights)
    return trainer


def trial_seed(study_seed: int, trial: Suggests, repetition: int = 0) -> int:
    """Return the seed for training a trial; a retry has the seed of the first attempt.

    Each `repetition` has a different seed.
    """
    number = (*trial.user_attrs.get("attempts", ()), trial.number)[0]
    return int(np.random.SeedSequence([study_seed, number, repetition]).generate_state(1, np.uint64)[0])


def describe_environment(device: torch.device | str) -> dict[str, Any]:
    """Return the software and hardware that a bit-exact training depends on, besides the seed."""
    name = torch.device(device)
    return {
        "torch": torch.__version__,
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "device": torch.cuda.get_device_name(name) if name.type == "cuda" else name.type,
        "threads": torch.get_num_threads(),
    }
