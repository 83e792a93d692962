"""The user's own images as arrays: an .npz file, or what a function of theirs returns."""

import logging
import os
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpsearch.config.definition import load_definition
from hpsearch.data import arrays
from hpsearch.data.arrays import open_file, open_function
from hpsearch.data.dataset import load_data, load_test
from hpsearch.data.own import OwnImages
from hpsearch.errors import DataError
from hpsearch.plugins import OwnCode
from hpsearch.training.run import load_study_data, open_data_set

N, N_TEST = 60, 12


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def draw(n: int = N, shape: tuple[int, ...] = (8, 6), seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def parts(**changed: Any) -> dict[str, Any]:
    """Arrays of three classes, with a test part; `changed` replaces some, and None leaves one out."""
    known = {
        "x_train": draw(),
        "y_train": np.arange(N) % 3,
        "x_test": draw(N_TEST, seed=1),
        "y_test": np.arange(N_TEST) % 3,
    }
    return {name: array for name, array in (known | changed).items() if array is not None}


def save(tmp_path: Path, **changed: Any) -> Path:
    file = tmp_path / "set.npz"
    np.savez_compressed(file, **parts(**changed))
    return file


def refuse(tmp_path: Path, **changed: Any) -> list[str]:
    """The problems that a file with these arrays is refused for."""
    with pytest.raises(DataError) as raised:
        open_file(save(tmp_path, **changed))
    title, *problems = str(raised.value).splitlines()
    assert title.startswith("set.npz: ")
    return [problem.strip() for problem in problems]


@pytest.mark.parametrize(
    ("shape", "to_channels_first"),
    [
        ((8, 6), lambda x: x[:, None]),
        ((8, 6, 1), lambda x: x.transpose(0, 3, 1, 2)),
        ((8, 6, 3), lambda x: x.transpose(0, 3, 1, 2)),
        ((3, 8, 6), lambda x: x),
        ((1, 8, 6), lambda x: x),
    ],
)
def test_a_file_of_arrays_gives_its_images_with_channels_first(
    tmp_path: Path, shape: tuple[int, ...], to_channels_first: Callable[[Any], Any]
) -> None:
    images, test_images = draw(N, shape), draw(N_TEST, shape, 1)
    file = save(tmp_path, x_train=images, x_test=np.asfortranarray(test_images), y_train=(np.arange(N) % 3)[:, None])
    own = open_file(file)
    assert np.array_equal(own.read(is_train=True)[0].numpy(), to_channels_first(images))
    assert own.image_shape == to_channels_first(images).shape[1:]
    assert own.read(is_train=True)[1].tolist() == [i % 3 for i in range(N)]
    found, labels = load_test(own)
    assert np.array_equal(found.numpy(), to_channels_first(test_images))
    assert labels.dtype == torch.int64
    assert (own.n_train, own.n_test, own.class_names) == (N, N_TEST, ("0", "1", "2"))


def test_a_search_reads_nothing_of_the_test_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    whole = arrays._read_member

    def note(file: Path, member: str, *, is_fortran: bool) -> Any:
        read.append(member)
        return whole(file, member, is_fortran=is_fortran)

    monkeypatch.setattr(arrays, "_read_member", note)
    own = open_file(save(tmp_path))
    load_data(own, validation=9)
    assert {"x_train.npy", "y_train.npy"} == set(read)
    load_test(own)
    assert {"x_test.npy", "y_test.npy"} < set(read)


def test_a_file_without_a_test_part_has_its_sides_chosen_by_content(tmp_path: Path) -> None:
    images = draw()
    images[40:50] = images[30:40]  # copies
    labels = np.arange(N) % 2
    labels[40:50] = labels[30:40]
    own = open_file(save(tmp_path, x_train=images, y_train=labels, x_test=None, y_test=None), test=0.2, validation=0.2)
    assert own.inventory.sides[40:50] == own.inventory.sides[30:40]
    assert set(own.inventory.sides) == {"train", "validation", "test"}
    found, _ = load_test(own)
    rows = [row for row, side in enumerate(own.inventory.sides) if side == "test"]
    assert np.array_equal(found.numpy()[:, 0], images[rows])
    data = load_data(own, validation=0)
    assert len(data.train) + len(data.validation) + len(rows) == N
    assert own.inventory.names[17] == "x_train[17]"


def test_labels_may_be_names_of_classes(tmp_path: Path) -> None:
    names = np.array(["tulip", "rose", "dandelion"])
    file = save(tmp_path, y_train=names[np.arange(N) % 3], y_test=names[:1].repeat(N_TEST).astype("S"))
    own = open_file(file)
    assert own.class_names == ("dandelion", "rose", "tulip")
    assert own.inventory.labels[:3] == [2, 1, 0]
    assert load_test(own)[1].tolist() == [2] * N_TEST
    own = open_file(save(tmp_path, class_names=names))
    assert own.class_names == ("tulip", "rose", "dandelion")


def test_every_problem_of_a_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    floats = draw() / 255
    problems = refuse(tmp_path, x_train=floats, y_train=np.arange(N) % 3 - 1, x_test=draw(N_TEST, (8, 6, 4)))
    assert problems == [
        "x_train: images must be uint8, from 0 to 255, but are float64; (x * 255).round().astype('uint8') would do, "
        "if they are from 0 to 1 and not NaN",
        "y_train: labels must be whole numbers from 0 on, without gaps, but y_train[0] = -1, y_train[3] = -1, "
        "y_train[6] = -1, ...",
        "x_test: has shape 12x8x6x4; C must be 1 or 3 in (N, H, W, C) or (N, C, H, W); x[..., :3] leaves out "
        "transparency",
    ]


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"x_train": draw(N, (784,))}, "x.reshape(-1, 28, 28) would do"),
        ({"x_train": draw(N, ())}, "has shape 60; images must be"),
        ({"x_train": draw(0)}, "has shape 0x8x6; there are no images in it"),
        ({"x_train": draw().astype(np.int64)}, "are int64; x.astype('uint8') would do"),
        ({"x_train": draw().astype(object)}, "x_train: has Python objects"),
        ({"y_train": (np.arange(N) % 3).astype(object)}, "y_train: has Python objects"),
        ({"y_train": np.arange(N) / 3}, "y_train: labels must be whole numbers or names, but are float64"),
        ({"y_train": np.eye(3)[np.arange(N) % 3].astype(int)}, "y.argmax(axis=1) would do"),
        ({"y_train": np.arange(N - 1) % 3}, "y_train: 59 labels for 60 images of x_train"),
        ({"y_train": np.zeros(N, int)}, "all images are of one class"),
        ({"y_train": np.arange(N) % 3 * 2}, "no images of 2 of 5 classes: 1, 3"),
        ({"y_train": np.arange(N) % 3 * 10**12}, "but y_train[1] = 1000000000000"),
        (
            {"class_names": np.array(["a", "b"])},
            "y_train: labels must be whole numbers from 0 to 1, but y_train[2] = 2",
        ),
        ({"class_names": np.array(["a", "b", "a"])}, "class_names: a, b, a are not all different"),
        ({"x_test": draw(N_TEST, (6, 8))}, "x_test: images of 1x6x8, but those to train on are 1x8x6"),
        ({"y_test": np.zeros(N_TEST + 1, int)}, "y_test: 13 labels for 12 images of x_test"),
        ({"y_test": np.eye(N_TEST)}, "y_test: labels must be whole numbers or names, but are float64"),
        ({"class_names": np.array("a")}, "class_names: must be a list of texts, but has <U1 of shape ()"),
        (
            {"y_train": np.array([0] * (N - 1) + [1])},
            'class "1": 1 different image, but the training and the other side',
        ),
    ],
)
def test_a_file_with_wrong_arrays_is_refused(tmp_path: Path, changed: dict[str, Any], problem: str) -> None:
    assert problem in "\n".join(refuse(tmp_path, **changed))


