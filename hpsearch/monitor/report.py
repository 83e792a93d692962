"""The report of a study: one self-contained HTML file, readable without knowledge of the project."""

import base64
import json
import math
import os
import platform
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import optuna
from jinja2 import Environment, PackageLoader, StrictUndefined
from optuna.trial import FrozenTrial, TrialState

from hpsearch.bundle import bundle as bundles
from hpsearch.bundle import formats
from hpsearch.bundle.config import Config
from hpsearch.bundle.evaluation import (
    candidate_interval,
    find_confusions,
    find_worst,
    is_unequal,
    trial_interval,
    wilson_interval,
)
from hpsearch.bundle.manifest import check_outside
from hpsearch.config.definition import StudyDefinition
from hpsearch.config.space import IntRange, Range
from hpsearch.config.validation import check_values
from hpsearch.errors import BundleError, UsageError
from hpsearch.monitor import plots
from hpsearch.monitor.text import count, format_cell, format_duration, format_percent, shorten
from hpsearch.monitor.trials import list_trials, read_status
from hpsearch.search.study import count_validation
from hpsearch.search.trials import explain_end, name_state
from hpsearch.storage.artifacts import replace_file
from hpsearch.storage.budget import measure_search
from hpsearch.training.metrics import Score, balanced_interval

MIN_TRIALS = 5  # needed for importances; completed ones for a contour plot
MAX_ROWS = 12
MAX_CLASSES = 25  # of more, only the worst are in view
PICTURES = ("confusion_matrix.png", "calibration.png", "mistakes.png")
VERSIONS = ("hpsearch", "optuna", "torch", "torchvision", "numpy", "matplotlib")


