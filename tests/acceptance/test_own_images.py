"""A folder of the user's own images goes from `init` to a report, with the real command line."""

import json
from pathlib import Path

import numpy as np
import pytest

import hpsearch as package
from hpsearch.training.run import open_data_set

from ..shapes import draw_shape, write_shapes
from .commands import hpsearch

SHORT = {"trials  = 30": 2, "epochs  = 100": 2, "epochs   = 200": 2, "depth        = 6": 4}


@pytest.mark.timeout(600)
def test_images_go_from_init_to_a_report_and_predict_treats_a_file_as_training_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_shapes(tmp_path / "shapes", 120, size=32, n_copies=4, n_broken=2)
    assert "unreadable  2: " in hpsearch("init", "--images", "shapes", cwd=tmp_path).stdout
    file = tmp_path / "shapes.toml"
    text = file.read_text()
    for key, number in SHORT.items():
        assert text.count(key) == 1, key
        text = text.replace(key, f"{key.partition('=')[0]}= {number}")
    file.write_text(text)
    hpsearch("run", "shapes", "--workers", 2, cwd=tmp_path)
    hpsearch("confirm", "shapes", "--top", 2, "--seeds", 2, cwd=tmp_path)
    hpsearch("export", "shapes", "--onnx", cwd=tmp_path)

    new = tmp_path / "new.png"
    draw_shape("ring", np.random.default_rng(7), 100).save(new)
    [found] = json.loads(hpsearch("predict", "models/shapes", new, "--json", cwd=tmp_path).stdout)
    assert {each["class"] for each in found["top"]} <= {folder.name for folder in (tmp_path / "shapes").iterdir()}

    classifier = package.load(tmp_path / "models" / "shapes")
    images = open_data_set(package.load_definition(file))
    assert images.inventory is not None
    names = [name for name, side in zip(images.inventory.names, images.inventory.sides, strict=True) if side != "test"]
    expected = classifier.predict_proba(images.read(is_train=True)[0])
    shown = hpsearch("predict", "models/shapes", *[f"shapes/{name}" for name in names], "--json", cwd=tmp_path).stdout
    predictions = json.loads(shown)
    assert [each["image"] for each in predictions] == [f"shapes/{name}" for name in names]
    best = [each["top"][0] for each in predictions]
    assert [each["class"] for each in best] == [classifier.class_names[label] for label in expected.argmax(axis=1)]
    np.testing.assert_allclose([each["probability"] for each in best], expected.max(axis=1), atol=1e-6)

    hpsearch("report", "shapes", cwd=tmp_path)
    assert "ring" in (tmp_path / "shapes-report.html").read_text()
