"""The verbs to watch a search, and to steer it."""

import signal
import sys
import time
from typing import Annotated

import typer

from hpsearch.cli.options import (
    JsonOption,
    State,
    StorageOption,
    StudyArgument,
    load_definition_of,
    load_study_of,
    print_document,
    print_status,
    shell_arguments,
)
from hpsearch.errors import UsageError

app = typer.Typer()

_POLL = 0.25  # seconds between two looks at whether all workers have stopped


@app.command(epilog="Example:  hpsearch status studies/mnist-mlp.toml --watch")
def status(
    study: StudyArgument,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show it until the search ends; in a pipe a line for each finished trial.")
    ] = False,
    storage: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show counts by state, the best trial, the workers, and the epochs run and saved."""
    definition = load_definition_of(study, storage)
    if not watch:
        return print_status(definition, as_json=as_json)
    if as_json:
        raise UsageError("--watch and --json do not go together; call status --json again and again instead")
    from rich.console import Console

    from hpsearch.monitor.live import LiveView
    from hpsearch.monitor.status import open_watch, summarize_search
    from hpsearch.monitor.text import echo

    watched = open_watch(definition)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # leaves the terminal as it was
    with LiveView(watched, Console(highlight=False), follows=True) as view:
        view.wait()
    for line in summarize_search(watched, shell_arguments(study, storage)):
        echo(line)
    return None


@app.command(epilog="Example:  hpsearch trials studies/mnist-mlp.toml --sort value --limit 5 --columns number,value,lr")
def trials(
    study: StudyArgument,
    state: Annotated[State | None, typer.Option(help="Only trials in this state.")] = None,
    sort: Annotated[str, typer.Option(metavar="COLUMN", help="By value the best first, else the least.")] = "number",
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many.")] = None,
    columns: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Only these columns: number, state, value, lr, ...")
    ] = None,
    storage: StorageOption = None,
    as_json: JsonOption = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, safe to open in a spreadsheet.")] = False,
) -> None:
    """List the trials of a study."""
    from hpsearch.cli.render import render_trials
    from hpsearch.monitor.trials import check_columns, flatten, list_columns, list_trials, to_csv

    if as_json and as_csv:
        raise UsageError("--json and --csv do not go together; choose one")
    definition = load_definition_of(study, storage)
    known = list_columns(definition.search)
    chosen = [name.strip() for name in columns.split(",")] if columns else []
    check_columns(known, [sort, *chosen])
    rows = list_trials(load_study_of(definition), state, sort, limit)
    if as_csv:
        sys.stdout.write(to_csv(rows, chosen or known))
    elif as_json and chosen:
        print_document([{name: flatten(row).get(name) for name in chosen} for row in rows], str, as_json=True)
    else:
        print_document(rows, lambda rows: render_trials(rows, chosen), as_json=as_json)


@app.command(epilog="Example:  hpsearch show studies/mnist-mlp.toml 17")
def show(
    study: StudyArgument,
    number: Annotated[int, typer.Argument(metavar="TRIAL", help="The trial's number.")],
    storage: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one trial: its parameters, reports, times, worker, and why it failed or was pruned."""
    from hpsearch.cli.render import render_trial
    from hpsearch.search.trials import describe_in_full

    document = describe_in_full(load_study_of(load_definition_of(study, storage)), number)
    print_document(document, render_trial, as_json=as_json)


@app.command(epilog="Example:  hpsearch stop studies/mnist-mlp.toml")
def stop(study: StudyArgument, storage: StorageOption = None) -> None:
    """Stop all workers on all machines: they finish their epochs and hand their trials back; run goes on with them."""
    from hpsearch.monitor.status import open_watch
    from hpsearch.monitor.text import echo
    from hpsearch.search.steering import stop_study

    definition = load_definition_of(study, storage)
    stop_study(load_study_of(definition))
    watch, told = open_watch(definition), 0
    while (snapshot := watch.poll()).is_stopped and snapshot.n_alive:
        if snapshot.n_alive != told:
            told = snapshot.n_alive
            echo(f"waiting for {told} trials whose workers finish their epochs ...")
        time.sleep(_POLL)
    if not snapshot.is_stopped:
        return echo("the study was resumed meanwhile")
    for lost in snapshot.workers:
        echo(f"trial {lost['trial']} of {lost['worker']}, which gives no sign of life, is taken over by the next run")
    return echo(f"stopped: {snapshot.describe_progress()}; go on with: hpsearch run {shell_arguments(study, storage)}")


@app.command(epilog="Example:  hpsearch extend studies/mnist-mlp.toml --trials 40")
def extend(
    study: StudyArgument,
    trials: Annotated[int, typer.Option(min=1, help="How many trials more.")],
    storage: StorageOption = None,
) -> None:
    """Add trials to the budget of a study; workers that run go on with them."""
    from hpsearch.monitor.status import open_watch
    from hpsearch.monitor.text import echo
    from hpsearch.search.steering import extend_study

    definition = load_definition_of(study, storage)
    n_trials = extend_study(load_study_of(definition), trials)
    suggestion = open_watch(definition).poll().suggest_next(shell_arguments(study, storage))
    echo(f"the budget has {n_trials} trials now; {suggestion}")


@app.command(epilog="Example:  hpsearch enqueue studies/mnist-mlp.toml --set lr=1e-3 --set depth=2")
def enqueue(
    study: StudyArgument,
    settings: Annotated[
        list[str], typer.Option("--set", metavar="NAME=VALUE", help="A hyperparameter; the sampler adds the others.")
    ],
    storage: StorageOption = None,
) -> None:
    """Try given values next."""
    from hpsearch.monitor.status import open_watch
    from hpsearch.monitor.text import echo
    from hpsearch.search.steering import enqueue_trial

    definition = load_definition_of(study, storage)
    number = enqueue_trial(definition, load_study_of(definition), settings)
    snapshot = open_watch(definition).poll()
    echo(f"trial {number} waits with {', '.join(settings)}; {snapshot.suggest_next(shell_arguments(study, storage))}")


@app.command(epilog="Example:  hpsearch dashboard studies/mnist-mlp.toml --open")
def dashboard(
    study: StudyArgument,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 0,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    token: Annotated[
        str | None, typer.Option(envvar="HPSEARCH_TOKEN", help="The secret in the address; default: a random one.")
    ] = None,
    writable: Annotated[
        bool,
        typer.Option(
            "--writable",
            help="Allow the page to write notes, to attach and delete files, and to delete studies, but nothing else.",
        ),
    ] = False,
    opens: Annotated[bool, typer.Option("--open", help="Open the address in a browser.")] = False,
    storage: StorageOption = None,
) -> None:
    """Show the study in a browser, with Optuna's dashboard, until Ctrl-C."""
    import threading
    import webbrowser
    from contextlib import ExitStack

    from hpsearch.monitor.dashboard.app import redirect_file, serve
    from hpsearch.monitor.dashboard.server import is_loopback
    from hpsearch.monitor.text import echo

    definition, arguments = load_definition_of(study, storage), shell_arguments(study, storage)
    with ExitStack() as stack:
        address = stack.enter_context(
            serve(definition, arguments, host=host, port=port, token=token, is_writable=writable)
        )
        if not is_loopback(host):
            echo(
                "the token and the study travel unencrypted: put a reverse proxy with TLS before this server,\n"
                "or leave --host out and reach it through: ssh -L"
            )
        print(address, flush=True)
        if opens:
            webbrowser.open(stack.enter_context(redirect_file(address)))
        threading.Event().wait()
