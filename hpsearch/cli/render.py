"""Results of the commands as tables and lines."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hpsearch.monitor.text import (
    count,
    describe_best,
    describe_epochs,
    format_cell,
    join_params,
    printable,
    shorten,
)
from hpsearch.monitor.trials import describe_interruption, flatten, list_columns

_N_ERRORS = 5  # shown by `evaluate`


def render_status(status: Mapping[str, Any]) -> RenderableType:
    """Return the document of `status --json` as text."""
    table = Table.grid(padding=(0, 2))
    budget, counts, best, epochs = status["budget"], status["trials"], status["best"], status["epochs"]
    finished = counts["complete"] + counts["pruned"]
    table.add_row("study", Text(status["study"], style="bold"))
    table.add_row("database", Text(status["storage"], overflow="fold"))
    table.add_row("progress", f"{finished}/{budget['trials']} trials (up to {budget['epochs']} epochs each)")
    table.add_row("trials", ", ".join(f"{n} {state}" for state, n in counts.items()))
    table.add_row("epochs", describe_epochs(**epochs))
    table.add_row("best", Text(describe_best(best), style="bold" if best else ""))
    if best:
        table.add_row("", Text(join_params(best["params"])))
    for worker in status["workers"]:
        text = f"{worker['id']}: trial {worker['trial']}, epoch {worker['epoch']}"
        table.add_row("worker", Text(printable(text)))
    return table


def render_trials(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> RenderableType:
    """Return a table with one row per trial, by default with a column for each hyperparameter that any of them has.

    On a terminal, a note is cut at the end of the line.
    """
    names = dict.fromkeys(name for row in rows for name in row["params"])
    columns = columns or [name for name in list_columns(names) if name != "worker"]
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=0)
    for name in columns:
        is_text = name in ("state", "worker", "note")
        heading = "trial" if name == "number" else name
        table.add_column(heading, justify="left" if is_text else "right", no_wrap=name != "note")
    for row in map(flatten, rows):
        cells = [printable(format_cell(row.get(name), name)) for name in columns]
        table.add_row(*(Text(cell, no_wrap=True, overflow="ellipsis") for cell in cells))
    return table


def render_trial(trial: Mapping[str, Any]) -> RenderableType:
    """Return the document of `show --json` as text."""
    table = Table.grid(padding=(0, 2))
    table.add_row("trial", Text(f"{trial['number']} {trial['state']}", style="bold"))
    if trial["value"] is not None:
        table.add_row("val. accuracy", f"{trial['value']:.4f}")
    if trial["note"]:
        table.add_row("reason", Text(printable(trial["note"]), overflow="fold"))
    for i, (name, value) in enumerate(trial["params"].items()):
        table.add_row("" if i else "hyperparameters", Text(printable(f"{name} {shorten(value)}")))
    if trial["started"]:
        seconds = "" if trial["seconds"] is None else f" ({trial['seconds']:.1f} s)"
        start, end = ((trial[key] or "now")[:19].replace("T", " ") for key in ("started", "ended"))
        table.add_row("time", f"{start} to {end.removeprefix(start[:11])}{seconds}")
        table.add_row("worker", Text(printable(str(trial["worker"]))))
    if trial["images_per_second"]:
        table.add_row("speed", f"{trial['images_per_second']:,} images/s")
    for i, interruption in enumerate(trial["interruptions"]):
        table.add_row("" if i else "interrupted", Text(printable(describe_interruption(interruption)), overflow="fold"))
    if trial["resumed_after"]:
        table.add_row("resumed", f"after epoch {trial['resumed_after']}")
    if trial["environment"]:
        environment = ", ".join(f"{name} {value}" for name, value in trial["environment"].items())
        table.add_row("environment", Text(printable(environment)))
    reports = [f"{epoch}: {value:.4f}" for epoch, value in trial["reports"].items()]
    table.add_row("val. accuracy by epoch", Text("  ".join(reports) or "none", overflow="fold"))
    return table


def render_findings(findings: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Return one line per check of `doctor`: `ok`, or `FIX` and how."""
    table = Table.grid(padding=(0, 2))
    for finding in findings:
        verdict = Text("ok", style="green") if finding["is_ok"] else Text("FIX", style="bold red")
        table.add_row(verdict, finding["check"], Text(finding["message"], overflow="fold"))
    return table


