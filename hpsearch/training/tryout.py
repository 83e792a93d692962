"""Tries a network of the user's on one batch, so that its mistakes are named before a search relies on it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

import torch
from torch import Tensor, nn

from hpsearch.config.definition import StudyDefinition
from hpsearch.config.space import suggest
from hpsearch.data.dataset import Split
from hpsearch.errors import Diverged, OwnCodeError
from hpsearch.plugins import OwnCode
from hpsearch.training.networks import OwnNetwork, build_network
from hpsearch.training.randomness import GlobalRandom
from hpsearch.training.trainer import Trainer

logger = logging.getLogger(__name__)

_N_IMAGES = 8
_MOST_NAMED = 5  # parameters in a message


class _FirstTrial:
    """Suggests the values of the first trial to try, and of other hyperparameters the first one."""

    number = 0

    def __init__(self, definition: StudyDefinition) -> None:
        self.values = dict(definition.first[0]) if definition.first else {}
        self.user_attrs: dict[str, Any] = {}

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        return int(self.values.get(name, low))

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        return float(self.values.get(name, low))

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self.values.get(name, choices[0])


def try_network(definition: StudyDefinition, image_shape: tuple[int, int, int], n_classes: int) -> OwnNetwork | None:
    """Train the network of the first trial on a batch of random images of shape (C, H, W), and return it.

    Does nothing and returns None for a built-in kind of network. Warns about parameters that get no gradient. Raises
    `OwnCodeError` if the user's code fails, or if its network cannot be trained to give logits (N, classes).
    """
    code = definition.network.code
    if code is None:
        return None
    hyperparameters: Any = suggest(_FirstTrial(definition), definition.space)
    call = ", ".join(f"{name}={value!r}" for name, value in hyperparameters.arguments().items())

    def build() -> OwnNetwork:
        return cast(OwnNetwork, build_network(definition.network, hyperparameters, image_shape, n_classes))

    with GlobalRandom(0).used():
        code.load()
    with GlobalRandom(0).used(), _naming(code, f"{code.function}({tuple(image_shape)}, {n_classes}, {call})"):
        network, other = build(), build()
        _check_parameters(network, other)
        images, labels = torch.randn(_N_IMAGES, *image_shape), torch.arange(_N_IMAGES) % n_classes
        split = Split(images, labels)
        logits = network.train().module(images)
        _check_logits(logits, (_N_IMAGES, n_classes), "in training")
        _check_gradients(code, network, logits.detach(), nn.functional.cross_entropy(logits.float(), labels))
        statistics: Any = {"mean": [0.0] * image_shape[0], "std": [1.0] * image_shape[0]}
        first = Split(images[:1], labels[:1])
        trainer = Trainer(network, split, hyperparameters, epochs=3, validation=first, **statistics)
        with torch.inference_mode():
            _check_logits(network.eval().module(images[:1]), (1, n_classes), "in evaluation")
        with suppress(Diverged):  # it may be the learning rate
            for _ in range(2):  # the second one comes after a validation
                trainer.run_epoch()
    return network


@contextmanager
def _naming(code: OwnCode, call: str) -> Iterator[None]:
    """Name the line of the user's file, or what is wrong with its network, and how it was built."""
    try:
        yield
    except OwnCodeError as error:
        raise OwnCodeError(f"{code.path}: {error}; it was tried as {call}") from error
    except Exception as error:
        raise OwnCodeError(f"{code.locate(error)}; it was tried as {call}") from error


def _check_parameters(network: OwnNetwork, other: OwnNetwork) -> None:
    """Raise `OwnCodeError` if the parameters of the network cannot be trained as they are."""
    owners: dict[int, str] = {}
    others = {parameter.data_ptr() for parameter in other.parameters() if parameter.numel()}
    trained = [(name, each) for name, each in network.module.named_parameters() if each.requires_grad and each.numel()]
    if not trained:
        raise OwnCodeError("the network has no parameters to train")
    for name, parameter in trained:
        if parameter.dtype != torch.float32:
            raise OwnCodeError(f"parameter {name} is {parameter.dtype}, but parameters are trained in torch.float32")
        if parameter.data_ptr() in others:
            raise OwnCodeError(f"two networks share the parameter {name}; the function must build a new one each time")
        if (twin := owners.setdefault(parameter.data_ptr(), name)) != name:
            raise OwnCodeError(f"parameters {twin} and {name} are two that share memory; tie them by making them one")


def _check_logits(logits: Any, expected: tuple[int, int], where: str) -> None:
    if not isinstance(logits, Tensor):
        raise OwnCodeError(f"the network must return logits, a tensor, but returned a {type(logits).__name__} {where}")
    if tuple(logits.shape) != expected:
        found = tuple(logits.shape)
        raise OwnCodeError(f"logits must have shape (images, classes) = {expected}, but have {found} {where}")
    if not logits.is_floating_point():
        raise OwnCodeError(f"logits must be floating point numbers, but are {logits.dtype}")
    if not logits.isfinite().all():
        raise OwnCodeError(f"some logits of random images are NaN or infinite {where}")


def _check_gradients(code: OwnCode, network: OwnNetwork, logits: Tensor, loss: Tensor) -> None:
    """Raise `OwnCodeError` if no parameter would move, and warn about those that get no gradient."""
    parameters = {name: each for name, each in network.module.named_parameters() if each.requires_grad}
    if loss.requires_grad:
        loss.backward()
    gradients = {name: each.grad for name, each in parameters.items() if each.grad is not None}
    if not any(gradient.any() for gradient in gradients.values()):
        raise OwnCodeError("no parameter moves in training: the logits do not depend on them, or are detached")
    if broken := [name for name, gradient in gradients.items() if not gradient.isfinite().all()]:
        raise OwnCodeError(f"gradients are NaN or infinite for random images: {_list(broken)}")
    if still := [name for name in parameters if name not in gradients]:
        logger.warning("%s: in a first batch, these parameters got no gradient: %s", code.path, _list(still))
    if (logits >= 0).all() and torch.allclose(logits.sum(1), torch.ones(len(logits)), atol=1e-4):
        logger.warning("%s: the output looks like probabilities; leave out the softmax, to return logits", code.path)


def _list(names: list[str]) -> str:
    rest = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + rest
