"""A study knows the user's own images on which it was searched, and refuses others with what has changed."""

import shutil
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import optuna
import pytest
from PIL import Image

from hpsearch.config.definition import StudyDefinition, evolve, load_definition
from hpsearch.data.dataset import ImageData, RawSplit
from hpsearch.data.pixels import MappedPixels
from hpsearch.errors import StudyMismatch
from hpsearch.search.copy import back_up_study
from hpsearch.search.objective import Objective
from hpsearch.search.study import check_data, load_study, open_study
from hpsearch.storage.checkpoints import checkpoint_folder
from hpsearch.storage.rdb import open_storage
from hpsearch.training.run import load_study_data, open_data_set
from hpsearch.workers.processes import share

STUDY = """
[budget]
trials = 2
epochs = 1
[data]
folder = "pets"
size = 16
[search]
lr = { float = [1e-3, 1e-1], log = true }
[fixed]
width = 8
batch_size = 16
"""


def draw(folder: Path, class_name: str, numbers: range) -> None:
    (folder / class_name).mkdir(parents=True, exist_ok=True)
    for i in numbers:
        generator = np.random.default_rng([len(class_name), i])
        pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / class_name / f"{i:03}.png")


NETWORK = """
import torch
from torch import nn

def build(image_shape, n_classes, *, width: int = 16):
    n_pixels = image_shape[0] * image_shape[1] * image_shape[2]
    hidden = nn.Sequential(nn.Linear(n_pixels, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2))
    return nn.Sequential(nn.Flatten(), hidden, nn.Linear(width, n_classes))
"""


def write_own_study(folder: Path, body: str, budget: str) -> Path:
    """Write `pets.toml`, a study of a network of one's own on images of one's own, and both of them."""
    for class_name in ("cat", "tiger"):
        draw(folder / "pets", class_name, range(150))
    (folder / "nets.py").write_text(NETWORK)
    file = folder / "pets.toml"
    study = STUDY.replace("trials = 2\nepochs = 1", budget)
    file.write_text(f'{study}flip = true\n[network]\nkind = "nets.py:build"\n{body}\n')
    return file


@pytest.fixture
def definition(tmp_path: Path) -> StudyDefinition:
    draw(tmp_path / "pets", "cat", range(40))
    draw(tmp_path / "pets", "tiger", range(40))
    (tmp_path / "pets.toml").write_text(STUDY)
    return load_definition(tmp_path / "pets.toml")


@pytest.fixture
def study(definition: StudyDefinition) -> optuna.Study:
    """A study that has been searched on the images."""
    study = open_study(definition, open_storage(definition.study.storage))
    check_data(definition, study, load_study_data(definition), stores=True)
    return study


def change(folder: Path) -> None:
    draw(folder, "cat", range(40, 43))
    (folder / "tiger" / "007.png").unlink()
    (folder / "tiger" / "009.png").rename(folder / "cat" / "109.png")


def test_a_changed_folder_is_refused_with_what_has_changed(
    definition: StudyDefinition, study: optuna.Study, tmp_path: Path
) -> None:
    check_data(definition, study, load_study_data(definition))
    change(tmp_path / "pets")
    with pytest.raises(StudyMismatch) as caught:
        check_data(definition, study, load_study_data(definition))
    assert str(caught.value).splitlines() == [
        "study 'pets' was searched on other images than these of pets:",
        "  3 images added: cat/040.png, cat/041.png, cat/042.png",
        "  1 image removed: tiger/007.png",
        "  1 image relabelled: tiger -> cat: cat/109.png",
        "Undo the change, or point --data at a copy of the images as they were, or search on these in a new study: "
        "set study.name in the file.",
    ]
    renamed = evolve(definition, "study", name="pets-2")
    other = open_study(renamed, open_storage(renamed.study.storage))
    check_data(renamed, other, load_study_data(renamed), stores=True)