def render_confirmation(confirmation: Mapping[str, Any]) -> RenderableType:
    """Return the document of `confirm --json` as text: one row per candidate, and the verdict."""
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    for heading in ("trial", "search acc.", "mean acc.", "95% CI", "min", "max", "params"):
        table.add_column(heading, justify="right")
    candidates = {candidate["number"]: candidate for candidate in confirmation["candidates"]}
    for number, candidate in candidates.items():
        low, high = candidate["interval"]
        values = candidate["accuracies"]
        means = [f"{value:.4f}" for value in (candidate["search_value"], candidate["mean"])]
        ends = [f"{value:.4f}" if value else "diverged" for value in (min(values), max(values))]
        row = [str(number), *means, f"{low:.4f} to {high:.4f}", *ends, f"{candidate['n_parameters']:,}"]
        table.add_row(*row, style="bold" if number == confirmation["winner"] else None)
    winner, seeds = candidates[confirmation["winner"]], confirmation["seeds"]
    verdict = f"trial {winner['number']}, mean accuracy {winner['mean']:.4f} over {seeds} seeds"
    tie = "tie: the differences are within noise, so the smallest network is chosen: "
    verdict = f"{tie if confirmation['is_tie'] else 'winner: '}{verdict}"
    optimism = round(confirmation["optimism"], 4) + 0.0  # no minus before a zero
    side = "that much above" if optimism > 0 else "that much below" if optimism < 0 else "equal to"
    bias = f"selection bias: {optimism:+.4f} (the search's best value is {side} the mean of its retrainings)"
    return Group(table, "", Text(verdict, style="bold"), Text(bias))


def render_export(target: str, metrics: Mapping[str, Any]) -> RenderableType:
    """Return the model folder, its accuracy, and the verification of its files."""
    low, high = metrics["test_interval"]
    n_images, several, n_uses = metrics["n_images"]["test"], metrics["test_accuracies"], metrics["test_reads"]
    lines = [
        f"{target}: trial {metrics['trial']}, test accuracy {metrics['test_accuracy']:.4f} "
        f"(95% CI {low:.4f} to {high:.4f}) on {n_images:,} test images; "
        f"the test set has now been used by {count(n_uses, 'export')} of this study"
    ]
    if several["std"] is not None:
        n_models = len(several["of_each_seed"])
        mean, std = f"mean {several['mean']:.4f}", f"standard deviation {several['std']:.4f}"
        lines.append(f"{n_models} models with different seeds: {mean}, {std}")
    table = Table("file", "max. probability difference", "test accuracy", box=SIMPLE_HEAD, show_edge=False)
    for name, check in metrics["verified"].items():
        table.add_row(name, f"{check['difference']:.1e}", f"{check['accuracy']:.4f}")
    return Group(*(Text(line) for line in lines), "", table)


def render_replay(document: Mapping[str, Any]) -> RenderableType:
    """Return whether the trial was reproduced; if not, the largest difference and its causes."""
    trial, value, epochs = f"trial {document['trial']}", f"{document['value']:.4f}", document["epochs"]
    if document["identical"]:
        return Text(f"{trial}: reproduced exactly, all {epochs} epochs identical (final accuracy {value})")
    replayed, largest = document["replayed_value"], document["largest_difference"]
    now = "now training diverges before the last epoch" if replayed is None else f"is now {replayed:.4f}"
    size = f", largest difference {largest:.4f} (epoch {document['epoch']})" if largest else ""
    lines = [
        f"{trial}: NOT reproduced{size}; final accuracy was {value}, {now}",
        *(f"  {reason}" for reason in document["reasons"]),
    ]
    return Group(*(Text(line) for line in lines))


def render_evaluation(evaluation: Mapping[str, Any]) -> RenderableType:
    """Return accuracy, calibration, and tables of per-class metrics, the confusion matrix and the worst errors."""
    rows = evaluation["per_class"]
    per_class = Table("class", "precision", "recall", "F1", "images", box=SIMPLE_HEAD, show_edge=False)
    for row in rows:
        scores = [f"{row[key]:.4f}" for key in ("precision", "recall", "f1")]
        per_class.add_row(row["name"], *scores, str(row["support"]))
    matrix = Table("true \\ predicted", *(row["name"] for row in rows), box=SIMPLE_HEAD, show_edge=False)
    for row, counts in zip(rows, evaluation["confusion_matrix"], strict=True):
        matrix.add_row(row["name"], *(str(count) if count else "." for count in counts))
    n_images = sum(row["support"] for row in rows)
    low, high = evaluation["interval"]
    accuracy = f"test accuracy {evaluation['accuracy']:.4f} (95% CI {low:.3f} to {high:.3f}) on {n_images:,} images"
    calibration = f"expected calibration error {evaluation['calibration']['error']:.4f}"
    errors = Table("most confident errors", "true", "predicted", "confidence", box=SIMPLE_HEAD, show_edge=False)
    for row in evaluation["mistakes"][:_N_ERRORS]:
        errors.add_row(f"test image #{row['index']}", row["true"], row["predicted"], f"{row['probability']:.4f}")
    worst: list[RenderableType] = ["", errors] if errors.rows else []
    return Group(accuracy, calibration, "", per_class, "", matrix, *worst)


def prediction_line(prediction: Mapping[str, Any]) -> str:
    """Return a line such as `digit.png  7 0.9981  9 0.0012  1 0.0003`."""
    top = [f"{entry['class']} {entry['probability']:.4f}" for entry in prediction["top"]]
    return "  ".join([printable(prediction["image"]), *top])
