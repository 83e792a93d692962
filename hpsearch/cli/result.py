"""The group `result`: each calls one function and prints its result."""

import json
import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from hpsearch.cli import options
from hpsearch.monitor.text import echo, printable

app = typer.Typer()


@app.command(epilog="Example: hpsearch confirm digits --top 3 --seeds 3")
def confirm(
    study: options.StudyArgument,
    top: Annotated[int, options.number("Number of best trials to retrain.", 1)] = 3,
    seeds: Annotated[int, options.number("New seeds for each of them.", 2, 100)] = 3,
    workers: options.WorkersOption = None,
    storage: options.StorageOption = None,
    data: options.DataOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Retrain the best trials: was it luck?

    The winner is chosen by the accuracy on the validation images; `export` takes it.
    """
    named = options.NamedStudy(study, storage)
    stored = named.load_study()
    from hpsearch.cli.render import render_confirmation
    from hpsearch.monitor.progress import Steps

    images = options.fetch_images(named.definition, data)
    with Steps() as show_step:
        show_step("loading PyTorch and the images")
        from hpsearch.bundle.confirm import confirm as confirm_trials
        from hpsearch.training.devices import default_workers, list_devices

        confirmation = confirm_trials(
            named.definition,
            stored,
            top=top,
            seeds=seeds,
            n_workers=workers or default_workers(),
            folder=images,
            devices=list_devices(),
            on_run=lambda trial, run, accuracy: echo(f"trial {trial}, run {run + 1}/{seeds}: {accuracy:.4f}"),
            on_epoch=lambda n_done, n_total: show_step("retraining, epochs", n_done, n_total),
        )
    options.print_document(confirmation, render_confirmation, as_json=as_json)
    echo(f"next: hpsearch export {named.arguments}")


@app.command(epilog="Example: hpsearch export digits --onnx")
def export(
    study: options.StudyArgument,
    trial: Annotated[int | None, options.number("Export this trial, not the winner.", 0)] = None,
    output: Annotated[Path | None, options.path("DIR", "Model folder. [default: models/<study>]")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace any model: edited, of another study.")] = False,
    onnx: Annotated[bool, typer.Option("--onnx", help="Also write model.onnx; needs hpsearch[onnx].")] = False,
    torch_export: Annotated[bool, typer.Option("--torch-export", help="Also write model.pt2 (torch.export).")] = False,
    workers: options.WorkersOption = None,
    storage: options.StorageOption = None,
    data: options.DataOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Retrain, test and save the winner.

    It is trained on the training and validation images together, and tested once.
    """
    named = options.NamedStudy(study, storage)
    definition, stored = named.definition, named.load_study()
    from hpsearch.cli.render import render_export
    from hpsearch.monitor.progress import Steps
    from hpsearch.search.selection import explain_choice

    target = output or Path("models") / definition.study.name
    n_models, n_epochs = definition.retrain.seeds, definition.retrain.epochs or definition.budget.epochs
    if trial is None:
        echo(explain_choice(stored, named.arguments))
    images = options.fetch_images(definition, data)
    with Steps() as show_step:
        show_step("loading PyTorch and the images")
        from hpsearch.bundle.retrain import export as export_bundle
        from hpsearch.training.devices import default_workers, list_devices
        from hpsearch.training.trainer import EpochResult

        n_done = dict[int, int]()

        def on_epoch(i: int, result: EpochResult) -> None:
            n_done[i] = result.epoch
            line = f"model {i + 1}/{n_models}  epoch {result.epoch}/{n_epochs}  loss {result.loss:.4f}"
            step = "training, epochs" if n_models == 1 else f"training {n_models} models, epochs"
            show_step(step, sum(n_done.values()), n_models * n_epochs, line=line)
            if sum(n_done.values()) == n_models * n_epochs:
                show_step("testing, writing the model folder")

        metrics = export_bundle(
            definition,
            stored,
            target,
            number=trial,
            onnx=onnx,
            torch_export=torch_export,
            folder=images,
            force=force,
            n_workers=workers or default_workers(),
            devices=list_devices(),
            on_epoch=on_epoch,
            on_file=lambda n_done, n_total: show_step("verifying the model files", n_done, n_total),
        )
    options.print_document(metrics, lambda document: render_export(str(target), document), as_json=as_json)
    bundle = shlex.quote(str(target))
    place = definition.data.folder or definition.data.file
    own = f" --data {shlex.quote(os.path.relpath(data or place))}" if place else ""
    evaluation = "" if definition.data.code else f"hpsearch evaluate {bundle}{own}  |  "
    echo(f"next: {_suggest_prediction(target)}{evaluation}hpsearch report {named.arguments}")


def _suggest_prediction(bundle: Path) -> str:
    """Return the command that classifies the test image in a model folder; those of older versions have none."""
    from hpsearch.bundle.bundle import EXAMPLE

    image = bundle / EXAMPLE
    return f"{shlex.join(['hpsearch', 'predict', str(bundle), str(image)])}  |  " if image.is_file() else ""


@app.command(epilog="Example: hpsearch predict models/digits digit.png scans/ 'more/**/*.jpg'")
def predict(
    bundle: options.BundleArgument,
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", help="Image files, folders or quoted patterns.")],
    as_json: options.JsonOption = False,
) -> None:
    """Classify images with a saved model."""
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
            print(prediction_line(prediction), flush=True)
            if prediction["unlike"]:
                echo(f"warning: {printable(prediction['image'])} is unlike the training images")
        if as_json:
            document.append(prediction)
    if as_json:
        print(json.dumps(document, indent=2))
    if n_errors:
        raise typer.Exit(1)


@app.command(epilog="Example: hpsearch evaluate models/digits --pictures pictures")
def evaluate(
    bundle: options.BundleArgument,
    pictures: Annotated[Path | None, options.path("DIR", "Save plots of the metrics here.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace pictures that are no plots of it.")] = False,
    data: options.DataOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Test a saved model."""
    from dataclasses import asdict

    from hpsearch.bundle.bundle import load, read_origin
    from hpsearch.bundle.evaluation import evaluate as measure
    from hpsearch.bundle.figures import check_folder, draw_evaluation
    from hpsearch.cli.render import render_evaluation

    classifier, name = load(bundle), read_origin(bundle).study
    if pictures:
        check_folder(pictures, name, force=force)
    images, labels = classifier.load_test(data)
    is_photo = classifier.config.preparation.kind == "photo"
    evaluation = measure(classifier.predict_proba(images), labels.numpy(), classifier.class_names)
    options.print_document(asdict(evaluation), render_evaluation, as_json=as_json)
    if pictures:
        files = draw_evaluation(evaluation, images, pictures, name, is_photo=is_photo)
        echo(f"plots saved: {', '.join(map(str, files))}")
    else:
        again = f"hpsearch evaluate {shlex.quote(str(bundle))}{f' --data {shlex.quote(str(data))}' if data else ''}"
        echo(f"next: {_suggest_prediction(bundle)}{again} --pictures plots")


@app.command(epilog="Example: hpsearch report digits --output report.html")
def report(
    study: options.StudyArgument,
    output: Annotated[Path | None, options.path("FILE", "HTML file. [default: <study>-report.html]")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is no report of it.")] = False,
    bundle: Annotated[
        Path | None,
        options.path("DIR", "Model folder. [default: models/<study>, if any]", options.find_model_folder),
    ] = None,
    storage: options.StorageOption = None,
) -> None:
    """Write an HTML report.

    It shows the winner, how certain its accuracy is, and how the search went.
    """
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
