"""A user's whole way: check, run, status, trials, export, evaluate, predict; and the stock dashboard."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import hpsearch as package
from hpsearch.bundle.formats import FORMATS
from hpsearch.data.dataset import load_test

from .commands import hpsearch

STUDIES = Path(__file__).parents[2] / "studies"
REAL_MNIST = Path(os.environ.get("HPSEARCH_DATA", "/nowhere")) / "MNIST" / "raw"


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the finished digits study and its bundle."""
    folder = tmp_path_factory.mktemp("digits")
    (folder / "studies").mkdir()
    (folder / "studies" / "digits.toml").write_text((STUDIES / "digits.toml").read_text())
    # One worker: with more, what is pruned depends on which trial is quicker.
    run = hpsearch("run", "studies/digits.toml", "--workers", 1, "--json", cwd=folder)
    lines = [line for line in run.stderr.splitlines() if line.startswith("trial ")]
    assert len(lines) == 30
    assert any(" complete 0.9" in line for line in lines)
    assert any(" pruned " in line and " epoch " in line for line in lines)
    assert (
        json.loads(run.stdout)["trials"]
        == json.loads(hpsearch("status", "digits", "--json", cwd=folder).stdout)["trials"]
    )
    hpsearch("confirm", "digits", "--top", 2, "--seeds", 2, cwd=folder)
    hpsearch("export", "digits", "--onnx", cwd=folder)
    return folder


def test_the_search_spends_its_budget_and_prunes(searched: Path) -> None:
    status = json.loads(hpsearch("status", "studies/digits.toml", "--json", cwd=searched).stdout)
    trials = status["trials"]
    assert trials["complete"] + trials["pruned"] == 30
    assert trials["pruned"] >= 10
    assert trials["running"] == trials["failed"] == trials["waiting"] == 0
    assert status["best"]["value"] > 0.95
    assert status["epochs"]["run"] + status["epochs"]["saved"] == 30 * 15
    text = hpsearch("status", "digits", cwd=searched).stdout
    assert f"{status['best']['value']:.4f}" in text


def test_the_trials_are_listed_the_best_first(searched: Path) -> None:
    rows = json.loads(hpsearch("trials", "digits", "--sort", "value", "--limit", 5, "--json", cwd=searched).stdout)
    values = [row["value"] for row in rows if row["state"] == "complete"]
    assert len(rows) == 5
    assert values == sorted(values, reverse=True)
    table = hpsearch("trials", "digits", "--sort", "value", "--limit", 5, cwd=searched).stdout
    assert f"{values[0]:.4f}" in table.splitlines()[2]


def test_a_finished_study_is_not_run_again(searched: Path) -> None:
    run = hpsearch("run", "digits", "--workers", 1, cwd=searched)
    assert "all 30 trials are finished" in run.stderr
    assert not [line for line in run.stderr.splitlines() if line.startswith("trial ")]


def test_the_confirmed_winner_is_exported(searched: Path) -> None:
    confirm = hpsearch("confirm", "digits", "--top", 2, "--seeds", 2, "--json", cwd=searched)
    assert ", run " not in confirm.stderr, "stored runs were repeated"
    confirmation = json.loads(confirm.stdout)
    metrics = json.loads((searched / "models" / "digits" / "metrics.json").read_text())
    assert metrics["trial"] == confirmation["winner"]
    assert metrics["confirmed"]["accuracies"] in [each["accuracies"] for each in confirmation["candidates"]]
    assert [*metrics["verified"]] == ["model.safetensors", "model.pt", "model.onnx"]
    text = hpsearch("confirm", "digits", "--top", 2, "--seeds", 2, cwd=searched).stdout
    assert f"trial {confirmation['winner']}, mean accuracy" in text
    assert f"selection bias: {confirmation['optimism']:+.4f}" in text


def test_trials_of_the_search_can_be_replayed(searched: Path) -> None:
    for state in ("complete", "pruned"):
        [row] = json.loads(hpsearch("trials", "digits", "--state", state, "--limit", 1, "--json", cwd=searched).stdout)
        replayed = hpsearch("trials", "digits", row["number"], "--replay", cwd=searched)
        assert f"trial {row['number']}: reproduced exactly, all {row['epoch']} epochs identical" in replayed.stdout
        assert replayed.stderr.count("epoch ") == row["epoch"]
    assert "has no trial 99" in hpsearch("trials", "digits", 99, "--replay", cwd=searched, expect=2).stderr


