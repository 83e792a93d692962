"""The closed-form gradients equal autograd's, and so do the trainings that use them."""

import platform
import threading
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

import hpsearch.training.gradients
import hpsearch.training.trainer
from hpsearch.data.dataset import Split
from hpsearch.training.gradients import Autograd, PerceptronGradients, choose_gradients, fast_matmul, join_parameters
from hpsearch.training.kinds import Hyperparameters
from hpsearch.training.networks import Dropout, Network, build_network
from hpsearch.training.trainer import EpochResult, Trainer

SHAPE = (1, 28, 28)
PERCEPTRONS: list[dict[str, Any]] = [
    {},
    {"batch_norm": False, "depth": 1},
    {"depth": 3, "dropout": 0.4, "activation": "gelu"},
    {"batch_norm": False, "dropout": 0.2, "activation": "silu"},
    {"dropout": 0.3, "label_smoothing": 0.1, "batch_size": 60},
]


def make_network(kind: str = "mlp", **options: Any) -> tuple[Network, Hyperparameters]:
    torch.manual_seed(0)
    hyperparameters = Hyperparameters(**{"width": 12, "batch_size": 64, "lr": 1e-2} | options)
    return build_network(kind, hyperparameters, SHAPE, 2), hyperparameters


def test_the_precision_of_a_training_in_one_thread_is_not_that_of_another() -> None:
    found = list[str]()

    def train_small_network() -> None:
        with fast_matmul(100):
            found.append(torch.get_float32_matmul_precision())

    thread = threading.Thread(target=train_small_network)
    before = torch.get_float32_matmul_precision()
    with fast_matmul(10**6):
        thread.start()
        thread.join(0.2)  # it has to wait
    thread.join()
    assert found == [before] == [torch.get_float32_matmul_precision()]


@pytest.mark.parametrize("options", PERCEPTRONS)
def test_closed_form_gradients_and_loss_equal_autograd(blobs: Split, options: dict[str, Any]) -> None:
    network, hyperparameters = make_network(**options)
    joined = join_parameters(network)
    found = []
    for kind in (Autograd, PerceptronGradients):
        joined.grad.fill_(torch.nan)  # type: ignore[union-attr]  # nothing is left of the other kind
        torch.manual_seed(1)  # of the dropout
        loss = kind(network, hyperparameters.label_smoothing)(blobs.images, blobs.labels)
        found.append([loss, *(parameter.grad.clone() for parameter in network.parameters())])  # type: ignore[union-attr]
    for reference, written in zip(*found, strict=True):
        torch.testing.assert_close(written, reference, rtol=1e-4, atol=1e-6)
    assert all(gradient.abs().max() > 0 for gradient in found[1])


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", "rmsprop", "nadam"])
@pytest.mark.parametrize("options", PERCEPTRONS)
def test_closed_form_training_has_the_learning_curve_and_the_weights_of_autograd(
    blobs: Split, options: dict[str, Any], optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def learn() -> tuple[list[EpochResult], dict[str, torch.Tensor]]:
        network, hyperparameters = make_network(**options, optimizer=optimizer, momentum=0.5, schedule="onecycle")
        return list(Trainer(network, blobs, hyperparameters, 3, validation=blobs, seed=3)), network.state_dict()

    curve, weights = learn()
    monkeypatch.setattr(hpsearch.training.trainer, "choose_gradients", Autograd)
    reference_curve, reference_weights = learn()
    assert [result.loss for result in curve] == pytest.approx([r.loss for r in reference_curve], rel=1e-3)
    assert [result.accuracy for result in curve] == pytest.approx([r.accuracy for r in reference_curve], abs=0.01)
    for name, reference in reference_weights.items():
        # Adam divides gradients by their own size, so rounding shows where they are almost nothing.
        torch.testing.assert_close(weights[name], reference, rtol=1e-2, atol=2e-3)


def test_perceptrons_use_closed_form_gradients_and_other_networks_autograd() -> None:
    assert isinstance(choose_gradients(make_network(dropout=0.1)[0], 0.0), PerceptronGradients)
    assert isinstance(choose_gradients(make_network("cnn")[0], 0.0), Autograd)
    assert isinstance(choose_gradients(Network(nn.Flatten(), nn.Linear(784, 2), nn.Tanh()), 0.0), Autograd)
    assert isinstance(choose_gradients(Network(nn.Flatten(), nn.ReLU(), nn.Linear(784, 2)), 0.0), Autograd)


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_joined_parameters_share_memory_with_the_network_and_keep_its_values(kind: str, blobs: Split) -> None:
    network, _ = make_network(kind)
    network.to(memory_format=torch.channels_last)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    joined = join_parameters(network)
    assert joined.numel() == sum(parameter.numel() for parameter in network.parameters())
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.stride() == before[name].stride()
    nn.functional.cross_entropy(network(blobs.images), blobs.labels).backward()
    assert joined.grad is not None
    assert joined.grad.abs().sum() == pytest.approx(
        sum(parameter.grad.abs().sum().item() for parameter in network.parameters() if parameter.grad is not None)
    )
    with torch.no_grad():
        joined.zero_()
    assert all(not parameter.any() for parameter in network.parameters())


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 0.97])
def test_dropout_drops_the_requested_share_and_keeps_the_mean(p: float) -> None:
    torch.manual_seed(0)
    dropped = Dropout(p)(torch.ones(1001, 999))
    assert (dropped == 0).float().mean().item() == pytest.approx(p, abs=2e-3)
    assert dropped.mean().item() == pytest.approx(1.0, abs=2e-2)
    assert len(dropped.unique()) == (2 if p else 1)
    assert not torch.equal(dropped[:500] == 0, dropped[500:1000] == 0) or p == 0
    assert torch.equal(Dropout(p).eval()(torch.ones(3, 5)), torch.ones(3, 5))


