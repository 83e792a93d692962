"""The commands that search: each calls one function and prints its result.

Commands import what they need inside the function: torch takes seconds to import, and `--help` must be fast.
"""

import json
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Annotated

import typer

from hpsearch.cli import options
from hpsearch.cli.care import app as care_app
from hpsearch.cli.result import app as result_app
from hpsearch.cli.watch import app as watch_app
from hpsearch.errors import Drained, StorageError, UsageError, read_docstring
from hpsearch.monitor.text import echo
from hpsearch.workers.shutdown import Drain

if TYPE_CHECKING:
    from hpsearch.monitor.live import LiveView

app = typer.Typer(
    name="hpsearch",
    help="Tune MLPs and CNNs on MNIST-style image data: search in parallel, watch it live, export the best model.",
    epilog="\b\nGetting started:\n"
    "  hpsearch run digits                  search (about a minute)\n"
    "  hpsearch export digits               save the best model\n"
    "  hpsearch predict models/digits IMAGE   classify an image",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=True,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"hpsearch {version('hpsearch')}")
        raise typer.Exit


@app.callback()
def _global_options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    _debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and debug output (works anywhere).")] = False,
) -> None:
    pass


@app.command(epilog="Example:  hpsearch check studies/mnist-mlp.toml")
def check(
    study: Annotated[
        str | None, typer.Argument(metavar="STUDY", help=options.STUDY_HELP, autocompletion=options.complete_study)
    ] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema for study files and exit.")] = False,
    as_json: options.JsonOption = False,
) -> None:
    """Check a study file and print it with all defaults filled in."""
    from hpsearch.config.definition import StudyDefinition, check_new, load_definition

    if schema:
        print(json.dumps(StudyDefinition.model_json_schema(), indent=2))
    elif study is None:
        raise UsageError("missing argument STUDY (or use --schema)")
    else:
        definition = load_definition(study)
        check_new(definition, study)
        print(json.dumps(definition.to_tables(), indent=2) if as_json else definition.to_toml().rstrip())


@app.command(epilog="Example:  hpsearch run studies/mnist-mlp.toml --workers 2 --trials 20")
def run(
    study: options.StudyArgument,
    workers: options.WorkersOption = None,
    trials: options.TrialsOption = None,
    storage: options.StorageOption = None,
    artifacts: options.ArtifactsOption = None,
    data: options.DataOption = None,
    shows_dashboard: Annotated[
        bool, typer.Option("--dashboard", help="Also serve the Optuna dashboard while the search runs.")
    ] = False,
    opens: Annotated[bool, typer.Option("--open", help="Like --dashboard, and open it in your browser.")] = False,
    as_json: options.JsonOption = False,
) -> None:
    """Start or resume a search until its budget is used up."""
    from hpsearch.workers.forkserver import start_fork_server

    named = options.NamedStudy(study, storage, artifacts=artifacts, trials=trials)
    start_fork_server()
    from hpsearch.search.study import start_study

    start_study(named.definition, keeps_extension=trials is None)  # fails before torch is loaded
    from hpsearch.training.devices import default_workers
    from hpsearch.workers.processes import run_pool

    drain, n_workers = Drain().listen(), workers or default_workers()

    def search(view: "LiveView") -> str:
        return run_pool(named.definition, drain, n_workers, folder=data, emit=view)

    with ExitStack() as stack:
        if shows_dashboard or opens:
            from hpsearch.monitor.dashboard.app import serve

            address = stack.enter_context(serve(named.definition, named.arguments, opens=opens))
            echo(f"Optuna dashboard (read-only): {address}")
        _show_search(named, search, n_workers, drain, as_json=as_json)


