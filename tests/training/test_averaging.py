"""The moving average of weights changes nothing of the training, and continues bit for bit."""

from copy import deepcopy

import torch
from torch import nn

from hpsearch.config.space import TrainingHyperparameters
from hpsearch.data.dataset import Split
from hpsearch.training.averaging import WeightAverage
from hpsearch.training.networks import Network
from hpsearch.training.trainer import Trainer


def make_trainer(split: Split, averaged_after: tuple[int, ...]) -> Trainer:
    torch.manual_seed(0)
    network = Network(nn.Flatten(), nn.Linear(split.images[0].numel(), 16), nn.BatchNorm1d(16), nn.Linear(16, 10))
    hyperparameters = TrainingHyperparameters(lr=0.1, batch_size=8)
    return Trainer(network, split, hyperparameters, 3, validation=split, averaged_after=averaged_after)


def test_an_average_follows_tensors_and_gives_them_back() -> None:
    live, counter = torch.zeros(2), torch.tensor(3)
    average = WeightAverage([live, counter], n_steps=4)
    live.fill_(1.0)
    average.update(step=1)
    expected = 10 / 11
    assert torch.allclose(average.tensors[0], torch.full((2,), expected))
    average.update(step=1000)
    expected += (1 - expected) / 4
    with average.used():
        assert torch.allclose(live, torch.full((2,), expected))
    assert (live.tolist(), counter.item(), len(average.tensors)) == ([1.0, 1.0], 3, 1)


def test_a_training_is_the_same_with_its_weights_averaged(blobs: Split) -> None:
    averaged, plain = make_trainer(blobs, (1, 2)), make_trainer(blobs, ())
    assert [*averaged] == [*plain]
    assert [*averaged.averaged] == [1, 2]
    assert plain.averaged == {}
    for one, other in zip(averaged.network.state_dict().values(), plain.network.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_weights_are_averaged_no_longer_than_they_are_measured(blobs: Split) -> None:
    trainer = make_trainer(blobs, (1, 2))
    assert trainer._average is not None
    averages = [trainer._average.tensors[0].clone() for _ in trainer]
    assert not torch.equal(averages[0], averages[1])
    assert torch.equal(averages[1], averages[2])


def test_an_average_continues_bit_for_bit_in_the_middle_of_an_epoch(blobs: Split) -> None:
    whole, first, second = (make_trainer(blobs, (1, 3)) for _ in range(3))
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
    assert all(map(torch.equal, second._average.tensors, whole._average.tensors))  # type: ignore[union-attr]


def test_an_average_of_a_training_that_had_none_starts_from_the_weights_with_which_it_continues(blobs: Split) -> None:
    first, second = make_trainer(blobs, ()), make_trainer(blobs, (3,))
    first.run_epoch()
    second.load_state_dict(deepcopy(first.state_dict()))
    assert second._average is not None
    assert all(map(torch.equal, second._average.tensors, second._average.live))
    assert [*second] == [*first]
    assert [*second.averaged] == [3]
