"""The training loop, its optimizers and schedules, and what it tells its callbacks."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR

from hpsearch.data import Split, augment
from hpsearch.errors import Diverged
from hpsearch.network import Network
from hpsearch.space import Hyperparameters


@dataclass(frozen=True)
class EpochResult:
    """What an epoch came to: its number from 1 on, mean training loss, validation accuracy (None without a split)."""

    epoch: int
    loss: float
    accuracy: float | None


Callback = Callable[[EpochResult], None]


def train(
    network: Network,
    train_split: Split,
    hyperparameters: Hyperparameters,
    epochs: int,
    *,
    validation: Split | None = None,
    generator: torch.Generator | None = None,
    callbacks: Sequence[Callback] = (),
    before_batch: Callable[[], None] = lambda: None,
) -> EpochResult:
    """The result of the last epoch; the network is trained in place, on the device where it and the data are.

    `generator` draws the order of the images. `before_batch` is called before each batch and may raise to end the
    training. Raises `Diverged` after an epoch whose loss is not finite.
    """
    loader = train_split.loader(hyperparameters.batch_size, shuffle=True, generator=generator)
    optimizer = build_optimizer(network, hyperparameters)
    schedule = build_schedule(optimizer, hyperparameters, n_steps=epochs * len(loader))
    loss_function = nn.CrossEntropyLoss(label_smoothing=hyperparameters.label_smoothing)

    for epoch in range(1, epochs + 1):
        network.train()
        total = torch.zeros((), device=train_split.labels.device)
        for images, labels in loader:
            before_batch()
            if hyperparameters.augment:
                images = augment(images, hyperparameters.augment)
            loss = loss_function(network(images), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()

        mean_loss = total.item() / len(loader)
        if not math.isfinite(mean_loss):
            raise Diverged(f"the training loss is {mean_loss} in epoch {epoch}")
        accuracy = None if validation is None else measure_accuracy(network, validation)
        result = EpochResult(epoch, mean_loss, accuracy)
        for callback in callbacks:
            callback(result)
    return result


def measure_accuracy(network: Network, split: Split) -> float:
    """The share of images whose likeliest class is their label, in [0, 1]."""
    predicted = network.predict_proba(split.images).argmax(dim=1)
    return int((predicted == split.labels).sum()) / len(split)


def build_optimizer(network: nn.Module, hyperparameters: Hyperparameters) -> torch.optim.Optimizer:
    """The optimizer of `torch.optim` that the hyperparameters name, fused where torch has a fused one."""
    lr, weight_decay = hyperparameters.lr, hyperparameters.weight_decay
    parameters = network.parameters()
    match hyperparameters.optimizer:
        case "adam":
            return torch.optim.Adam(parameters, lr=lr, weight_decay=weight_decay, fused=True)
        case "adamw":
            return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)
        case "nadam":
            return torch.optim.NAdam(parameters, lr=lr, weight_decay=weight_decay)
        case "rmsprop":
            return torch.optim.RMSprop(parameters, lr=lr, weight_decay=weight_decay, momentum=hyperparameters.momentum)
        case "sgd":
            return torch.optim.SGD(
                parameters, lr=lr, weight_decay=weight_decay, momentum=hyperparameters.momentum, fused=True
            )


def build_schedule(optimizer: torch.optim.Optimizer, hyperparameters: Hyperparameters, n_steps: int) -> LRScheduler:
    """The learning rate over `n_steps` batches: constant, half a cosine down to 0, or one cycle up to `lr` and down.

    One cycle leaves the momentum alone, since `momentum` is a hyperparameter of its own (Smith and Topin 2018,
    https://arxiv.org/abs/1708.07120).
    """
    match hyperparameters.schedule:
        case "constant":
            return LambdaLR(optimizer, lambda _: 1.0)
        case "cosine":
            return CosineAnnealingLR(optimizer, T_max=n_steps)
        case "onecycle":
            return OneCycleLR(optimizer, hyperparameters.lr, total_steps=n_steps, cycle_momentum=False)


def seed_everything(seed: int) -> torch.Generator:
    """A generator for the order of the images; torch's global random state is seeded as well."""
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)
