"""The verbs of the command line for what a search has found: each calls one function and prints what it returns."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from hpsearch.arguments import (
    BundleArgument,
    DataOption,
    JsonOption,
    StorageOption,
    StudyArgument,
    load_definition_of,
    load_study_of,
    print_document,
)

app = typer.Typer()


@app.command(epilog="Example:  hpsearch export studies/mnist-mlp.toml --output dist/mnist-mlp")
def export(
    study: StudyArgument,
    trial: Annotated[int | None, typer.Option(min=0, help="Another trial than the best.")] = None,
    output: Annotated[Path | None, typer.Option(help="Default: dist/<name of the study>.")] = None,
    storage: StorageOption = None,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Retrain the best trial, measure it once on the test set, and write it as a bundle."""
    definition = load_definition_of(study, storage)
    from hpsearch.console import say
    from hpsearch.retrain import export as export_bundle
    from hpsearch.worker import list_devices

    target = output or Path("dist") / definition.study.name
    metrics = export_bundle(
        definition,
        load_study_of(definition),
        target,
        number=trial,
        folder=data,
        device=list_devices()[0],
        on_epoch=lambda seed, result: say(f"model {seed + 1} epoch {result.epoch} loss {result.loss:.4f}"),
    )
    print_document(
        metrics, lambda m: f"{target}: trial {m['trial']}, test accuracy {m['test_accuracy']:.4f}", as_json=as_json
    )
    bundle = shlex.quote(str(target))
    say(f"next: hpsearch evaluate {bundle}  |  hpsearch predict {bundle} IMAGE")


@app.command(epilog="Example:  hpsearch report studies/mnist-mlp.toml --output report.html")
def report(
    study: StudyArgument,
    output: Annotated[Path | None, typer.Option(help="Default: <name of the study>-report.html.")] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="A folder that export wrote; default: dist/<name of the study>, if it is there.")
    ] = None,
    storage: StorageOption = None,
) -> None:
    """Write one HTML file that opens offline: how good the winner is, how sure that is, and what the search did."""
    definition = load_definition_of(study, storage)
    from hpsearch.console import say
    from hpsearch.database import show_url
    from hpsearch.report import find_bundle, write_report

    loaded = load_study_of(definition)
    name = definition.study.name
    file = output or Path(f"{name}-report.html")
    place = f" --storage {shlex.quote(show_url(storage))}" if storage else ""
    chosen = bundle or find_bundle(Path("dist") / name, name)
    write_report(definition, loaded, file, bundle=chosen, command=shlex.quote(study) + place)
    print(file)
    if chosen is None:
        say(f"next: hpsearch export {shlex.quote(study)}{place}, then report again, to have the test accuracy in it")


@app.command(epilog="Example:  hpsearch evaluate dist/mnist-mlp")
def evaluate(bundle: BundleArgument, data: DataOption = None, as_json: JsonOption = False) -> None:
    """Measure a bundle on the test set: accuracy, per-class figures, confusion matrix."""
    from dataclasses import asdict

    from hpsearch.bundle import load
    from hpsearch.console import render_evaluation

    print_document(asdict(load(bundle).evaluate(data)), render_evaluation, as_json=as_json)


@app.command(epilog="Example:  hpsearch predict dist/mnist-mlp digit.png")
def predict(
    bundle: BundleArgument,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="PNG or JPEG files of any size.")],
    as_json: JsonOption = False,
) -> None:
    """Give the softmax probabilities of the three likeliest classes of each image."""
    from hpsearch.bundle import load, predict_files
    from hpsearch.console import render_predictions, say

    predictions = list(predict_files(load(bundle), images))
    for prediction in predictions:
        if "error" in prediction:
            say(f"error: {prediction['error']}")
    print_document(predictions, render_predictions, as_json=as_json)
    if any("error" in prediction for prediction in predictions):
        raise typer.Exit(1)
