"""Arguments and options shared by several commands, the study that they name, and how a result is printed."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hpsearch.monitor.text import echo, show

if TYPE_CHECKING:
    import optuna
    from rich.console import RenderableType

    from hpsearch.monitor.status import Watch


def complete_study(incomplete: str) -> list[str]:
    """Return the shell completions for STUDY: names in studies/, and paths of study files."""
    names = [file.stem for file in Path("studies").glob("*.toml") if file.stem.startswith(incomplete)]
    folder = Path(incomplete.rpartition("/")[0] or ("/" if incomplete.startswith("/") else "."))
    paths = [str(path) for pattern in ("*.toml", "*/*.toml") for path in folder.glob(pattern)]
    return sorted([*names, *(path for path in paths if incomplete and path.startswith(incomplete))])


def expand_path(path: Path | None) -> Path | None:
    """Return the path with the home folder for a leading `~`, which shells leave alone in `--output=~/x`."""
    from hpsearch.config.urls import expand_home

    return path and Path(expand_home(str(path)))


STUDY_HELP = "Study file, or the name of one in ./studies (e.g. `digits`)."
StudyArgument = Annotated[str, typer.Argument(metavar="STUDY", help=STUDY_HELP, autocompletion=complete_study)]
BundleArgument = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="Model folder written by `hpsearch export`.", callback=expand_path)
]
StorageOption = Annotated[
    str | None, typer.Option(help="Database URL, SQLite or PostgreSQL; overrides the file. [env: HPSEARCH_STORAGE]")
]
ArtifactsOption = Annotated[
    str | None, typer.Option(help="Folder or URL for checkpoints; overrides the file. [env: HPSEARCH_ARTIFACTS]")
]
DataOption = Annotated[
    Path | None, typer.Option(help="Folder with the data sets. [env: HPSEARCH_DATA; default: the user cache]")
]
TrialsOption = Annotated[int | None, typer.Option(min=1, help="Total number of trials; overrides budget.trials.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON to stdout.")]
State = Literal["complete", "pruned", "failed", "running", "waiting"]  # of a trial
WorkersOption = Annotated[
    int | None,
    typer.Option("--workers", min=1, max=1024, help="Number of workers. [default: one per GPU, else one per core]"),
]


class NamedStudy:
    """A study as a command names it: its `definition`, and the `arguments` that name it in other commands.

    `trials` overrides `budget.trials`. The arguments are quoted for a shell, with the password of the database URL
    hidden.
    """

    def __init__(
        self, study: str, storage: str | None, *, artifacts: str | None = None, trials: int | None = None
    ) -> None:
        import optuna

        from hpsearch.config.definition import evolve, load_definition
        from hpsearch.config.urls import show_url

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        definition = load_definition(study, storage=storage, artifacts=artifacts)
        warn_about_password("--storage", storage)
        self.definition = definition if trials is None else evolve(definition, "budget", trials=trials)
        self.arguments = shlex.quote(study) + (f" --storage {shlex.quote(show_url(storage))}" if storage else "")

    def load_study(self) -> "optuna.Study":
        """Return the stored study. Creates nothing."""
        from hpsearch.search.study import load_study
        from hpsearch.storage.rdb import open_storage

        return load_study(self.definition, open_storage(self.definition.study.storage, must_exist=True))

    def watch(self) -> "Watch":
        """Return a read-only watch of the stored study. Creates nothing."""
        from hpsearch.monitor.status import Watch

        return Watch(self.definition)


def warn_about_password(option: str, url: str | None) -> None:
    """Warn that a password on the command line is visible to other users."""
    from hpsearch.config.urls import find_secrets

    if url and find_secrets(url):
        echo(
            f"warning: other users of this machine can read the password in {option} from the process list; "
            "use HPSEARCH_STORAGE, PGPASSWORD or ~/.pgpass instead"
        )


def print_document(document: Any, render: Callable[[Any], "RenderableType"], *, as_json: bool) -> None:
    """Print a result to stdout, as JSON or as text."""
    if as_json:
        print(json.dumps(document, indent=2))
    else:
        show(render(document))


def print_status(watch: "Watch", arguments: str, *, as_json: bool) -> None:
    """Print the document of `status`, and a hint if the study is stopped."""
    from hpsearch.cli.render import render_status
    from hpsearch.monitor.trials import read_status

    print_document(read_status(watch.definition, watch.study), render_status, as_json=as_json)
    if watch.study.user_attrs.get("stopped"):
        echo(f"the study is stopped; resume it with: hpsearch run {arguments}")
