"""What changes of the recipe of `mnist-cnn` give, on validation images: the errors of a network and of an ensemble."""

import multiprocessing
import os
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hpsearch.data.dataset import ImageData, load_data
from hpsearch.training.kinds import Hyperparameters
from hpsearch.training.networks import Ensemble, build_network
from hpsearch.training.trainer import Trainer
from tests.benchmark.report import Options, Row, summarize

Probabilities = NDArray[np.float32]

_N_TRAIN, _N_VALIDATION, _EPOCHS = 15_000, 45_000, 24
_BASE = Hyperparameters(
    depth=5,
    width=16,
    optimizer="adamw",
    lr=1e-2,
    weight_decay=1e-2,
    batch_size=256,
    schedule="onecycle",
    label_smoothing=0.1,
    augment=0.5,
)
VARIANTS: dict[str, dict[str, Any]] = {
    "the base": {},
    "shear 0.5": {"shear": 0.5},
    "shear 1": {"shear": 1.0},
    "augment 0.35": {"augment": 0.35},
    "augment 0.7": {"augment": 0.7},
    "erase 0.3": {"erase": 0.3},
    "label_smoothing 0": {"label_smoothing": 0.0},
    "label_smoothing 0.2": {"label_smoothing": 0.2},
    "ema 0.99": {"ema": 0.99},
    "lr 0.02": {"lr": 2e-2},
    "weight_decay 0.1": {"weight_decay": 0.1},
    "batch_size 128": {"batch_size": 128},
    "activation gelu": {"activation": "gelu"},
    "width 24": {"width": 24},
    "stem_stride 1, seven blocks of 8 to 64 channels": {"stem_stride": 1, "depth": 7, "width": 8},
    "stem_stride 1, seven blocks of 16 to 128 channels": {"stem_stride": 1, "depth": 7, "width": 16},
}


def recipe(folder: Path, options: Options) -> list[Row]:
    """Errors in 10,000 validation images of each variant, of each seed and of all of them together."""
    jobs = [(name, seed) for seed in range(options.repeats) for name in VARIANTS]
    found = defaultdict[tuple[str, bool], list[Probabilities]](list)
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("forkserver")) as pool:
        trained = [pool.submit(_load_and_train, options.data, VARIANTS[name], seed) for name, seed in jobs]
        for (name, _), each in zip(jobs, trained, strict=True):
            alone, shifted = each.result()
            found[name, False].append(alone)
            found[name, True].append(shifted)
    labels = _load(options.data).validation.labels.numpy()
    rows = []
    for (name, is_shifted), several in found.items():
        part, suffix = f"recipe: {name}", ", shift 1" if is_shifted else ""
        rows.append(summarize(part, f"errors{suffix}", "", [_count(each, labels) for each in several]))
        rows.append(summarize(part, f"errors of all together{suffix}", "", [_count(np.mean(several, axis=0), labels)]))
    return rows


@cache
def _load(folder: Path) -> ImageData:
    return load_data("mnist", folder, train=_N_TRAIN, validation=_N_VALIDATION)


def _load_and_train(folder: Path, variant: dict[str, Any], seed: int) -> list[Probabilities]:
    return train(_load(folder), variant, seed)


def train(data: ImageData, variant: dict[str, Any], seed: int, epochs: int = _EPOCHS) -> list[Probabilities]:
    """Return the probabilities of the validation images, of a new network and of it with `shift` 1."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    chosen = _BASE.model_copy(update=variant)
    network = build_network("cnn", chosen, data.image_shape, len(data.class_names))
    for _ in Trainer(network, data.train, chosen, epochs, seed=seed):
        pass
    return [Ensemble(network, shift=shift).predict_split(data.validation).numpy() for shift in (0, 1)]


def _count(probabilities: Probabilities, labels: NDArray[np.int64]) -> float:
    return 1e4 * float(np.mean(probabilities.argmax(axis=1) != labels))
