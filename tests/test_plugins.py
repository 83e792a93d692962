"""Data sets and kinds of network are found by their Python paths; nothing else in the package names them."""

from dataclasses import dataclass
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import FixedTrial
from pydantic import Field
from torch import Tensor

from hpsearch.config.definition import parse_definition
from hpsearch.config.space import Table, TrainingHyperparameters, suggest
from hpsearch.data.sets import DataSet
from hpsearch.errors import DefinitionError
from hpsearch.plugins import DATA_SETS, NETWORKS, find
from hpsearch.search.objective import Objective
from hpsearch.training.kinds import Layer, NetworkKind
from hpsearch.training.networks import build_network


@dataclass(frozen=True)
class Stripes(DataSet):
    """Bright images of one class, dark ones of the other."""

    def read(self, *, is_train: bool) -> tuple[Tensor, Tensor]:
        labels = torch.arange(self.n_train if is_train else self.n_test) % len(self.class_names)
        return (labels * 200).byte()[:, None, None, None].expand(-1, *self.image_shape), labels


class Blocks(Table):
    blocks: int = Field(1, ge=1, le=3)


class BlockHyperparameters(TrainingHyperparameters, Blocks):
    pass


def describe_blocks(hyperparameters: Blocks, image_shape: tuple[int, int, int], n_classes: int) -> list[Layer]:
    n_pixels = image_shape[1] * image_shape[2]
    hidden: list[Layer] = [("Linear", {"in_features": n_pixels, "out_features": n_pixels})] * hyperparameters.blocks
    return [("Flatten", {}), *hidden, ("Linear", {"in_features": n_pixels, "out_features": n_classes})]


STRIPES = Stripes(60, 20, ("dark", "bright"), (1, 6, 4), is_digit=False)
BLOCKS = NetworkKind("network of blocks", BlockHyperparameters, describe_blocks)


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A study of a data set and a kind of network that are defined here."""
    monkeypatch.setitem(DATA_SETS, "stripes", f"{__name__}:STRIPES")
    monkeypatch.setitem(NETWORKS, "blocks", f"{__name__}:BLOCKS")
    return {
        "budget": {"epochs": 3},
        "data": {"name": "stripes"},
        "network": {"kind": "blocks"},
        "search": {"blocks": {"int": [1, 3]}, "lr": {"float": [1e-3, 1e-1], "when": {"blocks": [1, 2]}}},
        "fixed": {"batch_size": 8},
    }


@pytest.mark.parametrize("name", DATA_SETS)
def test_what_is_known_of_a_data_set_is_what_it_has(name: str) -> None:
    data_set: DataSet = find(DATA_SETS, name)
    assert isinstance(data_set, DataSet)
    assert len(data_set.class_names) == 10
    if name == "digits":  # the others check it themselves when they read their files
        for is_train, n_images in ((True, data_set.n_train), (False, data_set.n_test)):
            images, labels = data_set.read(is_train=is_train)
            assert images.shape == (n_images, *data_set.image_shape)
            assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
            assert set(labels.tolist()) == set(range(10))


def test_a_registered_kind_and_data_set_are_searched_like_those_built_in(tables: dict[str, Any]) -> None:
    definition = parse_definition(tables)
    assert definition.data.validation == 10
    hyperparameters: Any = suggest(FixedTrial({"blocks": 2, "lr": 1e-2}), definition.space)
    assert (hyperparameters.blocks, hyperparameters.lr, hyperparameters.batch_size) == (2, 1e-2, 8)
    study = optuna.create_study(direction="maximize")
    study.optimize(Objective(definition), n_trials=1)
    assert study.best_value == 1.0
    assert 1 <= study.best_params["blocks"] <= 3


def test_a_study_file_is_checked_against_the_hyperparameters_of_its_kind_and_of_training(
    tables: dict[str, Any],
) -> None:
    tables["search"] = {"blocks": {"int": [0, 3]}, "width": {"int": [1, 2]}, "lr": {"float": [0.0, 1.0]}}
    tables["fixed"] = {"depth": 2, "momentum": 1.0}
    tables["data"]["train"] = 51
    with pytest.raises(DefinitionError) as caught:
        parse_definition(tables)
    names = (
        "blocks, optimizer, lr, weight_decay, momentum, batch_size, schedule, label_smoothing, ema, augment, shear, "
        "flip, erase, color_jitter"
    )
    assert list(caught.value.problems) == [
        "data: stripes has only 60 training images, but train + validation need 61",
        "search.blocks: must be greater than or equal to 1, but got 0",
        f"search.width: unknown hyperparameter; valid names: {names}",
        "search.lr: must be greater than 0, but got 0.0",
        "fixed.momentum: must be less than 1, but got 1.0",
        f"fixed.depth: unknown hyperparameter; valid names: {names}",
    ]


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_layers_of_a_kind_take_images_to_logits(kind: str) -> None:
    hyperparameters = find(NETWORKS, kind).hyperparameters()
    assert build_network(kind, hyperparameters, (1, 28, 28), 7)(torch.zeros(3, 1, 28, 28)).shape == (3, 7)
