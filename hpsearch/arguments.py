"""The arguments and options that several verbs share."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

StudyArgument = Annotated[str, typer.Argument(metavar="STUDY", help="A study file, or the name of one in studies/.")]
BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder that export wrote.")]
StorageOption = Annotated[
    str | None, typer.Option(help="SQLAlchemy URL instead of the study file's; so does HPSEARCH_STORAGE.")
]
DataOption = Annotated[
    Path | None, typer.Option(help="Folder of the data sets; else HPSEARCH_DATA, else the user's cache.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
WorkersOption = Annotated[
    int | None, typer.Option("--workers", min=1, max=1024, help="Default: one per GPU, else one per core.")
]


class State(StrEnum):
    """The states of a trial."""

    complete = "complete"
    pruned = "pruned"
    failed = "failed"
    running = "running"
    waiting = "waiting"


class Sort(StrEnum):
    """What `trials` can be sorted by."""

    number = "number"
    value = "value"
