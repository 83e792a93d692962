"""Tables fit their console: they lose columns, which they name, but no digits; in a pipe they lose nothing."""

import re
from typing import Any

import pytest
from rich.console import Console, RenderableType

from hpsearch.cli.render import render_confirmation, render_evaluation, render_export
from hpsearch.monitor.tables import tabulate_trials
from hpsearch.monitor.text import shorten, show

PARAMS = {"depth": 3, "width": 101, "lr": 2.1e-3, "optimizer": "sgd", "momentum": 0.91234, "weight_decay": 1.2345e-5}


def make_row(number: int, **values: Any) -> dict[str, Any]:
    row = {"number": number, "state": "complete", "value": 0.98765, "epoch": 15, "params": PARAMS}
    return row | {"worker": "host-0", "seconds": 12.34, "note": ""} | values


ROWS = [
    make_row(0),
    make_row(1234, params={"lr": 0.1, "optimizer": "adam"}),
    make_row(7, state="failed", value=None, params={}, note="exception: " + "x" * 300),
]
CONFIRMATION: dict[str, Any] = {
    "candidates": [
        {
            "number": 12,
            "search_value": 0.98,
            "mean": 0.9712,
            "interval": [0.96, 0.98],
            "accuracies": [0.97, 0.0],
            "n_parameters": 123456,
        }
    ],
    "winner": 12,
    "is_tie": False,
    "seeds": 2,
    "optimism": 0.0046,
}
EXPORT = {
    "trial": 11,
    "test_accuracy": 0.9823,
    "test_interval": [0.9793, 0.985],
    "n_images": {"test": 10_000},
    "test_accuracies": {"std": None, "of_each_seed": [0.9801]},
    "n_members": 1,
    "shift": 0,
    "test_balanced_accuracy": 0.9714,
    "test_balanced_interval": [0.9512, 0.983],
    "test_balanced_accuracies": {"std": None},
    "metric": "balanced_accuracy",
    "per_class": [{"name": "a", "support": 10_000}],
    "test_reads": 1,
    "verified": {"model.safetensors": {"difference": 1.2e-7, "accuracy": 0.9823}},
}
NAMES = ["T-shirt/top", "[bold]", *"23456789"]
EVALUATION: dict[str, Any] = {
    "accuracy": 0.98,
    "interval": [0.97, 0.985],
    "balanced_accuracy": 0.97,
    "balanced_interval": [0.96, 0.98],
    "calibration": {"error": 0.0123},
    "per_class": [{"name": name, "precision": 0.98, "recall": 0.9712, "f1": 0.9755, "support": 1135} for name in NAMES],
    "confusion_matrix": [[1000 + i if i == j else 0 for j in range(10)] for i in range(10)],
    "mistakes": [{"index": 9999, "true": "T-shirt/top", "predicted": "[bold]", "probability": 0.9991}],
}
MANY = [f"{'🌹' * (i % 3)}species {i} \n" + "x" * (i % 2 * 90) for i in range(200)]
LARGE = EVALUATION | {
    "per_class": [
        {"name": name, "precision": None, "recall": i / 200 if i else None, "f1": None, "support": i}
        for i, name in enumerate(MANY)
    ],
    "confusion_matrix": [[100 + i if i == j else int(j == i + 1) * i for j in range(200)] for i in range(200)],
    "mistakes": [{"index": 9999, "true": MANY[1], "predicted": MANY[2], "probability": 0.9991}],
}
EVERY = [
    *(tabulate_trials(ROWS, PARAMS), tabulate_trials(ROWS, PARAMS, ["trial", "note"]), tabulate_trials([], PARAMS)),
    *(render_confirmation(CONFIRMATION), render_export("models/small", EXPORT), render_evaluation(EVALUATION)),
    render_evaluation(LARGE),
]


def draw(table: RenderableType, width: int) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return [line.rstrip() for line in capture.get().splitlines()]


@pytest.mark.parametrize("table", EVERY)
@pytest.mark.parametrize("width", [40, 80, 200])
def test_every_table_fits_and_no_number_of_it_is_cut(table: RenderableType, width: int) -> None:
    lines, whole = draw(table, width), " ".join(draw(table, 10_000))
    assert all(len(line) <= width for line in lines)
    numbers = re.findall(r"[0-9][0-9.,e-]*", " ".join(line for line in lines if "x" not in line))
    assert set(numbers) <= set(re.findall(r"[0-9][0-9.,e-]*", whole))


def test_columns_are_left_out_from_the_right_and_named_below() -> None:
    narrow, wide = draw(tabulate_trials(ROWS, PARAMS), 40), draw(tabulate_trials(ROWS, PARAMS), 200)
    assert narrow[0].split() == ["trial", "state", "value", "epoch", "depth", "width"]
    told = "no room for: lr, optimizer, momentum, weight_decay, seconds, note; see --columns"
    assert " ".join(narrow[5:]) == told
    assert wide[0].split() == [*narrow[0].split(), *told.split(": ")[1].partition(";")[0].split(", ")]
    assert "no room" not in " ".join(wide)


