"""The moving average of weights changes nothing of the training, and continues bit for bit."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from hpsearch.config.space import TrainingHyperparameters
from hpsearch.data.dataset import Split
from hpsearch.training.averaging import WeightAverage
from hpsearch.training.gradients import join_parameters
from hpsearch.training.networks import Network, OwnNetwork
from hpsearch.training.trainer import Trainer, measure


def make_trainer(split: Split, averaged_after: tuple[int, ...], ema: float = 0.0) -> Trainer:
    torch.manual_seed(0)
    network = Network(nn.Flatten(), nn.Linear(split.images[0].numel(), 16), nn.BatchNorm1d(16), nn.Linear(16, 10))
    hyperparameters = TrainingHyperparameters(lr=0.1, batch_size=8, ema=ema)
    return Trainer(network, split, hyperparameters, 3, validation=split, averaged_after=averaged_after)


def test_an_average_follows_a_network_and_gives_it_back() -> None:
    network = nn.BatchNorm1d(2)
    joined = join_parameters(network)
    with torch.no_grad():
        joined.fill_(0.0)
    average = WeightAverage(network, joined, n_steps=4)
    with torch.no_grad():
        joined.fill_(1.0)
    average.update(step=1)
    expected = 10 / 11
    assert torch.allclose(average.tensors[0], torch.full((4,), expected))
    average.update(step=1000)
    expected += (1 - expected) / 4
    with average.used():
        assert torch.allclose(network.weight, torch.full((2,), expected))
    assert network.weight.tolist() == [1.0, 1.0]
    assert len(average.tensors) == 3, "the parameters, a mean and a variance, but not the counter of batches"


class Peculiar(nn.Module):
    """Draws random numbers and counts its calls, in evaluation too, and has constant buffers."""

    def __init__(self, n_inputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(n_inputs, 10)
        self.register_buffer("mask", torch.tensor(-torch.inf))
        self.register_buffer("expanded", torch.ones(1).expand(8))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1  # type: ignore[assignment, operator]
        outputs: Tensor = self.layer(images.flatten(1) + 0.1 * torch.randn(1))
        return outputs + torch.exp(self.mask)  # type: ignore[arg-type]


def test_a_network_that_draws_in_evaluation_trains_the_same_with_its_weights_averaged(blobs: Split) -> None:
    trainers = []
    for averaged_after in ((1, 2), ()):
        torch.manual_seed(0)
        network = OwnNetwork(Peculiar(blobs.images[0].numel()))
        hyperparameters = TrainingHyperparameters(lr=0.1, batch_size=8)
        trainers.append(Trainer(network, blobs, hyperparameters, 3, validation=blobs, averaged_after=averaged_after))
    averaged, plain = trainers
    assert [*averaged] == [*plain]
    assert all(value > 0.5 for value in averaged.averaged.values())
    for one, other in zip(averaged.network.state_dict().values(), plain.network.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_a_training_is_the_same_with_its_weights_averaged(blobs: Split) -> None:
    averaged, plain = make_trainer(blobs, (1, 2)), make_trainer(blobs, ())
    assert [*averaged] == [*plain]
    assert [*averaged.averaged] == [1, 2]
    assert plain.averaged == {}
    for one, other in zip(averaged.network.state_dict().values(), plain.network.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_weights_are_averaged_no_longer_than_they_are_measured(blobs: Split) -> None:
    trainer = make_trainer(blobs, (1, 2))
    assert ["average" in trainer.state_dict() for _ in trainer] == [True, False, False]
    resumed = make_trainer(blobs, (1, 2))
    resumed.load_state_dict(trainer.state_dict())
    assert "average" not in resumed.state_dict()
    assert resumed.averaged == trainer.averaged


@pytest.mark.parametrize("ema", [0.0, 0.95])
def test_an_average_continues_bit_for_bit_in_the_middle_of_an_epoch(blobs: Split, ema: float) -> None:
    whole, first, second = (make_trainer(blobs, (1, 3), ema) for _ in range(3))
    averages = whole._average, second._average
    for _ in whole:
        pass
    calls = iter(range(100))

    def stop() -> None:
        if next(calls) == len(blobs) // 8 + 2:
            raise InterruptedError

    try:
        while True:
            first.run_epoch(stop)
    except InterruptedError:
        second.load_state_dict(first.state_dict())
    for _ in second:
        pass
    assert second.averaged == whole.averaged
    assert all(map(torch.equal, *(average.tensors for average in averages if average)))
    assert all(map(torch.equal, floats(second.network), floats(whole.network)))
    done = make_trainer(blobs, (1, 3), ema)
    done.load_state_dict(whole.state_dict())
    assert all(map(torch.equal, floats(done.network), floats(whole.network)))


def test_an_average_of_a_training_that_had_none_starts_from_the_weights_with_which_it_continues(blobs: Split) -> None:
    first, second = make_trainer(blobs, ()), make_trainer(blobs, (3,))
    first.run_epoch()
    second.load_state_dict(deepcopy(first.state_dict()))
    assert second._average is not None
    assert all(map(torch.equal, second._average.tensors, second._average.live))
    assert [*second] == [*first]
    assert [*second.averaged] == [3]


def test_with_ema_the_average_is_validated_and_at_the_end_the_network_has_it(blobs: Split) -> None:
    plain, averaged = make_trainer(blobs, ()), make_trainer(blobs, (1,), ema=0.9)
    after_steps: list[list[Tensor]] = []

    def note() -> None:
        after_steps.append([tensor.clone() for tensor in floats(plain.network)])

    while not plain.is_done:
        plain.run_epoch(note)
    note()
    expected, *rest = after_steps
    for step, tensors in enumerate(rest, 1):
        weight = max(0.1, 10 / (10 + step))
        expected = [old.lerp(new, weight) for old, new in zip(expected, tensors, strict=True)]
    assert [result.loss for result in averaged] == [result.loss for result in plain.results]
    torch.testing.assert_close(floats(averaged.network), expected)
    assert averaged.results[-1].accuracy == measure(averaged.network, blobs).accuracy
    assert averaged.averaged == {1: averaged.results[0].accuracy}


def test_a_trainer_that_is_done_goes_on_with_the_average_of_an_earlier_state(blobs: Split) -> None:
    trainer = make_trainer(blobs, (), ema=0.95)
    trainer.run_epoch()
    earlier = deepcopy(trainer.state_dict())
    list(trainer)
    expected = [tensor.clone() for tensor in floats(trainer.network)]
    trainer.load_state_dict(earlier)
    list(trainer)
    assert all(map(torch.equal, floats(trainer.network), expected))


def floats(network: nn.Module) -> list[Tensor]:
    return [tensor for tensor in network.state_dict().values() if tensor.is_floating_point()]
