"""Results of the commands as tables and lines."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hpsearch.bundle.evaluation import find_confusions, find_worst, is_unequal
from hpsearch.monitor.tables import Column, FittedTable, tabulate
from hpsearch.monitor.text import (
    count,
    describe_best,
    describe_epochs,
    describe_patience,
    join_params,
    printable,
    shorten,
)
from hpsearch.monitor.trials import describe_interruption
from hpsearch.search.selection import confirmed_values
from hpsearch.training.devices import count_cores, share_cores
from hpsearch.workers.cores import needs_core

_N_ERRORS = 5  # shown by `evaluate`
_N_CLASSES = 20  # of more classes, `evaluate` shows only the worst, and no confusion matrix
_N_WORST = 10
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
    if patience := describe_patience(status):
        table.add_row("patience", patience)
    table.add_row("epochs", describe_epochs(**epochs))
    table.add_row("best", Text(describe_best(best, status["metric"]), style="bold" if best else ""))
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
    metric = trial["metric"].replace("_", " ")
    if trial["value"] is not None:
        beside = "" if trial["accuracy"] is None else f" (accuracy {trial['accuracy']:.4f})"
        table.add_row(f"val. {metric}", f"{trial['value']:.4f}{beside}")
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
    table.add_row(f"val. {metric} by epoch", Text("  ".join(reports) or "none", overflow="fold"))
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
    is_balanced = confirmation.get("metric") == "balanced_accuracy"
    short, metric = ("bal. acc.", "balanced accuracy") if is_balanced else ("acc.", "accuracy")
    rows = []
    for number, candidate in candidates.items():
        values, accuracies = confirmed_values(candidate), candidate["accuracies"]
        row = {
            "trial": str(number),
            f"mean {short}": f"{candidate['mean']:.4f}",
            "95% CI": "{:.4f} to {:.4f}".format(*candidate["interval"]),
            f"search {short}": f"{candidate['search_value']:.4f}",
            "min": _show_accuracy(min(values)),
            "max": _show_accuracy(max(values)),
            "params": f"{candidate['n_parameters']:,}",
        }
        rows.append(row | ({"mean acc.": f"{sum(accuracies) / len(accuracies):.4f}"} if is_balanced else {}))
    table = tabulate(rows, emphasized=list(candidates).index(confirmation["winner"]))
    winner, seeds = candidates[confirmation["winner"]], confirmation["seeds"]
    verdict = f"trial {winner['number']}, mean {metric} {winner['mean']:.4f} over {seeds} seeds"
    tie = "tie: the differences are within noise, so the smallest network is chosen: "
    verdict = f"{tie if confirmation['is_tie'] else 'winner: '}{verdict}"
    optimism = round(confirmation["optimism"], 4) + 0.0  # no minus before a zero
    side = "that much above" if optimism > 0 else "that much below" if optimism < 0 else "equal to"
    bias = f"selection bias: {optimism:+.4f} (the search's best value is {side} the mean of its retrainings)"
    return Group(table, "", Text(verdict, style="bold"), Text(bias))


def _show_accuracy(value: float) -> str:
    return f"{value:.4f}" if value else "diverged"


def render_export(target: str, metrics: Mapping[str, Any]) -> RenderableType:
    """Return the model folder, its accuracies, and the verification of its files."""
    n_images, n_uses = metrics["n_images"]["test"], metrics["test_reads"]
    described = _describe_accuracies(
        {key: metrics[f"test_{key}"] for key in ("accuracy", "interval", "balanced_accuracy", "balanced_interval")},
        metrics["per_class"],
        metrics["metric"],
        digits=4,
    )
    lines = [
        f"{target}: trial {metrics['trial']}, {described} on {n_images:,} test images; "
        f"the test set has now been used by {count(n_uses, 'export')} of this study"
    ]
    several = metrics["test_balanced_accuracies" if metrics["metric"] == "balanced_accuracy" else "test_accuracies"]
    if several["std"] is not None:
        n_models = len(several["of_each_seed"])
        mean, std = f"mean {several['mean']:.4f}", f"standard deviation {several['std']:.4f}"
        which = (
            f"each of the {n_models} networks alone"
            if metrics["n_members"] > 1
            else f"{n_models} models with different seeds"
        )
        which += ", without shifted copies" if metrics["shift"] else ""
        lines.append(f"{which}: {mean}, {std}")
    if metrics["shift"]:
        alone = f"; without them {several['of_each_seed'][0]:.4f}" if metrics["n_members"] == 1 else ""
        lines.append(f"averaged over each image and copies shifted by {count(metrics['shift'], 'pixel')}{alone}")
    files = [
        {
            "file": name,
            "test accuracy": f"{check['accuracy']:.4f}",
            "max. probability difference": shorten(check["difference"]),
        }
        for name, check in metrics["verified"].items()
    ]
    return Group(*(Text(line) for line in lines), "", tabulate(files, texts={"file"}))


def _describe_accuracies(
    values: Mapping[str, Any], per_class: Sequence[Mapping[str, Any]], metric: str, digits: int
) -> str:
    """Return the test accuracy with its interval; and the balanced one, if it is the metric or classes differ in size.

    The one that is the metric comes first.
    """
    texts = []
    for name, interval in (("accuracy", "interval"), ("balanced_accuracy", "balanced_interval")):
        low, high = values[interval]
        ci = f"(95% CI {low:.{digits}f} to {high:.{digits}f})"
        texts.append(f"{name.replace('_', ' ')} {values[name]:.4f} {ci}")
    if metric == "balanced_accuracy":
        return f"test {texts[1]}, {texts[0]}"
    return f"test {', '.join(texts if is_unequal([row['support'] for row in per_class]) else texts[:1])}"


def render_replay(document: Mapping[str, Any]) -> RenderableType:
    """Return whether the trial was reproduced; if not, the largest difference and its causes."""
    trial, value, epochs = f"trial {document['trial']}", f"{document['value']:.4f}", document["epochs"]
    metric = document["metric"].replace("_", " ")
    if document["identical"]:
        return Text(f"{trial}: reproduced exactly, all {epochs} epochs identical (final {metric} {value})")
    replayed, largest = document["replayed_value"], document["largest_difference"]
    now = "now training diverges before the last epoch" if replayed is None else f"is now {replayed:.4f}"
    size = f", largest difference {largest:.4f} (epoch {document['epoch']})" if largest else ""
    lines = [
        f"{trial}: NOT reproduced{size}; final {metric} was {value}, {now}",
        *(f"  {reason}" for reason in document["reasons"]),
    ]
    return Group(*(Text(line) for line in lines))


def render_evaluation(evaluation: Mapping[str, Any]) -> RenderableType:
    """Return accuracies, calibration, and tables of per-class metrics, the confusion matrix and the worst errors.

    Of more than 20 classes, it has only those with the lowest recall, and the most frequent confusions.
    """
    rows, matrix = evaluation["per_class"], evaluation["confusion_matrix"]
    is_large = len(rows) > _N_CLASSES
    per_class = [
        {
            "class": row["name"],
            **{heading: _show_share(row[heading.lower()]) for heading in ("precision", "recall", "F1")},
            "images": str(row["support"]),
        }
        for row in (find_worst(rows, _N_WORST) if is_large else rows)
    ]
    n_images = sum(row["support"] for row in rows)
    accuracy = f"{_describe_accuracies(evaluation, rows, 'accuracy', digits=3)} on {n_images:,} images"
    calibration = f"expected calibration error {evaluation['calibration']['error']:.4f}"
    errors = [
        {
            "test image": str(row["index"]),
            **{name: row[name] for name in ("true", "predicted")},
            "confidence": _format_probability(row["probability"]),
        }
        for row in evaluation["mistakes"][:_N_ERRORS]
    ]
    parts: list[RenderableType] = [Text(accuracy), calibration, ""]
    if is_large:
        parts.append(f"the {_N_WORST} of {len(rows)} classes with the lowest recall (--json has all):")
    parts.append(tabulate(per_class, names={"class"}))
    names = [row["name"] for row in rows]
    if not is_large:
        parts += ["", "confusion matrix: true classes in rows, predicted ones in columns"]
        parts.append(_tabulate_confusion(names, matrix))
    elif confusions := find_confusions(matrix, _N_WORST):
        pairs = [{"images": f"{n:,}", "true": names[i], "predicted": names[j]} for n, i, j in confusions]
        parts += ["", "most frequent confusions:", tabulate(pairs, names={"true", "predicted"})]
    if errors:
        parts += ["", "most confident errors:", tabulate(errors, names={"true", "predicted"})]
    return Group(*parts)


def _show_share(share: float | None) -> str:
    return "-" if share is None else f"{share:.4f}"


def _tabulate_confusion(names: Sequence[str], matrix: Sequence[Sequence[int]]) -> FittedTable:
    """Return a row for each true class and a column for each predicted one; long names of columns become numbers."""
    cells = [[str(n) if n else "." for n in counts] for counts in zip(*matrix, strict=True)]
    widest = max(len(cell) for column in cells for cell in column)
    true, predicted = list(names), list(names)
    if max(map(len, names)) > widest:
        true, predicted = [f"{i} {name}" for i, name in enumerate(names)], [str(i) for i in range(len(names))]
    columns = [Column(*column) for column in zip(predicted, cells, strict=True)]
    return FittedTable([Column("true", true, is_text=True, may_be_cut=True), *columns], continues=True)


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
