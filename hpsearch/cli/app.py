"""The group `search`, and all commands together: each calls one function and prints its result.

Commands import what they need inside the function: torch takes seconds to import, and `--help` must be fast.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hpsearch.cli import options
from hpsearch.cli.care import app as care_app
from hpsearch.cli.parsing import Command, Group
from hpsearch.cli.result import app as result_app
from hpsearch.cli.watch import app as watch_app
from hpsearch.config.files import EXAMPLES, describe_example, write_example
from hpsearch.errors import BudgetSpent, Drained, StorageError, UsageError, read_docstring
from hpsearch.monitor.text import count, echo
from hpsearch.workers.shutdown import Drain

if TYPE_CHECKING:
    from hpsearch.config.definition import StudyDefinition
    from hpsearch.data.sets import DataSet
    from hpsearch.monitor.live import LiveView
    from hpsearch.training.networks import OwnNetwork
    from hpsearch.workers.ray import Cluster

    Show = Callable[[Callable[[LiveView], str], Drain], None]

_POLL = 0.25  # seconds between two checks whether all workers have stopped

app = typer.Typer(
    name="hpsearch",
    cls=Group,
    help="Find the best network for small images, and export it as a verified model.",
    epilog="Start with: hpsearch init. Every command has help: hpsearch run -h",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 200},
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
    _debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks, wherever it is given.")] = False,
) -> None:
    pass


@app.command(epilog="Example: hpsearch init flowers --images ~/flowers")
def init(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="Example or name of a study. [default: list]",
            autocompletion=lambda incomplete: [name for name in EXAMPLES if name.startswith(incomplete)],
        ),
    ] = None,
    images: Annotated[Path | None, options.path("DIR", "Your images, in a folder with a subfolder a class.")] = None,
) -> None:
    """Write a study file to start from."""
    if images is not None:
        from hpsearch.cli.images import write_draft

        return write_draft(name, images)
    if name is None:
        for example in EXAMPLES:
            print(f"{example:{max(map(len, EXAMPLES))}}  {describe_example(example)}")
        return echo("next: hpsearch init digits, or for your own images: hpsearch init flowers --images ~/flowers")
    files = write_example(name)
    change = "it" if len(files) == 1 else "them"
    return echo(f"wrote {' and '.join(map(str, files))}; change {change} as you like\nnext: hpsearch run {name}")


@app.command(epilog="Example: hpsearch check digits")
def check(
    context: typer.Context,
    study: Annotated[
        str | None, typer.Argument(metavar="STUDY", help=options.STUDY_HELP, autocompletion=options.complete_study)
    ] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of study files.")] = False,
    as_json: options.JsonOption = False,
) -> None:
    """Check a study file; print it with all defaults."""
    from hpsearch.config.definition import StudyDefinition, check_new, load_definition

    if schema:
        print(json.dumps(StudyDefinition.model_json_schema(), indent=2))
    else:
        study = options.choose_study(context, study) or ""
        options.mention_example(study)
        definition = load_definition(study)
        check_new(definition, study)
        if definition.network.code or definition.data.name is None:
            _try(definition)
        notes = _list_priors(definition) if definition.sampler.prior and definition.sampler.kind == "tpe" else {}
        print(json.dumps(definition.to_tables(), indent=2) if as_json else definition.to_toml(notes).rstrip())


def _list_priors(definition: "StudyDefinition") -> dict[str, str]:
    """Return a note on each hyperparameter that has a built-in prior."""
    from hpsearch.monitor.text import shorten
    from hpsearch.search.priors import Priors

    priors = Priors(definition.space)
    unset = [name for name, dimension in definition.search.items() if dimension.prior is None]
    return {
        name: f"built-in prior: {' or '.join(map(shorten, found))}"
        for name in unset
        if (found := priors.find_all(name))
    }


def _convert(definition: "StudyDefinition") -> "Callable[[OwnNetwork, DataSet], None]":
    """Return what converts a network of the user's as `export` does, to know before a search that it can be."""

    def convert(network: "OwnNetwork", data_set: "DataSet") -> None:
        from hpsearch.bundle.formats import check_conversion

        if definition.network.code:
            check_conversion(definition.network.code, network, data_set.image_shape, len(data_set.class_names))

    return convert


def _try(definition: "StudyDefinition") -> None:
    """Read the user's own images, train a network of the user's on one batch, and convert it."""
    from hpsearch.training.run import open_data_set
    from hpsearch.training.tryout import try_network

    data_set = open_data_set(definition) if definition.data.name else options.read_own_images(definition, None)
    network = try_network(definition, data_set.image_shape, len(data_set.class_names))
    if network:
        _convert(definition)(network, data_set)


