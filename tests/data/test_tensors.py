"""Image files are read once, and their pixels are one file that all processes map."""

import os
import pickle
import shutil
import time
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import joblib
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
    monkeypatch.setattr(tensors, "_VERSION", tensors._VERSION + 1)
    assert look_at_files(folder, names) == changed
    assert seen[1:] == [folder / name for name in names]


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


def test_a_truncated_file_of_pixels_is_written_again(folder: Path) -> None:
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


def test_a_file_of_pixels_in_use_stays_when_the_disk_has_no_room(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def store(digest: str) -> MappedPixels:
        return store_pixels([digest], (1, 2, 2), lambda: [np.zeros((1, 2, 2), dtype=np.uint8)])

    used, unused = store("a"), store("b").file
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=4))
    fresh = store("c")
    assert not unused.exists()
    assert used.file.exists()
    assert used.tensor.shape == fresh.tensor.shape
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=3))
    with pytest.raises(DataError, match=r"cannot keep pixels in .*do not fit on the disk; set XDG_CACHE_HOME"):
        store_pixels(["d"], (1, 2, 2), lambda: pytest.fail("read"))


def test_what_a_killed_process_has_left_behind_is_removed_by_the_next_one(cache: Path) -> None:
    def store() -> Path:
        return store_pixels(["a"], (1, 2, 2), lambda: [np.zeros((1, 2, 2), dtype=np.uint8)]).file

    file = store()
    file.rename(file.with_name(f".new-{file.name}-x"))
    store()
    assert {each.suffix for each in cache.iterdir()} == {".pixels", ".lock"}


def test_pixels_that_are_gone_or_truncated_when_they_are_mapped_are_an_error(cache: Path) -> None:
    pixels = store_pixels(["a"], (1, 2, 2), lambda: [np.zeros((1, 2, 2), dtype=np.uint8)])
    copies = [pickle.loads(pickle.dumps(pixels)) for _ in range(2)]
    pixels.file.write_bytes(b"x")
    with pytest.raises(DataError, match=r"cannot map the pixels .*smaller.*; run the command again"):
        _ = copies[0].tensor
    pixels.file.unlink()
    with pytest.raises(DataError, match=r"cannot map the pixels .*No such file.*; run the command again"):
        _ = copies[1].tensor


@pytest.mark.parametrize(
    ("line", "names", "group"),
    [
        ("0::/job/step", ("memory.max", "memory.current"), "job"),
        ("4:memory:/job", ("memory.limit_in_bytes", "memory.usage_in_bytes"), "memory/job"),
    ],
)
def test_the_memory_limit_of_a_container_or_batch_job_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, names: tuple[str, str], group: str
) -> None:
    monkeypatch.setattr(tensors, "_CONTROL_GROUPS", tmp_path)
    folder = tmp_path / group
    (folder / "step").mkdir(parents=True)
    (folder / "step" / names[0]).write_text("max\n")
    texts = {names[0]: "1000", names[1]: "700", "memory.stat": "anon 300\ninactive_file 250\nactive_file 150\n"}
    for name, text in texts.items():
        (folder / name).write_text(text)
    process = tmp_path / "cgroup"
    process.write_text(f"1:cpu:/other\n{line}\n")
    assert list(tensors._list_free_of_groups(process)) == [700]


def test_an_interrupted_reading_ends_after_the_file_that_is_being_read(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped, seen = Event(), list[int]()

    class Stop(Event):
        def set(self) -> None:
            super().set()
            stopped.set()

    def read(number: int) -> int:
        if number >= tensors._N_TOGETHER:  # in the second task
            stopped.wait()
        seen.append(number)
        return number

    monkeypatch.setattr(tensors, "Event", Stop)
    monkeypatch.setattr(joblib, "cpu_count", lambda: 1)
    results = tensors._in_threads(read, range(10_000))
    assert next(results) == 0
    results.close()  # type: ignore[attr-defined]  # a generator
    assert len(seen) <= tensors._N_TOGETHER + 1


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
    with pytest.raises(
        DataError, match=r"need 15 MB, with 268 MB to spare, but only 269 MB of memory is free; size = 80 would fit$"
    ):
        open_folder(folder, size=500, color="rgb")
    monkeypatch.setattr(tensors, "_available_memory", lambda: 0)
    with pytest.raises(DataError, match="no size would fit: use fewer images"):
        open_folder(folder, size=500)


def test_pixels_that_are_kept_already_need_no_more_of_a_full_disk(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_folder(folder).read(is_train=True)[0]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    assert open_folder(folder).read(is_train=True)[0].equal(first)
    with pytest.raises(DataError, match=rf"but only 1 MB in {cache} is free; .*, or set XDG_CACHE_HOME to a folder on"):
        open_folder(folder, size=16)
