"""Several networks are trained at once, on the images of the study and, if asked, those for validation."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hpsearch.bundle.trainings import train_all
from hpsearch.config.definition import parse_definition
from hpsearch.data.dataset import ImageData
from hpsearch.errors import Drained
from hpsearch.training.run import load_study_data

from ..shapes import write_shapes


def describe(i: int, data: ImageData, check: Callable[[], None]) -> Iterator[tuple[int, str]]:
    check()
    yield len(data.train), data.train.take(slice(0, 1)).device.type


@pytest.mark.parametrize("n_workers", [1, 2])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("has_shared_memory", [True, False])
def test_a_training_gets_validation_images_too_on_any_device_and_in_any_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_workers: int, device: str, has_shared_memory: bool
) -> None:
    write_shapes(tmp_path / "shapes", 100, size=16)
    tables = {
        "data": {"folder": str(tmp_path / "shapes"), "validation": 20, "test": 15},
        "search": {"lr": {"float": [1e-3, 1e-1]}},
    }
    definition = parse_definition(tables)
    data = load_study_data(definition)
    if not has_shared_memory:

        def refuse(_: ImageData) -> ImageData:
            raise RuntimeError("unable to allocate shared memory(shm): No space left on device")

        monkeypatch.setattr(ImageData, "share_memory", refuse)
    for merges, n_images in ((False, 65), (True, 85)):
        options: dict[str, Any] = {"n_workers": n_workers, "devices": [device], "folder": None, "merges": merges}
        found = dict(train_all(definition, data, describe, [3, 5], **options))
        assert found == dict.fromkeys((3, 5), (n_images, device))


def train_until_drained(folder: Path, i: int, data: ImageData, check: Callable[[], None]) -> Iterator[str]:
    yield "begun"
    try:
        while True:
            check()
            time.sleep(0.01)
    except Drained:
        (folder / f"saved-{i}").touch()
        raise


def test_networks_in_training_are_saved_when_the_iteration_ends_early(tmp_path: Path, digits: ImageData) -> None:
    definition = parse_definition({"data": {"name": "digits"}, "search": {"lr": {"float": [1e-3, 1e-1]}}})
    train = partial(train_until_drained, tmp_path)
    trainings: Any = train_all(definition, digits, train, [3, 5], n_workers=2, devices=["cpu"], folder=None)
    assert {next(trainings)[0], next(trainings)[0]} == {3, 5}
    trainings.close()  # as after Ctrl-C
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["saved-3", "saved-5"]
