"""The list of a study's images: written and read back, and compared with an older one."""

from dataclasses import replace

import pytest

from hpsearch.data.inventory import Inventory, show_name
from hpsearch.errors import DataError

NAMES = ["a/0.png", "b/0.png", "a/1.png", "b/1.png", "a/2.png", "b/2.png"]
OLDER = Inventory(NAMES, list("pqrstu"), [0, 1] * 3, ["train", "test"] * 3, ["a", "b"])


def test_it_is_the_same_when_it_is_read_back() -> None:
    names = [*NAMES[:5], "b/\udcff\n🌹.png"]
    again = Inventory.from_bytes(replace(OLDER, names=names).to_bytes())
    assert again.names == names
    assert again.sha256 == OLDER.sha256
    with pytest.raises(DataError, match="the list of the study's images is damaged"):
        Inventory.from_bytes(OLDER.to_bytes()[:-9])


def test_other_names_in_the_same_order_make_no_difference() -> None:
    assert replace(OLDER, names=[f"x/{name}" for name in NAMES]).compare(OLDER) == []


def test_each_kind_of_difference_is_a_sentence_with_names() -> None:
    newer = Inventory(
        ["a/0.png", "c/0.png", "a/9.png", "b/1.png", "a/2.png", "b/3.png", "b/4.png", "b/5.png", "b/6.png"],
        list("pqrXtvwxy"),
        [0, 2, 0, 1, 0, 1, 1, 1, 1],
        ["train", "test", "train", "test", "test", "test", "train", "train", "train"],
        ["a", "b", "c"],
    )
    assert newer.compare(OLDER) == [
        "1 class added: c",
        "4 images added: b/3.png, b/4.png, b/5.png, ...",
        "1 image removed: b/2.png",
        "1 image with other content: b/1.png",
        "1 image relabelled: b -> c: c/0.png",
        "1 image moved from train to test: a/2.png",
        "1 image renamed: a/9.png",
    ]
    assert OLDER.compare(newer)[0] == "1 class removed: c"


def test_an_image_put_first_into_an_array_is_one_more() -> None:
    older = Inventory(
        [f"x_train[{i}]" for i in range(100)], [f"{i:016x}" for i in range(100)], [0] * 100, [""] * 100, []
    )
    older = replace(older, class_names=["a"])
    newer = replace(older, names=[*older.names, "x_train[100]"], digests=["f" * 16, *older.digests])
    newer = replace(newer, labels=[0] * 101, sides=[""] * 101)
    assert newer.compare(older)[0] == "1 image added: x_train[0]"
    assert older.compare(newer)[0] == "1 image removed: x_train[0]"


def test_copies_are_matched_one_to_one() -> None:
    newer = Inventory(
        [*NAMES, "a/copy.png"], [*OLDER.digests, "p"], [0, 1] * 3 + [0], [*OLDER.sides, "train"], ["a", "b"]
    )
    assert newer.compare(OLDER) == ["1 image added: a/copy.png"]
    assert OLDER.compare(newer) == ["1 image removed: a/copy.png"]


def test_another_order_alone_is_a_difference() -> None:
    newer = Inventory(NAMES[::-1], OLDER.digests[::-1], OLDER.labels[::-1], OLDER.sides[::-1], ["a", "b"])
    assert newer.compare(OLDER) == ["the images are in another order"]


def test_names_are_shown_on_one_line() -> None:
    assert show_name("two words 🌹\n\udce9\u2028") == r"two words 🌹\n\udce9\u2028"
