"""The best trials are retrained with new seeds, and the winner is chosen with its uncertainty in mind."""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from hpsearch.bundle import confirm as module
from hpsearch.bundle import retrain
from hpsearch.bundle.confirm import choose_winner, confirm
from hpsearch.config.definition import StudyDefinition
from hpsearch.config.space import SearchSpace
from hpsearch.data.dataset import ImageData, Split
from hpsearch.errors import NoCompletedTrial, StorageError, UsageError, WorkerError
from hpsearch.search.objective import Objective
from hpsearch.search.selection import explain_choice, find_best_few, find_winner
from hpsearch.search.study import load_study, open_study
from hpsearch.storage.rdb import open_storage
from hpsearch.training import run
from hpsearch.training.kinds import Hyperparameters
from hpsearch.training.metrics import Score
from hpsearch.training.networks import Network
from hpsearch.training.trainer import Trainer

from ..acceptance.commands import processes_of, start, wait_for
from ..conftest import make_definition


@pytest.fixture
def searched(tmp_path: Path) -> tuple[StudyDefinition, optuna.Study]:
    """Five trials, two of them of the same parameters."""
    study_table = {"artifacts": str(tmp_path / "artifacts")}
    definition = make_definition(f"sqlite:///{tmp_path / 'study.db'}", study=study_table, budget={"epochs": 3})
    study = open_study(definition, open_storage(definition.study.storage))
    for width, lr in ((8, 1e-3), (32, 0.02), (32, 0.02), (16, 0.02), (12, 0.01)):
        study.enqueue_trial({"width": width, "lr": lr})
    study.optimize(Objective(definition), n_trials=5)
    return definition, study


def test_each_candidate_is_trained_from_fresh_seeds_and_the_outcome_is_stored(
    searched: tuple[StudyDefinition, optuna.Study],
) -> None:
    definition, study = searched
    seen: list[tuple[int, int]] = []
    confirmation = confirm(
        definition, study, top=2, seeds=3, on_run=lambda trial, run, accuracy: seen.append((trial, run))
    )
    assert study.user_attrs["confirmation"] == confirmation
    numbers = [trial.number for trial in find_best_few(study, 2)]
    assert sorted(seen) == sorted((number, run) for number in numbers for run in range(3))
    assert [candidate["number"] for candidate in confirmation["candidates"]] == numbers
    for candidate in confirmation["candidates"]:
        assert len(set(candidate["accuracies"])) > 1, "seeds make no difference"
        assert candidate["mean"] == pytest.approx(np.mean(candidate["accuracies"]))
        assert candidate["search_value"] == study.trials[candidate["number"]].value
    best = confirmation["candidates"][0]
    assert confirmation["optimism"] == pytest.approx(best["search_value"] - best["mean"])
    assert confirmation["winner"] in numbers
    assert find_winner(study).number == confirmation["winner"]


def test_no_training_of_a_trial_has_the_seed_of_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables: dict[str, Any] = {"study": {"artifacts": str(tmp_path / "artifacts")}, "retrain": {"seeds": 2}}
    definition = make_definition(f"sqlite:///{tmp_path / 'study.db'}", budget={"trials": 1, "epochs": 1}, **tables)
    study = open_study(definition, open_storage(definition.study.storage))
    seeds: list[int] = []

    class Noting(Trainer):
        def __init__(self, *arguments: Any, seed: int, **options: Any) -> None:
            seeds.append(seed)
            super().__init__(*arguments, seed=seed, **options)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "Trainer", Noting)
    monkeypatch.setattr(retrain, "load_test", stop)  # after all training
    study.optimize(Objective(definition), n_trials=1)
    confirm(definition, study, top=1, seeds=2)
    with pytest.raises(KeyboardInterrupt):
        retrain.export(definition, study, tmp_path / "b")
    assert len(seeds) == 1 + 2 + 2
    assert len(set(seeds)) == len(seeds)


