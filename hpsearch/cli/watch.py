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
    named = options.NamedStudy(study, storage)
    if watch and as_json:
        raise UsageError("--watch cannot be combined with --json; poll `status --json` instead")
    watched = named.watch()
    if not watch:
        return options.print_status(watched, named.arguments, as_json=as_json)
    from hpsearch.monitor.live import LiveView
    from hpsearch.monitor.status import summarize_search

    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # restores the terminal
    with LiveView(watched, follows=True) as view:
        view.wait()
    for line in summarize_search(watched, named.arguments):
        echo(line)
    return None


@app.command(epilog="Example:  hpsearch trials studies/mnist-mlp.toml --sort value --limit 5 --columns trial,value,lr")
def trials(
    study: options.StudyArgument,
    state: Annotated[options.State | None, typer.Option(help="Show only trials in this state.")] = None,
    sort: Annotated[str, typer.Option(metavar="COLUMN", help="Sort by this column; value: best first.")] = "trial",
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Show at most N trials.")] = None,
    columns: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Columns to show: trial, state, value, lr, ...")
    ] = None,
    storage: options.StorageOption = None,
    as_json: options.JsonOption = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV (formulas are escaped).")] = False,
) -> None:
    """List trials; filter, sort, or print them as CSV or JSON."""
    from hpsearch.monitor.tables import tabulate_trials
    from hpsearch.monitor.trials import check_columns, flatten, list_columns, list_trials, to_csv

    if as_json and as_csv:
        raise UsageError("--json and --csv cannot be combined")
    named = options.NamedStudy(study, storage)
    known = list_columns(named.definition.search)
    chosen = [name.strip() for name in columns.split(",")] if columns else []
    check_columns(known, [sort, *chosen])
    rows = list_trials(named.load_study(), state, sort, limit)
    if as_csv:
        sys.stdout.write(to_csv(rows, chosen or known))
    elif as_json and chosen:
        options.print_document([{name: flatten(row).get(name) for name in chosen} for row in rows], str, as_json=True)
    else:
        options.print_document(
            rows, lambda rows: tabulate_trials(rows, named.definition.search, chosen), as_json=as_json
        )


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

    document = describe_in_full(options.NamedStudy(study, storage).load_study(), number)
    options.print_document(document, render_trial, as_json=as_json)


@app.command(epilog="Example:  hpsearch stop studies/mnist-mlp.toml")
def stop(study: options.StudyArgument, storage: options.StorageOption = None) -> None:
    """Stop all workers on all machines after their current epoch. `run` resumes."""
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


@app.command(epilog="Example:  hpsearch extend studies/mnist-mlp.toml --trials 40")
def extend(
    study: options.StudyArgument,
    trials: Annotated[int, typer.Option(min=1, help="Number of trials to add.")],
    storage: options.StorageOption = None,
) -> None:
    """Add trials to a study's budget. Running workers pick them up."""
    from hpsearch.search.study import extend_study

    named = options.NamedStudy(study, storage)
    n_trials = extend_study(named.load_study(), trials)
    echo(f"budget is now {n_trials} trials; {named.watch().poll().suggest_next(named.arguments)}")


@app.command(epilog="Example:  hpsearch enqueue studies/mnist-mlp.toml --set lr=1e-3 --set depth=2")
def enqueue(
    study: options.StudyArgument,
    settings: Annotated[
        list[str], typer.Option("--set", metavar="NAME=VALUE", help="Repeatable; the sampler chooses the rest.")
    ],
    storage: options.StorageOption = None,
) -> None:
    """Queue a trial with hyperparameters of your choice."""
    from hpsearch.search.study import enqueue_trial

    named = options.NamedStudy(study, storage)
    number = enqueue_trial(named.definition, named.load_study(), settings)
    suggestion = named.watch().poll().suggest_next(named.arguments)
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
    from contextlib import suppress

    from hpsearch.monitor.dashboard.app import serve

    named = options.NamedStudy(study, storage)
    with serve(named.definition, named.arguments, host=host, port=port, token=token, opens=opens) as address:
        echo("Optuna dashboard (read-only), press Ctrl-C to stop:")
        print(address, flush=True)
        with suppress(KeyboardInterrupt):
            threading.Event().wait()