def test_a_file_that_lacks_arrays_is_refused_with_those_that_it_has(tmp_path: Path) -> None:
    file = tmp_path / "set.npz"
    np.savez(file, images=draw(), y_train=np.arange(N))
    with pytest.raises(DataError, match=r"x_train: missing; it has images, y_train"):
        open_file(file)
    np.savez(file, **parts(y_test=None))
    with pytest.raises(DataError, match="y_test: missing"):
        open_file(file)


def test_a_file_that_is_missing_damaged_or_no_npz_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"other\.npz: no such file"):
        open_file(tmp_path / "other.npz")
    file = tmp_path / "set.npz"
    np.save(tmp_path / "set.npy", draw())
    (tmp_path / "set.npy").rename(file)
    with pytest.raises(DataError, match=r"not an \.npz file"):
        open_file(file)
    np.savez(file, **parts())
    content = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        content[archive.getinfo("x_train.npy").header_offset + 500] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"damaged \(Bad CRC-32 for file .x_train\.npy.\)"):
        open_file(file)
    file.write_bytes(content[:1000])
    with pytest.raises(DataError, match=r"not an \.npz file|damaged"):
        open_file(file)


def test_an_unchanged_file_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = save(tmp_path)
    os.utime(file, (time.time() - 60,) * 2)
    images = open_file(file).read(is_train=True)[0]
    monkeypatch.setattr(arrays, "_digest_one", lambda pixels: pytest.fail("read again"))
    assert open_file(file).read(is_train=True)[0].equal(images)


def test_problems_of_the_test_part_are_named_when_it_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    own = open_file(save(tmp_path, y_test=np.arange(N_TEST)))
    with pytest.raises(DataError, match=r"y_test: labels must be whole numbers from 0 to 2, but y_test\[3\] = 3"):
        load_test(own)
    with pytest.raises(DataError, match="all images of the test part are training images"):
        load_test(open_file(save(tmp_path, x_test=draw()[:N_TEST])))
    test_images = draw(N_TEST, seed=1)
    test_images[5] = draw()[7]
    with caplog.at_level(logging.WARNING):
        load_test(open_file(save(tmp_path, x_test=test_images)))
    assert caplog.messages == [
        "set.npz: 1 test image is also a training image, which makes results look better than they are: x_test[5]"
    ]


