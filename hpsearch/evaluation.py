"""How good predictions are: accuracy, confusion matrix, per-class figures, and the matrix as a picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Evaluation:
    """Figures of a set of predictions.

    `confusion_matrix[i][j]` counts the images of class i that were taken for class j. `per_class` has a row for each
    class: name, precision, recall, f1 and support (its number of images).
    """

    accuracy: float
    confusion_matrix: list[list[int]]
    per_class: list[dict[str, Any]]


def evaluate(probabilities: NDArray[np.float32], labels: NDArray[np.int64], class_names: Sequence[str]) -> Evaluation:
    """The figures of probabilities (N, classes) against labels (N,)."""
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    predicted = probabilities.argmax(axis=1)
    classes = range(len(class_names))
    rows = zip(*precision_recall_fscore_support(labels, predicted, labels=classes, zero_division=0), strict=True)
    return Evaluation(
        accuracy=int((predicted == labels).sum()) / len(labels),
        confusion_matrix=confusion_matrix(labels, predicted, labels=classes).tolist(),
        per_class=[
            {"name": name, "precision": float(p), "recall": float(r), "f1": float(f), "support": int(n)}
            for name, (p, r, f, n) in zip(class_names, rows, strict=True)
        ],
    )


def draw_confusion_matrix(evaluation: Evaluation, file: Path) -> None:
    """Write the confusion matrix as a picture; the shade of a cell is its share of the true class, log scaled."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    counts = np.array(evaluation.confusion_matrix)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    names = [row["name"] for row in evaluation.per_class]
    size = 2 + 0.55 * len(names)
    figure = Figure(figsize=(size, size), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(np.maximum(shares, 1e-4), cmap="Blues", norm=LogNorm(1e-4, 1))
    turn = 0 if max(map(len, names)) <= 2 else 45
    axes.set_xticks(range(len(names)), names, rotation=turn, ha="right" if turn else "center")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted", ylabel="true", title=f"test accuracy {evaluation.accuracy:.2%}")
    for (i, j), count in np.ndenumerate(counts):
        if count:
            axes.text(j, i, str(count), ha="center", va="center", color="white" if shares[i, j] > 0.05 else "black")
    figure.savefig(file, dpi=120)
