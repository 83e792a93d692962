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
CONFIRMATION = {
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
    "test_accuracies": {"std": None},
    "test_reads": 1,
    "verified": {"model.safetensors": {"difference": 1.2e-7, "accuracy": 0.9823}},
}
NAMES = ["T-shirt/top", "[bold]", *"23456789"]
EVALUATION = {
    "accuracy": 0.98,
    "interval": [0.97, 0.985],
    "calibration": {"error": 0.0123},
    "per_class": [{"name": name, "precision": 0.98, "recall": 0.9712, "f1": 0.9755, "support": 1135} for name in NAMES],
    "confusion_matrix": [[1000 + i if i == j else 0 for j in range(10)] for i in range(10)],
    "mistakes": [{"index": 9999, "true": "T-shirt/top", "predicted": "[bold]", "probability": 0.9991}],
}
EVERY = [
    *(tabulate_trials(ROWS, PARAMS), tabulate_trials(ROWS, PARAMS, ["trial", "note"]), tabulate_trials([], PARAMS)),
    *(render_confirmation(CONFIRMATION), render_export("models/small", EXPORT), render_evaluation(EVALUATION)),
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


def test_in_a_pipe_nothing_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    show(tabulate_trials(ROWS, PARAMS))
    assert "x" * 300 in capsys.readouterr().out
