"""A trainer learns, an epoch at a time; it can be saved after any batch, and shares no random numbers with others."""

import io
import math
import platform
import random
import subprocess
import sys
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LRScheduler

from hpsearch.config.definition import Metric
from hpsearch.data.dataset import ImageData, Split
from hpsearch.errors import Diverged
from hpsearch.training.kinds import Hyperparameters
from hpsearch.training.networks import Network, build_network
from hpsearch.training.optimizers import build_optimizer, build_schedule
from hpsearch.training.run import build_trainer, load_study_data
from hpsearch.training.trainer import EpochResult, Trainer, measure

from ..conftest import make_definition

NO_CHANGE: dict[str, Any] = {"augment": 0.0, "shear": 0.0, "flip": False, "erase": 0.0, "color_jitter": 0.0}


def small_network(**options: Any) -> tuple[Network, Hyperparameters]:
    hyperparameters = Hyperparameters(**{"width": 16, "batch_size": 32} | options)
    return build_network("mlp", hyperparameters, (1, 28, 28), 2), hyperparameters


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", "rmsprop", "nadam"])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "onecycle"])
def test_every_optimizer_learns_with_every_schedule(blobs: Split, optimizer: str, schedule: str) -> None:
    torch.manual_seed(0)
    network, hyperparameters = small_network(optimizer=optimizer, schedule=schedule, lr=1e-2, momentum=0.5)
    *_, result = Trainer(network, blobs, hyperparameters, 2, validation=blobs)
    assert result.accuracy == 1.0
    assert result.loss < 0.5


def test_a_trainer_is_pulled_an_epoch_at_a_time_until_it_is_done(blobs: Split) -> None:
    network, hyperparameters = small_network()
    trainer = Trainer(network, blobs, hyperparameters, 3, validation=blobs)
    first = trainer.run_epoch()
    assert not trainer.is_done
    second, third = trainer
    assert trainer.is_done
    assert trainer.results == [first, second, third]
    assert [result.epoch for result in trainer.results] == [1, 2, 3]
    assert third.loss < first.loss
    with pytest.raises(ValueError, match="done after 3 epochs"):
        trainer.run_epoch()


def test_the_accuracy_is_that_of_the_validation_split(blobs: Split) -> None:
    network, hyperparameters = small_network(lr=1e-2)
    *_, result = Trainer(network, blobs, hyperparameters, 2, validation=Split(blobs.images, 1 - blobs.labels))
    assert result.accuracy == 0.0


@pytest.mark.parametrize(
    "change", [{"augment": 0.5}, {"shear": 0.5}, {"flip": True}, {"erase": 0.5}, {"color_jitter": 0.5}]
)
def test_augmentation_changes_the_training_and_is_off_by_default(blobs: Split, change: dict[str, Any]) -> None:
    assert make_trainer(blobs, 1, **NO_CHANGE).run_epoch() != make_trainer(blobs, 1, **NO_CHANGE | change).run_epoch()
    assert {name: getattr(Hyperparameters(), name) for name in NO_CHANGE} == NO_CHANGE


def test_the_check_is_called_before_each_batch_and_may_raise(blobs: Split) -> None:
    calls = []

    def stop_at_the_tenth() -> None:
        calls.append(1)
        if len(calls) == 10:
            raise RuntimeError("enough")

    network, hyperparameters = small_network()
    trainer = Trainer(network, blobs, hyperparameters, 3)
    trainer.run_epoch(stop_at_the_tenth)
    with pytest.raises(RuntimeError, match="enough"):
        trainer.run_epoch(stop_at_the_tenth)
    assert len(calls) == 10
    assert trainer.n_batches == 2