def test_the_exported_model_is_good_and_says_how_good(searched: Path) -> None:
    metrics = json.loads((searched / "models" / "digits" / "metrics.json").read_text())
    evaluated = json.loads(hpsearch("evaluate", "models/digits", "--json", cwd=searched).stdout)
    assert metrics["test_accuracy"] == evaluated["accuracy"] > 0.95
    assert metrics["confusion_matrix"] == evaluated["confusion_matrix"]
    assert np.trace(np.array(evaluated["confusion_matrix"])) / 360 == pytest.approx(evaluated["accuracy"])
    assert f"test accuracy {evaluated['accuracy']:.4f}" in hpsearch("evaluate", "models/digits", cwd=searched).stdout


def test_both_weight_files_hold_the_same_weights(searched: Path) -> None:
    bundle = searched / "models" / "digits"
    pickled = torch.load(bundle / "model.pt", weights_only=True)
    safe = safetensors.torch.load_file(bundle / "model.safetensors")
    assert pickled.keys() == safe.keys()
    assert all(torch.equal(pickled[name], safe[name]) for name in safe)


def test_a_program_with_torch_alone_reproduces_the_predictions(searched: Path) -> None:
    bundle = searched / "models" / "digits"
    card = (bundle / "README.md").read_text()
    code = FORMATS["model.pt"]
    assert code.loading in card
    assert code.predicting in card
    images, _ = load_test("digits")
    np.save(searched / "images.npy", images.numpy())
    program = (
        "import sys; sys.modules['hpsearch'] = None\n"  # any import of hpsearch fails
        f"{code.loading}import numpy\nimages = torch.from_numpy(numpy.load('../../images.npy'))\n"
        f"{code.predicting}numpy.save('../../answers.npy', probabilities.numpy())\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=bundle, check=True)
    expected = package.load(bundle).predict_proba(images)
    assert np.abs(np.load(searched / "answers.npy") - expected).max() < 1e-6


def test_pictures_of_digits_are_recognized_in_any_size_and_ground(searched: Path) -> None:
    images, labels = load_test("digits")
    files = []
    for i in range(20):
        picture = Image.fromarray(images[i, 0].numpy())
        if i % 2:
            picture = picture.resize((300, 300), Image.Resampling.BICUBIC).point(lambda value: 255 - value)
        files.append(searched / f"{i}.{'png' if i % 3 else 'jpg'}")
        picture.convert("RGB" if i % 5 else "L").save(files[-1], quality=95)
    rows = json.loads(hpsearch("predict", "models/digits", *files, "--json", cwd=searched).stdout)
    assert [row["image"] for row in rows] == [str(file) for file in files]
    assert all(len(row["top"]) == 3 for row in rows)
    right = sum(row["top"][0]["class"] == str(int(label)) for row, label in zip(rows, labels, strict=False))
    assert right >= 17
    line = hpsearch("predict", "models/digits", files[0], cwd=searched).stdout
    assert line.startswith(f"{files[0]}  {rows[0]['top'][0]['class']} ")


def test_a_file_that_is_no_image_is_named_and_the_others_are_predicted(searched: Path) -> None:
    images, _ = load_test("digits")
    Image.fromarray(images[0, 0].numpy()).save(searched / "good.png")
    (searched / "bad.png").write_text("no image")
    process = hpsearch("predict", "models/digits", "bad.png", "good.png", cwd=searched, expect=1)
    assert process.stderr == "error: bad.png: not a readable image\n"
    assert process.stdout.startswith("good.png  ")


@pytest.mark.skipif(not REAL_MNIST.is_dir(), reason="no MNIST at hand")
@pytest.mark.timeout(600)
def test_a_small_search_on_real_mnist_ends_in_a_good_model(tmp_path: Path) -> None:
    text = (STUDIES / "mnist-mlp.toml").read_text()
    text = text.replace("trials = 12", "trials = 2").replace("epochs = 9", "epochs = 2").replace("= 18", "= 3")
    (tmp_path / "mnist-mlp.toml").write_text(text)
    hpsearch("run", "mnist-mlp.toml", "--workers", 2, cwd=tmp_path)
    hpsearch("export", "mnist-mlp.toml", cwd=tmp_path)
    metrics = json.loads((tmp_path / "models" / "mnist-mlp" / "metrics.json").read_text())
    assert metrics["n_images"] == {"train": 60_000, "validation": 10_000, "test": 10_000}
    assert metrics["validation_accuracy"] > 0.965
    assert metrics["test_accuracy"] > 0.97
