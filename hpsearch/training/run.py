"""What a study trains: its data, and a network whose weights and batches follow from a seed."""

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
    """The training and validation split that a study is searched on; raises `DataError`."""
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
    """A network whose weights and batches follow from the seed, and the result of its last epoch.

    It is trained where the data are, on the training split, or on `split`, for the study's epochs, or for `epochs`;
    `options` are those of `train`, which says what is raised.
    """
    split = split or data.train
    generator = seed_everything(seed)
    network = build_network(definition.network.kind, hyperparameters, data.image_shape, len(data.class_names))
    network.to(split.images.device)
    return network, train(
        network, split, hyperparameters, epochs or definition.budget.epochs, generator=generator, **options
    )


def trial_seed(study_seed: int, trial: Suggests, repetition: int = 0) -> int:
    """The seed of a trial's training; a retried trial has that of the trial it repeats.

    `repetition` gives further seeds of the same trial.
    """
    number = (*trial.user_attrs.get("attempts", ()), trial.number)[0]
    return int(np.random.SeedSequence([study_seed, number, repetition]).generate_state(1, np.uint64)[0])


def describe_environment(device: torch.device | str) -> dict[str, Any]:
    """What the last bits of a training depend on beside its seed."""
    name = torch.device(device)
    return {
        "torch": torch.__version__,
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "device": torch.cuda.get_device_name(name) if name.type == "cuda" else name.type,
        "threads": torch.get_num_threads(),
    }