def test_the_same_seed_trains_the_same_weights(blobs: Split) -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(0)
        network, hyperparameters = small_network(dropout=0.2, augment=0.5)
        list(Trainer(network, blobs, hyperparameters, 2, seed=seed))
        return torch.cat([parameter.flatten() for parameter in network.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def make_trainer(split: Split, seed: int, kind: str = "mlp", **options: Any) -> Trainer:
    """A trainer of two epochs of four batches, with noise; the weights depend on the seed, too."""
    definition = make_definition(network={"kind": kind}, budget={"epochs": 2})
    data = ImageData(split, split, (0.0,), (1.0,), ("dark", "bright"))
    changes = {"augment": 0.5, "shear": 0.5, "flip": True, "erase": 0.5, "color_jitter": 0.5}
    noise = {"depth": 2, "width": 4, "batch_size": 50, "dropout": 0.3} | changes
    return build_trainer(definition, data, Hyperparameters(**noise | options), seed, validation=split)


def contents(trainer: Trainer) -> bytes:
    """Everything that the trainer goes on from, the network included."""
    file = io.BytesIO()
    torch.save(trainer.state_dict(), file)
    return file.getvalue()


def test_the_noise_continues_the_random_numbers_of_the_weights_as_in_earlier_versions(blobs: Split) -> None:
    noise = make_trainer(blobs, 1).noise.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        small_network(depth=2, width=4, dropout=0.3)
        assert torch.equal(noise, torch.get_rng_state())


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_two_trainers_in_turn_give_what_each_gives_alone_and_leave_torchs_random_state(blobs: Split, kind: str) -> None:
    before = torch.get_rng_state()
    alone = [make_trainer(blobs, seed, kind) for seed in (1, 2)]
    for trainer in alone:
        list(trainer)
    in_turn = [make_trainer(blobs, seed, kind) for seed in (1, 2)]
    for _ in range(2):
        for trainer in in_turn:
            trainer.run_epoch()
    assert [contents(trainer) for trainer in in_turn] == [contents(trainer) for trainer in alone]
    assert contents(alone[0]) != contents(alone[1])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", "rmsprop", "nadam"])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "onecycle"])
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_a_state_saved_after_any_batch_continues_bit_for_bit(
    blobs: Split, optimizer: str, schedule: str, kind: str
) -> None:
    def build(seed: int = 1) -> Trainer:
        ema = 0.9 if schedule == "cosine" else 0.0
        return make_trainer(blobs, seed, kind, optimizer=optimizer, schedule=schedule, momentum=0.5, ema=ema)

    states: list[bytes] = []
    undisturbed = build()
    while not undisturbed.is_done:
        undisturbed.run_epoch(lambda: states.append(contents(undisturbed)))
    assert len(states) == 8
    for state in states:
        resumed = build(seed=2)
        resumed.load_state_dict(torch.load(io.BytesIO(state), weights_only=True))
        list(resumed)
        assert contents(resumed) == contents(undisturbed)


def test_a_trainer_whose_check_raised_goes_on_in_the_middle_of_the_epoch(blobs: Split) -> None:
    undisturbed, interrupted = make_trainer(blobs, 1), make_trainer(blobs, 1)
    list(undisturbed)
    chance = random.Random(0)

    def interrupt() -> None:
        if chance.random() < 0.5:
            raise KeyboardInterrupt

    while not interrupted.is_done:
        with suppress(KeyboardInterrupt):
            interrupted.run_epoch(interrupt)
    assert contents(interrupted) == contents(undisturbed)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_training(blobs: Split, bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    network, hyperparameters = small_network()
    monkeypatch.setattr(
        "hpsearch.training.trainer.choose_gradients", lambda *_: lambda images, labels: torch.tensor(bad)
    )
    trainer = Trainer(network, blobs, hyperparameters, 3)
    with pytest.raises(Diverged, match=f"loss is {bad} in epoch 1"):
        trainer.run_epoch()
    assert trainer.results == []


def test_the_split_of_a_study_is_drawn_from_its_seed() -> None:
    def held_out(seed: int) -> torch.Tensor:
        return load_study_data(make_definition(data={"split_seed": seed})).validation.labels

    assert torch.equal(held_out(1), held_out(1))
    assert not torch.equal(held_out(1), held_out(2))


def test_accuracy_is_the_share_of_right_answers(blobs: Split) -> None:
    network, _ = small_network()
    flipped = Split(blobs.images, 1 - blobs.labels)
    assert measure(network, blobs).accuracy + measure(network, flipped).accuracy == pytest.approx(1.0)
    right = network.predict_proba(blobs.images).argmax(1)
    assert measure(network, Split(blobs.images, right)).accuracy == 1.0


def test_the_value_of_an_epoch_is_the_metric_and_a_checkpoint_of_an_older_version_has_only_the_accuracy(
    blobs: Split,
) -> None:
    rare = Split(blobs.images[:40], torch.zeros(40, dtype=torch.int64).index_fill(0, torch.arange(2), 1))
    results = []
    metrics: tuple[Metric, ...] = ("accuracy", "balanced_accuracy")
    for metric in metrics:
        torch.manual_seed(0)
        network, hyperparameters = small_network(lr=1e-5)
        trainer = Trainer(network, rare, hyperparameters, 1, validation=rare, metric=metric)
        results.append(trainer.run_epoch())
    first, second = results
    assert (first.accuracy, first.balanced_accuracy) == (second.accuracy, second.balanced_accuracy)
    assert (first.value, second.value) == (first.accuracy, first.balanced_accuracy)
    assert first.value != second.value
    state = trainer.state_dict()
    trainer.load_state_dict(state)
    assert trainer.results == [second]
    trainer.metric = "accuracy"  # the only one that older versions knew
    trainer.load_state_dict(state | {"results": [(1, 0.5, 0.75)]})
    assert trainer.results == [EpochResult(1, 0.5, 0.75)]
    assert trainer.results[0].value == 0.75


def test_label_smoothing_raises_the_lowest_loss(blobs: Split) -> None:
    losses = []
    for smoothing in (0.0, 0.2):
        torch.manual_seed(0)
        network, hyperparameters = small_network(label_smoothing=smoothing, lr=1e-2)
        *_, last = Trainer(network, blobs, hyperparameters, 4)
        losses.append(last.loss)
    assert losses[1] > losses[0] + 0.2


def rates(schedule: str, n_steps: int) -> list[float]:
    network, hyperparameters = small_network(schedule=schedule, lr=0.1)
    optimizer = build_optimizer(network.parameters(), hyperparameters)
    scheduler: LRScheduler = build_schedule(optimizer, hyperparameters, n_steps)
    used = []
    for _ in range(n_steps):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return used


def test_schedules_follow_their_shapes() -> None:
    assert rates("constant", 5) == [0.1] * 5
    cosine = rates("cosine", 10)
    assert cosine == pytest.approx([0.05 * (1 + math.cos(math.pi * step / 10)) for step in range(10)])
    cycle = rates("onecycle", 100)
    assert max(cycle) == pytest.approx(0.1)
    assert 20 < cycle.index(max(cycle)) < 40
    assert cycle[0] < 0.01 > cycle[-1]


@pytest.mark.parametrize("schedule", ["constant", "cosine", "onecycle"])
@pytest.mark.parametrize("n_steps", [1, 2, 3])
def test_schedules_survive_the_shortest_trainings(schedule: str, n_steps: int) -> None:
    assert all(math.isfinite(rate) and rate >= 0 for rate in rates(schedule, n_steps))


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "rmsprop", "nadam"])
def test_optimizers_get_their_hyperparameters(name: str) -> None:
    network, hyperparameters = small_network(optimizer=name, lr=0.02, weight_decay=0.3, momentum=0.7)
    optimizer = build_optimizer(network.parameters(), hyperparameters)
    group = optimizer.param_groups[0]
    assert type(optimizer).__name__.lower() == name
    assert (group["lr"], group["weight_decay"]) == (0.02, 0.3)
    assert group.get("momentum", 0.7) == 0.7


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_the_memory_of_freed_tensors_is_reused() -> None:
    program = """
import resource, sys, torch
from hpsearch.training.devices import tune_malloc
if sys.argv[1] == "kept":
    tune_malloc()
def work(step):  # larger tensors at each step, because glibc keeps blocks as large as any that it has freed
    return [torch.ones(1_000_000 + 250_000 * step) for _ in range(9)]  # up to 24 MB each
work(0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for step in range(1, 21):
    work(step)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

    def count_page_faults(how: str) -> int:
        return int(subprocess.run([sys.executable, "-c", program, how], check=True, capture_output=True).stdout)

    assert count_page_faults("kept") < count_page_faults("default") / 5  # measured: a tenth