@app.command(epilog="Example: hpsearch run digits --workers 2 --trials 20")
def run(
    study: options.StudyArgument,
    workers: Annotated[int | None, options.number("Workers. [default: one per GPU, else per core]", 1, 10_000)] = None,
    threads: options.ThreadsOption = None,
    trials: Annotated[int | None, options.number("Trials in total. [default: budget.trials]", 1)] = None,
    ray: Annotated[
        str | None,
        typer.Option(metavar="[ADDRESS]", parser=options.read_address, help="Run in a Ray cluster. [env: RAY_ADDRESS]"),
    ] = None,
    cpus: Annotated[
        float | None, options.number("CPU cores per worker. [default: 1]", 0.01, 1000, "--cpus-per-worker")
    ] = None,
    gpus: Annotated[
        float | None, options.number("GPUs per worker, e.g. 0.25. [default: 0]", 0.0, 1000, "--gpus-per-worker")
    ] = None,
    detaches: Annotated[bool, typer.Option("--detach", help="Leave the workers running in the cluster.")] = False,
    shows_dashboard: Annotated[bool, typer.Option("--dashboard", help="Also serve the Optuna dashboard.")] = False,
    opens: Annotated[bool, typer.Option("--open", help="Also open the dashboard in a browser.")] = False,
    storage: options.StorageOption = None,
    artifacts: options.ArtifactsOption = None,
    data: options.DataOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Start or resume a search; --ray: on a cluster."""
    if ray is None and (detaches or cpus is not None or gpus is not None):
        raise UsageError("--cpus-per-worker, --gpus-per-worker and --detach need --ray")
    if ray is not None and threads:
        raise UsageError("--threads is for workers on this machine; --ray needs --cpus-per-worker")
    if ray is None and workers and workers > options.MAX_WORKERS:
        raise UsageError(f"--workers: must be a whole number from 1 to {options.MAX_WORKERS:,}, not {workers}")
    if detaches and ray == "local":
        raise UsageError("--detach needs a cluster that outlives this command; start one with: ray start --head")
    if detaches and (shows_dashboard or opens or as_json):
        raise UsageError("--detach cannot be combined with --dashboard, --open or --json")
    named = options.NamedStudy(study, storage, artifacts=artifacts, trials=trials)
    options.mention_example(study)

    def show(search: Callable[["LiveView"], str], drain: Drain) -> None:
        with _serving_dashboard(named, opens=opens) if shows_dashboard or opens else nullcontext():
            _show_search(named, search, drain, as_json=as_json)

    if ray is None:
        return _run_here(named, show, workers, threads, data, keeps_extension=trials is None)
    echo(f"{named.definition.study.name}: connecting to Ray")
    from hpsearch.workers.ray import Resources, connect

    resources = Resources(1.0 if cpus is None else cpus, gpus or 0.0)
    with connect(named.definition, resources, address=ray, folder=data) as cluster:
        return _run_in_cluster(cluster, named, show, workers, detaches=detaches, keeps_extension=trials is None)


def _run_here(
    named: options.NamedStudy,
    show: "Show",
    workers: int | None,
    threads: int | None,
    data: Path | None,
    *,
    keeps_extension: bool,
) -> None:
    """Run a search with workers on this machine."""
    from hpsearch.workers.forkserver import start_fork_server

    start_fork_server()
    from hpsearch.training.devices import default_workers, may_have_gpu, share_cores

    if workers is None and may_have_gpu():
        echo(f"{named.definition.study.name}: looking for GPUs")  # takes seconds
    drain, n_workers = Drain(), workers or default_workers()
    n_threads = count(threads or share_cores(n_workers), "thread")
    echo(f"{named.definition.study.name}: starting {count(n_workers, 'worker')} ({n_threads} each)")
    from hpsearch.search.study import start_study

    definition = named.definition
    # The user's own images and network are tried before the study is created, so that a correction needs no new name.
    is_own = definition.network.code is not None or definition.data.name is None
    images = options.fetch_images(definition, data) if is_own else None
    start_study(definition, keeps_extension=keeps_extension, data=images or data, on_tried=_convert(definition))
    images = images or options.fetch_images(definition, data)

    def search(view: "LiveView") -> str:
        from hpsearch.workers.processes import run_pool  # takes seconds, with torch; the table is there before

        drain.listen(on_request=view.announce_stop)
        return run_pool(named.definition, drain, n_workers, n_threads=threads, folder=images, emit=view)

    show(search, drain)


def _run_in_cluster(
    cluster: "Cluster",
    named: options.NamedStudy,
    show: "Show",
    workers: int | None,
    *,
    detaches: bool,
    keeps_extension: bool,
) -> None:
    """Run a search with workers in a Ray cluster; if it `detaches`, return once they are started."""
    from hpsearch.search.study import start_study

    drain = Drain().listen()  # replaces the handlers that Ray installed
    n_workers = workers or cluster.n_fitting
    if not n_workers:
        raise UsageError("no node has enough free CPUs or GPUs for a worker; use --workers to queue them anyway")
    is_known = named.definition.data.name is not None  # the user's own images may be on the nodes only
    start_study(named.definition, keeps_extension=keeps_extension, tries=is_known)
    for remark in cluster.remark_on(n_workers):
        echo(remark)
    if not detaches:
        echo(f"{named.definition.study.name}: starting {count(n_workers, 'worker')} in the cluster")

        def search(view: "LiveView") -> str:
            return cluster.run(n_workers, drain.listen(on_request=view.announce_stop), view.print_finished)

        return show(search, drain)
    name = cluster.detach(n_workers)
    echo(f"started {n_workers} workers; the actor {name} supervises them in the cluster")
    return echo(f"next: hpsearch status {named.arguments} --watch  |  hpsearch stop {named.arguments}")


@contextmanager
def _serving_dashboard(named: options.NamedStudy, *, opens: bool) -> Iterator[None]:
    """Serve the Optuna dashboard meanwhile."""
    from hpsearch.monitor.dashboard.app import serve

    with serve(named.definition, named.arguments, opens=opens) as address:
        echo(f"Optuna dashboard, read-only; it ends with the search: {address}")
        yield


@app.command(epilog="Example: hpsearch worker digits --max-trials 5")
def worker(
    study: options.StudyArgument,
    threads: options.ThreadsOption = None,
    max_trials: Annotated[int | None, options.number("Stop after N trials.", 1)] = None,
    creates: Annotated[bool, typer.Option("--create", help="Create the study if it does not exist.")] = False,
    storage: options.StorageOption = None,
    artifacts: options.ArtifactsOption = None,
    data: options.DataOption = None,
) -> None:
    """Add a worker from another terminal or machine."""
    from hpsearch.cli.render import describe_share
    from hpsearch.monitor.live import LiveView
    from hpsearch.workers.cores import Neighbors, needs_core, wait_for_core

    named = options.NamedStudy(study, storage, artifacts=artifacts)
    if creates:
        from hpsearch.search.study import start_study

        images = options.fetch_images(named.definition, data)
        start_study(named.definition, resumes=False, data=images, on_tried=_convert(named.definition))
    watch = named.watch()
    neighbors, drain = Neighbors(watch.study), Drain()
    echo(describe_share(neighbors.count() + 1, threads))
    if not creates:  # only now: an unknown study is reported without reading its images
        images = options.fetch_images(named.definition, data)

    def work(view: LiveView) -> str:
        drain.listen(on_request=view.announce_stop)
        if threads is None and needs_core(neighbors.count() + 1):
            wait_for_core(neighbors, named.load_study(), drain)
        with neighbors.joined():
            from hpsearch.workers.worker import run_worker  # takes seconds, with torch; the table is there before

            settings: dict[str, Any] = {"data": images, "n_threads": threads, "max_trials": max_trials}
            return run_worker(named.definition, drain, view, neighbors=neighbors, **settings)

    with LiveView(watch) as view:
        try:
            reason = work(view)
        except BudgetSpent as spent:
            reason = str(spent)
    echo("done: " + reason.replace(" STUDY", f" {named.arguments}"))


@app.command(epilog="Example: hpsearch stop digits")
def stop(study: options.StudyArgument, storage: options.StorageOption = None) -> None:
    """Stop all workers after their epoch; `run` resumes."""
    from hpsearch.search.study import stop_study

    named = options.NamedStudy(study, storage)
    stop_study(named.load_study())
    watch, n_waiting = named.watch(), 0
    while (snapshot := watch.poll()).is_stopped and snapshot.n_alive:
        if snapshot.n_alive != n_waiting:
            n_waiting = snapshot.n_alive
            echo(f"waiting for {count(n_waiting, 'worker')} to finish the current epoch ...")
        time.sleep(_POLL)
    if not snapshot.is_stopped:
        return echo("someone resumed the study in the meantime; it is running again")
    for stale in snapshot.workers:
        echo(f"worker {stale['worker']} is not responding; its trial {stale['trial']} will be resumed by the next run")
    return echo(f"stopped: {snapshot.describe_progress()}; resume with: hpsearch run {named.arguments}")


def _show_search(
    named: options.NamedStudy, search: Callable[["LiveView"], str], drain: Drain, *, as_json: bool
) -> None:
    """Show a search while it runs, and then its result."""
    from hpsearch.monitor.live import LiveView
    from hpsearch.monitor.status import summarize_search

    watch, arguments = named.watch(), named.arguments
    try:
        with LiveView(watch) as view:
            if (snapshot := watch.poll()).n_finished and not view.is_live:
                echo(snapshot.describe_progress())
            reason = search(view)
    except Drained:
        with suppress(StorageError):
            echo(watch.poll().describe_progress())
        raise
    echo("done: " + reason.replace(" STUDY", f" {arguments}"))
    from hpsearch.workers.worker import RETRY_SECONDS

    # The trials are stored, so their summary waits for a storage that is away now, until a signal.
    watch.storage.patience, watch.storage.giving_up = RETRY_SECONDS, drain.event
    options.print_best(watch, arguments, as_json=as_json)
    for line in summarize_search(watch, arguments):
        echo(line)


app.add_typer(watch_app)
app.add_typer(result_app)
app.add_typer(care_app)
for _group, _app in {"search": app, "watch": watch_app, "result": result_app, "upkeep": care_app}.items():
    for _command in _app.registered_commands:
        _command.help = read_docstring(_command.callback)
        _command.rich_help_panel, _command.cls = _group, Command
