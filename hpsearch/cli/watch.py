"""The commands that watch and steer a search."""

import signal
import sys
import time
from typing import Annotated

import typer

from hpsearch.cli import options
from hpsearch.errors import UsageError
from hpsearch.monitor.text import count, echo

app = typer.Typer()

_POLL = 0.25  # seconds between two checks whether all workers have stopped


@app.command(epilog="Example:  hpsearch status studies/mnist-mlp.toml --watch")
def status(
    study: options.StudyArgument,
    watch: Annotated[
        bool, typer.Option("--watch", help="Update until the search ends; in a pipe, one line per finished trial.")
    ] = False,
    storage: options.StorageOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Show the progress of a search: trials, best, workers, epochs."""
    definition = options.load_definition_of(study, storage)
    if not watch:
        arguments = options.shell_arguments(study, storage)
        return options.print_status(definition, options.load_study_of(definition), arguments, as_json=as_json)
    if as_json:
        raise UsageError("--watch cannot be combined with --json; poll `status --json` instead")
    from rich.console import Console

    from hpsearch.monitor.live import LiveView
    from hpsearch.monitor.status import open_watch, summarize_search

    watched = open_watch(definition)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # restores the terminal
    with LiveView(watched, Console(highlight=False), follows=True) as view:
        view.wait()
    for line in summarize_search(watched, options.shell_arguments(study, storage)):
        echo(line)
    return None


@app.command(epilog="Example:  hpsearch trials studies/mnist-mlp.toml --sort value --limit 5 --columns number,value,lr")
def trials(
    study: options.StudyArgument,
    state: Annotated[options.State | None, typer.Option(help="Show only trials in this state.")] = None,
    sort: Annotated[str, typer.Option(metavar="COLUMN", help="Sort by this column; value: best first.")] = "number",
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Show at most N trials.")] = None,
    columns: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Columns to show: number, state, value, lr, ...")
    ] = None,
    storage: options.StorageOption = None,
    as_json: options.JsonOption = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV (formulas are escaped).")] = False,
) -> None:
    """List trials; filter, sort, or print them as CSV or JSON."""
    from hpsearch.cli.render import render_trials
    from hpsearch.monitor.trials import check_columns, flatten, list_columns, list_trials, to_csv

    if as_json and as_csv:
        raise UsageError("--json and --csv cannot be combined")
    definition = options.load_definition_of(study, storage)
    known = list_columns(definition.search)
    chosen = [name.strip() for name in columns.split(",")] if columns else []
    check_columns(known, [sort, *chosen])
    rows = list_trials(options.load_study_of(definition), state, sort, limit)
    if as_csv:
        sys.stdout.write(to_csv(rows, chosen or known))
    elif as_json and chosen:
        options.print_document([{name: flatten(row).get(name) for name in chosen} for row in rows], str, as_json=True)
    else:
        options.print_document(rows, lambda rows: render_trials(rows, chosen), as_json=as_json)


@app.command(epilog="Example:  hpsearch show studies/mnist-mlp.toml 17")
def show(
    study: options.StudyArgument,
    number: Annotated[int, typer.Argument(metavar="TRIAL", help="Trial number.")],
    storage: options.StorageOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Show one trial: hyperparameters, accuracy per epoch, timing. Also why it failed or was pruned."""
    from hpsearch.cli.render import render_trial
    from hpsearch.monitor.trials import describe_in_full

    document = describe_in_full(options.load_study_of(options.load_definition_of(study, storage)), number)
    options.print_document(document, render_trial, as_json=as_json)


@app.command(epilog="Example:  hpsearch stop studies/mnist-mlp.toml")
def stop(study: options.StudyArgument, storage: options.StorageOption = None) -> None:
    """Stop all workers on all machines after their current epoch. `run` resumes."""
    from hpsearch.monitor.status import open_watch
    from hpsearch.search.study import stop_study

    definition = options.load_definition_of(study, storage)
    stop_study(options.load_study_of(definition))
    watch, n_waiting = open_watch(definition), 0
    while (snapshot := watch.poll()).is_stopped and snapshot.n_alive:
        if snapshot.n_alive != n_waiting:
            n_waiting = snapshot.n_alive
            echo(f"waiting for {count(n_waiting, 'worker')} to finish the current epoch ...")
        time.sleep(_POLL)
    if not snapshot.is_stopped:
        return echo("someone resumed the study in the meantime; it is running again")
    for stale in snapshot.workers:
        echo(f"worker {stale['worker']} is not responding; its trial {stale['trial']} will be resumed by the next run")
    command = options.shell_arguments(study, storage)
    return echo(f"stopped: {snapshot.describe_progress()}; resume with: hpsearch run {command}")


@app.command(epilog="Example:  hpsearch extend studies/mnist-mlp.toml --trials 40")
def extend(
    study: options.StudyArgument,
    trials: Annotated[int, typer.Option(min=1, help="Number of trials to add.")],
    storage: options.StorageOption = None,
) -> None:
    """Add trials to a study's budget. Running workers pick them up."""
    from hpsearch.monitor.status import open_watch
    from hpsearch.search.study import extend_study

    definition = options.load_definition_of(study, storage)
    n_trials = extend_study(options.load_study_of(definition), trials)
    suggestion = open_watch(definition).poll().suggest_next(options.shell_arguments(study, storage))
    echo(f"budget is now {n_trials} trials; {suggestion}")


@app.command(epilog="Example:  hpsearch enqueue studies/mnist-mlp.toml --set lr=1e-3 --set depth=2")
def enqueue(
    study: options.StudyArgument,
    settings: Annotated[
        list[str], typer.Option("--set", metavar="NAME=VALUE", help="Repeatable; the sampler chooses the rest.")
    ],
    storage: options.StorageOption = None,
) -> None:
    """Queue a trial with hyperparameters of your choice."""
    from hpsearch.monitor.status import open_watch
    from hpsearch.search.study import enqueue_trial

    definition = options.load_definition_of(study, storage)
    number = enqueue_trial(definition, options.load_study_of(definition), settings)
    snapshot = open_watch(definition).poll()
    suggestion = snapshot.suggest_next(options.shell_arguments(study, storage))
    echo(f"trial {number} queued with {', '.join(settings)}; {suggestion}")


@app.command(epilog="Example:  hpsearch dashboard studies/mnist-mlp.toml --open")
def dashboard(
    study: options.StudyArgument,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 picks a free one.")] = 0,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    token: Annotated[
        str | None, typer.Option(envvar="HPSEARCH_TOKEN", help="Access token for the URL. [default: random]")
    ] = None,
    opens: Annotated[bool, typer.Option("--open", help="Open the dashboard in your browser.")] = False,
    storage: options.StorageOption = None,
) -> None:
    """Serve the Optuna dashboard for a study (stop with Ctrl-C)."""
    import threading
    import webbrowser
    from contextlib import ExitStack, suppress

    from hpsearch.monitor.dashboard.app import redirect_file, serve
    from hpsearch.monitor.dashboard.server import is_loopback

    definition, arguments = options.load_definition_of(study, storage), options.shell_arguments(study, storage)
    with ExitStack() as stack:
        address = stack.enter_context(serve(definition, arguments, host=host, port=port, token=token))
        if not is_loopback(host):
            echo(
                "warning: traffic, including the token, is not encrypted; put a TLS reverse proxy in front of it,\n"
                "or drop --host and use an SSH tunnel (ssh -L)"
            )
        echo("Optuna dashboard (read-only), press Ctrl-C to stop:")
        print(address, flush=True)
        if opens:
            webbrowser.open(stack.enter_context(redirect_file(address)))
        with suppress(KeyboardInterrupt):
            threading.Event().wait()
