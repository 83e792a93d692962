"""The arguments and options that several verbs share, what they stand for, and how a verb's answer is printed."""

import json
import shlex
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import optuna
    from rich.console import RenderableType

    from hpsearch.config.definition import StudyDefinition


def complete_study(incomplete: str) -> list[str]:
    """What a shell offers for STUDY: names in studies/, and the paths of study files."""
    names = [file.stem for file in Path("studies").glob("*.toml") if file.stem.startswith(incomplete)]
    folder = Path(incomplete.rpartition("/")[0] or ("/" if incomplete.startswith("/") else "."))
    paths = [str(path) for pattern in ("*.toml", "*/*.toml") for path in folder.glob(pattern)]
    return sorted([*names, *(path for path in paths if incomplete and path.startswith(incomplete))])


StudyArgument = Annotated[
    str,
    typer.Argument(
        metavar="STUDY", help="A study file, or the name of one in studies/.", autocompletion=complete_study
    ),
]
BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder that export wrote.")]
StorageOption = Annotated[
    str | None, typer.Option(help="SQLAlchemy URL instead of the study file's; so does HPSEARCH_STORAGE.")
]
ArtifactsOption = Annotated[
    str | None, typer.Option(help="Folder or URL instead of the study file's; so does HPSEARCH_ARTIFACTS.")
]
DataOption = Annotated[
    Path | None, typer.Option(help="Folder of the data sets; else HPSEARCH_DATA, else the user's cache.")
]
TrialsOption = Annotated[int | None, typer.Option(min=1, help="Overrides budget.trials.")]
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


def load_definition_of(
    study: str, storage: str | None, trials: int | None = None, artifacts: str | None = None
) -> "StudyDefinition":
    """The study that the argument names; `trials` replaces that of its budget."""
    import optuna

    from hpsearch.config.definition import evolve, load_definition

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    definition = load_definition(study, storage=storage, artifacts=artifacts)
    warn_about_password("--storage", storage)
    return definition if trials is None else evolve(definition, "budget", trials=trials)


def warn_about_password(option: str, url: str | None) -> None:
    """Say that a password was typed where it can be read."""
    from hpsearch.config.urls import find_secrets
    from hpsearch.monitor.text import echo

    if url and find_secrets(url):
        echo(
            f"others can read the password of {option} in the list of processes; better places for it are "
            "HPSEARCH_STORAGE, PGPASSWORD and ~/.pgpass"
        )


def load_study_of(definition: "StudyDefinition") -> "optuna.Study":
    """The stored study of a definition; nothing is created."""
    from hpsearch.search.study import load_study
    from hpsearch.storage.rdb import open_storage

    return load_study(definition, open_storage(definition.study.storage, must_exist=True))


def shell_arguments(study: str, storage: str | None) -> str:
    """The study's arguments as they can be typed again, the password of the storage hidden."""
    from hpsearch.config.urls import show_url

    return shlex.quote(study) + (f" --storage {shlex.quote(show_url(storage))}" if storage else "")


def print_document(document: Any, render: Callable[[Any], "RenderableType"], *, as_json: bool) -> None:
    """Print a verb's answer on stdout, as JSON or as text."""
    from hpsearch.monitor.text import show

    if as_json:
        print(json.dumps(document, indent=2))
    else:
        show(render(document))


def print_status(definition: "StudyDefinition", *, as_json: bool) -> None:
    """Print the document of `status`, and say if the study is stopped."""
    from hpsearch.cli.render import render_status
    from hpsearch.monitor.text import echo
    from hpsearch.search.trials import read_status

    study = load_study_of(definition)
    print_document(read_status(definition, study), render_status, as_json=as_json)
    if study.user_attrs.get("stopped"):
        echo("the study is stopped for all workers; hpsearch run goes on with it")
