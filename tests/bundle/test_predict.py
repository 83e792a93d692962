"""Predictions for files, folders and patterns: each image once, in order, and what cannot be read by name."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from hpsearch.bundle import bundle, predict
from hpsearch.bundle.predict import find_images, predict_files
from hpsearch.cli.render import prediction_line
from hpsearch.data import image_files
from hpsearch.data.dataset import ImageData, load_test
from hpsearch.data.image_files import read_image
from hpsearch.monitor.text import printable
from hpsearch.training.kinds import Hyperparameters
from hpsearch.training.trainer import Trainer

from ..cli.test_app import Run, run  # noqa: F401
from .test_bundle import make_contents, save

DIGIT = Path(__file__).parents[1] / "digit.png"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, digits: ImageData, forked_verification: None) -> Path:
    target = tmp_path_factory.mktemp("models") / "small"
    save(make_contents(digits), target)
    return target


@pytest.fixture
def scans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with images at two depths, and with files that are none of its images."""
    monkeypatch.chdir(tmp_path)
    for name in ("b.png", "a.PNG", "more/c.jfif", "more/[d].png", ".hidden.png", ".cache/e.png", "notes.txt"):
        file = tmp_path / "scans" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(DIGIT, file)
    return tmp_path / "scans"


def names(argument: str) -> list[str]:
    found = list(find_images(argument))
    assert not any(error for _, error in found), found
    return [file for file, _ in found]


def test_a_folder_stands_for_its_images_sorted_without_hidden_ones(scans: Path) -> None:
    assert names("scans") == ["scans/a.PNG", "scans/b.png", "scans/more/[d].png", "scans/more/c.jfif"]


