"""Accuracy and balanced accuracy, from the number of images of each class that a network classifies correctly."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hpsearch.config.definition import Metric

NORMAL_QUANTILE = 1.959963984540054  # of 97.5%


@dataclass(frozen=True)
class Score:
    """The numbers of images of each class, and how many of them are classified correctly."""

    correct: Sequence[int]
    n_images: Sequence[int]

    @property
    def accuracy(self) -> float:
        """The share of correct images, in [0, 1]."""
        return sum(self.correct) / sum(self.n_images)

    @property
    def balanced_accuracy(self) -> float:
        """The mean of the recalls of the classes that occur, in [0, 1]: that of scikit-learn."""
        recalls = [correct / n for correct, n in zip(self.correct, self.n_images, strict=True) if n]
        return sum(recalls) / len(recalls)

    def of(self, metric: Metric) -> float:
        return self.accuracy if metric == "accuracy" else self.balanced_accuracy


def balanced_interval(scores: Sequence[Score]) -> list[float]:
    """Return the 95% confidence interval [low, high] of the balanced accuracy, or of its mean over several seeds.

    The scores are of networks that were trained with different seeds, on the same images. The balanced accuracy is a
    linear function of the K classes' recalls, each of which is a binomial proportion, so its variance is the sum of
    p (1 - p) / n over the classes, divided by K^2. As in Wilson's interval, proportions are shrunk, so that a class of
    few images, all of them correct, is not taken as certain: 2 / K correct and 2 / K wrong images are added to each
    class (Price and Bonett 2004, Computational Statistics & Data Analysis 45, 449-456). The variance of the mean over
    seeds is added, with the quantile of Student's t for the degrees of freedom of the sum (Satterthwaite 1946,
    https://doi.org/10.2307/3002019).
    """
    from scipy.stats import t

    n_images = np.array(scores[0].n_images)
    n, n_classes = n_images[n_images > 0], np.count_nonzero(n_images)
    correct = np.mean([score.correct for score in scores], axis=0)[n_images > 0]
    shares = (correct + 2 / n_classes) / (n + 4 / n_classes)
    values, quantile = [score.balanced_accuracy for score in scores], NORMAL_QUANTILE
    variance = float((shares * (1 - shares) / (n + 4 / n_classes)).sum()) / n_classes**2
    if len(set(values)) > 1:
        of_seeds = float(np.var(values, ddof=1)) / len(values)
        variance += of_seeds
        quantile = float(t.ppf(0.975, (len(values) - 1) * (variance / of_seeds) ** 2))
    mean, center, margin = float(np.mean(values)), float(shares.mean()), quantile * math.sqrt(variance)
    return [max(min(center - margin, mean), 0.0), min(max(center + margin, mean), 1.0)]
