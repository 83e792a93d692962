"""A network of the user's trains and resumes like a built-in one, and its mistakes are named before a search."""

import io
import logging
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hpsearch.config.definition import StudyDefinition, parse_definition
from hpsearch.data.dataset import ImageData, Split
from hpsearch.errors import OwnCodeError
from hpsearch.training.gradients import join_parameters
from hpsearch.training.networks import OwnNetwork
from hpsearch.training.run import build_trainer
from hpsearch.training.trainer import Trainer
from hpsearch.training.tryout import try_network

NOISY = """\
import random
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

class Noisy(nn.Module):
    '''Draws from every global generator, has BatchNorm, tied and frozen parameters, and a buffer.'''

    def __init__(self, n_pixels, n_classes, width):
        super().__init__()
        self.first = nn.Linear(n_pixels, width)
        self.second = nn.Linear(width, width)
        self.third = nn.Linear(width, width)
        self.third.weight = self.second.weight
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.unused = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, n_classes)
        self.head.weight.data += torch.from_numpy(np.random.normal(size=self.head.weight.shape)).float() * 0.1
        self.register_buffer("n_seen", torch.zeros((), dtype=torch.int64))

    def forward(self, images):
        values = self.norm(F.relu(self.first(images.flatten(1))))
        if self.training:
            self.n_seen += len(images)
            values = values + 0.1 * torch.rand_like(values) + 0.1 * np.random.rand()
        if not self.training or random.random() < 0.7:
            values = values + self.third(F.relu(self.second(values)))
        return self.head(F.dropout(values + self.frozen(values), 0.3, self.training))

def build(image_shape, n_classes, *, width: int = 16):
    return Noisy(image_shape[0] * image_shape[1] * image_shape[2], n_classes, width)
"""


@pytest.fixture
def define(tmp_path: Path) -> Callable[..., StudyDefinition]:
    """Makes a study of two epochs with a network of the given source."""

    def make(source: str = NOISY, **sections: Any) -> StudyDefinition:
        (tmp_path / "nets.py").write_text(source)
        tables = {"network": {"kind": "nets.py:build"}, "search": {"width": {"int": [16, 32]}}, "budget": {"epochs": 2}}
        return parse_definition(tables | sections, folder=tmp_path)

    return make


def make_trainer(definition: StudyDefinition, split: Split, seed: int = 1) -> Trainer:
    data = ImageData(split, split, (0.0,), (1.0,), ("dark", "bright"))
    options: dict[str, Any] = {
        "batch_size": 50,
        "augment": 0.5,
        "weight_decay": 0.1,
        "optimizer": "adamw",
        "schedule": "onecycle",
    }
    hyperparameters = definition.space.hyperparameters(**options)
    return build_trainer(definition, data, hyperparameters, seed, validation=split)


def contents(trainer: Trainer) -> bytes:
    file = io.BytesIO()
    torch.save(trainer.state_dict(), file)
    return file.getvalue()


def test_a_state_saved_after_any_batch_continues_bit_for_bit(
    define: Callable[..., StudyDefinition], blobs: Split
) -> None:
    definition = define()
    states: list[bytes] = []
    undisturbed = make_trainer(definition, blobs)
    while not undisturbed.is_done:
        undisturbed.run_epoch(lambda: states.append(contents(undisturbed)))
    assert len(states) == 8
    for state in states:
        resumed = make_trainer(definition, blobs, seed=2)
        resumed.load_state_dict(torch.load(io.BytesIO(state), weights_only=True))
        torch.rand(3)  # somebody else draws
        list(resumed)
        assert contents(resumed) == contents(undisturbed)
    assert int(resumed.network.state_dict()["0.n_seen"]) == 400


def test_what_a_file_draws_when_it_is_loaded_does_not_shift_the_random_numbers_of_a_network(
    define: Callable[..., StudyDefinition], blobs: Split
) -> None:
    definition = define(NOISY + "torch.rand(3), np.random.rand(3)\n")
    first, second = (contents(make_trainer(definition, blobs)) for _ in range(2))
    assert first == second


