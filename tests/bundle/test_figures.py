"""The pictures of an evaluation: opaque, the same each time, and as large as what they show."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hpsearch.bundle import figures
from hpsearch.bundle.evaluation import Evaluation, evaluate
from hpsearch.bundle.figures import (
    PLOTS,
    check_folder,
    draw_calibration,
    draw_confusion_matrix,
    draw_evaluation,
    draw_mistakes,
)
from hpsearch.errors import UsageError
from hpsearch.plugins import DATA_SETS, find

IMAGES = np.random.default_rng(0).integers(0, 256, (60, 1, 28, 28), dtype=np.uint8)
Draw = Callable[[Evaluation, Path], None]


def draw_gallery(evaluation: Evaluation, file: Path) -> None:
    draw_mistakes(evaluation, IMAGES, file)


def make_evaluation(n_mistakes: int, data: str = "fashion-mnist") -> Evaluation:
    """60 images, the first `n_mistakes` of which are taken for the next class."""
    labels = np.arange(60) % 10
    predicted = (labels + (np.arange(60) < n_mistakes)) % 10
    probabilities = np.full((60, 10), 0.02, dtype=np.float32)
    probabilities[np.arange(60), predicted] = 0.82
    return evaluate(probabilities, labels, find(DATA_SETS, data).class_names)


def read(file: Path) -> np.ndarray:
    with Image.open(file) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGBA"))


@pytest.mark.parametrize("draw", [draw_confusion_matrix, draw_calibration, draw_gallery])
@pytest.mark.parametrize("n_mistakes", [0, 1, 60])
@pytest.mark.parametrize("data", ["mnist", "fashion-mnist"])
def test_a_picture_is_opaque_on_white_and_the_same_each_time(
    draw: Draw, n_mistakes: int, data: str, tmp_path: Path
) -> None:
    evaluation = make_evaluation(n_mistakes, data)
    for name in ("a.png", "b.png"):
        draw(evaluation, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    pixels = read(tmp_path / "a.png")
    assert (pixels[..., 3] == 255).all()
    frame = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert (frame == 255).all(), "something is cut off at the edge"
    assert (pixels[..., :3].min(axis=(0, 1)) < 128).all(), "nothing is drawn"


def test_calibration_bins_of_few_images_have_no_whiskers(tmp_path: Path) -> None:
    n_dark = {}
    for n in (9, 10):
        bins = [{"confidence": 0.5, "accuracy": 0.5, "n": n}, {"confidence": 0.95, "accuracy": 0.95, "n": 100_000}]
        draw_calibration(replace(make_evaluation(0), calibration={"error": 0.0, "bins": bins}), tmp_path / "a.png")
        pixels = read(tmp_path / "a.png")[100:500, 200:500, :3].astype(int)  # around the bin of 0.5, above the counts
        n_dark[n] = int((np.abs(pixels - (47, 109, 179)).max(axis=2) < 40).sum())
    assert n_dark[9] < 60 < 200 < n_dark[10]


def test_right_and_wrong_cells_of_the_matrix_differ_in_colour(tmp_path: Path) -> None:
    def coloured(n_mistakes: int) -> tuple[int, int]:
        draw_confusion_matrix(make_evaluation(n_mistakes), tmp_path / "a.png")
        red, blue = (read(tmp_path / "a.png")[..., channel].astype(int) for channel in (0, 2))
        return int((blue - red > 60).sum()), int((red - blue > 60).sum())

    n_blue, n_red = coloured(0)
    assert n_blue > 1000
    assert n_red == 0
    n_blue, n_red = coloured(60)
    assert n_blue == 0
    assert n_red > 1000


def test_the_gallery_shows_the_pixels_of_the_mistakes_alone(tmp_path: Path) -> None:
    black = np.full_like(IMAGES, 255)
    darkness = []
    for n_mistakes in (0, 1, 8):
        draw_mistakes(make_evaluation(n_mistakes), black, tmp_path / "a.png")
        darkness.append(int((read(tmp_path / "a.png")[..., :3].max(axis=2) == 0).sum()))
    white = IMAGES.copy() * 0
    draw_mistakes(make_evaluation(8), white, tmp_path / "a.png")
    assert darkness[0] < 3000 < 10_000 < darkness[1] < darkness[2]
    assert int((read(tmp_path / "a.png")[..., :3].max(axis=2) == 0).sum()) < 6000


def test_the_gallery_ends_at_forty_images(tmp_path: Path) -> None:
    sizes = []
    for n_mistakes in (32, 40, 60):
        draw_gallery(make_evaluation(n_mistakes), tmp_path / "a.png")
        sizes.append(read(tmp_path / "a.png").shape[0])
    assert sizes[0] < sizes[1] == sizes[2]


def test_pictures_leave_the_users_own_pyplot_alone(tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    plt.close("all")
    for draw in (draw_confusion_matrix, draw_calibration, draw_gallery):
        draw(make_evaluation(3), tmp_path / "a.png")
    assert plt.get_fignums() == []


def test_a_folder_with_pictures_of_something_else_is_refused(tmp_path: Path) -> None:
    draw_evaluation(make_evaluation(1), IMAGES, tmp_path, "small")
    check_folder(tmp_path, "small")
    for name in PLOTS:
        before = (tmp_path / name).read_bytes()
        draw_confusion_matrix(make_evaluation(1), tmp_path / name)  # as an older version did
        with pytest.raises(UsageError, match=f"has another {name}; choose another folder, or replace it with --force"):
            check_folder(tmp_path, "small")
        check_folder(tmp_path, "small", force=True)
        (tmp_path / name).write_bytes(before)
    file = tmp_path / "confusion_matrix.png"
    for make in (lambda: file.write_bytes(b"my own"), lambda: file.symlink_to(tmp_path / "elsewhere")):
        file.unlink()
        make()
        with pytest.raises(UsageError, match=r"has another confusion_matrix\.png"):
            check_folder(tmp_path, "small")
    file.unlink()
    file.mkdir()
    with pytest.raises(UsageError, match=r"has another confusion_matrix\.png; choose another folder$"):
        check_folder(tmp_path, "small", force=True)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("n_classes", [2, 7, 200])
def test_pictures_of_few_and_many_classes_with_any_names_are_whole_and_of_a_size_to_read(
    n_classes: int, tmp_path: Path
) -> None:
    strange = ["🌹", "花", "a\nb", "**b** | <i>", "$x^2$", "n" * 100, "\x1b[31m"]
    names = [f"class {i}" for i in range(200)] if n_classes == 200 else strange[:n_classes]
    labels = np.arange(800) % n_classes
    labels[labels == 1] = 0  # a class without images
    predicted = np.where(np.arange(800) % 9, labels, (labels + 1) % n_classes)
    evaluation = evaluate(np.eye(n_classes, dtype=np.float32)[predicted], labels, names)
    images = np.zeros((800, 3, 40, 40), dtype=np.uint8)
    images[:, 0] = 200  # red
    draw_confusion_matrix(evaluation, tmp_path / "confusion_matrix.png")
    draw_mistakes(evaluation, images, tmp_path / "mistakes.png", is_photo=True)
    for name in ("confusion_matrix.png", "mistakes.png"):
        pixels = read(tmp_path / name)
        assert max(pixels.shape) < 2500
        assert (np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]) == 255).all()
    gallery = read(tmp_path / "mistakes.png")
    assert (gallery[..., :3] == (200, 0, 0)).all(axis=2).sum() > 100_000


def test_the_powers_of_ten_of_the_calibration_are_drawn_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(figures, "_save", lambda figure, file, study: drawn.append(figure))
    draw_calibration(make_evaluation(3), tmp_path / "a.png")
    labels = drawn[0].axes[1].get_yticklabels()
    assert any("10^" in label.get_text() for label in labels)
    assert all(label.get_parse_math() for label in labels)


def test_a_gray_photo_is_drawn_as_it_is_and_handwriting_dark_on_white(tmp_path: Path) -> None:
    black = np.zeros_like(IMAGES)
    darkness = []
    for is_photo in (False, True):
        draw_mistakes(make_evaluation(8), black, tmp_path / "a.png", is_photo=is_photo)
        darkness.append(int((read(tmp_path / "a.png")[..., :3].max(axis=2) == 0).sum()))
    assert darkness[0] < 6000 < 10_000 < darkness[1]
