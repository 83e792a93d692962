"""Networks: the requested hidden layers, logits in training, softmax probabilities in prediction."""

import json
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hpsearch.data.dataset import RawSplit, Split
from hpsearch.plugins import NETWORKS, find
from hpsearch.training.kinds import Hyperparameters
from hpsearch.training.networks import Ensemble, Network, OwnNetwork, build_network, from_layers, shift_images
from hpsearch.training.trainer import Trainer

SHAPE = (1, 28, 28)


def count(network: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(layer, kind) for layer in network.modules())


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_an_mlp_has_depth_hidden_layers_of_width(depth: int) -> None:
    network = build_network("mlp", Hyperparameters(depth=depth, width=17), SHAPE, 10)
    widths = [layer.out_features for layer in network if isinstance(layer, nn.Linear)]
    assert widths == [17] * depth + [10]
    assert count(network, nn.BatchNorm1d) == depth


@pytest.mark.parametrize("depth", [1, 3, 5])
def test_a_cnn_has_depth_blocks_from_width_channels(depth: int) -> None:
    network = build_network("cnn", Hyperparameters(depth=depth, width=6), SHAPE, 10)
    channels = [layer.out_channels for layer in network if isinstance(layer, nn.Conv2d)]
    assert channels == [6, 12, 12, 24, 24][:depth]
    assert count(network, nn.BatchNorm2d) == depth


@pytest.mark.parametrize(
    ("stem_stride", "expected"),
    [
        (1, [(5, 28), (10, 14), (10, 14), (20, 7), (20, 7), (40, 4), (40, 4), (40, 4)]),
        (2, [(5, 14), (10, 7), (10, 7), (20, 4), (20, 4), (20, 4), (20, 4), (20, 4)]),
    ],
)
def test_the_stem_of_a_cnn_keeps_all_pixels_or_a_quarter(stem_stride: int, expected: list[tuple[int, int]]) -> None:
    network = build_network("cnn", Hyperparameters(depth=8, width=5, stem_stride=stem_stride), (3, 28, 28), 10)
    images, shapes = torch.zeros(1, 3, 28, 28), []
    for layer in network[:-3]:
        images = layer.eval()(images)
        if isinstance(layer, nn.Conv2d):
            assert images.shape[2] == images.shape[3]
            shapes.append(tuple(images.shape[1:3]))
    assert shapes == expected


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
@pytest.mark.parametrize("options", [{}, {"batch_norm": False}, {"dropout": 0.3}, {"activation": "silu"}])
def test_predictions_are_softmax_probabilities_of_the_logits(kind: str, options: dict[str, Any]) -> None:
    network = build_network(kind, Hyperparameters(width=8, **options), SHAPE, 10)
    images = torch.randn(7, *SHAPE)
    network.eval()
    logits = network(images)
    network.train()
    probabilities = network.predict_proba(images, batch_size=3)
    assert probabilities.shape == (7, 10)
    assert torch.allclose(probabilities, logits.softmax(1), atol=1e-6)
    assert torch.allclose(probabilities.sum(1), torch.ones(7))
    assert network.training


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_a_network_is_rebuilt_from_its_layers_as_json(kind: str) -> None:
    hyperparameters = Hyperparameters(depth=3, width=8, dropout=0.1)
    network = build_network(kind, hyperparameters, SHAPE, 10)
    layers = json.loads(json.dumps(find(NETWORKS, kind).describe(hyperparameters, SHAPE, 10)))
    twin = from_layers(layers)
    twin.load_state_dict(network.state_dict())
    images = torch.randn(3, *SHAPE)
    assert torch.equal(twin.predict_proba(images), network.predict_proba(images))


def test_networks_take_other_image_shapes_and_numbers_of_classes() -> None:
    for kind in ("mlp", "cnn"):
        network = build_network(kind, Hyperparameters(width=8), (3, 32, 20), 4)
        assert network(torch.randn(5, 3, 32, 20)).shape == (5, 4)


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 8, 8), (3, 16, 16), (1, 64, 48), (3, 224, 224)])
def test_images_of_any_size_train_a_deep_network(kind: str, shape: tuple[int, int, int]) -> None:
    split = Split(torch.randn(4, *shape), torch.tensor([0, 1, 2, 0]))
    hyperparameters = Hyperparameters(depth=9, width=2, batch_size=2)
    trainer = Trainer(build_network(kind, hyperparameters, shape, 3), split, hyperparameters, 1, validation=split)
    assert trainer.run_epoch().value >= 0


@pytest.mark.parametrize("stem_stride", [1, 2])
@pytest.mark.parametrize("depth", [2, 6])
def test_the_cost_of_a_cnn_grows_with_the_pixels_and_no_faster(depth: int, stem_stride: int) -> None:
    def count_operations(side: int) -> int:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            hyperparameters = Hyperparameters(depth=depth, width=8, stem_stride=stem_stride)
            network = build_network("cnn", hyperparameters, (3, side, side), 10)
            network(torch.empty(2, 3, side, side)).sum().backward()
        return int(counter.get_total_flops())

    per_pixel = [count_operations(side) / side**2 for side in (16, 32, 64, 224)]
    assert per_pixel == pytest.approx([per_pixel[0]] * 4, rel=0.01)


@pytest.mark.parametrize(
    ("side", "expected"), [(8, [512, 88]), (28, [512, 88]), (56, [128] * 4 + [88]), (224, [8] * 75)]
)
def test_larger_images_are_predicted_in_smaller_batches(side: int, expected: list[int]) -> None:
    seen = list[int]()

    class Recorder(nn.Flatten):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(len(images))
            return super().forward(images[..., 0, :3].float())

    pixels = torch.zeros((), dtype=torch.uint8).expand(sum(expected), 1, side, side)
    split = RawSplit(pixels, torch.zeros(len(pixels), dtype=torch.int64), (0.5,), (0.5,))
    network = Network(Recorder())
    assert network.predict_split(split).shape == (len(pixels), 3)
    assert seen == expected
    network.predict_proba(pixels)
    assert seen == expected * 2


def test_images_are_shifted_by_pixels_and_repeat_their_border() -> None:
    images = torch.arange(12.0).view(1, 1, 3, 4)
    shifted = [view[0, 0].tolist() for view in shift_images(images, 1)]
    rows = images[0, 0].tolist()
    assert shifted[:3] == [rows, [rows[0], rows[0], rows[1]], [rows[1], rows[2], rows[2]]]
    assert shifted[3:] == [[[r[0], *r[:3]] for r in rows], [[*r[1:], r[3]] for r in rows]]


class Viewing(nn.Module):
    """Needs images that are contiguous, as those of a batch are."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.view(len(images), -1)[:, :2]


def test_networks_that_need_contiguous_images_read_shifted_ones() -> None:
    images = torch.rand(2, 3, 4, 5)
    views = [view.flatten(1)[:, :2].softmax(dim=1) for view in shift_images(images, 1)]
    found = Ensemble(OwnNetwork(Viewing()), shift=1).predict_proba(images)
    torch.testing.assert_close(found, torch.stack(views).mean(dim=0))
