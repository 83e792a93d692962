"""Plots of an evaluation as PNG files: confusion matrix, calibration, and a gallery of the most confident errors.

matplotlib is imported on first use, so that models load without it; pyplot is avoided, as it is stateful.
"""

import os
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from hpsearch.bundle.evaluation import N_BINS, Evaluation, bin_of, find_confusions, is_unequal, wilson_interval
from hpsearch.bundle.manifest import check_outside
from hpsearch.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RIGHT, WRONG, FAINT = "#2f6db3", "#d1603d", "#8a8f98"
N_COLUMNS, _WIDEST = 8, 14.0  # columns and inches of the gallery
_N_NUMBERED = 25  # classes of which each cell of the confusion matrix has its number
_N_TICKS = 60  # named on an axis
_N_LISTED = 40  # confusions beside a large matrix
_LARGE, _SMALL = 9.0, 3.4  # inches, of a large and of the smallest matrix
_LONGEST_NAME = 24
PLOTS = ("confusion_matrix.png", "calibration.png", "mistakes.png")
_N_FOR_INTERVAL = 10  # images of a calibration bin
_KEY = "hpsearch study"  # of a text in the PNG file


P = ParamSpec("P")


def _with_plain_text(draw: Callable[P, None]) -> Callable[P, None]:
    """Draw names with dollar signs as they are, not as formulas."""

    @wraps(draw)
    def drawn(*arguments: P.args, **options: P.kwargs) -> None:
        from matplotlib import rc_context

        with rc_context({"text.parse_math": False}):
            draw(*arguments, **options)

    return drawn