LOADER = """
import numpy as np
import torch

calls = []

def load(split):
    calls.append(split)
    print("loading", split)
    generator = np.random.default_rng(["train", "test"].index(split))
    images = generator.integers(0, 256, ({n}, 8, 8, 3), dtype=np.uint8)
    return {returned}
"""
RETURNED = "torch.tensor(images), torch.arange({n}) % 3, ['a', 'b', 'c']"


def write_loader(tmp_path: Path, returned: str = RETURNED, n: int = N) -> OwnCode:
    file = tmp_path / "my_data.py"
    file.write_text(LOADER.replace("{returned}", returned).replace("{n}", str(n)))
    return OwnCode.read("my_data.py:load", tmp_path)


def calls_of(code: OwnCode) -> list[str]:
    calls: list[str] = code.load().__globals__["calls"]
    return calls


def test_a_function_loads_images_and_the_test_part_only_when_it_is_needed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = write_loader(tmp_path)
    own = open_function(code)
    images, labels = own.read(is_train=True)
    expected = np.random.default_rng(0).integers(0, 256, (N, 8, 8, 3), dtype=np.uint8)
    assert np.array_equal(images.numpy(), expected.transpose(0, 3, 1, 2))
    assert Counter(labels.tolist()) == {0: 20, 1: 20, 2: 20}
    assert own.class_names == ("a", "b", "c")
    assert calls_of(code) == ["train"]
    assert len(load_test(own)[0]) == N
    assert calls_of(code) == ["train", "test"]
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "loading train" in printed.err


def test_with_data_test_a_function_is_asked_for_training_images_alone(tmp_path: Path) -> None:
    code = write_loader(tmp_path)
    own = open_function(code, test=0.2)
    images, _ = load_test(own)
    assert len(images) == own.n_test == own.inventory.sides.count("test") > 0
    assert set(calls_of(code)) == {"train"}


@pytest.mark.parametrize(
    ("returned", "problem"),
    [
        (
            "images / 0 if False else 1 / 0",
            r"my_data\.py:12: ZeroDivisionError: .*; it was called as load\(\"train\"\)",
        ),
        ("images", r"must return images, labels and class names, but returned a ndarray"),
        ("images, images", "must return images, labels and class names, but returned 2 values"),
        ("[[1], [1, 2]], [0, 1], None", "train_images must be an array, but"),
        ("images * np.nan, np.arange(60) % 3, None", "images must be uint8, from 0 to 255, but are float64"),
        ("images, np.arange(60) % 3, 'abc'", "must return a list of class names, but they are 'abc'"),
        ("images, np.arange(60) % 3, ['a', 'b']", r"from 0 to 1, but train_labels\[2\] = 2"),
    ],
)
def test_a_function_that_returns_something_else_is_named(tmp_path: Path, returned: str, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        open_function(write_loader(tmp_path, returned))


def test_a_function_without_a_test_part_is_told_how_to_go_on(tmp_path: Path) -> None:
    own = open_function(write_loader(tmp_path, f"None if split == 'test' else ({RETURNED})"))
    with pytest.raises(DataError, match=r'load\("test"\) returned None; .* set data.test in a new study'):
        load_test(own)


def test_classes_of_the_test_part_must_be_those_of_the_training_part(tmp_path: Path) -> None:
    returned = "images, np.arange(60) % 3, ['a', 'b', 'c'] if split == 'train' else ['a', 'c', 'b']"
    own = open_function(write_loader(tmp_path, returned))
    with pytest.raises(DataError, match="the classes a, c, b are not those of the training part"):
        load_test(own)


def test_images_that_differ_at_the_next_call_are_refused(tmp_path: Path) -> None:
    own = open_function(write_loader(tmp_path, "images + np.uint8(len(calls)), np.arange(60) % 3, None"), test=0.2)
    with pytest.raises(DataError, match=r"train_images\[\d+\] has changed since it was read"):
        load_test(own)


def write_study(tmp_path: Path, data: str) -> Path:
    file = tmp_path / "study.toml"
    file.write_text(f"[data]\n{data}\n[search]\nlr = {{ float = [1e-3, 1e-1], log = true }}\n")
    return file


def test_a_study_names_a_file_or_a_function_beside_it(tmp_path: Path) -> None:
    save(tmp_path)
    definition = load_definition(write_study(tmp_path, 'file = "set.npz"\nvalidation = 9'))
    data = load_study_data(definition)
    assert len(data.validation) == 9
    assert open_data_set(definition, (tmp_path / "set.npz").rename(tmp_path / "moved.npz")).title == "moved.npz"
    write_loader(tmp_path)
    definition = load_definition(write_study(tmp_path, 'load = "my_data.py:load"'))
    (tmp_path / "my_data.py").unlink()  # its source is in the definition
    own = open_data_set(definition)
    assert isinstance(own, OwnImages)
    assert own.n_train == N
    with pytest.raises(DataError, match="--data: has no effect"):
        open_data_set(definition, tmp_path)
