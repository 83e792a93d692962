"""A study knows the user's own images on which it was searched, and refuses others with what has changed."""

import shutil
from pathlib import Path

import numpy as np
import optuna
import pytest
from PIL import Image

from hpsearch.config.definition import StudyDefinition, evolve, load_definition
from hpsearch.errors import StudyMismatch
from hpsearch.search.objective import Objective
from hpsearch.search.study import check_data, open_study
from hpsearch.storage.checkpoints import checkpoint_folder
from hpsearch.storage.rdb import open_storage
from hpsearch.training.run import load_study_data, open_data_set

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
