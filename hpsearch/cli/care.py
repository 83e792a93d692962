"""The verbs of the command line that look after a study: each calls one function and prints what it returns."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from hpsearch.cli.options import (
    ArtifactsOption,
    DataOption,
    JsonOption,
    StorageOption,
    StudyArgument,
    load_definition_of,
    load_study_of,
    print_document,
    warn_about_password,
)

app = typer.Typer()


@app.command(epilog="Example:  hpsearch doctor studies/mnist-mlp.toml --fix")
def doctor(
    study: StudyArgument,
    fix: Annotated[bool, typer.Option("--fix", help="Mend what is safe to mend.")] = False,
    storage: StorageOption = None,
    artifacts: ArtifactsOption = None,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check database, trials, checkpoints, disk, data, devices and threads, and say how to mend what is wrong."""
    from dataclasses import asdict

    from hpsearch.cli.render import render_findings
    from hpsearch.monitor.doctor import run_checks

    findings = [
        asdict(finding)
        for finding in run_checks(load_definition_of(study, storage, artifacts=artifacts), folder=data, fix=fix)
    ]
    print_document(findings, render_findings, as_json=as_json)
    if not all(finding["is_ok"] for finding in findings):
        raise typer.Exit(1)


@app.command(epilog="Example:  hpsearch backup studies/mnist-mlp.toml mnist-mlp-backup.db")
def backup(
    study: StudyArgument,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A new file: a SQLite database.")],
    storage: StorageOption = None,
) -> None:
    """Copy the SQLite database of a study, which may be running, to a new file, and check the copy."""
    from hpsearch.config.urls import parse_url
    from hpsearch.monitor.text import echo
    from hpsearch.storage.backup import backup as backup_database

    definition = load_definition_of(study, storage)
    load_study_of(definition)
    backup_database(parse_url(definition.study.storage), file)
    place = shlex.quote(f"sqlite:///{file}")
    echo(f"{file} is a whole copy; look at it with: hpsearch status {shlex.quote(study)} --storage {place}")


@app.command(epilog="Example:  hpsearch copy studies/mnist-mlp.toml --to postgresql://ada@host/studies")
def copy(
    study: StudyArgument,
    to: Annotated[str, typer.Option(help="SQLAlchemy URL of another database; SQLite or PostgreSQL.")],
    artifacts_to: Annotated[
        str | None, typer.Option(help="Copy checkpoints and other files too: a folder or URL, as s3://bucket/prefix.")
    ] = None,
    storage: StorageOption = None,
    artifacts: ArtifactsOption = None,
) -> None:
    """Copy a study that no worker runs to another database, and check that both sides are equal; safe to repeat."""
    from hpsearch.config.definition import load_definition
    from hpsearch.config.urls import is_url, parse_url, show_url
    from hpsearch.monitor.text import echo
    from hpsearch.search.copy import copy_study

    parse_url(to)  # an empty one is not the study file's
    definition = load_definition_of(study, storage, artifacts=artifacts)
    target = load_definition(study, storage=to, artifacts=artifacts_to or artifacts)
    warn_about_password("--to", to)
    made = copy_study(definition, target)
    place, files = show_url(target.study.storage), target.study.artifacts
    what = "was there already" if made.was_there else "is there now"
    echo(f"{definition.study.name} {what}: {made.n_trials:,} trials with {made.n_reports:,} reports in {place}")
    echo(f"equal: what is read of it on both sides has the SHA-256 {made.digest[:12]}...")
    settings = f"HPSEARCH_STORAGE={shlex.quote(place)}"
    if files != definition.study.artifacts:
        echo(f"files: {made.n_files_copied} copied to {files}, {made.n_files_there} were there already")
    else:
        hint = "" if is_url(files) else "; where other machines do not see it: --artifacts-to s3://bucket/prefix"
        echo(f"files: they stay in {files}{hint}")
    if artifacts_to or artifacts:
        settings += f" HPSEARCH_ARTIFACTS={shlex.quote(files)}"
    echo(f"next:  {settings} hpsearch run {shlex.quote(study)}")
    echo(f"       and go on with one study only; {show_url(definition.study.storage)} is as it was")
