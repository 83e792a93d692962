"""A study file for images of one's own is valid, and suits the images and the machine."""

import tomllib
from dataclasses import replace

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState

from hpsearch.config.definition import StudyDefinition, check_new, parse_definition
from hpsearch.data.inventory import show_name
from hpsearch.search.draft import TRAINED, Images, choose_shares, choose_size, draft_study
from hpsearch.search.pruning import AshaPruner

SIDES = {"train": 0.7, "validation": 0.15, "test": 0.15}


def count_images(**classes: int) -> dict[str, dict[str, int]]:
    return {side: {name: round(n * share) for name, n in classes.items()} for side, share in SIDES.items()}


FLOWERS = Images(("folder", "flowers"), count_images(rose=1000, tulip=1100), (3, 48, 48))


def read(images: Images, n_cores: int = 2) -> StudyDefinition:
    definition = parse_definition(tomllib.loads(draft_study("flowers", images, n_cores)))
    check_new(definition)
    return definition


@settings(max_examples=30, deadline=None)
@given(
    path=st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
    classes=st.dictionaries(st.text(min_size=1, max_size=5), st.integers(10, 100_000), min_size=2, max_size=5),
    channels=st.sampled_from([1, 3]),
    sides=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    splits=st.sampled_from([(), ("train", "test"), ("train", "validation"), ("train", "validation", "test")]),
    unreadable=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), max_size=2),
)
def test_the_file_is_valid_whatever_the_images(
    path: str,
    classes: dict[str, int],
    channels: int,
    sides: tuple[int, int],
    splits: tuple[str, ...],
    unreadable: list[str],
) -> None:
    counts = count_images(**classes)
    if splits == ("train", "test"):
        del counts["validation"]
    definition = read(Images(("folder", path), counts, (channels, *sides), splits, True, [*map(show_name, unreadable)]))
    data = definition.data
    assert data.folder == path
    assert data.color == ("grey" if channels == 1 else "rgb")
    assert (data.size if isinstance(data.size, tuple) else (data.size, data.size)) == sides
    assert ((data.test is None), (data.validation is None)) == ("test" in splits, "validation" in splits)
    assert bool(data.skip_unreadable) == bool(unreadable)


def test_each_line_of_the_file_fits_the_screen_and_every_key_is_explained() -> None:
    text = draft_study("flowers", replace(FLOWERS, unreadable=["rose/a.png"]), 2)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 120
    keys = [line for line in lines if " = " in line and not line.startswith("#")]
    explained = [line for line in keys if "#" in line or "lr" in line]
    assert len(explained) > 12
    assert text.startswith("# A CNN on 2,100 images of 2 classes: about ")


@pytest.mark.parametrize(
    ("classes", "flips", "metric"),
    [
        ({"rose": 500, "tulip": 600}, True, "accuracy"),
        ({"rose": 300, "tulip": 600}, True, "balanced_accuracy"),
        ({"a": 500, "b": 600}, False, "accuracy"),  # letters
        ({"Left hand": 500, "right hand": 600}, False, "accuracy"),
    ],
)
def test_what_the_classes_are_decides_on_the_metric_and_on_mirror_images(
    classes: dict[str, int], flips: bool, metric: str
) -> None:
    definition = read(replace(FLOWERS, counts=count_images(**classes)))
    assert ("flip" in definition.search) == flips
    assert definition.study.metric == metric


def test_gray_images_have_no_colors_to_change() -> None:
    assert "color_jitter" in read(FLOWERS).search
    assert "color_jitter" not in read(replace(FLOWERS, shape=(1, 48, 48))).search


def test_the_budget_suits_the_images_and_the_cores() -> None:
    few, many = (read(replace(FLOWERS, counts=count_images(a1=n, b1=n))) for n in (50, 40_000))
    assert few.budget.epochs > many.budget.epochs
    assert [few.search["batch_size"].values, many.search["batch_size"].values] == [[16, 32], [64, 128]]
    assert few.budget.minutes == 10
    assert many.budget.minutes == 60
    assert "more minutes, more trials" in draft_study(
        "x", replace(FLOWERS, counts=count_images(a1=90_000, b1=90_000)), 2
    )
    first = [draft_study("x", FLOWERS, n_cores).splitlines()[0] for n_cores in (1, 4)]
    minutes = [int(line.split("about ")[1].split()[0]) for line in first]
    assert minutes[0] >= 3 * minutes[1]
    assert [line.split(" on ")[-1] for line in first] == ["1 core.", "4 cores."]


@pytest.mark.parametrize("epochs", [10, 30, 100])
def test_the_epochs_from_which_the_duration_follows_are_about_those_that_the_default_pruner_leaves(epochs: int) -> None:
    definition = read(FLOWERS)
    generator, counts = np.random.default_rng(0), []
    for _ in range(8):
        study = optuna.create_study(direction="maximize", pruner=AshaPruner(epochs))
        waiting = [(study.ask(), generator.normal(), 1) for _ in range(2)]  # trial, quality, epoch: of two workers
        n_epochs = 0
        while waiting:
            trial, quality, epoch = waiting.pop(0)
            n_epochs += 1
            trial.report(quality + 0.5 * generator.normal(), epoch)
            if epoch < epochs and not trial.should_prune():
                waiting.append((trial, quality, epoch + 1))
                continue
            study.tell(trial, state=TrialState.PRUNED)
            if len(study.trials) < definition.budget.trials:
                later = generator.normal() + len(study.trials) / definition.budget.trials  # trials get better
                waiting.append((study.ask(), later, 1))
        counts.append(n_epochs)
    assert 0.8 < TRAINED * definition.budget.trials * epochs / np.mean(counts) < 1.25


def test_more_images_need_smaller_shares_for_tests_and_sides_of_ones_own_none() -> None:
    shares = [choose_shares(n, ())["test"] for n in (100, 5_000, 50_000)]
    assert shares == sorted(shares, reverse=True)
    assert choose_shares(100, ("train", "test")) == {"validation": shares[0]}


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({(48, 48): 9}, (48, 48)),
        ({(8, 12): 9}, (8, 12)),
        ({(480, 640): 9}, (48, 64)),
        ({(50, 2000): 9}, (16, 64)),
        ({(30, 30): 5, (31, 31): 4}, (30, 30)),
        ({(3000, 4000): 5, (600, 400): 4}, (64, 64)),
        ({(4, 4): 5, (600, 400): 4}, (16, 16)),
        ({}, (64, 64)),
    ],
)
def test_the_size_keeps_proportions_where_all_files_have_the_same(
    sizes: dict[tuple[int, int], int], expected: tuple[int, int]
) -> None:
    assert choose_size(sizes) == expected
