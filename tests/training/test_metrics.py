"""Balanced accuracy is that of scikit-learn, and its interval covers, for rare and for many classes."""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from hpsearch.training.metrics import Score, balanced_interval


def test_balanced_accuracy_is_that_of_scikit_learn_over_the_classes_that_occur() -> None:
    rng = np.random.default_rng(0)
    labels, predicted = rng.choice([0, 1, 2, 4], 200), rng.choice([0, 1, 2, 4], 200)
    n_images = np.bincount(labels, minlength=5)
    score = Score(np.bincount(labels[labels == predicted], minlength=5).tolist(), n_images.tolist())
    assert score.balanced_accuracy == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert score.accuracy == (labels == predicted).mean()


@pytest.mark.parametrize(
    ("recalls", "n_images", "widest"),
    [
        ([0.99, 0.6], [2000, 5], 0.4),
        ([0.99, 0.98], [2000, 5], 0.22),
        ([0.95, 0.9, 0.5], [300, 40, 20], 0.16),
        ([0.97] * 200, [5] * 200, 0.025),
        ([0.999] * 200, [5] * 200, 0.007),
        ([0.9] * 10, [500] * 10, 0.018),
    ],
)
def test_the_interval_covers_the_balanced_accuracy_also_of_rare_and_of_many_classes(
    recalls: list[float], n_images: list[int], widest: float
) -> None:
    draws = np.random.default_rng(0).binomial(n_images, recalls, (1000, len(recalls)))
    low, high = np.transpose([balanced_interval([Score(correct.tolist(), n_images)]) for correct in draws])
    assert ((low <= np.mean(recalls)) & (np.mean(recalls) <= high)).mean() > 0.93
    assert (high - low).mean() < widest


def test_the_interval_of_a_mean_over_seeds_is_wider_the_more_the_seeds_differ() -> None:
    n_images, widths = [200, 50], []
    for spread in (0, 2, 8):
        scores = [Score([180, 40 + i * spread], n_images) for i in (-1, 0, 1)]
        low, high = balanced_interval(scores)
        assert low < np.mean([score.balanced_accuracy for score in scores]) < high
        widths.append(high - low)
    assert widths[0] < widths[1] < widths[2]
    assert balanced_interval([Score([200, 50], n_images)] * 3)[1] == 1.0
    assert balanced_interval([Score([0, 0], n_images)])[0] == 0.0