def write_report(
    definition: StudyDefinition,
    study: optuna.Study,
    file: Path,
    *,
    bundle: Path | None = None,
    command: str,
    force: bool = False,
) -> None:
    """Write the report atomically. Raises `UsageError` if the file cannot be written.

    Without `force`, it replaces only an older report of the same study.

    `command` holds the arguments of the commands that the report suggests. A bundle that is corrupt or from another
    search is left out, and the report says why.
    """
    _check_output(file, study, force=force)
    environment = Environment(
        loader=PackageLoader("hpsearch.monitor", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": format_percent, "duration": format_duration, "count": count, "cell": format_cell}
    text = environment.get_template("report.html.jinja").render(_collect(definition, study, bundle, command))
    try:
        with replace_file(file) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UsageError(f"cannot write {file}: {error.strerror}; choose another --output") from error


def _check_output(file: Path, study: optuna.Study, *, force: bool) -> None:
    """Raise `UsageError` for a file in a model folder and, without `force`, for all but a report of the study."""
    check_outside(file, "--output")
    if file.exists() and not file.is_file():
        raise UsageError(f"cannot write {file}: it is not a regular file; choose another --output")
    folder = file.resolve().parent
    if not os.access(folder, os.W_OK | os.X_OK):
        reason = "is not writable" if folder.exists() else "does not exist"
        raise UsageError(f"cannot write {file}: folder {folder} {reason}; choose another --output")
    if not file.exists():
        return
    with file.open("rb") as stream:
        if not force and not _is_report(stream.read(2**12).decode(errors="replace"), study):
            raise UsageError(
                f"{file} exists and is not a report of this study; choose another --output, or replace it with --force"
            )


def _mark(study: optuna.Study) -> str:
    """Return what identifies the reports of the study."""
    return f"hpsearch {study.study_name} {study.user_attrs.get('id', '')}"


def _is_report(head: str, study: optuna.Study) -> bool:
    """Return whether a file with that head is a report of the study; older versions wrote no id, or only the title."""
    name = study.study_name
    if 'name="generator"' not in head:
        return f"<title>{name}: hyperparameter search report</title>" in head
    return any(f'content="{mark}"' in head for mark in (_mark(study), f"hpsearch {name} "))


def find_bundle(folder: Path, name: str) -> Path | None:
    """Return the folder if it holds a bundle of the named study, else None."""
    try:
        metrics = json.loads((folder / "metrics.json").read_bytes())
    except (OSError, ValueError):
        return None
    return folder if isinstance(metrics, dict) and metrics.get("study") == name else None


def _collect(definition: StudyDefinition, study: optuna.Study, folder: Path | None, command: str) -> dict[str, Any]:
    """Return the variables of the template."""
    trials = study.get_trials(deepcopy=False)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    confirmation = study.user_attrs.get("confirmation") if complete else None
    rows = list_trials(study, None, "value", None)
    best = trials[rows[0]["number"]] if complete else None
    chosen = trials[confirmation["winner"]] if confirmation else best
    exported, problem = _read_bundle(folder, study, trials)
    n_members, shift = (exported["config"].n_members, exported["config"].shift) if exported else (1, 0)
    n_validation = count_validation(definition, study)
    for candidate in confirmation["candidates"] if confirmation else ():  # of older versions, it was narrower
        candidate["interval"] = candidate_interval(candidate, n_validation)
    compared = [candidate["number"] for candidate in confirmation["candidates"]] if confirmation else []
    reads, network = study.user_attrs.get("test_reads"), definition.network
    return {
        "definition": definition,
        "n_validation": n_validation,
        "networks": f"networks of {network.kind}" if network.code else f"{network.title}s",
        "summary": read_status(definition, study),
        "best": best,
        "chosen": chosen,
        "metric": definition.study.metric_title,
        "is_balanced": definition.study.metric == "balanced_accuracy",
        "interval": chosen and trial_interval(chosen, n_validation),
        "confirmation": confirmation,
        "is_best_compared": bool(best and best.number in compared),
        "bundle": exported,
        "bundle_problem": problem,
        "n_test_reads": len(reads) if reads is not None else exported and exported["metrics"].get("test_reads"),
        "formats": formats.choose_formats(definition.network.code, n_members, shift),
        "n_members": n_members,
        "shift": shift,
        "top": [row for row in rows if row["state"] == "complete"][:MAX_ROWS],
        "names": list(definition.search),
        "accuracies": {
            trial.number: trial.user_attrs["accuracy"] for trial in complete if "accuracy" in trial.user_attrs
        },
        "time": _sum_time(rows, definition.budget.epochs, trials),
        "n_combinations": len({tuple(sorted(trial.params.items())) for trial in trials if trial.params}),
        "notes": Counter(filter(None, map(_explain_failure, trials))).most_common(MAX_ROWS),
        "advice": list(advise(definition, chosen)) if chosen else [],
        "versions": {"Python": platform.python_version()} | {name: version(name) for name in VERSIONS},
        "toml": definition.to_toml(),
        "command": command,
        "mark": _mark(study),
        "min_trials": MIN_TRIALS,
        **_draw(definition, trials, complete, chosen),
    }


def _draw(
    definition: StudyDefinition,
    trials: Sequence[FrozenTrial],
    complete: Sequence[FrozenTrial],
    chosen: FrozenTrial | None,
) -> dict[str, Any]:
    """Return the plots for which there are enough trials; the others are None."""
    names = [name for name in definition.search if any(name in trial.params for trial in complete)]
    valued = [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED) and trial.values]
    ranked: dict[str, float] = {}
    if len(valued) >= MIN_TRIALS and len({trial.value for trial in valued}) > 1 and len(names) > 1:
        ranked = plots.rank_hyperparameters(valued, names)
    pair = _find_pair(list(ranked), complete)
    curves = [trial for trial in trials if trial.intermediate_values]
    metric = definition.study.metric_title
    return {
        "importances": ranked,
        "n_ranked": len(valued),
        "history": plots.draw_history(complete, metric) if complete else None,
        "importance_picture": plots.draw_importances(ranked) if ranked else None,
        "slices": [plots.draw_slice(name, complete, chosen, metric) for name in ranked or names] if chosen else [],
        "contour": plots.draw_contour(pair, complete, metric) if pair else None,
        "pair": pair,
        "curves": plots.draw_curves(curves, chosen, metric) if curves else None,
    }


def _find_pair(ranked: Sequence[str], complete: Sequence[FrozenTrial]) -> tuple[str, str] | None:
    """Return the two most important hyperparameters that enough trials have in common, each with several values."""
    for pair in ((first, second) for i, second in enumerate(ranked) for first in ranked[:i]):
        both = [[trial.params[name] for name in pair] for trial in complete if set(pair) <= trial.params.keys()]
        if len(both) >= MIN_TRIALS and all(len(set(column)) > 1 for column in zip(*both, strict=True)):
            return pair
    return None


def _read_bundle(
    folder: Path | None, study: optuna.Study, trials: Sequence[FrozenTrial]
) -> tuple[dict[str, Any] | None, str]:
    """Return the contents of a verified bundle of this study, or None and the reason why it cannot be used."""
    if folder is None:
        return None, ""
    try:
        config = bundles.load(folder).config
        metrics = json.loads((folder / "metrics.json").read_bytes())
        if metrics["study"] != study.study_name:
            raise BundleError(f"{folder} belongs to study '{metrics['study']}', not '{study.study_name}'")
        values = config.hyperparameters
        source = next((trial for trial in trials if trial.number == metrics["trial"] and trial.params), None)
        if source is None or any(values.get(name) != value for name, value in source.params.items()):
            raise BundleError(f"{folder} was exported from a different search with the same name; export again")
        return _describe_bundle(folder, config, metrics), ""
    except BundleError as error:
        return None, str(error)
    except (LookupError, TypeError, ValueError, OSError) as error:  # someone edited it and updated the manifest
        return None, f"{folder / 'metrics.json'} is invalid ({error}); export again"


def _describe_bundle(folder: Path, config: Config, metrics: dict[str, Any]) -> dict[str, Any]:
    classes, matrix = metrics["per_class"], metrics["confusion_matrix"]
    score = Score([row[i] for i, row in enumerate(matrix)], [sum(row) for row in matrix])
    confusions = find_confusions(matrix, 5 if len(classes) <= MAX_CLASSES else 12)
    pictures = [folder / name for name in PICTURES if (folder / name).is_file()]
    return {
        "folder": str(folder),
        "metrics": metrics,
        "config": config,
        "interval": metrics.get("test_interval")
        or wilson_interval(metrics["test_accuracy"], metrics["n_images"]["test"]),
        "confusions": [(n, classes[i]["name"], classes[j]["name"]) for n, i, j in confusions],
        "worst": find_worst(classes, MAX_CLASSES) if len(classes) > MAX_CLASSES else classes,
        "is_large": len(classes) > MAX_CLASSES,
        "is_unequal": is_unequal(score.n_images),
        "balanced": score.balanced_accuracy,
        "balanced_interval": balanced_interval([score]),
        "pictures": {file.name: base64.b64encode(file.read_bytes()).decode() for file in pictures},
    }


def _sum_time(rows: Sequence[dict[str, Any]], full: int, trials: Sequence[FrozenTrial]) -> dict[str, Any]:
    """Return trials, epochs and seconds by state and by worker, the seconds searched, and those saved by pruning."""
    started = [row | {"seconds": row["seconds"] or 0.0} for row in rows if row["state"] != "waiting"]
    pruned = [row for row in started if row["state"] == "pruned" and row["epoch"]]
    starts = [trial.datetime_start.astimezone() for trial in trials if trial.datetime_start]
    return {
        "seconds": sum(row["seconds"] for row in started),
        "by_state": _group(started, "state"),
        "by_worker": _group(started, "worker"),
        "saved": sum((full - row["epoch"]) * row["seconds"] / row["epoch"] for row in pruned),
        "searched": measure_search(trials),
        "since": min(starts, default=None),
    }


def _explain_failure(trial: FrozenTrial) -> tuple[str, str] | None:
    """Return how a trial went wrong, and why; None if it did not. To be pruned is no failure, unless it diverged."""
    outcome = "diverged" if "diverged" in trial.user_attrs else name_state(trial)
    return (outcome, explain_end(trial)[:300]) if outcome in ("diverged", "failed") else None


def _group(rows: Sequence[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """Return the number of rows, epochs and seconds for each value of `key`, the longest time first."""
    sums: dict[Any, dict[str, Any]] = {}
    for row in rows:
        group = sums.setdefault(row[key], {"name": row[key], "n": 0, "epoch": 0, "seconds": 0.0})
        group["n"] += 1
        group["epoch"] += row["epoch"]
        group["seconds"] += row["seconds"]
    return sorted(sums.values(), key=lambda group: -group["seconds"])


def advise(definition: StudyDefinition, trial: FrozenTrial) -> Iterator[dict[str, str]]:
    """Return, for each value at the edge of its range, which edge, and the line of the study file now and widened."""
    for name, dimension in definition.search.items():
        if not isinstance(dimension, Range) or name not in trial.params or _has_only_ends(dimension):
            continue
        value = trial.params[name]
        low, high, position = (math.log(x) if dimension.log else x for x in (*dimension.values, value))
        share = (position - low) / (high - low) if high > low else 0.5
        if 0.02 < share < 0.98:
            continue
        ends: list[Any] = list(dimension.values)
        end = int(share > 0.5)
        ends[end] = _find_wider(definition, name, dimension, end)
        if ends[end] is not None:
            wider = dimension.model_copy(update={"values": ends})
            now, then = (_toml_line(definition, name, table) for table in (dimension, wider))
            yield {"name": name, "value": shorten(value), "end": ("lower", "upper")[end], "now": now, "then": then}


def _has_only_ends(dimension: Range) -> bool:
    """Return whether the range has two values, so that each of them lies at an end."""
    low, high = dimension.values
    return dimension.step is not None and high - low < 1.5 * dimension.step


def _find_wider(definition: StudyDefinition, name: str, dimension: Range, end: int) -> int | float | None:
    """Return a valid value beyond that end of the range, or None if the hyperparameter allows none."""
    low, high = dimension.values
    sign, is_int = (-1, 1)[end], isinstance(dimension, IntRange)
    for part in (2.0**-i for i in range(8)):
        if dimension.log:
            value = dimension.values[end] * (2 if is_int else 10) ** (sign * part)
        else:
            room = (high - low) / 2 * part
            value = dimension.values[end] + sign * (
                max(1, round(room / dimension.step)) * dimension.step if dimension.step else room
            )
        value = round(value) if is_int else float(f"{value:.3g}")
        if value != dimension.values[end] and not check_values({name: value}, definition.space.hyperparameters):
            return value
    return None


def _toml_line(definition: StudyDefinition, name: str, dimension: Range) -> str:
    toml = definition.model_copy(update={"search": {name: dimension}}).to_toml()
    return next(line for line in toml.splitlines() if line.startswith(f"{name} = {{"))
