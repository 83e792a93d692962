"""A folder of the user's own images: what is found in it, on which side an image is, and what is refused."""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hpsearch.data.dataset import load_data
from hpsearch.data.image_folder import natural_key, open_folder, survey_folder
from hpsearch.data.inventory import Inventory
from hpsearch.data.own import divide
from hpsearch.data.sets import find_data_set
from hpsearch.errors import DataError, ImageError
from tests.data.test_photos import as_nobody

Write = Callable[..., Path]


@pytest.fixture
def flowers(tmp_path: Path) -> Path:
    return tmp_path / "flowers"


def write(folder: Path, n: int, first: int = 0, size: tuple[int, int] = (8, 6), mode: str = "RGB") -> None:
    """Write different images, of width and height `size`, named by their number."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + n):
        pixels = np.random.default_rng([number, *os.fsencode(folder.name)]).integers(0, 256, (*size[::-1], 3), np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / f"{number}.png")


def sides_of(inventory: Inventory) -> dict[str, str]:
    return dict(zip(inventory.names, inventory.sides, strict=True))


def test_a_subfolder_is_a_class_and_every_image_has_one_side(flowers: Path) -> None:
    write(flowers / "rose", 40)
    write(flowers / "tulip 10", 30)
    write(flowers / "tulip 9", 30)
    images = open_folder(flowers, test=0.2, validation=0.2)
    assert images.class_names == ("rose", "tulip 9", "tulip 10")
    assert images.image_shape == (3, 6, 8)
    assert images.preparation == {"kind": "photo", "size": [6, 8], "color": "rgb"}
    pixels, labels = images.read(is_train=True)
    test_pixels, test_labels = images.read(is_train=False)
    assert pixels.shape == (images.n_train, 3, 6, 8)
    assert pixels.dtype == torch.uint8
    assert len(pixels) + len(test_pixels) == 100
    assert torch.equal(torch.cat([labels, test_labels]).bincount(), torch.tensor([40, 30, 30]))
    training, validation = images.split(labels, 0, None, 0)
    assert sorted([*training.tolist(), *validation.tolist()]) == list(range(len(pixels)))
    for part in (labels[training], labels[validation], test_labels):
        assert part.bincount(minlength=3).min() >= 1


def test_rows_are_in_the_natural_order_of_the_file_names_whatever_the_class(flowers: Path) -> None:
    write(flowers / "train" / "b", 12)
    write(flowers / "train" / "a", 1, first=100)
    write(flowers / "train" / "a", 2, first=3)
    write(flowers / "test" / "a", 1)
    write(flowers / "test" / "b", 1)
    images = open_folder(flowers)
    names = [images.inventory.names[row] for row in images.rows(is_train=True)]
    numbers = ["0", "1", "2", "3", "3", "4", "4", *map(str, range(5, 12)), "100"]
    assert [Path(name).stem for name in names] == numbers
    assert names[3:5] == ["train/a/3.png", "train/b/3.png"]
    for row, pixels in zip(images.rows(is_train=True), images.read(is_train=True)[0], strict=True):
        picture = np.asarray(Image.open(flowers / images.inventory.names[row]))
        assert np.array_equal(pixels.numpy().transpose(1, 2, 0), picture)


def test_a_built_in_data_set_written_as_files_is_the_very_same(flowers: Path) -> None:
    digits = find_data_set("digits")
    parts = {"train": digits.read(is_train=True), "test": digits.read(is_train=False)}
    for split, part in parts.items():
        for number, (pixels, label) in enumerate(zip(*part, strict=True)):
            folder = flowers / split / str(label.item())
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[0].numpy()).save(folder / f"{number:05d}.png")
    images = open_folder(flowers)
    for split, part in parts.items():
        for found, expected in zip(images.read(is_train=split == "train"), part, strict=True):
            assert torch.equal(found, expected)
    own, built_in = (load_data(each, validation=300, train=900, split_seed=5) for each in (images, digits))
    assert (own.mean, own.std) == (built_in.mean, built_in.std)
    for same, known in ((own.train, built_in.train), (own.validation, built_in.validation)):
        assert torch.equal(same.images, known.images)
        assert torch.equal(same.labels, known.labels)


def test_adding_images_moves_none_to_another_side(flowers: Path) -> None:
    for name in ("a", "b", "c"):
        write(flowers / name, 60)
    before = open_folder(flowers).inventory
    for name in ("a", "b", "c"):
        write(flowers / name, 20, first=60)
    after = open_folder(flowers).inventory
    assert sides_of(before).items() <= sides_of(after).items()
    assert sides_of(open_folder(flowers, split_seed=1).inventory) != sides_of(after)
    assert after.compare(before)[0].startswith("60 images added: a/60.png, b/60.png, c/60.png, ...")


@pytest.mark.parametrize("sizes", [{"test": 0.3, "validation": 0.3}, {"test": 20, "validation": 25}])
def test_copies_are_on_one_side(flowers: Path, sizes: dict[str, float]) -> None:
    for name in ("a", "b"):
        write(flowers / name, 40)
        for number in range(40):
            shutil.copy(flowers / name / f"{number}.png", flowers / name / f"copy {number}.png")
    survey, sides = survey_folder(flowers), sides_of(open_folder(flowers, **sizes).inventory)  # type: ignore[arg-type]
    assert survey.n_copies == 80
    assert set(sides.values()) == {"train", "validation", "test"}
    for name in ("a", "b"):
        for number in range(40):
            assert sides[f"{name}/{number}.png"] == sides[f"{name}/copy {number}.png"]


def test_numbers_of_images_are_met_in_proportion_to_the_classes(flowers: Path) -> None:
    for name, n in (("a", 60), ("b", 30), ("c", 3)):
        write(flowers / name, n)
    inventory = open_folder(flowers, test=31, validation=0.25).inventory
    counts = {
        side: [
            sum((label, each) == (c, side) for label, each in zip(inventory.labels, inventory.sides, strict=True))
            for c in range(3)
        ]
        for side in ("test", "validation", "train")
    }
    assert counts == {"test": [20, 10, 1], "validation": [15, 7, 1], "train": [25, 13, 1]}


def test_the_users_own_splits_stay_as_they_are(flowers: Path) -> None:
    for split, n in (("train", 10), ("valid", 4), ("Test", 5)):
        for name in ("a", "b"):
            write(flowers / split / name, n, first=100 * n)
    with pytest.raises(DataError, match=r"test = 0.2, but the folder has a test side of its own; remove one of them"):
        open_folder(flowers, test=0.2)
    images = open_folder(flowers)
    assert images.n_train == 28
    labels = images.read(is_train=True)[1]
    training, validation = images.split(labels, 0, None, 0)
    assert [Path(images.inventory.names[images.rows(is_train=True)[row]]).parts[0] for row in validation] == (
        ["valid"] * 8
    )
    assert len(training) == 20
    assert len(images.split(labels, 0, 7, 0)[0]) == 7


def test_a_validation_side_is_drawn_as_for_mnist_and_copies_stay_together(flowers: Path) -> None:
    for name in ("a", "b"):
        write(flowers / "train" / name, 30)
        write(flowers / "test" / name, 5, first=100)
    images = open_folder(flowers)
    labels = images.read(is_train=True)[1]
    training, validation = images.split(labels, 20, None, 3)
    assert len(validation) == 20
    assert len(images.split(labels, 0.25, None, 3)[1]) == 15
    copied = images.inventory.names[images.rows(is_train=True)[int(validation[0])]]
    shutil.copy(flowers / copied, (flowers / copied).with_name("0 copy.png"))
    images = open_folder(flowers)
    labels = images.read(is_train=True)[1]
    names = [images.inventory.names[row] for row in images.rows(is_train=True)]
    for seed in range(5):
        training, validation = images.split(labels, 20, None, seed)
        parts = [{names[row] for row in part} for part in (training.tolist(), validation.tolist())]
        assert len(parts[0] | parts[1]) == 61
        assert any({copied, str(Path(copied).with_name("0 copy.png"))} <= part for part in parts)


def test_copies_between_the_users_own_splits_and_between_classes_are_named(
    flowers: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for split in ("train", "test"):
        for name in ("a", "b"):
            write(flowers / split / name, 5, first=10 * len(split))
    shutil.copy(flowers / "train" / "a" / "50.png", flowers / "test" / "a" / "x.png")
    shutil.copy(flowers / "train" / "b" / "51.png", flowers / "train" / "a" / "y.png")
    with caplog.at_level(logging.WARNING):
        open_folder(flowers)
        open_folder(flowers)
    assert caplog.text.count("1 image is in more than one split") == 1
    assert "train/a/50.png = test/a/x.png" in caplog.text
    assert "more than one class: train/b/51.png = train/a/y.png" in caplog.text


def test_what_is_no_image_is_left_out_and_counted(flowers: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a", "b"):
        write(flowers / name, 3)
    (flowers / "a" / "0.png").rename(flowers / "a" / "no suffix")
    (flowers / "a" / "notes.TXT").write_text("x")
    (flowers / "b" / "photo.heic").write_bytes(b"x" * 100)
    (flowers / "b" / ".DS_Store").touch()
    (flowers / "b" / "Thumbs.db").touch()
    (flowers / "LICENSE").touch()
    write(flowers, 1)
    os.mkfifo(flowers / "b" / "pipe.png")
    survey = survey_folder(flowers)
    assert survey.counts == {"": [3, 3]}
    assert survey.left_out == {
        **{"hidden": 2, ".txt": 1, ".heic": 1, "no suffix": 1},
        **{"image outside the class folders": 1, "not a file": 1},
    }
    open_folder(flowers)
    assert "left out 1 .heic files" in caplog.text


def test_links_are_followed_and_loops_are_left(flowers: Path, tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", 4)
    write(flowers / "b" / "inside", 4)
    (flowers / "a").symlink_to(tmp_path / "elsewhere")
    (flowers / "b" / "above").symlink_to(flowers)
    (flowers / "b" / "gone.png").symlink_to(tmp_path / "missing.png")
    (flowers / "b" / "self.png").symlink_to(flowers / "b" / "self.png")
    survey = survey_folder(flowers)
    assert survey.counts == {"": [4, 4]}
    assert survey.left_out["link to a folder above"] == 1
    problems = {file.name: file.look.problem for file in survey.unreadable}
    assert problems == {
        "b/gone.png": "is a link to a missing file",
        "b/self.png": "Too many levels of symbolic links",
    }


def test_folders_that_may_not_be_read_are_named() -> None:
    with as_nobody() as folder:
        for name in ("a", "b", "c"):
            write(folder / name, 3)
        (folder / "b").chmod(0)
        (folder / "c").chmod(0o600)
        survey = survey_folder(folder)
        assert survey.problems[0] == "b: Permission denied"
        assert [(file.name, file.look.problem) for file in survey.unreadable] == [
            (f"c/{number}.png", "Permission denied") for number in range(3)
        ]
        folder.chmod(0)
        with pytest.raises(DataError, match=r"^/.*: Permission denied$"):
            open_folder(folder)
        folder.chmod(0o700)


def test_all_that_is_wrong_is_said_at_once(flowers: Path) -> None:
    for name in ("a", "b"):
        write(flowers / name, 6)
    write(flowers / "few", 2)
    (flowers / "none").mkdir()
    (flowers / "broken").mkdir()
    for number in range(30):
        (flowers / "broken" / f"bad\n{number}.png").write_bytes(b"no image")
    (flowers / "a" / "empty 🌹.jpg").touch()
    (flowers / "a" / "cut.png").write_bytes((flowers / "a" / "0.png").read_bytes()[:60])
    with pytest.raises(DataError) as caught:
        open_folder(flowers)
    lines = str(caught.value).splitlines()
    assert lines[:4] == [
        f"{flowers}: 35 problems",
        '  class "broken": no readable images; add some, or remove the class',
        '  class "none": no images; add some, or remove the class',
        '  class "few": 2 different images, but the training, validation and test sides need one each; add images',
    ]
    assert lines[4] == r"  broken/bad\n0.png: not a readable image"
    assert lines[-2:] == [
        "  ... and 15 more",
        "Replace or remove files that cannot be read, or set data.skip_unreadable = true to go on without.",
    ]
    (flowers / "a" / "2.png").write_bytes(b"")
    for name in ("few", "none", "broken"):
        shutil.rmtree(flowers / name)
    with pytest.raises(DataError, match=r"3 problems\n  a/2\.png: file is empty\n  a/cut\.png.*\n  a/empty 🌹\.jpg"):
        open_folder(flowers)


def test_skip_unreadable_goes_on_and_says_how_many(flowers: Path, caplog: pytest.LogCaptureFixture) -> None:
    for split in ("train", "test"):
        for name in ("a", "b"):
            write(flowers / split / name, 4)
        (flowers / split / "a" / "0.png").write_bytes(b"no image")
    images = open_folder(flowers, skip_unreadable=True)
    assert (images.n_train, images.n_test) == (7, 7)
    assert "flowers: skipping 2 files that cannot be read: test/a/0.png, train/a/0.png" in caplog.text


def test_a_file_that_changes_while_the_folder_is_read_is_named(flowers: Path) -> None:
    for name in ("a", "b"):
        write(flowers / name, 4)
    images = open_folder(flowers)
    row = images.rows(is_train=True)[2]
    changed = flowers / images.inventory.names[row]
    Image.new("RGB", (8, 6)).save(changed)
    with pytest.raises(ImageError, match=rf"^{changed}: has changed since the other files were looked at; run"):
        images.read(is_train=True)
    changed.unlink()
    with pytest.raises(ImageError, match=rf"^{changed}: No such file or directory"):
        images.read(is_train=True)


def test_a_folder_without_classes_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "flowers"
    with pytest.raises(
        DataError, match=r"flowers: no such folder; give the one that has a subfolder .*in data.folder, or with --data"
    ):
        open_folder(folder)
    folder.touch()
    with pytest.raises(DataError, match="flowers is a file, not a folder; unpack it if it is an archive"):
        open_folder(folder)
    folder.unlink()
    write(folder, 3)
    with pytest.raises(DataError, match="flowers has no class folders; sort the images into one subfolder a class"):
        open_folder(folder)
    write(folder / "rose", 3)
    with pytest.raises(DataError, match="flowers has a single class, rose; there must be two at least"):
        open_folder(folder)
    write(tmp_path / "outer" / "inner" / "a", 3)
    write(tmp_path / "outer" / "inner" / "b", 3)
    with pytest.raises(DataError, match=r"which has the class folders; name that one: .*outer/inner"):
        open_folder(tmp_path / "outer")


def test_splits_that_do_not_fit_together_are_refused(flowers: Path) -> None:
    for name in ("a", "b"):
        write(flowers / "train" / name, 5)
        write(flowers / "val" / name, 5)
    write(flowers / "valid" / "a", 2)
    write(flowers / "test", 2)
    (flowers / "annotations").mkdir()
    survey = survey_folder(flowers)
    assert survey.left_out == {"folder annotations": 1, "image outside the class folders": 2}
    assert survey.problems == (
        "test: no class folders; sort its images into them, or move it elsewhere",
        "val: there is another folder for the validation side; keep one of them",
        "valid: there is another folder for the validation side; keep one of them",
        'class "a": no images on the test side; add some, or remove the class',
        'class "b": no images on the test side; add some, or remove the class',
    )


def test_classes_may_be_called_train_and_test(flowers: Path) -> None:
    for name in ("train", "test", "car"):
        write(flowers / name, 4)
    assert survey_folder(flowers).class_names == ("car", "test", "train")


def test_sides_that_leave_nothing_to_train_on_are_refused(flowers: Path) -> None:
    for name in ("a", "b"):
        write(flowers / name, 10)
    with pytest.raises(DataError, match=r"data.test = 12 and data.validation = 0.5 leave none of 20 images"):
        open_folder(flowers, test=12, validation=0.5)


@pytest.mark.parametrize("size", [(28, 28), (64, 40)])
def test_the_size_and_color_are_by_default_those_of_the_files(flowers: Path, size: tuple[int, int]) -> None:
    for name in ("a", "b"):
        write(flowers / name, 4, size=size, mode="L")
    Image.open(flowers / "a" / "0.png").convert("RGB").save(flowers / "a" / "0.png")
    assert open_folder(flowers).image_shape == (1, *size[::-1])
    assert open_folder(flowers, size=16, color="rgb").image_shape == (3, 16, 16)
    assert open_folder(flowers, size=(20, 16)).image_shape == (1, 20, 16)
    write(flowers / "b", 1, first=4, size=(65, 9))
    survey = survey_folder(flowers)
    assert (survey.size, survey.color) == ((64, 64), "rgb")
    assert survey.sizes == {size[::-1]: 8, (9, 65): 1}
    assert survey.colors == {"grey": 8, "rgb": 1}


def test_class_names_of_any_characters_can_be_shown(flowers: Path) -> None:
    for name in ("two words", "🌹", "line\nend", "caf\u0065\u0301", os.fsdecode(b"latin \xe9")):
        write(flowers / "train" / name, 3)
    write(flowers / "train" / "caf\u00e9", 3, first=3)
    names = open_folder(flowers, test=5, validation=5).class_names
    assert names == ("caf\u00e9", r"latin \udce9", r"line\nend", "two words", "🌹")


def test_names_with_numbers_sort_as_a_person_does() -> None:
    names = ["a10", "a2", "10", "9", "a", "a2b"]
    assert sorted(names, key=natural_key) == ["9", "10", "a", "a2", "a2b", "a10"]


def test_the_users_own_test_images_decide_neither_size_nor_color(flowers: Path) -> None:
    for name in ("a", "b"):
        write(flowers / "train" / name, 5, mode="L")
        write(flowers / "test" / name, 2, size=(9, 9))
    assert open_folder(flowers).image_shape == (1, 6, 8)
    survey = survey_folder(flowers)
    assert (survey.size, survey.color) == ((6, 8), "grey")
    assert (survey.training_sizes, survey.sizes) == ({(6, 8): 10}, {(6, 8): 10, (9, 9): 4})


def test_copies_leave_no_side_without_an_image_of_a_class(flowers: Path) -> None:
    for name in ("a", "b"):
        write(flowers / "train" / name, 2)
        write(flowers / "test" / name, 1, first=9)
        for number in range(10, 18):
            shutil.copy(flowers / "train" / name / "0.png", flowers / "train" / name / f"{number}.png")
    images = open_folder(flowers, validation=0.3)
    labels = images.read(is_train=True)[1]
    for seed in range(5):
        for part in images.split(labels, 0, None, seed):
            assert labels[part].unique().tolist() == [0, 1]


def test_more_classes_than_a_model_can_have_are_refused_at_once() -> None:
    digests = [str(i) for i in range(3003)]
    names = [f"class {i}" for i in range(1001)]
    _, problems = divide(digests, [i // 3 for i in range(3003)], names, {}, 3, 0)
    assert problems == ["there are 1,001 classes, but at most 1,000 are possible"]