def check_folder(folder: Path, study: str, *, force: bool = False) -> None:
    """Create a folder for plots of the study's model.

    Raises `UsageError` if it is not writable, is a model folder or inside one, or has other files with the names of
    plots; with `force`, these are replaced.
    """
    check_outside(folder / PLOTS[0], "--pictures")
    for file in (folder / name for name in PLOTS):
        if os.path.lexists(file) and not (file.is_file() and (force or _is_plot(file, study))):
            advice = ", or replace it with --force" if file.is_file() else ""
            raise UsageError(f"--pictures {folder}: has another {file.name}; choose another folder{advice}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"--pictures {folder}: is a file, expected a folder") from error
    except OSError as error:
        raise UsageError(f"--pictures {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"--pictures {folder}: not writable")


def draw_evaluation(
    evaluation: Evaluation, images: ArrayLike, folder: Path, study: str, *, is_photo: bool = False
) -> list[Path]:
    """Write all plots of a study's model to a folder and return their paths.

    `images` are raw pixels, (N, C, H, W). Those of one channel are drawn with 0 as white, unless they are photos.
    """
    files = [folder / name for name in PLOTS]
    draw_confusion_matrix(evaluation, files[0], study)
    draw_calibration(evaluation, files[1], study)
    draw_mistakes(evaluation, images, files[2], study, is_photo=is_photo)
    return files


@_with_plain_text
def draw_confusion_matrix(evaluation: Evaluation, file: Path, study: str = "") -> None:
    """Plot the confusion matrix; the shade of a cell is its share of the true class (log scale), errors are red.

    With more than 25 classes, cells have no numbers, and the most frequent confusions are listed beside the matrix.
    """
    from matplotlib.colors import LogNorm

    counts = np.array(evaluation.confusion_matrix)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    n_classes, is_large = len(counts), len(counts) > _N_NUMBERED
    names = _label([row["name"] for row in evaluation.per_class])
    longest = max(map(len, names))
    side = _LARGE if is_large else max(1.4 + 0.52 * n_classes, _SMALL)
    list_width = 0.5 + 0.06 * (2 * longest + 8) if is_large else 0.0
    width, height = (side + 0.6, side + 1.2) if is_large else (side + 0.03 * longest, side)
    figure = _new_figure(width + 0.06 * longest + list_width, height + 0.06 * longest)
    grid = figure.add_gridspec(1, 2, width_ratios=[1, list_width / side]) if is_large else figure.add_gridspec(1, 1)
    axes = figure.add_subplot(grid[0])
    is_right = np.eye(n_classes, dtype=bool)
    for color_map, hidden in (("Blues", ~is_right), ("Reds", is_right)):
        shown = np.ma.array(np.maximum(shares, 3e-4), mask=hidden | (counts == 0))
        axes.imshow(shown, cmap=color_map, norm=LogNorm(3e-4, 1.5), interpolation="nearest" if is_large else None)
    if is_large:
        _list_confusions(figure.add_subplot(grid[1]), evaluation, names)
    else:
        for (i, j), count in np.ndenumerate(counts):
            if count:
                is_dark = shares[i, j] > 0.06
                axes.text(j, i, str(count), ha="center", va="center", size=9, color="white" if is_dark else "black")
    step = -(-n_classes // _N_TICKS)
    ticks, size = range(0, n_classes, step), 7 if is_large else None
    turn = 0 if longest <= 4 and not is_large else 90 if is_large else 45
    axes.set_xticks(ticks, names[::step], rotation=turn, ha="right" if turn == 45 else "center", size=size)
    axes.set_yticks(ticks, names[::step], size=size)
    if is_large:
        axes.tick_params(length=2)
        axes.spines[:].set_color("#d5d8dc")
    else:
        _draw_grid(axes, n_classes)
    axes.set(xlabel="predicted", ylabel="true" if step == 1 else f"true (one class in {step} is named)")
    title, interval = _describe_accuracy(evaluation)
    axes.set_title(f"{title}\n", size=12, weight="bold")
    axes.text(0.5, 1 + 0.1 / side, interval, transform=axes.transAxes, ha="center", size=9)
    _save(figure, file, study)


def _describe_accuracy(evaluation: Evaluation) -> tuple[str, str]:
    """Return a title and a line with the interval; with both accuracies if the classes differ in size."""
    low, high = evaluation.interval
    interval = f"95% confidence interval {low:.2%} to {high:.2%}"
    if is_unequal([row["support"] for row in evaluation.per_class]):
        low, high = evaluation.balanced_interval
        interval = f"95% CI {interval.removeprefix('95% confidence interval ')}; balanced accuracy "
        interval += f"{evaluation.balanced_accuracy:.2%}, 95% CI {low:.2%} to {high:.2%}"
    return f"test accuracy {evaluation.accuracy:.2%}", interval


def _list_confusions(axes: "Axes", evaluation: Evaluation, names: Sequence[str]) -> None:
    confusions = find_confusions(evaluation.confusion_matrix, _N_LISTED)
    n_of = [row["support"] for row in evaluation.per_class]
    lines = [f"{n:,} of {n_of[i]:,}  {names[i]} \N{RIGHTWARDS ARROW} {names[j]}" for n, i, j in confusions]
    axes.set_axis_off()
    axes.text(0, 1, "most frequent confusions" if lines else "no errors", va="top", size=9, weight="bold")
    axes.text(0, 0.965, "\n".join(lines), va="top", size=7, linespacing=1.5)


def draw_calibration(evaluation: Evaluation, file: Path, study: str = "") -> None:
    """Plot the reliability diagram: each bin's accuracy with its 95% confidence interval, and its number of images.

    A bin of fewer than 10 images has a hollow point and no interval: it would be as wide as the diagram.
    """
    bins = evaluation.calibration["bins"]
    confidence, accuracy, counts = (np.array([row[key] for row in bins]) for key in ("confidence", "accuracy", "n"))
    centers = (bin_of(confidence) + 0.5) / N_BINS
    intervals = np.array([wilson_interval(row["accuracy"], row["n"]) for row in bins]).T
    figure = _new_figure(6, 6.4)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3.2, 1])
    upper.plot([0, 1], [0, 1], color=FAINT, linestyle="--", linewidth=1, label="perfect calibration")
    upper.bar(centers, accuracy, width=0.94 / N_BINS, color=RIGHT, alpha=0.25)
    whiskers, is_small = np.abs(intervals - accuracy), counts < _N_FOR_INTERVAL
    points = {"fmt": "o", "color": RIGHT, "markersize": 5, "linewidth": 1.2, "capsize": 2.5, "clip_on": False}
    large = ~is_small
    if large.any():
        upper.errorbar(confidence[large], accuracy[large], whiskers[:, large], label="accuracy (95% CI)", **points)
    if is_small.any():
        few = {"s": 25, "facecolor": "white", "edgecolor": RIGHT, "linewidth": 1.2, "clip_on": False, "zorder": 3}
        upper.scatter(confidence[is_small], accuracy[is_small], label=f"fewer than {_N_FOR_INTERVAL} images", **few)
    upper.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="accuracy")
    upper.set_title(f"expected calibration error {evaluation.calibration['error']:.4f}", size=12, weight="bold")
    upper.legend(loc="upper left", frameon=False)
    lower.bar(centers, counts, width=0.94 / N_BINS, color=RIGHT)
    for center, count in zip(centers, counts, strict=True):
        lower.annotate(f"{count:,}", (center, count), (0, 2), textcoords="offset points", ha="center", size=7)
    lower.set(yscale="log", ylim=(0.7, counts.max() * 5), xlabel="confidence (top probability)", ylabel="images")
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, file, study)


