"""Accuracy, confusion matrix and per-class figures."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpsearch.evaluation import draw_confusion_matrix, evaluate


def probabilities_for(predicted: list[int], n_classes: int) -> np.ndarray:
    return np.eye(n_classes, dtype=np.float32)[predicted]


def test_figures_agree_with_a_count_by_hand() -> None:
    evaluation = evaluate(probabilities_for([0, 0, 1, 1, 1, 2], 3), np.array([0, 1, 1, 1, 2, 2]), ["a", "b", "c"])
    assert evaluation.accuracy == pytest.approx(4 / 6)
    assert evaluation.confusion_matrix == [[1, 0, 0], [1, 2, 0], [0, 1, 1]]
    b = evaluation.per_class[1]
    assert (b["name"], b["support"]) == ("b", 3)
    assert (b["precision"], b["recall"]) == (pytest.approx(2 / 3), pytest.approx(2 / 3))


def test_a_class_without_images_or_predictions_counts_as_zero() -> None:
    evaluation = evaluate(probabilities_for([0, 1], 3), np.array([0, 1]), ["a", "b", "c"])
    assert evaluation.per_class[2] == {"name": "c", "precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}


def test_the_confusion_matrix_is_drawn_for_long_and_short_names(tmp_path: Path) -> None:
    for names in (["0", "1"], ["T-shirt/top", "Ankle boot"]):
        file = tmp_path / "matrix.png"
        draw_confusion_matrix(evaluate(probabilities_for([0, 1], 2), np.array([0, 1]), names), file)
        with Image.open(file) as picture:
            assert min(picture.size) > 200
            assert len(set(picture.convert("L").tobytes())) > 10
