"""The group `watch`: the commands that watch and steer a search."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from hpsearch.cli import options
from hpsearch.errors import UsageError
from hpsearch.monitor.text import echo, list_columns

app = typer.Typer()


@app.command(epilog="Example: hpsearch status digits --watch")
def status(
    study: options.StudyArgument,
    watch: Annotated[bool, typer.Option("--watch", help="Update until the search ends.")] = False,
    storage: options.StorageOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Show progress; --watch: live."""
    named = options.NamedStudy(study, storage)
    if watch and as_json:
        raise UsageError("--watch cannot be combined with --json; poll `status --json` instead")
    watched = named.watch()
    if not watch:
        return options.print_status(watched, named.arguments, as_json=as_json)
    from hpsearch.monitor.live import LiveView
    from hpsearch.monitor.status import summarize_search

    with LiveView(watched, follows=True) as view:
        view.wait()
    for line in summarize_search(watched, named.arguments):
        echo(line)
    return None


@app.command(epilog="Example: hpsearch trials digits --sort value --limit 5")
def trials(
    context: typer.Context,
    study: options.StudyArgument,
    number: Annotated[
        int | None,
        typer.Argument(metavar="TRIAL", parser=options.read_number(0), help="Show this trial in detail, e.g. 17."),
    ] = None,
    replays: Annotated[bool, typer.Option("--replay", help="Re-run TRIAL from its seed, and compare.")] = False,
    state: Annotated[
        options.State | None, typer.Option(metavar="STATE", help="complete, pruned, failed, running or waiting.")
    ] = None,
    sort: Annotated[str | None, options.columns("COLUMN", "Sort by it; value: best first. [default: trial]")] = None,
    limit: Annotated[int | None, options.number("List at most N trials.", 1)] = None,
    columns: Annotated[str | None, options.columns("A,B,...", "Columns: trial, state, value, lr, ...")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV (formulas are escaped).")] = False,
    as_json: options.JsonOption = False,
    data: options.DataOption = None,
    storage: options.StorageOption = None,
) -> None:
    """List trials, or show one: trials STUDY 17."""
    from hpsearch.cli.render import render_trial
    from hpsearch.monitor.tables import tabulate_trials
    from hpsearch.monitor.trials import check_columns, describe_in_full, flatten, list_trials, to_csv

    if number is None:
        study, typed = options.split_study(context, study, r"\d+")
        number = int(typed) if typed else None
    if as_json and as_csv:
        raise UsageError("--json and --csv cannot be combined")
    if number is not None and (state or sort or limit or columns or as_csv):
        raise UsageError(
            f"--state, --sort, --limit, --columns and --csv list trials; leave them out to show trial {number}"
        )
    if number is None and (replays or data):
        raise UsageError("--replay and --data need the number of a trial")
    named = options.NamedStudy(study, storage)
    if replays and number is not None:
        return _replay(named, number, data, as_json=as_json)
    if number is not None:
        return options.print_document(describe_in_full(named.load_study(), number), render_trial, as_json=as_json)
    known = list_columns(named.definition.search)
    chosen = [name.strip() for name in columns.split(",")] if columns else []
    check_columns(known, [sort or "trial", *chosen])
    rows = list_trials(named.load_study(), state, sort or "trial", limit)
    if as_csv:
        sys.stdout.write(to_csv(rows, chosen or known))
    elif as_json and chosen:
        options.print_document([{name: flatten(row).get(name) for name in chosen} for row in rows], str, as_json=True)
    else:
        options.print_document(
            rows, lambda rows: tabulate_trials(rows, named.definition.search, chosen), as_json=as_json
        )
    return None


def _replay(named: options.NamedStudy, number: int, data: Path | None, *, as_json: bool) -> None:
    """Re-run a trial, and print whether its learning curve is reproduced."""
    stored = named.load_study()
    from hpsearch.bundle.replay import replay
    from hpsearch.cli.render import render_replay
    from hpsearch.training.devices import list_devices

    document = replay(
        named.definition,
        stored,
        number,
        folder=data,
        device=list_devices()[0],
        on_epoch=lambda result: echo(f"epoch {result.epoch} loss {result.loss:.4f} accuracy {result.accuracy:.4f}"),
    )
    options.print_document(document, render_replay, as_json=as_json)
    if not document["identical"]:
        raise typer.Exit(1)


@app.command(epilog="Example: hpsearch add digits lr=1e-3 depth=2 --trials 20")
def add(
    context: typer.Context,
    study: options.StudyArgument,
    values: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME=VALUE", help="Queue a trial with them; the rest is sampled."),
    ] = None,
    trials: Annotated[int | None, options.number("Add N trials to the budget.", 1)] = None,
    storage: options.StorageOption = None,
) -> None:
    """Add --trials 20, or values to try next: lr=1e-3."""
    from hpsearch.search.study import enqueue_trial, extend_study

    study, first = options.split_study(context, study, r"\w+=.*")
    values = [*([first] if first else []), *(values or [])]
    named = options.NamedStudy(study, storage)
    if not values and trials is None:
        raise UsageError("nothing to add: give a number of trials (--trials 20) or values to try next (lr=1e-3)")
    stored, done = named.load_study(), []
    if values:
        done.append(f"trial {enqueue_trial(named.definition, stored, values)} queued with {', '.join(values)}")
    if trials is not None:
        done.append(f"budget is now {extend_study(named.definition, stored, trials)} trials")
    echo("; ".join([*done, named.watch().poll().suggest_next(named.arguments)]))


@app.command(epilog="Example: hpsearch dashboard digits --open")
def dashboard(
    study: options.StudyArgument,
    port: Annotated[int, options.number("Port; 0: any free one.", 0, 65535)] = 0,
    host: Annotated[str, typer.Option(metavar="HOST", help="Address to listen on.")] = "127.0.0.1",
    token: Annotated[
        str | None,
        typer.Option(
            metavar="TOKEN",
            envvar="HPSEARCH_TOKEN",
            help="Token. [default: random] [env: HPSEARCH_TOKEN]",
            show_envvar=False,
        ),
    ] = None,
    opens: Annotated[bool, typer.Option("--open", help="Open it in your browser.")] = False,
    storage: options.StorageOption = None,
) -> None:
    """Serve the Optuna dashboard, read-only."""
    import threading
    from contextlib import suppress

    from hpsearch.monitor.dashboard.app import serve

    named = options.NamedStudy(study, storage)
    with serve(named.definition, named.arguments, host=host, port=port, token=token, opens=opens) as address:
        echo(f"Optuna dashboard of {named.definition.study.name}, read-only; it ends with Ctrl-C:")
        print(address, flush=True)
        with suppress(KeyboardInterrupt):
            threading.Event().wait()
