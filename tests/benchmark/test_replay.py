"""Simulated searches: the recorded curves are kept well, and the real samplers and pruners are driven exactly."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from hpsearch.search.priors import Priors
from tests.benchmark import record
from tests.benchmark.record import FILE, SIGNALS, TASKS, define
from tests.benchmark.replay import DEFAULT, MEDIAN, STRATEGIES, Strategy, Surrogate, simulate

TASK = TASKS["digits"]


@pytest.fixture(scope="module")
def surrogate() -> Surrogate:
    """Of a part of the recorded digits, which is fitted in a second."""
    with np.load(FILE) as packed:
        params = json.loads(str(packed["digits.params"]))
        numbers, curves = packed["digits.numbers"], packed["digits.curves"]
    few = np.flatnonzero((numbers < 60) | (np.unique(numbers, return_counts=True)[1][numbers] == 2))
    return Surrogate(define(TASK).space, [params[row] for row in few], numbers[few], curves[few])


def test_the_recorded_curves_are_below_a_megabyte() -> None:
    assert FILE.stat().st_size < 1_000_000


def test_packed_curves_are_those_of_each_training_and_can_be_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"number": 1, "seed": 0, "params": {"lr": 0.1}, "curves": [[0.5, 1.5, 1.4, 0.6, 1.2], [None] * 5]},
        {"number": 0, "seed": 1, "params": {"lr": 0.2}, "curves": [[0.25, 2.0, 2.1, 0.2, 2.2]] * 2},
        {"number": 0, "seed": 0, "params": {"lr": 0.2}, "curves": [[0.75, 1.0, 1.1, 0.7, 1.2]] * 2},
    ]
    Path(tmp_path, "digits.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    monkeypatch.setattr(record, "FILE", tmp_path / "packed.npz")
    record.pack(tmp_path)
    with np.load(tmp_path / "packed.npz") as packed:
        assert json.loads(str(packed["digits.params"])) == [{"lr": 0.2}, {"lr": 0.2}, {"lr": 0.1}]
        assert packed["digits.numbers"].tolist() == [0, 0, 1]
        assert packed["digits.curves"][:, 0, 0].tolist() == [0.75, 0.25, 0.5]
        assert np.isnan(packed["digits.curves"][2, 1]).all()
    other = tmp_path / "other"
    other.mkdir()
    record.unpack(other)
    assert [json.loads(line) for line in (other / "digits.jsonl").read_text().splitlines()] == rows[::-1]


def test_the_surrogate_orders_configurations_that_it_has_not_seen(surrogate: Surrogate) -> None:
    with np.load(FILE) as packed:
        params, curves = json.loads(str(packed["digits.params"])), packed["digits.curves"]
    unseen = range(100, 200)
    predicted = [surrogate.value(params[row]) for row in unseen]
    assert spearmanr(predicted, curves[unseen, -1, SIGNALS.index("accuracy")]).statistic > 0.6


def test_a_simulated_search_is_the_same_each_time_and_within_its_epochs(surrogate: Surrogate) -> None:
    courses = [simulate(TASK, surrogate, STRATEGIES[DEFAULT], 3, 90) for _ in range(2)]
    assert courses[0] == courses[1]
    assert 15 <= courses[0].epochs[0] <= courses[0].epochs[-1] <= 90
    assert courses[0].reports == sorted(courses[0].reports)
    assert courses[0] != simulate(TASK, surrogate, STRATEGIES[DEFAULT], 4, 90)
    assert courses[0] != simulate(TASK, surrogate, STRATEGIES[MEDIAN], 3, 90)


def test_a_wrong_prior_is_wrong_by_its_factor() -> None:
    task = TASKS["mnist-mlp"]
    right = Priors(STRATEGIES[DEFAULT].define(task, 0).space).find("lr", {"optimizer": "adam", "schedule": "cosine"})
    wrong = Strategy({}, wrong_by=30).define(task, 0).space.dimensions["lr"].prior
    assert wrong == pytest.approx(30 * right)


def test_recording_goes_on_where_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "digits.jsonl"
    monkeypatch.setitem(record.TASKS, "digits", replace(TASK, n_random=3, n_near=1, n_again=2))
    params = {"depth": 2, "width": 16, "lr": 0.01, "optimizer": "adam", "dropout": 0.1}
    recorded = [{"number": number, "seed": 0, "params": params, "curves": [[0.9] * 5] * 15} for number in (2, 0)]
    text = "".join(f"{json.dumps(row)}\n" for row in recorded)
    file.write_text(text)
    record._record_task("digits", file)
    assert file.read_text().startswith(text)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted(row["number"] for row in rows if row["seed"] == 0) == [0, 1, 2, 3]
    again = [row for row in rows if row["seed"] == 1]
    assert len({row["number"] for row in again}) == 2
    firsts = {row["number"]: row["params"] for row in rows if row["seed"] == 0}
    assert all(row["params"] == firsts[row["number"]] for row in again)
    assert np.array(rows[-1]["curves"]).shape == (15, len(SIGNALS))