def test_without_the_list_of_images_the_classes_are_compared(
    definition: StudyDefinition, study: optuna.Study, tmp_path: Path
) -> None:
    change(tmp_path / "pets")
    [name] = [name for name in checkpoint_folder(definition, study).find() if name.startswith("images-")]
    checkpoint_folder(definition, study).remove(name)
    with pytest.raises(StudyMismatch, match="images of class cat: 40 -> 44\n  images of class tiger: 40 -> 38"):
        check_data(definition, study, load_study_data(definition))


def test_a_list_of_images_that_cannot_be_written_is_a_warning(
    definition: StudyDefinition, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    study = open_study(definition, open_storage(definition.study.storage))
    (tmp_path / "artifacts").write_text("a file, where the folder should be")
    check_data(definition, study, load_study_data(definition), stores=True)
    assert "cannot write the list of images" in caplog.text
    change(tmp_path / "pets")
    with pytest.raises(StudyMismatch, match="images of class cat: 40 -> 44"):
        check_data(definition, study, load_study_data(definition))


def test_a_moved_folder_has_the_images_of_the_study(
    definition: StudyDefinition, study: optuna.Study, tmp_path: Path
) -> None:
    shutil.move(tmp_path / "pets", tmp_path / "animals")
    check_data(definition, study, load_study_data(definition, tmp_path / "animals"))
    file = tmp_path / "pets.toml"
    file.write_text(file.read_text().replace('"pets"', '"animals"'))
    open_study(load_definition(file), open_storage(definition.study.storage))


def test_a_plain_study_of_optuna_refuses_changed_images(definition: StudyDefinition, tmp_path: Path) -> None:
    study = optuna.create_study(direction="maximize")
    study.optimize(Objective(definition), n_trials=1)
    change(tmp_path / "pets")
    with pytest.raises(StudyMismatch, match="images of class cat: 40 -> 44"):
        study.optimize(Objective(definition), n_trials=1)


def test_a_copy_of_a_study_knows_the_images(definition: StudyDefinition, study: optuna.Study, tmp_path: Path) -> None:
    settings = {"storage": f"sqlite:///{tmp_path / 'copy.db'}", "artifacts": str(tmp_path / "copied")}
    target = evolve(definition, "study", **settings)
    back_up_study(definition, target)
    copied = load_study(target, open_storage(target.study.storage))
    check_data(target, copied, load_study_data(target))
    shutil.rmtree(definition.study.artifacts)
    (tmp_path / "pets" / "cat" / "003.png").unlink()
    with pytest.raises(StudyMismatch, match=r"1 image removed: cat/003\.png"):
        check_data(target, copied, load_study_data(target))


def test_workers_get_the_file_of_the_pixels_and_no_copy(definition: StudyDefinition) -> None:
    data = share(load_study_data(definition), None)
    assert isinstance(data, ImageData)
    other = load_study_data(definition)  # of `hpsearch worker` in another terminal
    for split in (data.train, data.validation, other.train):
        assert isinstance(split, RawSplit)
        assert isinstance(split.pixels, MappedPixels)
        assert split.pixels.file == other.train.__dict__["pixels"].file
        assert len(ForkingPickler.dumps(split.pixels)) < 1000


def test_adding_fifty_images_moves_none_from_one_side_to_another(definition: StudyDefinition, tmp_path: Path) -> None:
    def list_sides() -> dict[str, str]:
        inventory = open_data_set(definition).inventory
        assert inventory
        return dict(zip(inventory.names, inventory.sides, strict=True))

    before = list_sides()
    assert {*before.values()} == {"train", "validation", "test"}
    draw(tmp_path / "pets", "cat", range(40, 90))
    shutil.copy(tmp_path / "pets" / "tiger" / "003.png", tmp_path / "pets" / "tiger" / "copy.png")
    after = list_sides()
    assert len(after) == len(before) + 51
    assert {name: after[name] for name in before} == before
    assert after["tiger/copy.png"] == before["tiger/003.png"]
