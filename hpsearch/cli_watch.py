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
