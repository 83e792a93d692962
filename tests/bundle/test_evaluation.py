"""Accuracy and its interval, confusion matrix, per-class figures, calibration and the worst mistakes."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpsearch.bundle.evaluation import N_MISTAKES, evaluate, mean_interval, wilson_interval


def probabilities_for(predicted: list[int], n_classes: int) -> np.ndarray:
    return np.eye(n_classes, dtype=np.float32)[predicted]


def two_classes(confidences: list[float]) -> np.ndarray:
    """Probabilities of two classes, the first of which is predicted with these confidences."""
    first = np.array(confidences, dtype=np.float32)
    return np.stack([first, 1 - first], axis=1)


def test_figures_agree_with_a_count_by_hand() -> None:
    evaluation = evaluate(probabilities_for([0, 0, 1, 1, 1, 2], 3), np.array([0, 1, 1, 1, 2, 2]), ["a", "b", "c"])
    assert evaluation.accuracy == pytest.approx(4 / 6)
    assert evaluation.confusion_matrix == [[1, 0, 0], [1, 2, 0], [0, 1, 1]]
    b = evaluation.per_class[1]
    assert (b["name"], b["support"]) == ("b", 3)
    assert (b["precision"], b["recall"]) == (pytest.approx(2 / 3), pytest.approx(2 / 3))


def test_a_class_without_images_has_no_recall_and_is_not_in_the_balanced_accuracy() -> None:
    evaluation = evaluate(probabilities_for([0, 1, 1], 3), np.array([0, 1, 0]), ["a", "b", "c"])
    assert evaluation.per_class[2] == {"name": "c", "precision": None, "recall": None, "f1": None, "support": 0}
    assert evaluation.balanced_accuracy == 0.75
    never = evaluate(probabilities_for([0, 2, 0], 3), np.array([0, 1, 0]), ["a", "b", "c"]).per_class
    assert [row["precision"] for row in never] == [1.0, 0.0, 0.0]
    assert [row["recall"] for row in never] == [1.0, 0.0, None]


@settings(deadline=None)
@given(n=st.integers(1, 20_000), share=st.floats(0, 1))
def test_the_interval_is_wilsons_formula(n: int, share: float) -> None:
    n_right = round(share * n)
    p, z = n_right / n, 1.959963984540054
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert wilson_interval(n_right / n, n) == pytest.approx([max(centre - half, 0), min(centre + half, 1)], abs=1e-9)


def test_the_interval_of_equal_seeds_is_that_of_one_network() -> None:
    for accuracy in (0.0, 281 / 287, 1.0):
        assert mean_interval([accuracy] * 3, 287) == wilson_interval(accuracy, 287)
    low, high = mean_interval([281 / 287] * 3, 287)
    assert (low, high) == pytest.approx((0.9551, 0.9904), abs=1e-4)


def test_the_interval_of_a_mean_is_students_where_the_images_are_many() -> None:
    low, high = mean_interval([0.50, 0.52, 0.54], 10_000_000)
    assert (low, high) == pytest.approx((0.52 - 0.0497, 0.52 + 0.0497), abs=1e-3)  # 4.303 * 0.02 / sqrt(3)


def test_the_interval_of_a_mean_covers_the_accuracy_on_new_images_with_new_seeds() -> None:
    """Networks of which each image has its own chance to be classified correctly, and each seed a skill."""
    generator, n_images, n_seeds, n_covered = np.random.default_rng(0), 300, 3, 0
    easiness = generator.beta(2, 0.1, 100_000)
    truth = np.mean([np.clip(easiness + generator.normal(0, 0.01), 0, 1).mean() for _ in range(30)])
    for _ in range(500):
        images = generator.choice(easiness, n_images)
        skills = generator.normal(0, 0.01, n_seeds)
        is_right = generator.random((n_seeds, n_images)) < images + skills[:, np.newaxis]
        low, high = mean_interval([float(row.mean()) for row in is_right], n_images)
        n_covered += low <= truth <= high
    assert n_covered / 500 > 0.94


def test_the_evaluation_has_the_interval_of_its_accuracy() -> None:
    evaluation = evaluate(probabilities_for([0] * 360, 2), np.array([0] * 353 + [1] * 7), ["a", "b"])
    assert evaluation.interval == pytest.approx([0.9604, 0.9905], abs=1e-4)


def test_the_calibration_error_agrees_with_a_count_by_hand() -> None:
    labels = np.array([0, 0, 1, 0])  # two bins: 0.62 and 0.64, both right; 0.97 and 0.99, one wrong
    calibration = evaluate(two_classes([0.62, 0.64, 0.97, 0.99]), labels, ["a", "b"]).calibration
    assert calibration["bins"] == [
        {"confidence": pytest.approx(0.63), "accuracy": 1.0, "n": 2},
        {"confidence": pytest.approx(0.98), "accuracy": 0.5, "n": 2},
    ]
    assert calibration["error"] == pytest.approx((0.37 + 0.48) / 2)


def test_certain_and_right_predictions_are_calibrated() -> None:
    calibration = evaluate(two_classes([1.0, 1.0, 1.0]), np.zeros(3, dtype=np.int64), ["a", "b"]).calibration
    assert calibration == {"error": 0.0, "bins": [{"confidence": 1.0, "accuracy": 1.0, "n": 3}]}


def test_mistakes_are_the_most_confident_wrong_predictions_the_worst_first() -> None:
    evaluation = evaluate(two_classes([0.6, 0.9, 0.99, 0.8]), np.array([1, 1, 0, 1]), ["cat", "dog"])
    assert [mistake["index"] for mistake in evaluation.mistakes] == [1, 3, 0]
    assert evaluation.mistakes[0] == {
        "index": 1,
        "true": "dog",
        "predicted": "cat",
        "probability": pytest.approx(0.9),
    }


def test_no_more_mistakes_are_told_than_a_gallery_holds() -> None:
    evaluation = evaluate(two_classes([0.7] * 100), np.ones(100, dtype=np.int64), ["a", "b"])
    assert [mistake["index"] for mistake in evaluation.mistakes] == list(range(N_MISTAKES))


def test_all_figures_can_be_written_as_json() -> None:
    evaluation = evaluate(two_classes([0.6, 0.9]), np.array([1, 0]), ["a", "b"])
    assert json.loads(json.dumps(asdict(evaluation))) == asdict(evaluation)
