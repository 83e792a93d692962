"""Several networks are trained at once, on the images of the study and, if asked, those for validation."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hpsearch.bundle.trainings import train_all
from hpsearch.config.definition import parse_definition
from hpsearch.data.dataset import ImageData
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