@_with_plain_text
def draw_mistakes(
    evaluation: Evaluation, images: ArrayLike, file: Path, study: str = "", *, is_photo: bool = False
) -> None:
    """Plot the most confident errors, each with true class, predicted class and probability.

    `images` are the evaluated raw pixels, shape (N, C, H, W).
    """
    mistakes, pixels = evaluation.mistakes, np.asarray(images)
    names = [row["name"] for row in evaluation.per_class]
    labels = dict(zip(names, _label(names), strict=True))
    longest = max((len(labels[row[key]]) for row in mistakes for key in ("true", "predicted")), default=0)
    longest = max(longest, min(max(map(len, names)), 4))
    arrow = " \N{RIGHTWARDS ARROW} " if longest <= 4 else " \N{RIGHTWARDS ARROW}\n"
    width, height = (1.0, 1.4) if longest <= 4 else (max(1.2, 0.08 * longest + 0.35), 1.65)
    n_columns = max(1, min(N_COLUMNS, int(_WIDEST / width), len(mistakes)))
    n_rows = -(-len(mistakes) // n_columns)
    figure = _new_figure(max(n_columns * width + 0.3, 5.5), n_rows * height + 0.9)
    figure.suptitle(_title_of(evaluation), size=11, weight="bold")
    grid = figure.subplots(max(n_rows, 1), n_columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, mistake in zip(grid.flat, mistakes, strict=False):
        axes.set_title(f"{labels[mistake['true']]}{arrow}{labels[mistake['predicted']]}", size=9, pad=3)
        _draw_image(axes, pixels[mistake["index"]], f"{mistake['probability']:.1%}", is_photo=is_photo)
    _save(figure, file, study)


def _title_of(evaluation: Evaluation) -> str:
    n_images = int(np.sum(evaluation.confusion_matrix))
    n_errors = n_images - int(np.trace(evaluation.confusion_matrix))
    if not n_errors:
        return f"no errors on {n_images:,} test images"
    n_shown = len(evaluation.mistakes)
    which = f"{n_shown} most confident of {n_errors:,} errors" if n_shown < n_errors else f"all {n_errors:,} errors"
    return f"{which} (out of {n_images:,} images)\ntrue \N{RIGHTWARDS ARROW} predicted, probability"


def _draw_image(axes: "Axes", pixels: NDArray[np.uint8], label: str, *, is_photo: bool) -> None:
    """Draw an image of shape (C, H, W): in color if it has three channels, else the mean of its channels."""
    axes.set_axis_on()
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color("#d5d8dc")
    if len(pixels) == 3:
        axes.imshow(pixels.transpose(1, 2, 0))
    else:
        axes.imshow(pixels.mean(axis=0), cmap="gray" if is_photo else "gray_r", vmin=0, vmax=255)
    axes.set_xlabel(label, size=8, color=WRONG, labelpad=2)


def _label(names: Sequence[str]) -> list[str]:
    """Return the names as the font can show them, at most 24 characters each: others have the number of their class."""
    from matplotlib import font_manager

    known = font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap()
    labels = []
    for i, name in enumerate(names):
        text = " ".join("".join(c for c in name if ord(c) in known).split())
        if len(text) > _LONGEST_NAME:
            text = f"{text[: _LONGEST_NAME - 1]}\N{HORIZONTAL ELLIPSIS}"
        labels.append(text if text == name else f"[{i}] {text}".strip())
    return labels


def _draw_grid(axes: "Axes", n: int) -> None:
    edges = np.arange(n + 1) - 0.5
    axes.set_xticks(edges, minor=True)
    axes.set_yticks(edges, minor=True)
    axes.grid(which="minor", color="#e4e6e9", linewidth=0.8)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)


def _new_figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))


def _save(figure: "Figure", file: Path, study: str) -> None:
    metadata = {_KEY: study}
    figure.savefig(file, dpi=120, facecolor="white", transparent=False, format="png", metadata=metadata)


def _is_plot(file: Path, study: str) -> bool:
    try:
        with Image.open(file, formats=("PNG",)) as image:
            return bool(image.info.get(_KEY) == study)
    except OSError:
        return False
