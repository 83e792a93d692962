"""The verbs of the command line for what a search has found: each calls one function and prints what it returns."""

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from hpsearch.cli.options import (
    BundleArgument,
    DataOption,
    JsonOption,
    StorageOption,
    StudyArgument,
    WorkersOption,
    load_definition_of,
    load_study_of,
    print_document,
    shell_arguments,
)

app = typer.Typer()


@app.command(epilog="Example:  hpsearch confirm studies/mnist-mlp.toml --top 3 --seeds 3")
def confirm(
    study: StudyArgument,
    top: Annotated[int, typer.Option(min=1, help="How many of the best trials.")] = 3,
    seeds: Annotated[int, typer.Option(min=2, max=100, help="Trainings of each, from fresh seeds.")] = 3,
    workers: WorkersOption = None,
    storage: StorageOption = None,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train the best few trials again from fresh seeds, and say which wins on validation; export takes the winner."""
    definition = load_definition_of(study, storage)
    stored = load_study_of(definition)
    from hpsearch.bundle.confirm import confirm as confirm_trials
    from hpsearch.cli.render import render_confirmation
    from hpsearch.monitor.text import echo
    from hpsearch.training.devices import default_workers, list_devices

    confirmation = confirm_trials(
        definition,
        stored,
        top=top,
        seeds=seeds,
        n_workers=workers or default_workers(),
        folder=data,
        devices=list_devices(),
        on_run=lambda trial, run, accuracy: echo(f"trial {trial} training {run + 1} of {seeds} {accuracy:.4f}"),
    )
    print_document(confirmation, render_confirmation, as_json=as_json)
    echo(f"next: hpsearch export {shell_arguments(study, storage)}")


@app.command(epilog="Example:  hpsearch export studies/mnist-mlp.toml --onnx --output dist/mnist-mlp")
def export(
    study: StudyArgument,
    trial: Annotated[int | None, typer.Option(min=0, help="Another trial than the confirmed or the best one.")] = None,
    output: Annotated[Path | None, typer.Option(help="Default: dist/<name of the study>.")] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Write model.onnx, too (needs the extra onnx).")] = False,
    torch_export: Annotated[bool, typer.Option("--torch-export", help="Write model.pt2, too.")] = False,
    storage: StorageOption = None,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Retrain the confirmed or best trial, measure it once on the test set, and write it as a bundle."""
    definition = load_definition_of(study, storage)
    stored = load_study_of(definition)
    from hpsearch.bundle.retrain import export as export_bundle
    from hpsearch.cli.render import render_export
    from hpsearch.monitor.text import echo
    from hpsearch.search.selection import explain_choice
    from hpsearch.training.devices import list_devices

    target = output or Path("dist") / definition.study.name
    if trial is None:
        echo(explain_choice(stored, shell_arguments(study, storage)))
    metrics = export_bundle(
        definition,
        stored,
        target,
        number=trial,
        onnx=onnx,
        torch_export=torch_export,
        folder=data,
        device=list_devices()[0],
        on_epoch=lambda seed, result: echo(f"model {seed + 1} epoch {result.epoch} loss {result.loss:.4f}"),
    )
    print_document(metrics, lambda document: render_export(str(target), document), as_json=as_json)
    bundle = shlex.quote(str(target))
    report_command = f"hpsearch report {shell_arguments(study, storage)}"
    echo(f"next: hpsearch evaluate {bundle}  |  hpsearch predict {bundle} IMAGE  |  {report_command}")


@app.command(epilog="Example:  hpsearch replay studies/mnist-mlp.toml --trial 17")
def replay(
    study: StudyArgument,
    trial: Annotated[int, typer.Option(min=0, help="A trial that has finished an epoch.")],
    storage: StorageOption = None,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a finished trial again from its seed, and say whether it gives the same learning curve."""
    definition = load_definition_of(study, storage)
    stored = load_study_of(definition)
    from hpsearch.bundle.replay import replay as replay_trial
    from hpsearch.cli.render import render_replay
    from hpsearch.monitor.text import echo
    from hpsearch.training.devices import list_devices

    document = replay_trial(
        definition,
        stored,
        trial,
        folder=data,
        device=list_devices()[0],
        on_epoch=lambda result: echo(f"epoch {result.epoch} loss {result.loss:.4f} accuracy {result.accuracy:.4f}"),
    )
    print_document(document, render_replay, as_json=as_json)
    if not document["identical"]:
        raise typer.Exit(1)


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
    from hpsearch.bundle.bundle import load
    from hpsearch.monitor.report import find_bundle, write_report
    from hpsearch.monitor.text import echo

    loaded = load_study_of(definition)
    name = definition.study.name
    file = output or Path(f"{name}-report.html")
    if bundle:
        load(bundle)
    chosen = bundle or find_bundle(Path("dist") / name, name)
    write_report(definition, loaded, file, bundle=chosen, command=shell_arguments(study, storage))
    print(file)
    if chosen is None:
        echo(
            f"next: hpsearch export {shell_arguments(study, storage)}, then report again, to include the test accuracy"
        )


@app.command(epilog="Example:  hpsearch evaluate dist/mnist-mlp --pictures pictures")
def evaluate(
    bundle: BundleArgument,
    pictures: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Draw confusion matrix, calibration and worst mistakes here.")
    ] = None,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a bundle on the test set: accuracy, per-class figures, confusion matrix, calibration, worst mistakes."""
    from dataclasses import asdict

    from hpsearch.bundle.bundle import load
    from hpsearch.bundle.figures import check_folder, draw_evaluation
    from hpsearch.cli.render import render_evaluation
    from hpsearch.data.dataset import load_test
    from hpsearch.monitor.text import echo

    if pictures:
        check_folder(pictures, bundle)
    classifier = load(bundle)
    evaluation = classifier.evaluate(data)
    print_document(asdict(evaluation), render_evaluation, as_json=as_json)
    if pictures:
        files = draw_evaluation(evaluation, load_test(classifier.config.data, data)[0], pictures)
        echo(f"drawn: {', '.join(map(str, files))}")
    else:
        echo(f"next: hpsearch evaluate {shlex.quote(str(bundle))} --pictures DIR")


@app.command(epilog="Example:  hpsearch predict dist/mnist-mlp digit.png scans/ 'more/**/*.jpg'")
def predict(
    bundle: BundleArgument,
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE...", help="Image files of any size, folders of them, and patterns.")
    ],
    as_json: JsonOption = False,
) -> None:
    """Give the softmax probabilities of the three likeliest classes of each image."""
    from hpsearch.bundle.bundle import load
    from hpsearch.bundle.predict import predict_files
    from hpsearch.cli.render import prediction_line
    from hpsearch.monitor.text import echo, printable

    def tell(file: str) -> None:
        echo(f"{printable(file)}: named again, predicted once")

    n_errors, document = 0, []
    for prediction in predict_files(load(bundle), images, on_duplicate=tell):
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
