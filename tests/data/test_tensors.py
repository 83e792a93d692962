"""Image files are read once, and their pixels are one file that all processes map."""

import os
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hpsearch.data import tensors
from hpsearch.data.image_folder import open_folder
from hpsearch.data.photos import Look, look_at
from hpsearch.data.pixels import MappedPixels
from hpsearch.data.tensors import check_space, look_at_files, store_pixels
from hpsearch.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hpsearch" / "images"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty images of two classes, which have not been changed for a minute."""
    generator = np.random.default_rng(0)
    for i in range(20):
        file = tmp_path / "pets" / ("cat" if i % 2 else "dog") / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (12, 10, 3), dtype=np.uint8)).save(file)
        settle(file)
    return tmp_path / "pets"


def settle(file: Path, seconds: float = 60) -> None:
    os.utime(file, (time.time() - seconds,) * 2)


def watch(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are looked at from now on."""
    seen: list[Path] = []

    def look(file: Path) -> Look:
        seen.append(file)
        return look_at(file)

    monkeypatch.setattr(tensors, "look_at", look)
    return seen


def test_only_new_and_changed_files_are_looked_at_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = sorted(str(file.relative_to(folder)) for file in folder.glob("*/*"))
    first = look_at_files(folder, names)
    seen = watch(monkeypatch)
    assert look_at_files(folder, names) == first
    assert seen == []
    Image.new("L", (5, 6)).save(folder / names[3])
    settle(folder / names[3])
    changed = look_at_files(folder, names)
    assert seen == [folder / names[3]]
    assert (changed[3].height, changed[3].width, changed[3].color) == (6, 5, "grey")
    assert changed[:3] + changed[4:] == first[:3] + first[4:]


def test_a_file_that_was_written_just_now_is_looked_at_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "dog" / "0.png").touch()  # it may change once more in the same moment
    look_at_files(folder, ["dog/0.png", "cat/1.png"])
    seen = watch(monkeypatch)
    look_at_files(folder, ["dog/0.png", "cat/1.png"])
    assert seen == [folder / "dog/0.png"]


def test_pixels_are_read_once_and_shared_as_one_file(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, _ = open_folder(folder).map_training()
    monkeypatch.setattr(tensors, "read_photo", lambda *_, **__: pytest.fail("read again"))
    again, labels = open_folder(folder).map_training()
    assert images.file == again.file
    assert [file.suffix for file in cache.iterdir() if file.suffix == ".pixels"] == [".pixels"]
    assert images.tensor.equal(again.tensor)
    assert images.tensor.shape == (len(labels), 3, 12, 10)
    copy: MappedPixels = pickle.loads(pickle.dumps(images))
    assert copy.tensor.equal(images.tensor)
    assert len(pickle.dumps(images)) < 500


def test_a_copy_of_the_folder_has_the_same_pixels_without_reading(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, _ = open_folder(folder).map_training()
    monkeypatch.setattr(tensors, "read_photo", lambda *_, **__: pytest.fail("read again"))
    assert open_folder(folder.rename(tmp_path / "animals")).map_training()[0].file == images.file


def test_a_truncated_file_of_pixels_is_written_anew(folder: Path) -> None:
    images, _ = open_folder(folder).map_training()
    before = images.file.read_bytes()
    images.file.write_bytes(before[:-1])
    assert open_folder(folder).map_training()[0].file.read_bytes() == before


def test_a_reading_that_fails_leaves_nothing_behind(cache: Path) -> None:
    def read() -> Any:
        yield np.zeros((1, 2, 2), dtype=np.uint8)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store_pixels(["a", "b"], (1, 2, 2), read)
    assert [file.suffix for file in cache.iterdir()] in ([".lock"], [])


def test_pixels_that_no_search_has_used_for_a_month_are_removed(cache: Path) -> None:
    def keep(digest: str) -> Path:
        return store_pixels([digest], (1, 2, 2), lambda: [np.zeros((1, 2, 2), dtype=np.uint8)]).file

    old, other = keep("a"), keep("b")
    settle(old, 31 * 24 * 3600)
    keep("b")
    assert not old.exists()
    assert other.exists()


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cannot keep pixels in .*file/hpsearch/images: .*; set XDG_CACHE_HOME"):
        store_pixels(["a"], (1, 2, 2), lambda: [np.zeros((1, 2, 2), dtype=np.uint8)])


def test_data_that_would_not_fit_are_refused_before_any_file_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_space(1000, (3, 64, 64))
    monkeypatch.setattr(tensors, "_available_memory", lambda: 2**28 + 20 * 3 * 80**2)
    monkeypatch.setattr(tensors, "look_at", lambda file: pytest.fail("read"))
    with pytest.raises(DataError, match=r"20 images of 500x500 pixels need .* GB, more than .*; size = 80 would fit"):
        open_folder(folder, size=500, color="rgb")
    monkeypatch.setattr(tensors, "_available_memory", lambda: 0)
    with pytest.raises(DataError, match="no size would fit: use fewer images"):
        open_folder(folder, size=500)