@pytest.mark.parametrize(("width", "expected"), [(12, "highest"), (256, "medium")])
def test_only_large_networks_use_fast_matmul(blobs: Split, width: int, expected: str) -> None:
    network, hyperparameters = make_network(width=width)
    seen = set()

    def stop() -> None:
        seen.add(torch.get_float32_matmul_precision())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trainer(network, blobs, hyperparameters, 1).run_epoch(stop)
    assert seen == {expected}
    assert torch.get_float32_matmul_precision() == "highest"  # as it was before


def learn_losses(blobs: Split, kind: str, width: int) -> list[float]:
    network, hyperparameters = make_network(kind, width=width)
    return [result.loss for result in Trainer(network, blobs, hyperparameters, 3, seed=3)]


def test_fast_matmul_has_the_learning_curve_of_plain_matmul(blobs: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = learn_losses(blobs, "mlp", 256)
    monkeypatch.setattr(hpsearch.training.trainer, "fast_matmul", lambda n_parameters: nullcontext())
    is_rounded = torch.cpu.get_capabilities().get("amx_bf16") or platform.machine() != "x86_64"
    assert quick == pytest.approx(learn_losses(blobs, "mlp", 256), rel=0.05 if is_rounded else 1e-3)


def test_networks_without_convolutions_are_computed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hpsearch.training.gradients, "_computes_bfloat16", lambda device: True)
    assert [Autograd(make_network(kind)[0], 0.0).is_mixed for kind in ("mlp", "cnn")] == [False, True]


def test_convolutions_in_bfloat16_have_the_learning_curve_of_float32(
    blobs: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    curves = []
    for computes_bfloat16 in (True, False):
        monkeypatch.setattr(
            hpsearch.training.gradients, "_computes_bfloat16", lambda device, answer=computes_bfloat16: answer
        )
        curves.append(learn_losses(blobs, "cnn", 8))
    assert curves[0] != curves[1]
    assert curves[0] == pytest.approx(curves[1], rel=0.05)