def test_a_candidate_trains_and_is_measured_on_the_splits_of_the_search(
    searched: tuple[StudyDefinition, optuna.Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    n_trained = set[int]()

    class Noting(Trainer):
        def __init__(self, network: Network, split: Split, *arguments: Any, **options: Any) -> None:
            n_trained.add(len(split))
            super().__init__(network, split, *arguments, **options)

    monkeypatch.setattr(run, "Trainer", Noting)
    monkeypatch.setattr(module, "measure", lambda network, split: Score([len(split)], [1000]))
    [candidate] = confirm(*searched, top=1, seeds=2)["candidates"]
    assert (n_trained, candidate["accuracies"]) == ({300}, [0.2, 0.2])


def test_processes_read_the_data_themselves_where_shared_memory_is_too_small(
    searched: tuple[StudyDefinition, optuna.Study], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_: ImageData) -> ImageData:
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device")

    monkeypatch.setattr(ImageData, "share_memory", refuse)
    assert len(confirm(*searched, top=1, seeds=2, n_workers=2)["candidates"][0]["accuracies"]) == 2
    assert "each worker loads its own copy" in caplog.text


def test_a_single_seed_shows_no_variance(searched: tuple[StudyDefinition, optuna.Study]) -> None:
    with pytest.raises(UsageError, match="--seeds 1: must be at least 2"):
        confirm(*searched, seeds=1)


def test_a_study_that_may_only_be_read_is_noticed_before_the_training(
    searched: tuple[StudyDefinition, optuna.Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    definition, _ = searched
    monkeypatch.setattr(module, "load_study_data", None)
    reading = load_study(definition, open_storage(definition.study.storage, reads_only=True))
    with pytest.raises(StorageError, match="readonly database"):
        confirm(definition, reading)


def test_the_same_parameters_are_a_candidate_once(searched: tuple[StudyDefinition, optuna.Study]) -> None:
    _, study = searched
    assert [trial.number for trial in find_best_few(study, 9)].count(2) == 0
    assert len(find_best_few(study, 9)) == 4


def test_a_later_call_adds_what_is_missing_and_repeats_nothing(searched: tuple[StudyDefinition, optuna.Study]) -> None:
    definition, study = searched
    first = confirm(definition, study, top=1, seeds=2)
    again: list[tuple[int, int]] = []
    second = confirm(definition, study, top=1, seeds=3, on_run=lambda trial, run, accuracy: again.append((trial, run)))
    assert again == [(first["winner"], 2)]
    assert second["candidates"][0]["accuracies"][:2] == first["candidates"][0]["accuracies"]


def test_processes_give_what_one_process_gives(searched: tuple[StudyDefinition, optuna.Study]) -> None:
    definition, study = searched
    shared = confirm(definition, study, top=2, seeds=2, n_workers=2)
    study.set_user_attr("confirmed_runs", {})
    alone = confirm(definition, study, top=2, seeds=2)
    assert [c["accuracies"] for c in shared["candidates"]] == [c["accuracies"] for c in alone["candidates"]]


def test_a_training_that_diverges_counts_as_nothing(
    searched: tuple[StudyDefinition, optuna.Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    definition, study = searched
    monkeypatch.setattr(SearchSpace, "read", lambda space, params: Hyperparameters(width=8, lr=1e38, optimizer="sgd"))
    assert confirm(definition, study, top=1, seeds=2)["candidates"][0]["accuracies"] == [0, 0]


def test_a_study_without_complete_trials_has_nothing_to_confirm(tmp_path: Path) -> None:
    definition = make_definition(f"sqlite:///{tmp_path / 'study.db'}")
    study = open_study(definition, open_storage(definition.study.storage))
    with pytest.raises(NoCompletedTrial):
        confirm(definition, study)


@pytest.mark.parametrize(("n_images", "is_tie"), [(500, True), (600, False)])
def test_seeds_that_agree_do_not_make_a_difference_of_five_images_significant(n_images: int, is_tie: bool) -> None:
    for best in ([0.99, 0.99, 0.99], [0.99, 0.99, 0.9901]):  # 5 and 6 images better than the smaller network
        assert choose_winner({1: best, 2: [0.98] * 3}, {1: 9, 2: 5}, n_images)[1] == is_tie


@pytest.mark.parametrize(
    ("correct", "n_images", "is_tie"),
    [
        ([[95, 90], [90, 90]], [100, 100], True),  # by five images
        ([[96, 90], [90, 90]], [100, 100], False),  # by six
        ([[960, 5], [960, 3]], [1000, 5], True),  # by two of a rare class, which are 20 percentage points
        ([[960, 5], [800, 5]], [1000, 5], False),  # by 160 of the common class, which are 8
        ([[960, 4], [940, 5]], [1000, 5], True),  # one is better in each class
    ],
)
def test_balanced_accuracies_are_tied_if_they_differ_by_few_images_or_by_few_of_a_rare_class(
    correct: list[list[int]], n_images: list[int], is_tie: bool
) -> None:
    scores = {number: [Score(each, n_images)] * 3 for number, each in enumerate(correct)}
    values = {number: [score.balanced_accuracy for score in of] for number, of in scores.items()}
    assert choose_winner(values, {0: 9, 1: 5}, sum(n_images), scores)[1] == is_tie


@pytest.mark.parametrize(
    ("accuracies", "sizes", "expected"),
    [
        ({1: [0.91, 0.92, 0.93], 2: [0.81, 0.82, 0.83]}, {1: 900, 2: 10}, (1, False)),
        ({1: [0.91, 0.92, 0.93], 2: [0.90, 0.92, 0.93]}, {1: 900, 2: 10}, (2, True)),
        ({1: [0.91, 0.92, 0.93], 2: [0.90, 0.92, 0.93], 3: [0.5, 0.5, 0.6]}, {1: 900, 2: 10, 3: 1}, (2, True)),
        ({1: [0.99, 0.991, 0.99], 2: [0.98, 0.98, 0.1]}, {1: 900, 2: 10}, (1, False)),
        ({1: [0.91, 0.92], 2: [0.90, 0.92]}, {1: 10, 2: 10}, (1, True)),
        ({1: [0.9, 0.9], 2: [0.8, 0.8]}, {1: 900, 2: 10}, (1, False)),
        ({1: [0.9, 0.9], 2: [0.9, 0.9]}, {1: 900, 2: 10}, (2, True)),
        ({7: [0.9, 0.8]}, {7: 5}, (7, False)),
        ({1: [0.99, 0.991, 0.992], 2: [0.95, 0.951, 0.952], 3: [0.98, 0.981, 0.0]}, {1: 9, 2: 5, 3: 1}, (1, False)),
        ({1: [0.9, 0.0], 2: [0.0, 0.0]}, {1: 9, 2: 5}, (2, True)),
    ],
    ids=[
        "clear",
        "tie",
        "tie-of-two",
        "one-collapsed",
        "equal-sizes",
        "clear-without-variance",
        "tie-without-variance",
        "alone",
        "one-diverged",
        "all-diverged",
    ],
)
def test_the_highest_mean_wins_and_the_smallest_network_among_equals(
    accuracies: dict[int, list[float]], sizes: dict[int, int], expected: tuple[int, bool]
) -> None:
    assert choose_winner(accuracies, sizes, 1000) == expected


def test_of_ten_equal_candidates_one_is_left_out_wrongly_in_few_comparisons() -> None:
    rng, sizes = np.random.default_rng(0), {i: i for i in range(10)}
    draws = [{i: list(rng.normal(0.9, 0.01, 3)) for i in sizes} for _ in range(20)]
    wrong = sum(choose_winner(accuracies, sizes, 10_000) != (0, True) for accuracies in draws)
    assert wrong <= 2  # 1 is expected at 95%


def test_what_export_takes_is_explained(searched: tuple[StudyDefinition, optuna.Study]) -> None:
    _, study = searched
    best, second = find_best_few(study, 2)
    assert explain_choice(study, "small").endswith("to see whether it was luck, run: hpsearch confirm small")
    compared = [{"number": second.number}]
    study.set_user_attr("confirmation", {"winner": second.number, "candidates": compared})
    assert explain_choice(study, "small") == (
        f"trial {second.number} is the confirmed winner; trial {best.number} has a better value now but was not "
        "compared, so consider: hpsearch confirm small"
    )
    study.set_user_attr("confirmation", {"winner": second.number, "candidates": [*compared, {"number": best.number}]})
    assert explain_choice(study, "small") == f"trial {second.number} is the confirmed winner"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_leaves_no_process_and_keeps_what_is_done(
    searched: tuple[StudyDefinition, optuna.Study], tmp_path: Path, number: signal.Signals
) -> None:
    definition, study = searched
    (tmp_path / "small.toml").write_text(definition.to_toml())
    log = tmp_path / "log"
    command = start("confirm", "small.toml", "--seeds", 50, "--workers", 2, cwd=tmp_path, log=log)
    wait_for(lambda: log.read_text().count("trial ") >= 3, "three trainings")
    os.kill(command.pid, number)
    command.wait(timeout=120)
    wait_for(lambda: not processes_of(command.pid), "the end of all processes")
    assert len(study.user_attrs["confirmed_runs"]) >= 3


def test_a_killed_process_is_told_and_what_is_done_is_kept(
    searched: tuple[StudyDefinition, optuna.Study],
) -> None:
    from multiprocessing import active_children

    definition, study = searched

    def kill_one(trial: int, run: int, accuracy: float) -> None:
        for process in active_children()[:1]:
            process.kill()

    with pytest.raises(WorkerError, match="a training process was killed"):
        confirm(definition, study, seeds=30, n_workers=2, on_run=kill_one)
    assert 1 <= len(study.user_attrs["confirmed_runs"]) < 90
    assert not active_children()
