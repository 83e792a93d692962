"""Arguments and options shared by several commands, the study that they name, and how a result is printed."""

import json
import math
import os
import re
import shlex
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from hpsearch.config.files import EXAMPLES, find_study_file, is_study_file, list_study_files
from hpsearch.errors import UsageError
from hpsearch.monitor.text import echo, list_columns, show

if TYPE_CHECKING:
    import optuna
    from rich.console import RenderableType

    from hpsearch.config.definition import StudyDefinition
    from hpsearch.data.sets import DataSet
    from hpsearch.monitor.status import Watch

_N_BEST = 5  # trials in the table at the end of a search
Number = TypeVar("Number", int, float)


def complete_study(incomplete: str) -> list[str]:
    """Return the shell completions for STUDY: names of studies and examples, and paths of study files."""
    folder = Path(incomplete.rpartition("/")[0] or ("/" if incomplete.startswith("/") else "."))
    files = [file for pattern in ("*.toml", "*/*.toml") for file in folder.glob(pattern) if incomplete]
    paths = [str(file) for file in files if str(file).startswith(incomplete) and is_study_file(file)]
    return sorted({*paths, *(name for name in list_study_files() | EXAMPLES if name.startswith(incomplete))})


def complete_columns(context: typer.Context, incomplete: str) -> list[str]:
    """Return the shell completions for columns of the trials of STUDY, separated by commas."""
    files = list_study_files()
    typed = context.params.get("study") or next(iter(context.args), "")  # in `args` before an option without a value
    file = find_study_file(typed) if typed or len(files) != 1 else next(iter(files.values()))
    try:
        search = tomllib.loads(file.read_text(encoding="utf-8-sig"))["search"] if file else {}
    except (OSError, ValueError, KeyError):
        search = {}
    *before, last = incomplete.split(",")
    return [",".join([*before, name]) for name in list_columns(search) if name.startswith(last) and name not in before]


def choose_study(context: typer.Context, study: str | None) -> str | None:
    """Return the study that a command names, else the only one here.

    Raises `UsageError` if there is none here, or, with the state of each, if there are several.
    """
    if study is not None or context.resilient_parsing:
        return study
    files = list_study_files()
    if not files:
        raise UsageError("no study file here or in studies/; write one with: hpsearch init digits")
    if len(files) > 1:
        from hpsearch.monitor.status import describe_state

        width = max(map(len, files))
        lines = [f"  {name:{width}}  {describe_state(name)}" for name in files]
        example = shlex.quote(next(iter(files)))
        raise UsageError("\n".join([f"which study? Name one, such as: hpsearch {context.info_name} {example}", *lines]))
    [(name, file)] = files.items()
    echo(f"study {name}, the only one here ({'a packaged example' if file == EXAMPLES.get(name) else file})")
    return name


def split_study(context: typer.Context, study: str, pattern: str) -> tuple[str, str | None]:
    """Return the study and None; if it matches the pattern of the next argument, the only study here and that text."""
    if not re.fullmatch(pattern, study) or find_study_file(study):
        return study, None
    context.params["study"] = choose_study(context, None)
    return context.params["study"], study


def mention_example(study: str) -> None:
    """Say so if a study is an example of the package because no file here has its name."""
    if find_study_file(study) in EXAMPLES.values():
        echo(f"{study}: packaged example (hpsearch init {study} writes a copy to change)")


def expand_path(path: Path | None) -> Path | None:
    """Return the path with the home folder for a leading `~`, which shells leave alone in `--output=~/x`."""
    from hpsearch.config.urls import expand_home

    return path and Path(expand_home(str(path)))


def find_model_folder(path: Path | None) -> Path | None:
    """Return the path of a model folder, with the home folder for `~`. Raises `UsageError` if it is none."""
    from hpsearch.bundle.manifest import MANIFEST

    folder = expand_path(path)
    is_closed = folder and folder.is_dir() and not os.access(folder, os.X_OK)  # which is named when it is read
    if folder and not is_closed and not (folder / MANIFEST).exists():
        raise UsageError(f"{folder} is not a model folder; create one with: hpsearch export")
    return folder


def read_number(low: Number, high: Number | None = None) -> Callable[[str], Number]:
    """Return a parser of numbers from `low` to `high`, whole ones if `low` is."""
    noun = "a whole number" if isinstance(low, int) else "a number"
    limits = f"of at least {low}" if high is None else f"from {low:,} to {high:,}"

    def read(text: str) -> Number:
        try:
            value = type(low)(text)
        except ValueError:
            value = low - 1
        if not low <= value <= (math.inf if high is None else high):
            raise typer.BadParameter(f"must be {noun} {limits}, not {text}")
        return value

    return read


def read_address(text: str) -> str:
    """Return the address of a Ray cluster, or "" for the one of RAY_ADDRESS or of this machine."""
    if text and not re.fullmatch(r"auto|local|(ray://)?[^/]+:\d+", text):
        raise typer.BadParameter(f"must be an address such as head:6379, ray://head:10001 or local, not {text}")
    return text


def number(text: str, low: Number, high: Number | None = None, *names: str) -> Any:
    """Return an option with this help, whose value is a number from `low` to `high`."""
    return typer.Option(*names, metavar="N", parser=read_number(low, high), help=text)


