"""The benchmark compares equal work, and its parts run."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torchvision
from torch import nn

from hpsearch.bundle.likeness import Likeness
from hpsearch.data.dataset import ImageData, load_data
from hpsearch.training.networks import Network
from tests.benchmark import joining, many, pictures, pieces, recipe, searches, step, textbook, unlike, watching, whole
from tests.benchmark.report import Options, Row, show, summarize
from tests.benchmark.textbook import Outcome

needs_mnist = pytest.mark.skipif("HPSEARCH_DATA" not in os.environ, reason="no MNIST at hand")


@pytest.fixture
def unpacked(tmp_path: Path) -> Path:
    """A folder of MNIST as the textbook way needs it: with the archives unpacked."""
    archives = Path(os.environ["HPSEARCH_DATA"], "MNIST", "raw")
    shutil.copytree(archives, tmp_path / "data" / "MNIST" / "raw")
    torchvision.datasets.MNIST(str(tmp_path / "data"), download=True)
    return tmp_path / "data"


@needs_mnist
def test_the_textbook_way_and_hpsearch_make_the_same_steps(tmp_path: Path, unpacked: Path) -> None:
    trials = searches.draw_trials(2)
    definition = searches.define(trials, train=300, validation=128, epochs=2)
    ours = searches.run_hpsearch(tmp_path, definition, 1)
    theirs = textbook.run_optuna(definition, unpacked, 2, 1)
    assert ours.n_steps == theirs.n_steps == 2 * 3 * 2
    assert len(ours.accuracies) == len(theirs.accuracies) == 2
    assert ours.seconds > 0 < theirs.per_minute


@needs_mnist
def test_the_textbook_way_has_the_images_of_hpsearch(unpacked: Path) -> None:
    data = load_data("mnist", unpacked, validation=200, train=300)
    dataset = torchvision.datasets.MNIST(str(unpacked))
    ours = (data.train.labels, data.validation.labels)
    for labels, rows in zip(ours, textbook._split(tuple(dataset.targets.tolist()), 300, 200), strict=True):
        assert labels.tolist() == dataset.targets[rows].tolist()


def test_a_search_that_a_worker_joins_trains_the_same_trials_as_one_without() -> None:
    definition = joining.define("digits", 3, 2)
    assert (definition.budget.trials, definition.budget.epochs, definition.pruner.kind) == (3, 2, "none")
    assert len(definition.first) == 3
    assert definition == joining.define("digits", 3, 2)


def test_unequal_work_is_noticed() -> None:
    def compare(accuracies: list[float], n_steps: int = 40) -> list[str]:
        ours = Outcome(1.0, [0.90, 0.50, 0.91, 0.52], 160)  # two points, twice each
        theirs = Outcome(1.0, accuracies, n_steps * len(accuracies))
        return searches.find_unfairness({"ours": [ours], "theirs": [theirs]}, 2)

    assert compare([0.91, 0.49]) == []
    assert compare([0.98, 0.70]) == ["theirs reached another accuracy by 0.1325, standard error 0.0097"]
    [problem] = compare([0.91, 0.49], n_steps=41)
    assert problem.startswith("different numbers of optimizer steps")


def test_the_cost_of_a_trial_in_the_storage_is_measured(tmp_path: Path) -> None:
    assert pieces._measure_cost(f"sqlite:///{tmp_path}/cost.db", 2, n_before=5, n_trials=3) > 0


def test_the_shares_of_a_training_step_are_measured(tmp_path: Path) -> None:
    rows = {row.what: row.median or 0 for row in step.step(tmp_path, Options(1, tmp_path, tmp_path), widths=(4,))}
    *shares, _, speed = rows.values()
    assert sum(shares) == pytest.approx(100)
    assert min(shares) > 0 < speed


@pytest.mark.parametrize("new_url", ["postgresql"], indirect=True)
def test_what_many_workers_wait_for_is_measured(url: str) -> None:
    figures = many.run(url, n_workers=2, n_trials=6)
    assert figures["beyond the budget", "trials"] == 0
    assert {"throughput", "ask", "objective", "tell", "CPU of workers", "CPU of PostgreSQL"} <= {
        what for what, _ in figures
    }


def test_the_cost_of_watching_is_measured(tmp_path: Path) -> None:
    rows = watching.watching(tmp_path, Options(1, tmp_path, tmp_path), n_before=20, n_trials=3)
    assert [row.unit for row in rows] == ["x", "%", "s"]
    assert all(row.median and row.median > 0 for row in rows)


def test_a_variant_of_the_recipe_is_trained_and_asked_with_and_without_shifted_copies(digits: ImageData) -> None:
    alone, shifted = recipe.train(digits, {"width": 4, "shear": 0.5}, seed=0, epochs=1)
    assert alone.shape == shifted.shape == (len(digits.validation), 10)
    assert not np.allclose(alone, shifted)


def test_whole_runs_are_timed_and_have_the_accuracies_of_the_export(tmp_path: Path) -> None:
    study = tmp_path / "tiny.toml"
    study.write_text(
        '[study]\nseed = 7\n[budget]\ntrials = 2\nepochs = 1\n[data]\nname = "digits"\nvalidation = 300\n'
        '[search]\nlr = { float = [1e-3, 1e-2], log = true }\n[retrain]\nseeds = 2\nexport = "ensemble"\n'
    )
    rows = {row.what: row for row in whole.run_all(tmp_path, 1, study)}
    assert rows["each network"].n == 2
    assert (rows["the exported model"].median or 0) > 20
    assert rows["run: minutes"].part == "whole: tiny, seed 1"
    assert json.loads((tmp_path / "models" / "seed-1" / "metrics.json").read_text())["seeds"]["study"] == 1


def test_pictures_of_all_kinds_are_written_and_read(tmp_path: Path, digits: ImageData) -> None:
    images, labels = pictures.choose(digits, 1)
    network = Network(nn.Flatten(), nn.Linear(28 * 28, 10))
    rows = [
        pictures.measure(kind, pictures.write(kind, images, tmp_path / "pictures"), labels, network, digits)
        for kind in pictures.KINDS
    ]
    assert len(rows) >= 20
    assert [row.what.split(":")[0] for row in rows if "1 refused" in row.what] == ["blank", "blank, photographed"]
    assert [row.median for row in rows][-2:] == [100, 100]


def test_pictures_of_what_is_no_digit_are_warned_of(tmp_path: Path, digits: ImageData) -> None:
    images, _ = pictures.choose(digits, 1)
    likeness = Likeness.fit(digits)
    found = [
        unlike.warn(pictures.write(kind, images, tmp_path / "pictures", unlike.UNLIKE), likeness, 1)
        for kind in unlike.UNLIKE
    ]
    assert all(n_warned + n_refused == 1 for n_warned, n_refused in found)


def test_rows_are_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = summarize("loader", "ours over X[rows]", "x", [2.0, 1.0, 4.0], "1.15x")
    assert row == Row("loader", "ours over X[rows]", "x", 2.0, 1.0, 4.0, 3, "1.15x")
    show([row], tmp_path / "benchmark.json")
    assert "ours over X[rows]" in capsys.readouterr().out
    written = json.loads((tmp_path / "benchmark.json").read_text())
    assert written["rows"][0]["median"] == 2.0
    assert written["machine"]["cores"]


def test_an_unknown_part_is_refused_by_name() -> None:
    command = [sys.executable, "-m", "tests.benchmark", "sped"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert "no such part: sped" in answer.stderr


def test_without_mnist_the_benchmark_says_so_in_two_lines_and_measures_nothing(tmp_path: Path) -> None:
    (tmp_path / "MNIST").write_text("in the way of the folder")
    command = [sys.executable, "-m", "tests.benchmark", "--output", str(tmp_path / "out" / "b.json"), "loader"]
    environment = os.environ | {"HPSEARCH_DATA": str(tmp_path)}
    answer = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert answer.returncode == 1
    problem, what_to_do = answer.stderr.splitlines()
    assert "offline" in what_to_do
    assert problem.startswith("error: could not load MNIST from")
    assert not (tmp_path / "out").exists()