def test_a_pattern_stands_for_the_files_that_it_matches(scans: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert names("scans/*.png") == ["scans/b.png"]
    assert names("scans/**/*.png") == ["scans/b.png", "scans/more/[d].png"]
    assert names("scans/*") == ["scans/a.PNG", "scans/b.png", "scans/notes.txt"]
    monkeypatch.setenv("HOME", str(scans.parent))
    assert names("~/scans/*.png") == [str(scans / "b.png")]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(scans: Path) -> None:
    assert names("scans/more/[d].png") == ["scans/more/[d].png"]


def test_what_stands_for_nothing_is_an_error_by_name(scans: Path) -> None:
    (scans / "empty").mkdir()
    [(folder, error)] = find_images("scans/empty")
    assert (folder, str(error)[:8]) == ("scans/empty", "no image")
    [(pattern, error)] = find_images("scans/*.gif")
    assert (pattern, error) == ("scans/*.gif", "no matching files")


def test_links_in_a_circle_end(scans: Path) -> None:
    (scans / "more" / "up").symlink_to(scans)
    assert len(names("scans")) == 4


def test_predictions_come_in_order_and_are_those_of_the_single_files(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = load_test("digits")[0][:7, 0].numpy()
    files = [tmp_path / f"{6 - i}.png" for i in range(7)]
    for file, pixels in zip(files, images, strict=True):
        Image.fromarray(pixels).save(file)
    (tmp_path / "text.png").write_text("no image")
    monkeypatch.setattr(predict, "BATCH_SIZE", 3)
    classifier = bundle.load(saved)
    rows = list(predict_files(classifier, [*files[:2], tmp_path / "text.png", *files[2:]]))
    assert [row["image"] for row in rows] == [*map(str, files[:2]), f"{tmp_path}/text.png", *map(str, files[2:])]
    assert rows.pop(2)["error"] == f"{tmp_path}/text.png: not a readable image"
    expected = np.sort(classifier.predict_proba(images), axis=1)[:, :-4:-1]
    probabilities = [[entry["probability"] for entry in row["top"]] for row in rows]
    assert np.allclose(probabilities, expected, atol=1e-6)
    assert rows[0]["top"][0]["class"] == classifier.predict(files[0]).class_name


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, digits: ImageData, forked_verification: None) -> Path:
    torch.manual_seed(0)
    contents = make_contents(digits)
    list(Trainer(contents.network, digits.train, Hyperparameters(width=8, lr=1e-2, batch_size=32), 12))
    target = tmp_path_factory.mktemp("models") / "trained"
    save(contents, target)
    return target


def draw(digit: Image.Image, kind: int) -> Image.Image:
    """A test image as it is; black on white; larger; drawn somewhere on gray paper; or black on transparent."""
    large = digit.resize((280, 280), Image.Resampling.BICUBIC)
    if kind == 2:
        return large
    if kind == 3:
        paper = Image.new("L", (500, 400), 210)
        paper.paste(large.point(lambda shade: 210 - shade * 190 // 255), (200, 60))
        return paper.convert("RGB")
    if kind == 4:
        drawing = Image.new("RGBA", large.size)
        drawing.putalpha(large)
        return drawing
    return ImageOps.invert(digit) if kind == 1 else digit


def test_predict_py_agrees_with_hpsearch_on_a_hundred_pictures(trained: Path, tmp_path: Path) -> None:
    """On 20 each of `draw`. Photographs, thin pens and ruled paper, which only hpsearch reads, are not among them."""
    images, labels = load_test("digits")
    files = [tmp_path / f"{i}.png" for i in range(100)]
    for i, file in enumerate(files):
        draw(Image.fromarray(images[i, 0].numpy()), i % 5).save(file)
    program = runpy.run_path(str(trained / "predict.py"))
    classifier = bundle.load(trained)
    expected = classifier.predict_proba(np.concatenate([classifier.read_image(file)[np.newaxis] for file in files]))
    found = program["predict_proba"](torch.stack([program["read_image"](file) for file in files])).numpy()
    differences = np.abs(found - expected).max(axis=1)
    assert differences[[i for i in range(100) if i % 5 < 2]].max() < 1e-6
    assert np.quantile(differences, 0.95) < 0.05  # a digit on the border of two pixels may be placed on either
    assert (found.argmax(axis=1) == expected.argmax(axis=1)).sum() >= 99
    assert (found.argmax(axis=1) == labels[:100].numpy()).mean() > 0.6


def test_predict_py_runs_with_torch_and_pillow_alone_and_has_forty_lines(trained: Path) -> None:
    text = (trained / "predict.py").read_text()
    assert len(text.splitlines()) <= 40
    assert max(map(len, text.splitlines())) <= 120
    guard = "import sys\nfor name in ('hpsearch', 'numpy', 'safetensors', 'scipy'): sys.modules[name] = None\n"
    run_it = "import runpy\nsys.argv = ['predict.py', 'example.png']\nrunpy.run_path('predict.py', run_name='__main__')"
    command = [sys.executable, "-W", "ignore", "-c", guard + run_it]
    found = subprocess.run(command, cwd=trained, check=True, capture_output=True, text=True).stdout
    [row] = predict_files(bundle.load(trained), [trained / "example.png"])
    assert found == prediction_line(row | {"image": "example.png"}) + "\n"


@pytest.mark.parametrize("size", [(300, 200), (28, 28)])
@pytest.mark.parametrize("mode", ["L", "I;16", "F"])
def test_predict_py_names_the_file_that_is_blank_or_has_more_than_8_bits(
    trained: Path, tmp_path: Path, size: tuple[int, int], mode: str
) -> None:
    paper = Image.new(mode, size, 255)
    if mode != "L":
        paper.paste(0, (5, 5, 20, 20))
    paper.save(tmp_path / "paper.tiff")
    with pytest.raises(ValueError, match=r"paper\.tiff: blank, of low contrast, or of more than 8 bits"):
        runpy.run_path(str(trained / "predict.py"))["read_image"](tmp_path / "paper.tiff")


def test_predict_py_turns_a_photograph_as_its_exif_says(trained: Path, tmp_path: Path) -> None:
    image = Image.fromarray(load_test("digits")[0][0, 0].numpy())
    turned = Image.Exif()
    turned[274] = 6  # to be turned clockwise by a quarter
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.tiff", exif=turned)
    image.save(tmp_path / "upright.tiff")
    read = runpy.run_path(str(trained / "predict.py"))["read_image"]
    assert torch.equal(read(tmp_path / "turned.tiff"), read(tmp_path / "upright.tiff"))


def test_no_more_than_a_batch_is_read_ahead(saved: Path, scans: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "BATCH_SIZE", 2)
    read: list[str] = []

    def note(file: str, *arguments: Any, **options: Any) -> np.ndarray:
        read.append(file)
        return read_image(file, *arguments, **options)

    monkeypatch.setattr(image_files, "read_image", note)
    rows = predict_files(bundle.load(saved), ["scans"])
    next(rows)
    assert read == ["scans/a.PNG", "scans/b.png"]
    assert len(list(rows)) == 3


def test_an_image_that_is_named_again_is_predicted_once_and_told_of(saved: Path, scans: Path) -> None:
    again: list[str] = []
    rows = list(predict_files(bundle.load(saved), ["scans/b.png", "scans", "./scans/*.png"], on_duplicate=again.append))
    assert [row["image"] for row in rows][:2] == ["scans/b.png", "scans/a.PNG"]
    assert len(rows) == 4
    assert again == ["scans/b.png", "./scans/b.png"]


@pytest.mark.timeout(60)
def test_whatever_cannot_be_read_is_named_and_the_others_are_predicted(
    run: Run,  # noqa: F811
    saved: Path,
    tmp_path: Path,
) -> None:
    good = ["a b.png", "a\nb.png", "\x1b[31mred.png", "é.png", "\udcff.png"]
    for name in good:
        shutil.copy(DIGIT, name)
    os.mkfifo("pipe.png")
    Path("empty.png").touch()
    Path("text\x1b[2J.png").write_text("no image")
    Path("cut.png").write_bytes(DIGIT.read_bytes()[:200])
    bad = ["pipe.png", "empty.png", "text\x1b[2J.png", "cut.png", "missing.png", "*.gif", "x" * 300 + ".png"]
    mixed = [name for pair in zip(bad, good, strict=False) for name in pair] + bad[len(good) :]

    code, out, err = run("predict", saved, *mixed)
    assert code == 1
    assert [line.split("  ")[0] for line in out.splitlines()] == [printable(name) for name in good]
    lines = err.splitlines()
    assert [line.split(": ")[:2] for line in lines] == [["error", printable(name)] for name in bad]
    assert out.isprintable() or set(out) - {"\n"} == {c for c in out if c.isprintable()}
    assert "\x1b" not in out + err

    code, out, err = run("predict", saved, *mixed, "--json")
    assert code == 1
    rows = json.loads(out)
    assert [row["image"] for row in rows] == mixed
    assert [row["image"] for row in rows if "error" in row] == bad
    assert all(len(row["top"]) == 3 for row in rows if "top" in row)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_named(saved: Path, scans: Path) -> None:
    (scans / "b.png").chmod(0)
    (scans / "more").chmod(0)
    rows = list(predict_files(bundle.load(saved), ["scans"]))
    (scans / "more").chmod(0o700)
    errors = [row["error"] for row in rows if "error" in row]
    assert errors == ["scans/b.png: Permission denied", "scans/more: Permission denied"]
    assert "top" in rows[0]


def test_good_images_alone_give_status_0_and_a_line_each(run: Run, saved: Path) -> None:  # noqa: F811
    code, out, err = run("predict", saved, DIGIT)
    assert (code, err) == (0, "")
    assert out.startswith(f"{DIGIT}  ")
    assert len(out.split("  ")) == 4


def test_a_prediction_is_one_line_whatever_the_name() -> None:
    row = {"image": "a\r\n\u202eb.png", "top": [{"class": "7", "probability": 0.99812}]}
    assert prediction_line(row) == r"a\r\n\u202eb.png  7 0.9981"


def test_no_prediction_is_certain() -> None:
    probabilities = {"7": 0.99994, "2": 0.9999, "9": 0.0001, "1": 0.00004, "3": 1.0, "5": 0.0}
    row = {"image": "a.png", "top": [{"class": name, "probability": p} for name, p in probabilities.items()]}
    assert prediction_line(row) == "a.png  7 >0.9999  2 0.9999  9 0.0001  1 <0.0001  3 >0.9999  5 <0.0001"


def test_an_evaluation_is_told_in_full_and_drawn_where_asked(run: Run, saved: Path, tmp_path: Path) -> None:  # noqa: F811
    before = {file: file.read_bytes() for file in saved.iterdir()}
    code, out, err = run("evaluate", saved, "--pictures", "new/pictures")
    assert code == 0
    assert "95% CI" in out.splitlines()[0]
    assert "expected calibration error" in out
    assert "most confident errors" in out
    pictures = sorted(file.name for file in (tmp_path / "new" / "pictures").iterdir())
    assert pictures == ["calibration.png", "confusion_matrix.png", "mistakes.png"]
    assert all(name in err for name in pictures)
    (tmp_path / "new" / "pictures" / "mistakes.png").write_text("mine")
    assert run("evaluate", saved, "--pictures", "new/pictures")[0] == 2
    assert (tmp_path / "new" / "pictures" / "mistakes.png").read_text() == "mine"
    for options in (["--force"], []):  # the second time, they are its own
        assert run("evaluate", saved, "--pictures", "new/pictures", *options)[0] == 0
    code, out, err = run("evaluate", saved, "--json")
    assert set(json.loads(out)) == {
        *("accuracy", "interval", "balanced_accuracy", "balanced_interval"),
        *("confusion_matrix", "per_class", "calibration", "mistakes"),
    }
    predict, draw = err.removeprefix("next: hpsearch ").strip().split("  |  hpsearch ")
    assert draw == f"evaluate {saved} --pictures plots"
    assert run(*predict.split())[1].startswith(f"{saved}/example.png  ")
    assert {file: file.read_bytes() for file in saved.iterdir()} == before


def test_pictures_go_into_no_file_and_no_bundle(run: Run, saved: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "file").write_text("mine")
    for place, reason in (("file", "is a file"), ("file/x", "is a file"),
                          (saved, "is a model folder"), (saved / "x", "is a model folder"),
                          ("/proc/x", "--pictures /proc/x: ")):  # fmt: skip
        code, out, err = run("evaluate", saved, "--pictures", place)
        assert (code, out) == (2, "")
        assert reason in err
        assert len(err.splitlines()) == 1
    assert (tmp_path / "file").read_text() == "mine"
