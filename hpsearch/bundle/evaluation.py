"""How good predictions are: accuracy, confusion matrix, per-class figures, calibration and the worst mistakes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

N_BINS = 15  # of the calibration, as in Guo et al.
N_MISTAKES = 40


@dataclass(frozen=True)
class Evaluation:
    """Figures of a set of predictions.

    `interval` is the 95% interval [low, high] of the accuracy. `confusion_matrix[i][j]` counts the images of class i
    that were taken for class j. `per_class` has a row for each class: name, precision, recall, f1 and support (its
    number of images). `calibration` has the expected calibration error and the bins that hold images: their mean
    confidence, accuracy and n. `mistakes` are the most confident wrong predictions, at most 40, the worst first: index
    (the image's row in the set), true, predicted and probability.
    """

    accuracy: float
    interval: list[float]
    confusion_matrix: list[list[int]]
    per_class: list[dict[str, Any]]
    calibration: dict[str, Any]
    mistakes: list[dict[str, Any]]


def evaluate(probabilities: NDArray[np.float32], labels: NDArray[np.int64], class_names: Sequence[str]) -> Evaluation:
    """The figures of probabilities (N, classes) against labels (N,)."""
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    predicted, confidences = probabilities.argmax(axis=1), probabilities.max(axis=1).astype(np.float64)
    is_right = predicted == labels
    classes = range(len(class_names))
    rows = zip(*precision_recall_fscore_support(labels, predicted, labels=classes, zero_division=0), strict=True)
    wrong = np.flatnonzero(~is_right)
    worst = wrong[np.argsort(-confidences[wrong], kind="stable")][:N_MISTAKES]
    return Evaluation(
        accuracy=int(is_right.sum()) / len(labels),
        interval=wilson_interval(int(is_right.sum()), len(labels)),
        confusion_matrix=confusion_matrix(labels, predicted, labels=classes).tolist(),
        per_class=[
            {"name": name, "precision": float(p), "recall": float(r), "f1": float(f), "support": int(n)}
            for name, (p, r, f, n) in zip(class_names, rows, strict=True)
        ],
        calibration=calibrate(confidences, is_right),
        mistakes=[
            {
                "index": int(i),
                "true": class_names[labels[i]],
                "predicted": class_names[predicted[i]],
                "probability": float(confidences[i]),
            }
            for i in worst
        ],
    )


def wilson_interval(n_right: int, n: int) -> list[float]:
    """The 95% interval [low, high] of a share (Wilson 1927, https://doi.org/10.2307/2276774)."""
    from scipy.stats import binomtest

    interval = binomtest(n_right, n).proportion_ci(0.95, method="wilson")
    return [float(interval.low), float(interval.high)]


def calibrate(confidences: NDArray[np.float64], is_right: NDArray[np.bool_]) -> dict[str, Any]:
    """The expected calibration error, and the bins that hold images.

    The error is the mean, weighted by images, of |accuracy - confidence| in bins of equal width (Naeini et al. 2015;
    Guo et al. 2017, https://arxiv.org/abs/1706.04599). Both arguments have shape (N,).
    """
    places = bin_of(confidences)
    bins = [
        {"confidence": float(confidences[chosen].mean()), "accuracy": float(is_right[chosen].mean()), "n": len(chosen)}
        for chosen in (np.flatnonzero(places == i) for i in np.unique(places))
    ]
    gaps = (row["n"] * abs(row["accuracy"] - row["confidence"]) for row in bins)
    return {"error": sum(gaps) / len(confidences), "bins": bins}


def bin_of(confidences: NDArray[np.float64]) -> NDArray[np.int64]:
    """The bin of each confidence; bin i holds those in (i / 15, (i + 1) / 15]."""
    bins: NDArray[np.int64] = np.clip(np.ceil(confidences * N_BINS) - 1, 0, N_BINS - 1).astype(np.int64)
    return bins
