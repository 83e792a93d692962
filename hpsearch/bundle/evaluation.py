"""Evaluate predictions: accuracies, confusion matrix, per-class metrics, calibration and the most confident errors."""

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hpsearch.training.metrics import NORMAL_QUANTILE, Score, balanced_interval

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

N_BINS = 15  # calibration bins, as in Guo et al.
N_MISTAKES = 40
_UNEQUAL = 1.5  # times as many images in the largest class as in the smallest one


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a set of predictions.

    `interval` is the 95% confidence interval [low, high] of the accuracy, and `balanced_interval` that of the balanced
    accuracy, the mean of the recalls of the classes that occur. `confusion_matrix[i][j]` counts images of class i
    predicted as class j. `per_class` has a row for each class: name, precision, recall, f1 and support (number of
    images); recall and f1 are None without images, and so is the precision if nothing is predicted as the class.
    `calibration` has the expected calibration error and the non-empty bins: mean confidence, accuracy and n. `mistakes`
    are the most confident errors, at most 40, in descending order: index of the image, true class, predicted class and
    probability.
    """

    accuracy: float
    interval: list[float]
    balanced_accuracy: float
    balanced_interval: list[float]
    confusion_matrix: list[list[int]]
    per_class: list[dict[str, Any]]
    calibration: dict[str, Any]
    mistakes: list[dict[str, Any]]


def evaluate(probabilities: NDArray[np.float32], labels: NDArray[np.int64], class_names: Sequence[str]) -> Evaluation:
    """Evaluate probabilities of shape (N, classes) against labels of shape (N,)."""
    from sklearn.metrics import confusion_matrix

    predicted, confidences = probabilities.argmax(axis=1), probabilities.max(axis=1).astype(np.float64)
    is_right = predicted == labels
    classes = range(len(class_names))
    matrix = confusion_matrix(labels, predicted, labels=classes)
    score = Score(matrix.diagonal().tolist(), matrix.sum(axis=1).tolist())
    wrong = np.flatnonzero(~is_right)
    worst = wrong[np.argsort(-confidences[wrong], kind="stable")][:N_MISTAKES]
    return Evaluation(
        accuracy=int(is_right.sum()) / len(labels),
        interval=wilson_interval(float(is_right.mean()), len(labels)),
        balanced_accuracy=score.balanced_accuracy,
        balanced_interval=balanced_interval([score]),
        confusion_matrix=matrix.tolist(),
        per_class=describe_classes(matrix, class_names),
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


def describe_classes(matrix: NDArray[np.int64], class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the rows `per_class` of an `Evaluation` with that confusion matrix."""
    rows = []
    for name, n_correct, n, n_predicted in zip(
        class_names, matrix.diagonal().tolist(), matrix.sum(axis=1).tolist(), matrix.sum(axis=0).tolist(), strict=True
    ):
        recall = n_correct / n if n else None
        precision = n_correct / n_predicted if n_predicted else 0.0 if n else None
        f1 = 2 * n_correct / (n + n_predicted) if n else None
        rows.append({"name": name, "precision": precision, "recall": recall, "f1": f1, "support": n})
    return rows


def find_worst(per_class: Sequence[Mapping[str, Any]], n: int) -> list[Mapping[str, Any]]:
    """Return the `n` classes with the lowest recall, the lowest first, of those that have images."""
    return sorted((row for row in per_class if row["support"]), key=lambda row: row["recall"])[:n]


def find_confusions(matrix: Sequence[Sequence[int]], n: int) -> list[tuple[int, int, int]]:
    """Return the `n` most frequent confusions, the most frequent first: images, and indices of the classes."""
    confusions = [(k, i, j) for i, row in enumerate(matrix) for j, k in enumerate(row) if k and i != j]
    return heapq.nlargest(n, confusions, key=lambda confusion: confusion[0])


def is_unequal(n_images: Sequence[int]) -> bool:
    """Return whether the classes that occur differ so much in size that accuracy and balanced accuracy may differ."""
    sizes = [n for n in n_images if n]
    return max(sizes) >= _UNEQUAL * min(sizes)


def trial_interval(trial: "FrozenTrial", n_images: int) -> list[float]:
    """Return the 95% confidence interval of the value of a complete trial, measured on `n_images`.

    Trials of a study of the balanced accuracy, for which the sizes of the classes count, have it as an attribute.
    """
    interval: list[float] | None = trial.user_attrs.get("interval")
    return interval or wilson_interval(trial.value or 0.0, n_images)


def candidate_interval(candidate: Mapping[str, Any], n_images: int) -> list[float]:
    """Return the 95% confidence interval of a mean of `confirm`; the stored one of older versions is too narrow."""
    interval: list[float] = candidate["interval"]
    return interval if "balanced_accuracies" in candidate else mean_interval(candidate["accuracies"], n_images)


def wilson_interval(share: float, n: float, quantile: float = NORMAL_QUANTILE) -> list[float]:
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
