"""Results of the commands as tables and lines."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hpsearch.monitor.tables import Column, FittedTable, tabulate
from hpsearch.monitor.text import count, describe_best, describe_epochs, join_params, printable, shorten
from hpsearch.monitor.trials import describe_interruption
from hpsearch.training.devices import count_cores, share_cores
from hpsearch.workers.cores import needs_core

_N_ERRORS = 5  # shown by `evaluate`
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")


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


def render_trial(trial: Mapping[str, Any]) -> RenderableType:
    """Return the document of `trials STUDY 17 --json` as text."""
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
    candidates = {candidate["number"]: candidate for candidate in confirmation["candidates"]}
    table = tabulate(
        [
            {
                "trial": str(number),
                "mean acc.": f"{candidate['mean']:.4f}",
                "95% CI": "{:.4f} to {:.4f}".format(*candidate["interval"]),
                "search acc.": f"{candidate['search_value']:.4f}",
                "min": _show_accuracy(min(candidate["accuracies"])),
                "max": _show_accuracy(max(candidate["accuracies"])),
                "params": f"{candidate['n_parameters']:,}",
            }
            for number, candidate in candidates.items()
        ],
        emphasized=list(candidates).index(confirmation["winner"]),
    )
    winner, seeds = candidates[confirmation["winner"]], confirmation["seeds"]
    verdict = f"trial {winner['number']}, mean accuracy {winner['mean']:.4f} over {seeds} seeds"
    tie = "tie: the differences are within noise, so the smallest network is chosen: "
    verdict = f"{tie if confirmation['is_tie'] else 'winner: '}{verdict}"
    optimism = round(confirmation["optimism"], 4) + 0.0  # no minus before a zero
    side = "that much above" if optimism > 0 else "that much below" if optimism < 0 else "equal to"
    bias = f"selection bias: {optimism:+.4f} (the search's best value is {side} the mean of its retrainings)"
    return Group(table, "", Text(verdict, style="bold"), Text(bias))


def _show_accuracy(value: float) -> str:
    return f"{value:.4f}" if value else "diverged"


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
    files = [
        {
            "file": name,
            "test accuracy": f"{check['accuracy']:.4f}",
            "max. probability difference": shorten(check["difference"]),
        }
        for name, check in metrics["verified"].items()
    ]
    return Group(*(Text(line) for line in lines), "", tabulate(files, texts={"file"}))


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
    per_class = [
        {
            "class": row["name"],
            **{heading: f"{row[heading.lower()]:.4f}" for heading in ("precision", "recall", "F1")},
            "images": str(row["support"]),
        }
        for row in rows
    ]
    n_images = sum(row["support"] for row in rows)
    low, high = evaluation["interval"]
    accuracy = f"test accuracy {evaluation['accuracy']:.4f} (95% CI {low:.3f} to {high:.3f}) on {n_images:,} images"
    calibration = f"expected calibration error {evaluation['calibration']['error']:.4f}"
    errors = [
        {
            "test image": str(row["index"]),
            **{name: row[name] for name in ("true", "predicted")},
            "confidence": f"{row['probability']:.4f}",
        }
        for row in evaluation["mistakes"][:_N_ERRORS]
    ]
    matrix = _tabulate_confusion([row["name"] for row in rows], evaluation["confusion_matrix"])
    parts: list[RenderableType] = [accuracy, calibration, "", tabulate(per_class, texts={"class"})]
    parts += ["", "confusion matrix: true classes in rows, predicted ones in columns", matrix]
    if errors:
        parts += ["", "most confident errors:", tabulate(errors, texts={"true", "predicted"})]
    return Group(*parts)


def _tabulate_confusion(names: Sequence[str], matrix: Sequence[Sequence[int]]) -> FittedTable:
    """Return a row for each true class and a column for each predicted one; long names of columns become numbers."""
    cells = [[str(n) if n else "." for n in counts] for counts in zip(*matrix, strict=True)]
    widest = max(len(cell) for column in cells for cell in column)
    true, predicted = list(names), list(names)
    if max(map(len, names)) > widest:
        true, predicted = [f"{i} {name}" for i, name in enumerate(names)], [str(i) for i in range(len(names))]
    columns = [Column(*column) for column in zip(predicted, cells, strict=True)]
    return FittedTable([Column("true", true, is_text=True), *columns], continues=True)


def prediction_line(prediction: Mapping[str, Any]) -> str:
    """Return a line such as `digit.png  7 >0.9999  9 <0.0001  1 <0.0001`."""
    top = [f"{entry['class']} {_format_probability(entry['probability'])}" for entry in prediction["top"]]
    return "  ".join([printable(prediction["image"]), *top])


def _format_probability(probability: float) -> str:
    """Return four decimals. No network is certain, so neither `1.0000` nor `0.0000`."""
    if probability > 0.9999:
        return ">0.9999"
    return "<0.0001" if probability < 0.0001 else f"{probability:.4f}"


def describe_share(n_workers: int, n_threads: int | None = None) -> str:
    """Return what a worker brings that joins as number `n_workers` on this machine, with `n_threads` if given."""
    ordinal = f"{_ORDINALS[n_workers - 1]} worker" if n_workers <= len(_ORDINALS) else f"worker {n_workers}"
    share = count(n_threads or share_cores(n_workers), "thread")
    if needs_core(n_workers):
        waits = "it waits until another one ends (--threads 1 starts it now)"
        share = f"it will not speed up the search; {share if n_threads else waits}"
    return f"{ordinal} on {count(count_cores(), 'core')}: {share}"
