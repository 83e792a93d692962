"""Evaluate predictions: accuracy, confusion matrix, per-class metrics, calibration and the most confident errors."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

N_BINS = 15  # calibration bins, as in Guo et al.
N_MISTAKES = 40
_NORMAL_QUANTILE = 1.959963984540054  # of 97.5%


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a set of predictions.

    `interval` is the 95% confidence interval [low, high] of the accuracy. `confusion_matrix[i][j]` counts images of
    class i predicted as class j. `per_class` has a row for each class: name, precision, recall, f1 and support (number
    of images). `calibration` has the expected calibration error and the non-empty bins: mean confidence, accuracy and
    n. `mistakes` are the most confident errors, at most 40, in descending order: index of the image, true class,
    predicted class and probability.
    """

    accuracy: float
    interval: list[float]
    confusion_matrix: list[list[int]]
    per_class: list[dict[str, Any]]
    calibration: dict[str, Any]
    mistakes: list[dict[str, Any]]


def evaluate(probabilities: NDArray[np.float32], labels: NDArray[np.int64], class_names: Sequence[str]) -> Evaluation:
    """Evaluate probabilities of shape (N, classes) against labels of shape (N,)."""
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    predicted, confidences = probabilities.argmax(axis=1), probabilities.max(axis=1).astype(np.float64)
    is_right = predicted == labels
    classes = range(len(class_names))
    rows = zip(*precision_recall_fscore_support(labels, predicted, labels=classes, zero_division=0), strict=True)
    wrong = np.flatnonzero(~is_right)
    worst = wrong[np.argsort(-confidences[wrong], kind="stable")][:N_MISTAKES]
    return Evaluation(
        accuracy=int(is_right.sum()) / len(labels),
        interval=wilson_interval(float(is_right.mean()), len(labels)),
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


def wilson_interval(share: float, n: float, quantile: float = _NORMAL_QUANTILE) -> list[float]:
    """Return the 95% confidence interval [low, high] of a share of n (Wilson 1927, https://doi.org/10.2307/2276774)."""
    shrunk = 1 / (1 + quantile**2 / n)
    center = shrunk * (share + quantile**2 / (2 * n))
    margin = shrunk * quantile * math.sqrt(share * (1 - share) / n + quantile**2 / (4 * n**2))
    return [max(center - margin, 0.0), min(center + margin, 1.0)]


def mean_interval(accuracies: Sequence[float], n_images: int) -> list[float]:
    """Return the 95% confidence interval of the mean accuracy p of m > 1 seeds on the same n images, never of no width.

    It is of the accuracy on new images after a training with a new seed. By the law of total variance, p has at most
    the variance v = p (1 - p) / n + s^2 / m, where s is the standard deviation over the seeds. The interval is Wilson's
    for as many independent images as have that variance, n' = p (1 - p) / v (Korn and Graubard 1998, Survey Methodology
    24), with the quantile of Student's t for the degrees of freedom of v (Satterthwaite 1946,
    https://doi.org/10.2307/3002019). If all seeds are equal, it is that of one network.
    """
    from scipy.stats import t

    if len(set(accuracies)) == 1:
        return wilson_interval(accuracies[0], n_images)
    mean, n_seeds = float(np.mean(accuracies)), len(accuracies)
    of_seeds = float(np.var(accuracies, ddof=1)) / n_seeds
    total = mean * (1 - mean) / n_images + of_seeds
    freedom = (n_seeds - 1) * (total / of_seeds) ** 2  # infinitely many of the images
    return wilson_interval(mean, mean * (1 - mean) / total, float(t.ppf(0.975, freedom)))


def calibrate(confidences: NDArray[np.float64], is_right: NDArray[np.bool_]) -> dict[str, Any]:
    """Return the expected calibration error and the non-empty bins; both arguments have shape (N,).

    The error is the mean of |accuracy - confidence| over bins of equal width, weighted by their number of images
    (Naeini et al. 2015; Guo et al. 2017, https://arxiv.org/abs/1706.04599).
    """
    indices = bin_of(confidences)
    bins = [
        {"confidence": float(confidences[chosen].mean()), "accuracy": float(is_right[chosen].mean()), "n": len(chosen)}
        for chosen in (np.flatnonzero(indices == i) for i in np.unique(indices))
    ]
    gaps = (row["n"] * abs(row["accuracy"] - row["confidence"]) for row in bins)
    return {"error": sum(gaps) / len(confidences), "bins": bins}


def bin_of(confidences: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the bin index of each confidence; bin i covers (i / 15, (i + 1) / 15]."""
    bins: NDArray[np.int64] = np.clip(np.ceil(confidences * N_BINS) - 1, 0, N_BINS - 1).astype(np.int64)
    return bins
