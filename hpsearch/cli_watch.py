"""The verbs to watch a search, and to steer it."""

from typing import Annotated

import typer

from hpsearch.arguments import (
    JsonOption,
    Sort,
    State,
    StorageOption,
    StudyArgument,
    load_definition_of,
    load_study_of,
    print_document,
    print_status,
    retype,
)

app = typer.Typer()


@app.command(epilog="Example:  hpsearch status studies/mnist-mlp.toml --json")
def status(study: StudyArgument, storage: StorageOption = None, as_json: JsonOption = False) -> None:
    """Show counts by state, the best trial, the workers, and the epochs run and saved."""
    print_status(load_definition_of(study, storage), as_json=as_json)


@app.command(epilog="Example:  hpsearch trials studies/mnist-mlp.toml --sort value --limit 5")
def trials(
    study: StudyArgument,
    state: Annotated[State | None, typer.Option(help="Only trials in this state.")] = None,
    sort: Annotated[Sort, typer.Option(help="By number, or the best value first.")] = Sort.number,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many.")] = None,
    storage: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the trials of a study."""
    from hpsearch.console import render_trials
    from hpsearch.study import list_trials

    print_document(
        list_trials(load_study_of(load_definition_of(study, storage)), state, sort, limit),
        render_trials,
        as_json=as_json,
    )


@app.command(epilog="Example:  hpsearch dashboard studies/mnist-mlp.toml --open")
def dashboard(
    study: StudyArgument,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 0,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    token: Annotated[
        str | None, typer.Option(envvar="HPSEARCH_TOKEN", help="The secret in the address; default: a random one.")
    ] = None,
    writable: Annotated[bool, typer.Option("--writable", help="Allow notes, uploads, and deleting.")] = False,
    opens: Annotated[bool, typer.Option("--open", help="Open the address in a browser.")] = False,
    storage: StorageOption = None,
) -> None:
    """Show the study in a browser, with Optuna's dashboard, until Ctrl-C."""
    import threading
    import webbrowser

    from hpsearch.console import say
    from hpsearch.dashboard import is_loopback, serve

    definition, arguments = load_definition_of(study, storage), retype(study, storage)
    with serve(definition, arguments, host=host, port=port, token=token, is_writable=writable) as address:
        if not is_loopback(host):
            say(
                "the token and the study travel unencrypted: put a reverse proxy with TLS before this server,\n"
                "or leave --host out and reach it through: ssh -L"
            )
        print(address, flush=True)
        if opens:
            webbrowser.open(address)
        threading.Event().wait()
