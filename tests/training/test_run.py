"""A study's images: what its [data] table says reaches the folder."""

import pickle
from pathlib import Path
from typing import Any

import pytest

from hpsearch.config.definition import StudyDefinition, parse_definition
from hpsearch.data.own import OwnImages
from hpsearch.errors import DataError
from hpsearch.training.run import load_study_data, open_data_set
from tests.shapes import write_shapes


def define(**data: Any) -> StudyDefinition:
    return parse_definition({"data": data, "search": {"depth": {"int": [1, 2]}}})


def test_each_setting_of_the_images_reaches_the_folder(tmp_path: Path) -> None:
    write_shapes(tmp_path / "shapes", 200, size=16, n_broken=3)
    with pytest.raises(DataError, match="shapes: 3 problems"):
        open_data_set(define(folder=str(tmp_path / "shapes")))
    own = {"folder": str(tmp_path / "shapes"), "skip_unreadable": True}
    plain = open_data_set(define(**own))
    chosen = open_data_set(define(**own, size=(20, 12), color="grey", test=40, validation=30, split_seed=1))
    assert (plain.image_shape, chosen.image_shape) == ((3, 16, 16), (1, 20, 12))
    assert plain.title == "shapes"
    assert (chosen.n_train, chosen.n_test) == (160, 40)
    assert isinstance(plain, OwnImages)
    assert isinstance(chosen, OwnImages)
    assert not set(plain.rows(is_train=False)) <= set(chosen.rows(is_train=False))
    data = load_study_data(define(**own, test=40, validation=30, train=100))
    assert (len(data.train), len(data.validation)) == (100, 30)


def test_a_share_of_the_training_images_is_held_out_and_another_folder_takes_the_place(tmp_path: Path) -> None:
    write_shapes(tmp_path / "moved" / "train", 100, size=16)
    write_shapes(tmp_path / "moved" / "test", 30, size=16, seed=1)
    data = load_study_data(define(folder=str(tmp_path / "shapes"), validation=0.3), tmp_path / "moved")
    assert (len(data.train), len(data.validation)) == (70, 30)


def test_a_data_set_that_is_open_is_used_as_it_is_here_and_in_other_processes(tmp_path: Path) -> None:
    write_shapes(tmp_path / "shapes", 60, size=16)
    checked: list[tuple[int, int]] = []
    read: list[tuple[int, int]] = []
    definition = define(folder=str(tmp_path / "shapes"))
    images = open_data_set(definition, on_read=lambda *progress: checked.append(progress))
    images.map_training(lambda *progress: read.append(progress))
    assert checked[-1] == (60, 60)
    assert read[-1] == (images.n_train, images.n_train)
    (tmp_path / "shapes").rename(tmp_path / "away")
    assert open_data_set(definition, images) is images
    copy = pickle.loads(pickle.dumps(images))
    assert len(load_study_data(definition, copy).merged()) == images.n_train