def columns(metavar: str, text: str) -> Any:
    """Return an option with this help, whose value names columns of the trials of STUDY."""
    return typer.Option(metavar=metavar, help=text, autocompletion=complete_columns)


def path(metavar: str, text: str, callback: Callable[[Path | None], Path | None] = expand_path) -> Any:
    """Return an option with this help, whose value is the path of a file or folder."""
    return typer.Option(metavar=metavar, help=text, callback=callback)


STUDY_HELP = "Study file or name. [default: the only one here]"
StudyArgument = Annotated[
    str,
    typer.Argument(
        metavar="STUDY",
        help=STUDY_HELP,
        default_factory=lambda: None,
        show_default=False,
        callback=choose_study,
        autocompletion=complete_study,
    ),
]
BundleArgument = Annotated[
    Path,
    typer.Argument(metavar="BUNDLE", help="Model folder, written by `hpsearch export`.", callback=find_model_folder),
]
ThreadsOption = Annotated[int | None, number("Threads per worker. [default: cores / workers]", 1, 1024)]
StorageOption = Annotated[
    str | None, typer.Option(metavar="URL", help="Database URL of the study. [env: HPSEARCH_STORAGE]")
]
ArtifactsOption = Annotated[
    str | None, typer.Option(metavar="URL", help="Folder or URL for files. [env: HPSEARCH_ARTIFACTS]")
]
DataOption = Annotated[Path | None, typer.Option(metavar="DIR", help="Data sets, or your images. [env: HPSEARCH_DATA]")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
State = Literal["complete", "pruned", "failed", "running", "waiting"]  # of a trial
MAX_WORKERS = 1024  # on this machine
WorkersOption = Annotated[int | None, number("Workers. [default: one per GPU, else per core]", 1, MAX_WORKERS)]


def name_study(study: str, storage: str | None) -> str:
    """Return the arguments that name a study in other commands, for a shell and with no password in them."""
    from hpsearch.config.urls import show_url

    return shlex.quote(study) + (f" --storage {shlex.quote(show_url(storage))}" if storage else "")


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

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        definition = load_definition(study, storage=storage, artifacts=artifacts)
        warn_about_password("--storage", storage)
        self.definition = definition if trials is None else evolve(definition, "budget", trials=trials)
        self.arguments = name_study(study, storage)

    def load_study(self) -> "optuna.Study":
        """Return the stored study. Creates nothing."""
        from hpsearch.search.study import load_study
        from hpsearch.storage.rdb import open_storage

        return load_study(self.definition, open_storage(self.definition.study.storage, must_exist=True))

    def watch(self) -> "Watch":
        """Return a read-only watch of the stored study. Creates nothing."""
        from hpsearch.monitor.status import Watch

        return Watch(self.definition)


def fetch_images(definition: "StudyDefinition", folder: Path | None) -> "DataSet | Path | None":
    """Download or read the images of a study if that has not been done, before anything is drawn.

    Returns the data set if it is now open, else the folder. Each archive has a bar of its own. So has the user's own
    folder; in a pipe, there is a line.
    """
    from hpsearch.data.sets import find_data_set

    if definition.data.name is None:
        return read_own_images(definition, folder)
    data_set = find_data_set(definition.data.name, folder)
    place = data_set.locate()
    if place and not place.exists():
        echo(f"downloading {data_set.title} to {place}")
        data_set.read(is_train=True)
    return folder


def read_own_images(definition: "StudyDefinition", folder: Path | None) -> "DataSet":
    """Read and return the user's own images, with a bar; what was read before takes a moment and shows nothing."""
    from hpsearch.monitor.progress import Steps
    from hpsearch.training.run import open_data_set

    title, announced = definition.data.title, set[str]()
    with Steps() as show_step:

        def show(step: str, n_done: int, n_total: int) -> None:
            line = "" if step in announced else f"{step} {n_total:,} images of {title}"
            announced.add(step)
            show_step(f"{step} {title}", n_done, n_total, line=line)

        if definition.data.code:
            loading = f"loading images with {title}"
            show_step(loading, line=loading)
        data_set = open_data_set(definition, folder, partial(show, "checking"))
        data_set.map_training(partial(show, "reading"))
    return data_set


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


def print_best(watch: "Watch", arguments: str, *, as_json: bool) -> None:
    """Print the five best trials of a search that ended, as a table, or as JSON the document of `status`."""
    from hpsearch.monitor.tables import tabulate_trials
    from hpsearch.monitor.trials import list_trials

    hyperparameters = watch.definition.search
    columns, hint = ["trial", "value", *hyperparameters, "seconds"], f"; see: hpsearch trials {arguments}"
    best = list_trials(watch.study, "complete", "value", _N_BEST)
    if as_json:
        print_status(watch, arguments, as_json=True)
    elif best:
        show(tabulate_trials(best, hyperparameters, columns, hint))


def print_status(watch: "Watch", arguments: str, *, as_json: bool) -> None:
    """Print the document of `status`, and a hint if the study is stopped."""
    from hpsearch.cli.render import render_status
    from hpsearch.monitor.trials import read_status

    print_document(read_status(watch.definition, watch.study), render_status, as_json=as_json)
    if watch.study.user_attrs.get("stopped"):
        echo(f"the study is stopped; resume it with: hpsearch run {arguments}")
