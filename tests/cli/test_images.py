"""`init --images` says what is in a folder, and writes a study file for it, or says all that is wrong."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hpsearch.config.definition import load_definition

from ..shapes import write_shapes
from .test_app import Run, run  # noqa: F401


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images") / "shapes"
    write_shapes(folder, 200, size=16, n_copies=5, n_broken=2)
    return folder


def test_init_says_what_is_in_a_folder_and_writes_a_study_file_that_can_be_checked(
    run: Run,  # noqa: F811
    shapes: Path,
    tmp_path: Path,
) -> None:
    code, out, err = run("init", "--images", shapes)
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == ["class", "images", "train", "validation", "test"]
    assert rows[-6][:4] == ["all", "6", "classes", "205"]
    facts = {row[0]: row[1:] for row in rows[-4:]}
    assert facts["sizes"] == ["16x16"]
    assert facts["colors"] == ["205", "rgb"]
    assert facts["copies"][0] == "5,"
    assert facts["unreadable"][0] == "2:"
    assert "image file is truncated" in out
    assert err.splitlines()[-2:] == [
        "wrote shapes.toml; change it as you like, and check it with: hpsearch check shapes",
        "next: hpsearch run shapes",
    ]
    assert "warning: only" in err
    definition = load_definition("shapes")
    assert definition.data.folder == str(shapes)
    assert definition.data.skip_unreadable
    assert run("check", "shapes")[0] == 0


def test_a_folder_is_named_relative_to_the_study_file_where_it_is_below_or_was_so_named(
    run: Run,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for place in ("study/images", "images"):
        write_shapes(tmp_path / place, 60, size=8)
    (tmp_path / "study").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "study")
    for name, path in {"one": tmp_path / "study/images", "two": "../images", "three": tmp_path / "images"}.items():
        assert run("init", name, "--images", path)[0] == 0
    written = [(tmp_path / "study" / f"{name}.toml").read_text() for name in ("one", "two", "three")]
    paths = [text.split("folder     = ")[1].split("\n")[0] for text in written]
    assert paths == ['"images"', '"../images"', f'"{tmp_path}/images"']


def test_init_overwrites_nothing_and_names_what_cannot_be_a_name(
    run: Run,  # noqa: F811
    shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "shapes.toml").write_text("mine")
    code, out, err = run("init", "shapes.toml", "--images", shapes)
    assert (code, out) == (2, "")
    assert "shapes.toml is there already" in err
    assert (tmp_path / "shapes.toml").read_text() == "mine"
    for name in ("a b", "", "../up", "-x", "x" * 101, "ü"):
        code, out, err = run("init", "--images", shapes, "--", name)
        assert (code, out) == (2, ""), name
        assert "the name of a study " in err
    assert "try: hpsearch init a-b --images" in run("init", "a b", "--images", shapes)[2]
    monkeypatch.chdir(shapes / "ring")
    assert "type this elsewhere" in run("init", "new", "--images", shapes)[2]
    assert [file.name for file in tmp_path.iterdir()] == ["shapes.toml"]


def test_what_cannot_be_searched_is_said_at_once_and_nothing_is_written(run: Run, tmp_path: Path) -> None:  # noqa: F811
    for name, n in {"one": 2, "none": 0, "many": 12}.items():
        (tmp_path / "bad" / name).mkdir(parents=True)
        for number in range(n):
            Image.new("L", (4, 4), 20 * number + n).save(tmp_path / "bad" / name / f"{number}.png")
    code, out, err = run("init", "new", "--images", "bad")
    assert code == 1
    assert "all 3 classes" in out
    assert 'class "one": 2 different images' in err
    assert 'class "none": no images' in err
    code, out, err = run("init", "new", "--images", "bad/many")
    assert (code, out) == (1, "")
    assert "no class folders" in err
    assert not (tmp_path / "new.toml").exists()


def test_a_folder_that_may_only_be_read_is_noticed_before_the_images_are_read(
    run: Run,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_shapes(tmp_path / "shapes", 60, size=8)
    monkeypatch.setattr(os, "access", lambda path, mode: path != ".")  # root may write anywhere
    code, out, err = run("init", "--images", "shapes")
    assert (code, out) == (2, "")
    assert err == "error: no file can be written to the current folder; begin in another one\n"


def test_the_table_of_many_classes_is_short(run: Run, tmp_path: Path) -> None:  # noqa: F811
    for label in range(30):
        (tmp_path / "many" / f"c{label}").mkdir(parents=True)
        for number in range(4):
            Image.new("L", (4, 4), 8 * label + number).save(tmp_path / "many" / f"c{label}" / f"{number}.png")
    code, out, _ = run("init", "--images", "many")
    assert code == 0
    assert len(out.splitlines()) < 22
    assert "19 more" in out


@pytest.mark.parametrize("has_test", [False, True])
def test_arrays_in_a_file_get_a_study_file_too(run: Run, tmp_path: Path, has_test: bool) -> None:  # noqa: F811
    random = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "x_train": random.integers(0, 256, (90, 12, 10, 3), np.uint8),
        "y_train": np.arange(90) % 3,
    }
    if has_test:
        arrays |= {"x_test": arrays["x_train"][:20] // 2, "y_test": arrays["y_train"][:20]}
    np.savez(tmp_path / "set.npz", **arrays)
    code, out, _ = run("init", "--images", "set.npz")
    assert code == 0
    assert "10x12" in out
    assert ("test part" in out) == has_test
    data = load_definition("set").data
    assert data.file == str(tmp_path / "set.npz")
    assert (data.test, data.validation) == (None if has_test else 0.2, 0.2)
    (tmp_path / "bad.npz").write_bytes(b"nothing")
    code, out, err = run("init", "--images", "bad.npz")
    assert (code, out) == (1, "")
    assert "bad.npz" in err


@pytest.mark.parametrize("command", ["check", "run"])
def test_images_with_problems_are_named_before_there_is_a_study(
    run: Run,  # noqa: F811
    shapes: Path,
    tmp_path: Path,
    command: str,
) -> None:
    body = f'[data]\nfolder = "{shapes}"\n[search]\nlr = {{ float = [1e-3, 1e-1], log = true }}\n'
    (tmp_path / "broken.toml").write_text(body)
    code, out, err = run(command, "broken")
    assert (code, out) == (1, "")
    assert "2 problems" in err
    assert "image file is truncated" in err
    assert [file.name for file in tmp_path.iterdir()] == ["broken.toml"]
