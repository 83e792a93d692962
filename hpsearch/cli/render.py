"""Answers of the commands as tables and lines."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hpsearch.monitor.text import join_params, printable, shorten
from hpsearch.monitor.trials import flatten, list_columns


def render_status(status: Mapping[str, Any]) -> RenderableType:
    """The document of `status --json` as text."""
    table = Table.grid(padding=(0, 2))
    budget, counts, best, epochs = status["budget"], status["trials"], status["best"], status["epochs"]
    finished = counts["complete"] + counts["pruned"]
    table.add_row("study", Text(status["study"], style="bold"))
    table.add_row("storage", Text(status["storage"], overflow="fold"))
    table.add_row("budget", f"{finished} of {budget['trials']} trials, {budget['epochs']} epochs each")
    table.add_row("trials", ", ".join(f"{n} {state}" for state, n in counts.items()))
    table.add_row("epochs", f"{epochs['run']} run, {epochs['saved']} saved by pruning")
    if best:
        table.add_row("best", Text(f"{best['value']:.4f} in trial {best['number']}", style="bold"))
        table.add_row("", Text(join_params(best["params"])))
    else:
        table.add_row("best", "no trial is complete yet")
    for worker in status["workers"]:
        text = f"{worker['id']}: trial {worker['trial']}, epoch {worker['epoch']}"
        table.add_row("worker", Text(printable(text)))
    return table


def render_trials(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> RenderableType:
    """A table with a row for each trial; by default with a column for each hyperparameter that any of them has.

    On a terminal a note is cut to what is left of its line.
    """
    names = dict.fromkeys(name for row in rows for name in row["params"])
    columns = columns or [name for name in list_columns(names) if name != "worker"]
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=0)
    for name in columns:
        is_text = name in ("state", "worker", "note")
        heading = "trial" if name == "number" else name
        table.add_column(heading, justify="left" if is_text else "right", no_wrap=name != "note")
    for row in map(flatten, rows):
        cells = [printable(_show_cell(name, row.get(name))) for name in columns]
        table.add_row(*(Text(cell, no_wrap=True, overflow="ellipsis") for cell in cells))
    return table


def render_trial(trial: Mapping[str, Any]) -> RenderableType:
    """The document of `show --json` as text."""
    table = Table.grid(padding=(0, 2))
    table.add_row("trial", Text(f"{trial['number']} {trial['state']}", style="bold"))
    if trial["value"] is not None:
        table.add_row("value", f"{trial['value']:.4f}")
    if trial["note"]:
        table.add_row("why", Text(printable(trial["note"]), overflow="fold"))
    for i, (name, value) in enumerate(trial["params"].items()):
        table.add_row("" if i else "parameters", Text(printable(f"{name} {shorten(value)}")))
    if trial["started"]:
        seconds = "" if trial["seconds"] is None else f" ({trial['seconds']:.1f} s)"
        table.add_row("times", f"{trial['started']} to {trial['ended'] or 'now'}{seconds}")
        table.add_row("worker", Text(printable(str(trial["worker"]))))
    if trial["images_per_second"]:
        table.add_row("speed", f"{trial['images_per_second']:,} training images a second")
    if trial["attempts"]:
        after = trial["resumed_after"]
        how = f"from its checkpoint after epoch {after}" if after else "from the beginning"
        table.add_row("attempts", f"goes on with trial {', '.join(map(str, trial['attempts']))}, {how}")
    if trial["environment"]:
        environment = ", ".join(f"{name} {value}" for name, value in trial["environment"].items())
        table.add_row("ran with", Text(printable(environment)))
    reports = [f"{epoch}: {value:.4f}" for epoch, value in trial["reports"].items()]
    table.add_row("reports", Text("  ".join(reports) or "none", overflow="fold"))
    return table


def render_findings(findings: Sequence[Mapping[str, Any]]) -> RenderableType:
    """A line for each check of `doctor`: `ok`, or `mend` and how."""
    table = Table.grid(padding=(0, 2))
    for finding in findings:
        verdict = Text("ok", style="green") if finding["is_ok"] else Text("mend", style="bold red")
        table.add_row(verdict, finding["check"], Text(finding["message"], overflow="fold"))
    return table


def render_confirmation(confirmation: Mapping[str, Any]) -> RenderableType:
    """The document of `confirm --json`: a row for each candidate, and the verdict."""
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    for heading in ("trial", "search", "mean", "95% interval", "lowest", "highest", "parameters"):
        table.add_column(heading, justify="right")
    candidates = {candidate["number"]: candidate for candidate in confirmation["candidates"]}
    for number, candidate in candidates.items():
        low, high = candidate["interval"]
        values = candidate["accuracies"]
        figures = [f"{value:.4f}" for value in (candidate["search_value"], candidate["mean"])]
        ends = [f"{value:.4f}" if value else "diverged" for value in (min(values), max(values))]
        row = [str(number), *figures, f"{low:.4f} to {high:.4f}", *ends, f"{candidate['n_parameters']:,}"]
        table.add_row(*row, style="bold" if number == confirmation["winner"] else None)
    winner, seeds = candidates[confirmation["winner"]], confirmation["seeds"]
    verdict = f"trial {winner['number']} wins, with a mean of {winner['mean']:.4f} over {seeds} seeds"
    if confirmation["is_tie"]:
        verdict = f"a tie, the differences are within chance; so the smallest network among equals, and {verdict}"
    optimism = round(confirmation["optimism"], 4) + 0.0  # no minus before a zero
    side = "above" if optimism > 0 else "below" if optimism < 0 else "at"
    luck = f"optimism of the selection: {optimism:+.4f}; the search's best value lies {side} its trial's mean"
    return Group(table, "", Text(verdict, style="bold"), Text(luck))


def render_export(target: str, metrics: Mapping[str, Any]) -> RenderableType:
    """Where the bundle is, how good it is, and how its files agree."""
    low, high = metrics["test_interval"]
    n_images, several, readings = metrics["n_images"]["test"], metrics["test_accuracies"], metrics["test_reads"]
    lines = [
        f"{target}: trial {metrics['trial']}, test accuracy {metrics['test_accuracy']:.4f} "
        f"(95% interval {low:.4f} to {high:.4f}) on {n_images} images; export {readings} of this study that reads them"
    ]
    if several["std"] is not None:
        n_models = len(several["of_each_seed"])
        lines.append(
            f"{n_models} models from different seeds: mean {several['mean']:.4f}, deviation {several['std']:.4f}"
        )
    table = Table("file", "largest difference of a probability", "test accuracy", box=SIMPLE_HEAD, show_edge=False)
    for name, seen in metrics["verified"].items():
        table.add_row(name, f"{seen['difference']:.1e}", f"{seen['accuracy']:.4f}")
    return Group(*(Text(line) for line in lines), "", table)


def render_replay(document: Mapping[str, Any]) -> RenderableType:
    """Identical, or by how much not, and why."""
    trial = f"trial {document['trial']} ({document['state']}, {document['epochs']} epochs)"
    if document["identical"]:
        return Text(f"{trial} is identical: {document['value']:.4f} after the last epoch, as every epoch before it")
    replayed = document["replayed_value"]
    again = "the training diverged before" if replayed is None else f"{replayed:.4f} now"
    largest = document["largest_difference"]
    size = f", by up to {largest:.4f} (in epoch {document['epoch']})" if largest else ""
    lines = [
        f"{trial} differs{size}; after the last epoch {document['value']:.4f} then, {again}",
        *(f"  {reason}" for reason in document["reasons"]),
    ]
    return Group(*(Text(line) for line in lines))


def render_evaluation(evaluation: Mapping[str, Any]) -> RenderableType:
    """Accuracy, calibration, and as tables per-class figures, the confusion matrix and the worst mistakes."""
    rows = evaluation["per_class"]
    figures = Table("class", "precision", "recall", "F1", "images", box=SIMPLE_HEAD, show_edge=False)
    for row in rows:
        scores = [f"{row[key]:.4f}" for key in ("precision", "recall", "f1")]
        figures.add_row(row["name"], *scores, str(row["support"]))
    matrix = Table("true \\ predicted", *(row["name"] for row in rows), box=SIMPLE_HEAD, show_edge=False)
    for row, counts in zip(rows, evaluation["confusion_matrix"], strict=True):
        matrix.add_row(row["name"], *(str(count) if count else "." for count in counts))
    n_images = sum(row["support"] for row in rows)
    low, high = evaluation["interval"]
    accuracy = f"test accuracy {evaluation['accuracy']:.4f} (95% interval {low:.3f} to {high:.3f}) on {n_images} images"
    calibration = f"expected calibration error {evaluation['calibration']['error']:.4f}"
    return Group(accuracy, calibration, "", figures, "", matrix, *_render_mistakes(evaluation["mistakes"]))


def _render_mistakes(mistakes: Sequence[Mapping[str, Any]], n_shown: int = 5) -> list[RenderableType]:
    table = Table("worst mistakes", "true", "predicted", "probability", box=SIMPLE_HEAD, show_edge=False)
    for row in mistakes[:n_shown]:
        table.add_row(f"image {row['index']}", row["true"], row["predicted"], f"{row['probability']:.4f}")
    return ["", table] if mistakes else []


def prediction_line(prediction: Mapping[str, Any]) -> str:
    """`digit.png  7 0.9981  9 0.0012  1 0.0003`."""
    top = [f"{entry['class']} {entry['probability']:.4f}" for entry in prediction["top"]]
    return "  ".join([printable(prediction["image"]), *top])


def _show_cell(name: str, cell: Any) -> str:
    if cell is None:
        return ""
    places = {"value": 4, "seconds": 1}.get(name)
    return shorten(cell) if places is None else f"{cell:.{places}f}"