@app.command(epilog="Example:  hpsearch worker studies/mnist-mlp.toml --max-trials 5")
def worker(
    study: options.StudyArgument,
    max_trials: Annotated[int | None, typer.Option(min=1, help="Stop after N trials.", metavar="N")] = None,
    creates: Annotated[bool, typer.Option("--create", help="Create the study if it does not exist yet.")] = False,
    storage: options.StorageOption = None,
    artifacts: options.ArtifactsOption = None,
    data: options.DataOption = None,
) -> None:
    """Add a worker to a study, from any terminal or machine."""
    from hpsearch.monitor.live import LiveView

    named = options.NamedStudy(study, storage, artifacts=artifacts)
    if creates:
        from hpsearch.search.study import start_study

        start_study(named.definition, resumes=False)
    watch = named.watch()
    from hpsearch.workers.worker import run_worker

    drain = Drain().listen()
    with LiveView(watch) as view:
        reason = run_worker(named.definition, drain, view, data=data, max_trials=max_trials)
    echo("done: " + reason.replace(" STUDY", f" {named.arguments}"))


@app.command(
    epilog="Example:  hpsearch launch mnist-mlp --workers 16 --gpus-per-worker 0.25 --address ray://head:10001"
)
def launch(
    study: options.StudyArgument,
    workers: Annotated[
        int | None, typer.Option(min=1, max=10_000, help="Number of workers. [default: as many as fit]")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Address of the Ray cluster. [env: RAY_ADDRESS; default: this machine's]")
    ] = None,
    cpus: Annotated[float, typer.Option("--cpus-per-worker", min=0.01, help="CPU cores per worker.")] = 1.0,
    gpus: Annotated[float, typer.Option("--gpus-per-worker", min=0, help="GPUs per worker, e.g. 0.25.")] = 0.0,
    detaches: Annotated[bool, typer.Option("--detach", help="Start the workers and return immediately.")] = False,
    trials: options.TrialsOption = None,
    storage: options.StorageOption = None,
    artifacts: options.ArtifactsOption = None,
    data: options.DataOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Start or resume a search with workers in a Ray cluster."""
    from hpsearch.search.study import start_study
    from hpsearch.workers.ray import Resources, connect

    if detaches and address == "local":
        raise UsageError("--detach needs a cluster that outlives this command; start one with: ray start --head")
    named = options.NamedStudy(study, storage, artifacts=artifacts, trials=trials)
    with connect(named.definition, Resources(cpus, gpus), address=address, folder=data) as cluster:
        drain = Drain().listen()  # replaces the handlers that Ray installed
        n_workers = workers or cluster.n_fitting
        if not n_workers:
            raise UsageError("no node has enough free CPUs or GPUs for a worker; pass --workers N to queue them anyway")
        start_study(named.definition, keeps_extension=trials is None)
        for remark in cluster.remark_on(n_workers):
            echo(remark)
        if detaches:
            name = cluster.detach(n_workers)
            echo(f"launched {n_workers} workers; the actor {name} supervises them in the cluster")
            return echo(f"next: hpsearch status {named.arguments} --watch  |  hpsearch stop {named.arguments}")

        def search(view: "LiveView") -> str:
            return cluster.run(n_workers, drain, view.print_finished)

        return _show_search(named, search, n_workers, drain, as_json=as_json)


def _show_search(
    named: options.NamedStudy, search: Callable[["LiveView"], str], n_workers: int, drain: Drain, *, as_json: bool
) -> None:
    """Show a search while it runs, and then its result."""
    from hpsearch.monitor.live import LiveView
    from hpsearch.monitor.status import summarize_search
    from hpsearch.workers.worker import RETRY_SECONDS

    watch, arguments = named.watch(), named.arguments
    try:
        with LiveView(watch) as view:
            view.start(n_workers)
            reason = search(view)
    except Drained:
        with suppress(StorageError):
            echo(watch.poll().describe_progress())
        raise
    echo("done: " + reason.replace(" STUDY", f" {arguments}"))
    # The trials are stored, so their summary waits for a storage that is away now, until a signal.
    watch.storage.patience, watch.storage.giving_up = RETRY_SECONDS, drain.event
    options.print_status(watch, arguments, as_json=as_json)
    for line in summarize_search(watch, arguments):
        echo(line)


app.add_typer(watch_app)
app.add_typer(result_app)
app.add_typer(care_app)
for _app in (app, watch_app, result_app, care_app):
    for _command in _app.registered_commands:
        _command.help = read_docstring(_command.callback)
