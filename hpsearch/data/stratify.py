"""Splits rows into two disjoint parts with the same class proportions."""

import torch
from torch import Tensor

from hpsearch.errors import DataError


def stratify(labels: Tensor, n_held_out: int, n_training: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """Return the row numbers of two disjoint parts, training and held out, sorted and stratified by label."""
    from sklearn.model_selection import train_test_split

    try:
        training, held_out = train_test_split(
            range(len(labels)), train_size=n_training, test_size=n_held_out, stratify=labels, random_state=seed
        )
    except ValueError as error:
        raise DataError(
            f"cannot split {len(labels)} images into data.train = {n_training or 'the rest'} and "
            f"data.validation = {n_held_out} with every class in both: {error}"
        ) from error
    return torch.tensor(sorted(training)), torch.tensor(sorted(held_out))
