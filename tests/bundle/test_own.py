"""Models of the user's own images and of a network of the user's own."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpsearch.bundle import bundle, manifest
from hpsearch.bundle.bundle import Classifier
from hpsearch.bundle.graph import Graph
from hpsearch.bundle.retrain import export
from hpsearch.config.definition import StudyDefinition, evolve, load_definition
from hpsearch.errors import BundleError, DataError, OwnCodeError
from hpsearch.search.objective import Objective
from hpsearch.search.study import open_study
from hpsearch.storage.rdb import open_storage
from hpsearch.training import run
from hpsearch.training.run import load_study_data, open_data_set

STUDY = """
[budget]
trials = 1
epochs = 2
[data]
folder = "pets"
size = [10, 12]
validation = 0.25
[network]
kind = "{kind}"
[search]
lr = {{ float = [1e-2, 3e-2], log = true }}
[fixed]
width = 8
batch_size = 16
"""
NETS = """
from torch import nn
from torch.nn import functional


class Net(nn.Module):
    def __init__(self, n_channels, n_classes, width):
        super().__init__()
        self.convolution = nn.Conv2d(n_channels, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, n_classes)

    def forward(self, images):
        values = functional.relu(self.norm(self.convolution(images))).mean((2, 3))
        return self.head(functional.dropout(values, 0.1, self.training))


def make(image_shape, n_classes, *, width: int = 4):
    return Net(image_shape[0], n_classes, width)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of red and blue pictures in two classes with odd names, and a file with a network."""
    home = tmp_path_factory.mktemp("home")
    for number, name in enumerate(("rot | *1*", "blau 🐟")):
        (home / "pets" / name).mkdir(parents=True)
        for i in range(40):
            pixels = np.random.default_rng([number, i]).integers(0, 90, (20, 30, 3), dtype=np.uint8)
            pixels[..., 2 * number] += 100
            Image.fromarray(pixels).save(home / "pets" / name / f"{i}.png")
    (home / "nets.py").write_text(NETS)
    return home


def search(home: Path, name: str, kind: str, *, width: str = "width = 8\n") -> tuple[StudyDefinition, Path]:
    """Search with one trial; the definition, and where its model goes."""
    file = home / f"{name}.toml"
    file.write_text(STUDY.format(kind=kind).replace("width = 8\n", width))
    definition = load_definition(file)
    study = open_study(definition, open_storage(definition.study.storage))
    study.optimize(Objective(definition), n_trials=1)
    return definition, home / "models" / name


@pytest.fixture(scope="module")
def photos(home: Path) -> tuple[StudyDefinition, Path]:
    definition, target = search(home, "photos", "cnn")
    export(definition, open_study(definition, open_storage(definition.study.storage)), target)
    return definition, target


@pytest.fixture(scope="module")
def own(home: Path) -> tuple[StudyDefinition, Path]:
    """The model of the user's network, without files that show images."""
    definition, target = search(home, "own", "nets.py:make")
    definition = evolve(definition, "retrain", examples=False)
    export(definition, open_study(definition, open_storage(definition.study.storage)), target)
    return definition, target


def check_predictions(definition: StudyDefinition, classifier: Classifier) -> None:
    """The model predicts files of the training folder as the pixels that it was trained on."""
    data_set = open_data_set(definition)
    images, labels = data_set.read(is_train=True)
    assert data_set.inventory
    names = [
        name for name, side in zip(data_set.inventory.names, data_set.inventory.sides, strict=True) if side != "test"
    ]
    folder = Path(definition.data.folder or "")
    read = np.stack([classifier.read_image(folder / name) for name in names[:9]])
    assert np.array_equal(read, images[:9].numpy())
    assert classifier.predict(folder / names[0])[0] in classifier.class_names
    found = classifier.predict_proba(images).argmax(1)
    assert (found == labels.numpy()).mean() > 0.9
    last = images.permute(0, 2, 3, 1).numpy()
    assert np.array_equal(classifier.predict_proba(last), classifier.predict_proba(images))


def test_a_model_says_how_photos_become_pixels_and_predicts_files_as_it_was_trained(
    photos: tuple[StudyDefinition, Path],
) -> None:
    definition, target = photos
    config = json.loads((target / "config.json").read_text())
    data = load_study_data(definition)
    assert config["format_version"] == 2
    assert config["preparation"] == {"kind": "photo", "size": [10, 12], "color": "rgb"}
    assert config["class_names"] == ["blau 🐟", "rot | *1*"]
    assert (config["mean"], config["std"]) == (list(data.mean), list(data.std))
    assert r"rot \| \*1\*" in (target / "README.md").read_text()
    assert np.asarray(Image.open(target / "example.png")).shape == (10, 12, 3)
    check_predictions(definition, bundle.load(target))


