"""Loads the data of a study, and trains a network whose weights and batches depend only on a seed."""

import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpsearch.config.definition import StudyDefinition
from hpsearch.config.space import Hyperparameters, Suggests
from hpsearch.data.dataset import ImageData, Split, load_data
from hpsearch.training.networks import Network, build_network
from hpsearch.training.trainer import EpochResult, seed_everything, train


def load_study_data(definition: StudyDefinition, folder: Path | str | None = None) -> ImageData:
    """Load the training and validation split of a study. Raises `DataError`."""
    data = definition.data
    return load_data(data.name, folder, validation=data.validation, train=data.train, split_seed=data.split_seed)


def train_from_seed(
    definition: StudyDefinition,
    data: ImageData,
    hyperparameters: Hyperparameters,
    seed: int,
    *,
    split: Split | None = None,
    epochs: int | None = None,
    **options: Any,
) -> tuple[Network, EpochResult]:
    """Train a network whose weights and batches depend only on the seed; return it with its last epoch's result.

    Trains on the device of the data, on the training split or `split`, for the study's epochs or `epochs`. `options`
    are passed to `train`, whose docstring lists the errors.
    """
    split = split or data.train
    generator = seed_everything(seed)
    network = build_network(definition.network.kind, hyperparameters, data.image_shape, len(data.class_names))
    network.to(split.images.device)
    return network, train(
        network, split, hyperparameters, epochs or definition.budget.epochs, generator=generator, **options
    )


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
