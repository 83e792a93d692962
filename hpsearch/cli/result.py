"""The commands for the result of a search: each calls one function and prints its result."""

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from hpsearch.cli import options
from hpsearch.monitor.text import echo, printable

app = typer.Typer()


@app.command(epilog="Example:  hpsearch confirm studies/mnist-mlp.toml --top 3 --seeds 3")
def confirm(
    study: options.StudyArgument,
    top: Annotated[int, typer.Option(min=1, help="Number of best trials to retrain.")] = 3,
    seeds: Annotated[int, typer.Option(min=2, max=100, help="Training runs per trial, each with a new seed.")] = 3,
    workers: options.WorkersOption = None,
    storage: options.StorageOption = None,
    data: options.DataOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Retrain the best trials with new seeds and pick the winner. It is picked on validation data; `export` uses it."""
    named = options.NamedStudy(study, storage)
    stored = named.load_study()
    from hpsearch.bundle.confirm import confirm as confirm_trials
    from hpsearch.cli.render import render_confirmation
    from hpsearch.training.devices import default_workers, list_devices

    confirmation = confirm_trials(
        named.definition,
        stored,
        top=top,
        seeds=seeds,
        n_workers=workers or default_workers(),
        folder=data,
        devices=list_devices(),
        on_run=lambda trial, run, accuracy: echo(f"trial {trial}, run {run + 1}/{seeds}: {accuracy:.4f}"),
    )
    options.print_document(confirmation, render_confirmation, as_json=as_json)
    echo(f"next: hpsearch export {named.arguments}")


@app.command(epilog="Example:  hpsearch export studies/mnist-mlp.toml --onnx --output models/mnist-mlp")
def export(
    study: options.StudyArgument,
    trial: Annotated[int | None, typer.Option(min=0, help="Export this trial instead of the winner.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Output folder. [default: models/<study>]", callback=options.expand_path)
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Also replace a modified model, or one of another study.")
    ] = False,
    onnx: Annotated[bool, typer.Option("--onnx", help="Also write model.onnx (needs hpsearch[onnx]).")] = False,
    torch_export: Annotated[bool, typer.Option("--torch-export", help="Also write model.pt2 (torch.export).")] = False,
    storage: options.StorageOption = None,
    data: options.DataOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Retrain the winner, test it once and save it. Trains on the training and validation images together."""
    named = options.NamedStudy(study, storage)
    definition, stored = named.definition, named.load_study()
    from hpsearch.bundle.retrain import export as export_bundle
    from hpsearch.cli.render import render_export
    from hpsearch.search.selection import explain_choice
    from hpsearch.training.devices import list_devices

    target = output or Path("models") / definition.study.name
    n_models, n_epochs = definition.retrain.seeds, definition.retrain.epochs or definition.budget.epochs
    if trial is None:
        echo(explain_choice(stored, named.arguments))
    metrics = export_bundle(
        definition,
        stored,
        target,
        number=trial,
        onnx=onnx,
        torch_export=torch_export,
        folder=data,
        force=force,
        device=list_devices()[0],
        on_epoch=lambda i, result: echo(
            f"model {i + 1}/{n_models}  epoch {result.epoch}/{n_epochs}  loss {result.loss:.4f}"
        ),
    )
    options.print_document(metrics, lambda document: render_export(str(target), document), as_json=as_json)
    bundle = shlex.quote(str(target))
    following = f"hpsearch predict {bundle} IMAGE  |  hpsearch report {named.arguments}"
    echo(f"next: hpsearch evaluate {bundle}  |  {following}")


@app.command(epilog="Example:  hpsearch replay studies/mnist-mlp.toml --trial 17")
def replay(
    study: options.StudyArgument,
    trial: Annotated[int, typer.Option(min=0, help="Number of the trial (must have finished at least one epoch).")],
    storage: options.StorageOption = None,
    data: options.DataOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Re-run a trial and check that its learning curve is reproduced."""
    named = options.NamedStudy(study, storage)
    stored = named.load_study()
    from hpsearch.bundle.replay import replay as replay_trial
    from hpsearch.cli.render import render_replay
    from hpsearch.training.devices import list_devices

    document = replay_trial(
        named.definition,
        stored,
        trial,
        folder=data,
        device=list_devices()[0],
        on_epoch=lambda result: echo(f"epoch {result.epoch} loss {result.loss:.4f} accuracy {result.accuracy:.4f}"),
    )
    options.print_document(document, render_replay, as_json=as_json)
    if not document["identical"]:
        raise typer.Exit(1)


@app.command(epilog="Example:  hpsearch report studies/mnist-mlp.toml --output report.html")
def report(
    study: options.StudyArgument,
    output: Annotated[
        Path | None, typer.Option(help="Output file. [default: <study>-report.html]", callback=options.expand_path)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Also replace a file that is no report of the study.")] = False,
    bundle: Annotated[
        Path | None,
        typer.Option(
            help="Model folder to include. [default: models/<study>, if it exists]", callback=options.expand_path
        ),
    ] = None,
    storage: options.StorageOption = None,
) -> None:
    """Write an HTML report. Shows the winner, how certain its accuracy is, and how the search went; opens offline."""
    named = options.NamedStudy(study, storage)
    stored, name = named.load_study(), named.definition.study.name
    from hpsearch.bundle.bundle import load
    from hpsearch.monitor.report import find_bundle, write_report

    file = output or Path(f"{name}-report.html")
    if bundle:
        load(bundle)
    chosen = bundle or find_bundle(Path("models") / name, name)
    write_report(named.definition, stored, file, bundle=chosen, command=named.arguments, force=force)
    print(file)
    if chosen is None:
        again = f"hpsearch export {named.arguments}, then run report again"
        echo(f"no exported model found, so the report has no test accuracy; to add it: {again}")


@app.command(epilog="Example:  hpsearch evaluate models/mnist-mlp --pictures pictures")
def evaluate(
    bundle: options.BundleArgument,
    pictures: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Save plots (confusion matrix, calibration, worst errors) here.",
            callback=options.expand_path,
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Also replace pictures that are no plots of the study.")
    ] = False,
    data: options.DataOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Evaluate a saved model on the test set. Prints accuracy, per-class metrics, confusion matrix and calibration."""
    from dataclasses import asdict

    from hpsearch.bundle.bundle import load, read_origin
    from hpsearch.bundle.figures import check_folder, draw_evaluation
    from hpsearch.cli.render import render_evaluation
    from hpsearch.data.dataset import load_test

    classifier, name = load(bundle), read_origin(bundle).study
    if pictures:
        check_folder(pictures, name, force=force)
    evaluation = classifier.evaluate(data)
    options.print_document(asdict(evaluation), render_evaluation, as_json=as_json)
    if pictures:
        files = draw_evaluation(evaluation, load_test(classifier.config.data, data)[0], pictures, name)
        echo(f"plots saved: {', '.join(map(str, files))}")
    else:
        echo(f"next: hpsearch evaluate {shlex.quote(str(bundle))} --pictures DIR")


@app.command(epilog="Example:  hpsearch predict models/mnist-mlp digit.png scans/ 'more/**/*.jpg'")
def predict(
    bundle: options.BundleArgument,
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", help="Image files, folders or quoted glob patterns.")],
    as_json: options.JsonOption = False,
) -> None:
    """Classify images. Prints the top three classes with probabilities."""
    from hpsearch.bundle.bundle import load
    from hpsearch.bundle.predict import predict_files
    from hpsearch.cli.render import prediction_line

    def warn(file: str) -> None:
        echo(f"{printable(file)}: listed more than once, predicted once")

    n_errors, document = 0, []
    for prediction in predict_files(load(bundle), images, on_duplicate=warn):
        if "error" in prediction:
            n_errors += 1
            echo(f"error: {printable(prediction['error'])}")
        elif not as_json:
            print(prediction_line(prediction))
        if as_json:
            document.append(prediction)
    if as_json:
        print(json.dumps(document, indent=2))
    if n_errors:
        raise typer.Exit(1)
