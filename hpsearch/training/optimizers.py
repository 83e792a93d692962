"""Optimizers and learning rate schedules."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR

from hpsearch.config.space import TrainingHyperparameters


def build_optimizer(
    parameters: Iterable[nn.Parameter], hyperparameters: TrainingHyperparameters
) -> torch.optim.Optimizer:
    """Build the optimizer that the hyperparameters name, fused where torch has a fused implementation."""
    options: Any = {"lr": hyperparameters.lr, "weight_decay": hyperparameters.weight_decay}
    match hyperparameters.optimizer:
        case "adam":
            return torch.optim.Adam(parameters, **options, fused=True)
        case "adamw":
            return torch.optim.AdamW(parameters, **options, fused=True)
        case "nadam":
            return torch.optim.NAdam(parameters, **options)
        case "rmsprop":
            return torch.optim.RMSprop(parameters, **options, momentum=hyperparameters.momentum)
        case "sgd":
            return torch.optim.SGD(parameters, **options, momentum=hyperparameters.momentum, fused=True)


def build_schedule(
    optimizer: torch.optim.Optimizer, hyperparameters: TrainingHyperparameters, n_steps: int
) -> LRScheduler:
    """Build the learning rate schedule for `n_steps` batches: constant, cosine decay to 0, or one cycle up to `lr`.

    One cycle (Smith and Topin 2018, https://arxiv.org/abs/1708.07120) does not change the momentum, which is a
    separate hyperparameter.
    """
    match hyperparameters.schedule:
        case "constant":
            return LambdaLR(optimizer, lambda _: 1.0)
        case "cosine":
            return CosineAnnealingLR(optimizer, T_max=n_steps)
        case "onecycle":
            return OneCycleLR(optimizer, hyperparameters.lr, total_steps=n_steps, cycle_momentum=False)