def test_a_network_of_the_users_is_loaded_without_its_code(
    own: tuple[StudyDefinition, Path], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    definition, target = own
    assert (target / "network.py").read_text() == NETS
    verified = json.loads((target / "metrics.json").read_text())["verified"]
    assert {*verified} == {"model.pt2", "model.pt2 by torch.export", "model.pt", "model.safetensors"}
    monkeypatch.setattr("hpsearch.plugins.OwnCode.load", lambda code: pytest.fail("ran the user's code"))
    classifier = bundle.load(target)
    assert isinstance(classifier.network, Graph)
    assert "nets.py:make with" in repr(classifier)
    check_predictions(definition, classifier)


def test_no_file_of_a_model_shows_an_image_if_the_user_wants_it_so(own: tuple[StudyDefinition, Path]) -> None:
    _, target = own
    assert {*bundle.OPTIONAL} & {file.name for file in target.iterdir()} == {
        "model.pt2",
        "calibration.png",
        "network.py",
    }
    assert "No file shows an image" in (target / "README.md").read_text()
    assert bundle.load(target).measure_distances(np.zeros((1, 3, 10, 12), dtype=np.uint8)) is None


def test_a_model_without_the_network_of_the_users_is_refused(own: tuple[StudyDefinition, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(own[1], tmp_path / "copy"))
    (copy / "model.pt2").unlink()
    manifest.write_manifest(copy)
    with pytest.raises(BundleError, match=r"model\.pt2 is missing: a network of the user's own is loaded from it"):
        bundle.load(copy)


def test_a_model_is_evaluated_on_the_images_of_its_search_and_on_no_others(
    photos: tuple[StudyDefinition, Path], home: Path, tmp_path: Path
) -> None:
    classifier = bundle.load(photos[1])
    with pytest.raises(DataError, match="the images of pets are not in the model folder; point --data at them"):
        classifier.evaluate()
    moved = Path(shutil.copytree(home / "pets", tmp_path / "elsewhere"))
    metrics = json.loads((photos[1] / "metrics.json").read_text())
    assert classifier.evaluate(moved).accuracy == metrics["test_accuracy"]
    next(moved.glob("*/3.png")).unlink()
    with pytest.raises(
        DataError, match=r"elsewhere has other images than pets, .*: 80 images of 2 classes then, 79 of"
    ):
        classifier.evaluate(moved)
    assert str(home) not in (photos[1] / "metrics.json").read_text() + (photos[1] / "config.json").read_text()


def test_an_ensemble_of_networks_of_ones_own_is_verified_in_every_format(home: Path) -> None:
    definition, target = search(home, "several", "nets.py:make")
    definition = evolve(definition, "retrain", seeds=3, export="ensemble", shift=1, examples=False)
    metrics = export(definition, open_study(definition, open_storage(definition.study.storage)), target)
    assert [*metrics["verified"]] == ["model.pt2", "model.pt2 by torch.export", "model.pt", "model.safetensors"]
    assert bundle.load(target).network.n_parameters == metrics["n_parameters"] == 3 * (8 * 3 * 9 + 8 + 16 + 8 * 2 + 2)
    card = (target / "README.md").read_text()
    assert "An ensemble of 3 networks of its own" in card
    assert (
        "also over copies of each image that are shifted by a pixel up, down, left and right. One of them alone" in card
    )
    assert "asking the ensemble takes 15 times the arithmetic of one network" in card


FORGETFUL = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, n_inputs, n_classes):
        super().__init__()
        self.head = nn.Linear(n_inputs, n_classes)
        self.mean = torch.zeros(n_inputs)  # no buffer

    def forward(self, images):
        values = images.flatten(1)
        if self.training:
            self.mean = 0.9 * self.mean + 5 * values.detach().abs().mean(0)
        return self.head(values * (self.mean + 0.1))


def build(image_shape, n_classes):
    return Net(image_shape[0] * image_shape[1] * image_shape[2], n_classes)
"""


def test_a_network_that_keeps_what_it_learns_in_an_attribute_is_not_exported(home: Path) -> None:
    (home / "forgetful.py").write_text(FORGETFUL)
    definition, target = search(home, "forgetful", "forgetful.py:build", width="")
    study = open_study(definition, open_storage(definition.study.storage))
    for _ in range(2):
        with pytest.raises(OwnCodeError, match=r"gives other probabilities \(by up to .*; make a buffer of what else"):
            export(definition, study, target)
    assert "test_reads" not in study.user_attrs


BRANCHING = """
from torch import nn


class Net(nn.Module):
    def __init__(self, n_inputs, n_classes):
        super().__init__()
        self.head = nn.Linear(n_inputs, n_classes)

    def forward(self, images):
        return self.head(images.flatten(1) if images.sum() > 0 else -images.flatten(1))


def build(image_shape, n_classes):
    return Net(image_shape[0] * image_shape[1] * image_shape[2], n_classes)
"""


def test_a_network_that_cannot_be_converted_is_refused_before_its_training(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "branching.py").write_text(BRANCHING)
    definition, target = search(home, "branching", "branching.py:build", width="")
    study = open_study(definition, open_storage(definition.study.storage))
    monkeypatch.setattr(run, "Trainer", None)
    with pytest.raises(OwnCodeError, match=r"branching\.py:build: torch\.export cannot convert it"):
        export(definition, study, target)
    assert "test_reads" not in study.user_attrs