def test_trainers_in_turn_and_in_threads_give_what_each_gives_alone_and_leave_the_global_state(
    define: Callable[..., StudyDefinition], blobs: Split
) -> None:
    definition = define()
    before = torch.get_rng_state()
    alone = [make_trainer(definition, blobs, seed) for seed in (1, 2)]
    for trainer in alone:
        list(trainer)
    in_turn = [make_trainer(definition, blobs, seed) for seed in (1, 2)]
    for _ in range(2):
        for trainer in in_turn:
            trainer.run_epoch()
    in_threads: dict[int, Trainer] = {}

    def train(seed: int) -> None:
        in_threads[seed] = make_trainer(definition, blobs, seed)
        list(in_threads[seed])

    threads = [threading.Thread(target=train, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = [contents(trainer) for trainer in alone]
    assert [contents(trainer) for trainer in in_turn] == expected
    assert [contents(in_threads[seed]) for seed in (1, 2)] == expected
    assert expected[0] != expected[1]
    assert torch.equal(torch.get_rng_state(), before)


def test_tied_parameters_stay_tied_frozen_ones_stay_as_they_are_and_unused_ones_only_decay(
    define: Callable[..., StudyDefinition], blobs: Split
) -> None:
    trainer = make_trainer(define(), blobs)
    module: Any = trainer.network[0]
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    list(trainer)
    assert module.third.weight is module.second.weight
    assert torch.equal(module.frozen.weight, before["frozen.weight"])
    ratio = module.unused.weight / before["unused.weight"]
    assert torch.allclose(ratio, ratio[0, 0].expand(2, 2))
    moved = [name for name in before if not torch.equal(module.state_dict()[name], before[name])]
    assert set(before) - set(moved) == {"frozen.weight", "frozen.bias"}
    assert isinstance(trainer.network, OwnNetwork)
    assert trainer.results[-1].value > 0.9


def test_parameters_keep_their_memory_format_and_slices_become_dense() -> None:
    module = nn.Module()
    module.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    module.turned = nn.Parameter(torch.randn(5, 6).t())
    module.slice = nn.Parameter(torch.randn(5, 6)[:, :2])
    module.same = nn.Parameter(torch.randn(5, 1).expand(5, 3))
    before = {name: (each.detach().clone(), each.stride()) for name, each in module.named_parameters()}
    joined = join_parameters(module)
    assert joined.numel() == sum(parameter.numel() for parameter in module.parameters())
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert (parameter.stride() == before[name][1]) == (name not in ("slice", "same")), name


def test_lazy_parameters_get_their_shapes_when_the_network_is_built(
    define: Callable[..., StudyDefinition], blobs: Split
) -> None:
    lazy = """
        from torch import nn
        def build(image_shape, n_classes, *, width: int = 16):
            return nn.Sequential(nn.Flatten(), nn.LazyLinear(width), nn.LazyBatchNorm1d(), nn.LazyLinear(n_classes))
    """
    definition = define(textwrap.dedent(lazy))
    trainers = [make_trainer(definition, blobs) for _ in range(2)]
    assert contents(trainers[0]) == contents(trainers[1])
    assert list(trainers[0])[-1].value > 0.9
    assert try_network(definition, (1, 28, 28), 2)


def module_with(forward: str, *, init: str = "") -> str:
    return textwrap.dedent(
        """\
        import torch
        from torch import nn
        class Net(nn.Module):
            def __init__(self, n_pixels, n_classes, width):
                super().__init__()
                self.first, self.head = nn.Linear(n_pixels, width), nn.Linear(width, n_classes)
                {init}
            def forward(self, images):
                values = torch.relu(self.first(images.flatten(1)))
                {forward}
        def build(image_shape, n_classes, *, width: int):
            return Net(image_shape[0] * image_shape[1] * image_shape[2], n_classes, width)
        """
    ).format(forward=forward, init=init)


def building(body: str) -> str:
    head = "import torch\nfrom torch import nn\nshared = nn.Linear(4, 3)\n"
    return f"{head}def build(shape, n, *, width: int):\n    {body}\n"


MISTAKES = [
    (building("nn.Linear(width, n)"), "must return a torch.nn.Module, but returned None; is there a return?"),
    (building("return nn.Linear"), "must return a torch.nn.Module, but returned the class Linear; call it"),
    (building("return torch.zeros(2)"), "must return a torch.nn.Module, but returned a Tensor"),
    (building("return nn.Linear(width, n, shape)[0]"), "nets.py:5: TypeError: "),
    (building("return nn.Flatten()"), "nets.py:build: the network has no parameters to train"),
    (building("return shared"), "two networks share the parameter weight; the function must build a new one each time"),
    (building("return nn.Linear(width, n).double()"), "parameter weight is torch.float64"),
    (module_with("return self.head(values).missing"), "nets.py:10: AttributeError: 'Tensor' object has no attribute"),
    (module_with("return self.first(values)"), "nets.py:10: RuntimeError: "),
    (module_with("return values"), "logits must have shape (images, classes) = (8, 3), but have (8, 16) in training"),
    (module_with("return self.head(values).squeeze()"), "(images, classes) = (1, 3), but have (3,) in evaluation"),
    (module_with("return self.head(values).argmax(1, keepdim=True).expand(-1, 3)"), "are torch.int64"),
    (module_with("return self.head(values), values"), "must return logits, a tensor, but returned a tuple in training"),
    (module_with("return self.head(values).log() * 0"), "some logits of random images are NaN or infinite in training"),
    (module_with("return self.head(values).detach()"), "no parameter moves in training"),
    (module_with("return self.head(values) * 0"), "no parameter moves in training"),
    (
        module_with("return self.head(values)", init="self.second = nn.Parameter(self.head.weight.data)"),
        "parameters second and head.weight are two that share memory",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("source", "message"), MISTAKES)
def test_every_mistake_is_named_when_one_batch_is_tried(
    define: Callable[..., StudyDefinition], source: str, message: str
) -> None:
    before = torch.get_rng_state()
    with pytest.raises(OwnCodeError) as caught:
        try_network(define(source), (1, 2, 2), 3)
    assert message in str(caught.value)
    assert str(caught.value).endswith("; it was tried as build((1, 2, 2), 3, width=16)")
    assert torch.equal(torch.get_rng_state(), before)


def test_one_batch_is_tried_with_the_values_that_are_tried_first(define: Callable[..., StudyDefinition]) -> None:
    definition = define(building("raise ValueError(width)"), **{"try": [{"width": 20}]})
    with pytest.raises(OwnCodeError, match=r"^nets.py:5: ValueError: 20; it was tried as build.*width=20\)$"):
        try_network(definition, (1, 2, 2), 3)


@pytest.mark.parametrize(
    ("source", "warning"),
    [
        (NOISY, "in a first batch, these parameters got no gradient: second.weight, second.bias, "),
        (module_with("return self.head(values).softmax(1)"), "looks like probabilities; leave out the softmax"),
        (module_with("return self.head(values)"), ""),
        (module_with("return self.head(values).bfloat16()"), ""),
    ],
)
def test_what_may_be_meant_is_only_a_warning(
    define: Callable[..., StudyDefinition], caplog: pytest.LogCaptureFixture, source: str, warning: str
) -> None:
    caplog.set_level(logging.WARNING)
    network = try_network(define(source), (1, 28, 28), 2)
    assert isinstance(network, OwnNetwork)
    assert [record.message for record in caplog.records if warning not in record.message] == []
    assert bool(caplog.records) == bool(warning)


def test_a_built_in_network_is_not_tried() -> None:
    assert try_network(parse_definition({"search": {"width": {"int": [8, 9]}}}), (1, 28, 28), 10) is None
