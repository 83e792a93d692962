"""The commands that maintain a study: each calls one function and prints its result."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from hpsearch.cli import options
from hpsearch.monitor.text import echo

app = typer.Typer()


@app.command(epilog="Example:  hpsearch doctor studies/mnist-mlp.toml --fix")
def doctor(
    study: options.StudyArgument,
    fix: Annotated[bool, typer.Option("--fix", help="Fix what can be fixed safely.")] = False,
    storage: options.StorageOption = None,
    artifacts: options.ArtifactsOption = None,
    data: options.DataOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Find problems and show how to fix them. Checks database, trials, checkpoints, disk, data, devices, threads."""
    from dataclasses import asdict

    from hpsearch.cli.render import render_findings
    from hpsearch.monitor.doctor import run_checks

    definition = options.NamedStudy(study, storage, artifacts=artifacts).definition
    findings = [asdict(finding) for finding in run_checks(definition, folder=data, fix=fix)]
    options.print_document(findings, render_findings, as_json=as_json)
    if not all(finding["is_ok"] for finding in findings):
        raise typer.Exit(1)


@app.command(epilog="Example:  hpsearch backup studies/mnist-mlp.toml mnist-mlp-backup.db")
def backup(
    study: options.StudyArgument,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Where to write the copy.", callback=options.expand_path)
    ],
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    storage: options.StorageOption = None,
) -> None:
    """Back up a study's SQLite database (safe while workers run)."""
    from sqlalchemy.engine import URL

    from hpsearch.bundle.manifest import check_outside
    from hpsearch.config.urls import parse_url
    from hpsearch.storage.backup import backup as backup_database

    named = options.NamedStudy(study, storage)
    named.load_study()
    check_outside(file, "FILE")
    backup_database(parse_url(named.definition.study.storage), file, force=force)
    place = shlex.quote(str(URL.create("sqlite", database=str(file))))
    command = f"hpsearch status {shlex.quote(study)} --storage {place}"
    echo(f"backup written to {file} (integrity check passed); inspect it with: {command}")


@app.command(epilog="Example:  hpsearch copy studies/mnist-mlp.toml --to postgresql://ada@host/studies")
def copy(
    study: options.StudyArgument,
    to: Annotated[str, typer.Option(help="Target database URL (SQLite or PostgreSQL).")],
    artifacts_to: Annotated[
        str | None,
        typer.Option(help="Also copy checkpoints and other files to this folder or URL, e.g. s3://bucket/prefix."),
    ] = None,
    storage: options.StorageOption = None,
    artifacts: options.ArtifactsOption = None,
) -> None:
    """Copy a stopped study to another database. Verifies the copy; safe to repeat."""
    from hpsearch.config.definition import load_definition
    from hpsearch.config.urls import is_url, parse_url, show_url
    from hpsearch.search.copy import copy_study

    parse_url(to)  # an empty URL must not fall back to the study file's
    definition = options.NamedStudy(study, storage, artifacts=artifacts).definition
    target = load_definition(study, storage=to, artifacts=artifacts_to or artifacts)
    options.warn_about_password("--to", to)
    made = copy_study(definition, target)
    place, files = show_url(target.study.storage), target.study.artifacts
    what = f"was already in {place}" if made.was_there else f"copied to {place}"
    echo(f"{definition.study.name} {what}: {made.n_trials:,} trials, {made.n_reports:,} epoch results")
    echo("verified: source and copy are identical")
    settings = f"HPSEARCH_STORAGE={shlex.quote(place)}"
    if files != definition.study.artifacts:
        echo(f"files: {made.n_files_copied} copied to {files}, {made.n_files_there} already there")
    else:
        hint = "" if is_url(files) else "; if other machines cannot reach it, use --artifacts-to s3://bucket/prefix"
        echo(f"files: not copied, still in {files}{hint}")
    if artifacts_to or artifacts:
        settings += f" HPSEARCH_ARTIFACTS={shlex.quote(files)}"
    echo(f"next:  {settings} hpsearch run {shlex.quote(study)}")
    echo(f"note:  the original in {show_url(definition.study.storage)} is unchanged; continue with only one of the two")