def test_numbers_are_right_aligned_with_three_significant_digits_and_texts_are_cut_at_the_end() -> None:
    heading, _, first, second, third = draw(tabulate_trials(ROWS, PARAMS), 120)
    for name, cells in (("trial", ("0", "1234")), ("lr", ("2.1e-3", "0.1")), ("momentum", ("0.912", ""))):
        end = re.search(rf"\b{name}\b", heading).end()  # type: ignore[union-attr]
        assert [line[:end].endswith(cell) for line, cell in zip((first, second), cells, strict=True)] == [True, True]
    assert first[heading.index("optimizer") :].startswith("sgd ")
    assert third.endswith("xxx…")


def test_numbers_have_three_significant_digits() -> None:
    values = (
        0.0,
        0.5,
        0.01234,
        0.0021,
        1.0e-4,
        1.2345e-5,
        -0.00314159,
        123.4,
        999.9,
        64_000.0,
        float("nan"),
        64,
        "adam",
    )
    told = "0 0.5 0.0123 2.1e-3 1e-4 1.23e-5 -3.14e-3 123 1e3 6.4e4 nan 64 adam"
    assert [shorten(value) for value in values] == told.split()


def test_a_confusion_matrix_continues_below() -> None:
    lines = draw(render_evaluation(EVALUATION), 40)
    heads = [line.split()[1:] for line in lines if re.match("true +[0-9]", line)]
    assert [name for head in heads for name in head] == [str(i) for i in range(10)]
    assert len(heads) == 2
    assert any(line.startswith("1 [bold]") and "1001" in line for line in lines)


def test_of_many_classes_the_worst_and_the_most_frequent_confusions_are_shown() -> None:
    lines = draw(render_evaluation(LARGE), 100)
    assert len(lines) < 40
    worst = lines[lines.index("the 10 of 200 classes with the lowest recall (--json has all):") + 3 :][:10]
    assert [re.search(r"species (\d+)", line)[1] for line in worst] == [str(i) for i in range(1, 11)]  # type: ignore[index]
    assert all("0.0" in line and " - " in line for line in worst)
    [head] = [i for i, line in enumerate(lines) if line.startswith("images")]
    assert lines[head + 2].split()[:4] == ["198", "species", "198", r"\n"]


def test_an_export_that_averages_over_shifted_copies_says_what_it_reaches_without_them() -> None:
    shifted = EXPORT | {"metric": "accuracy", "shift": 1}
    assert "averaged over each image and copies shifted by 1 pixel; without them 0.9801" in draw(
        render_export("models/small", shifted), 500
    )
    several = {"of_each_seed": [0.98, 0.97], "mean": 0.975, "std": 0.007}
    lines = draw(render_export("models/small", shifted | {"n_members": 2, "test_accuracies": several}), 500)
    assert "each of the 2 networks alone, without shifted copies: mean 0.9750, standard deviation 0.0070" in lines
    assert "averaged over each image and copies shifted by 1 pixel" in lines


def test_both_accuracies_are_shown_where_the_classes_differ_in_size_or_the_balanced_one_is_the_metric() -> None:
    [line, *_] = draw(render_export("models/small", EXPORT), 500)
    assert "test balanced accuracy 0.9714 (95% CI 0.9512 to 0.9830), accuracy 0.9823 (95% CI 0.9793 to 0.98" in line
    [line, *_] = draw(render_evaluation(EVALUATION), 500)
    assert line == "test accuracy 0.9800 (95% CI 0.970 to 0.985) on 11,350 images"
    unequal = [row | {"support": 500 * (i + 1)} for i, row in enumerate(EVALUATION["per_class"])]
    [line, *_] = draw(render_evaluation(EVALUATION | {"per_class": unequal}), 500)
    assert line.startswith(
        "test accuracy 0.9800 (95% CI 0.970 to 0.985), balanced accuracy 0.9700 (95% CI 0.960 to 0.9"
    )


def test_a_comparison_by_balanced_accuracy_says_so_and_shows_the_accuracies() -> None:
    [candidate] = CONFIRMATION["candidates"]
    balanced = candidate | {"balanced_accuracies": [0.97, 0.9724], "accuracies": [0.991, 0.993]}
    lines = draw(render_confirmation(CONFIRMATION | {"metric": "balanced_accuracy", "candidates": [balanced]}), 200)
    assert re.split("  +", lines[0].strip())[:3] == ["trial", "mean bal. acc.", "95% CI"]
    assert lines[2].split()[-1] == "0.9920"
    assert "winner: trial 12, mean balanced accuracy 0.9712 over 2 seeds" in lines


def test_in_a_pipe_nothing_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    show(tabulate_trials(ROWS, PARAMS))
    assert "x" * 300 in capsys.readouterr().out
