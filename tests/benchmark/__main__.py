"""The command line of the benchmark."""

import argparse
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path

import optuna
import torchvision

from hpsearch.data.dataset import load_test
from hpsearch.data.sets import data_folder
from hpsearch.errors import HpsearchError
from tests.benchmark import (
    joining,
    many,
    pictures,
    pieces,
    quality,
    recipe,
    record,
    replay,
    searches,
    step,
    unlike,
    watching,
    whole,
)
from tests.benchmark.report import UNFAIR, Options, Row, show

PARTS = {
    "throughput": searches.throughput,
    "full": searches.full_fidelity,
    "storage": pieces.storage,
    "loader": pieces.loader,
    "quality": quality.quality,
    "startup": searches.start_up,
    "step": step.step,
    "scaling": searches.scaling,
    "joining": joining.joining,
    "watching": watching.watching,
    "gpu": searches.gpu,
    "many": many.many,
    "pictures": pictures.pictures,
    "unlike": unlike.unlike,
}
_ON_REQUEST = {
    "replay": replay.replay,
    "record": record.record,
    "recipe": recipe.recipe,
    "whole": whole.whole,
}  # they take hours


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/benchmark", description="Measure hpsearch side by side.")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind, in turn (default: 3)")
    parser.add_argument("--output", type=Path, default=Path("dist/benchmark.json"), help="default: dist/benchmark.json")
    names = [*PARTS, *_ON_REQUEST]
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"of {', '.join(names)} (default: all but the last four)"
    )
    options = parser.parse_args()
    if unknown := {*options.parts} - {*names}:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", "Heartbeat of storage is supposed to be used with Study.optimize")
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        load_test("mnist")  # downloads what is missing
    except HpsearchError as error:
        sys.exit(f"error: {error}")
    torchvision.datasets.MNIST(str(data_folder()), download=True)  # the textbook way reads the unpacked files
    options.output.parent.mkdir(parents=True, exist_ok=True)
    settings = Options(options.repeats, data_folder(), options.output.parent)
    os.environ["HPSEARCH_DATA"] = str(settings.data.absolute())
    rows: list[Row] = []
    for name, measure in (PARTS | _ON_REQUEST).items():
        if name in (options.parts or PARTS):
            print(f"{name} ...", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(prefix=f"benchmark-{name}-") as folder:
                rows += measure(Path(folder), settings)
            show(rows, options.output)
    if any(row.what.startswith(UNFAIR) for row in rows):
        sys.exit("the ways did not do the same work equally well")


if __name__ == "__main__":
    main()
