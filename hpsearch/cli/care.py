"""The group `upkeep`: each calls one function and prints its result."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from hpsearch.cli import options
from hpsearch.errors import UsageError
from hpsearch.monitor.text import echo

app = typer.Typer()


@app.command(epilog="Example: hpsearch doctor digits --fix")
def doctor(
    study: options.StudyArgument,
    fix: Annotated[bool, typer.Option("--fix", help="Fix what can be fixed safely.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Also show what is ok.")] = False,
    storage: options.StorageOption = None,
    artifacts: options.ArtifactsOption = None,
    data: options.DataOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Find and fix problems.

    It checks the database, trials, checkpoints, disk, data, your own network, devices and threads.
    """
    from dataclasses import asdict, replace

    from hpsearch.cli.render import render_findings

    definition = options.NamedStudy(study, storage, artifacts=artifacts).definition
    echo(f"{definition.study.name}: checking")
    from hpsearch.monitor.doctor import run_checks

    named = options.name_study(study, storage)
    findings = [
        replace(finding, message=finding.message.replace(" STUDY", f" {named}"))
        for finding in run_checks(definition, folder=data, fix=fix)
    ]
    shown = [asdict(finding) for finding in findings if verbose or as_json or finding.is_news]
    if shown:
        options.print_document(shown, render_findings, as_json=as_json)
    n_ok = sum(finding.is_ok for finding in findings)
    hint = "" if verbose or as_json else "; see all with --verbose"
    echo(f"{definition.study.name}: {n_ok} of {len(findings)} checks are ok{hint}")
    if n_ok < len(findings):
        raise typer.Exit(1)


@app.command(epilog="Example: hpsearch copy digits --to backup.db")
def copy(
    study: options.StudyArgument,
    to: Annotated[str, typer.Option(metavar="URL", help="Database URL or file, e.g. backup.db.")],
    artifacts_to: Annotated[
        str | None, typer.Option(metavar="URL", help="Copy checkpoints and other files here.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing SQLite file.")] = False,
    storage: options.StorageOption = None,
    artifacts: options.ArtifactsOption = None,
) -> None:
    """Copy or back up a study.

    From SQLite to a SQLite file, the whole database is copied as it is at one moment, also while workers run. To and
    from PostgreSQL, the study is copied and compared with its source; stop it first.
    """
    from sqlalchemy.engine import URL

    from hpsearch.bundle.manifest import check_outside
    from hpsearch.config.definition import load_definition
    from hpsearch.config.urls import is_url, parse_url, show_url
    from hpsearch.search.copy import back_up_study, copy_study

    url = to if is_url(to) or not to else URL.create("sqlite", database=to).render_as_string()
    is_file = parse_url(url).get_backend_name() == "sqlite"
    definition = options.NamedStudy(study, storage, artifacts=artifacts).definition
    target = load_definition(study, storage=url, artifacts=artifacts_to or artifacts)
    options.warn_about_password("--to", url)
    place, files = show_url(target.study.storage), target.study.artifacts
    if is_file:
        check_outside(Path(str(parse_url(url).database)), "--to")
    is_backup = is_file and parse_url(definition.study.storage).get_backend_name() == "sqlite"
    if is_backup:
        made = back_up_study(definition, target, force=force)
    elif force:
        raise UsageError("--force replaces a SQLite file by a copy of another one, and nothing else")
    else:
        made = copy_study(definition, target)
    what = f"was already in {place}" if made.was_there else f"copied to {place}"
    echo(f"{definition.study.name} {what}: {made.n_trials:,} trials, {made.n_reports:,} epoch results")
    echo("verified: " + ("integrity check passed" if is_backup else "source and copy are identical"))
    settings = f"HPSEARCH_STORAGE={shlex.quote(place)}"
    if files != definition.study.artifacts:
        echo(f"files: {made.n_files_copied} copied to {files}, {made.n_files_there} already there")
    else:
        hint = (
            ""
            if is_url(files) or is_backup
            else "; if other machines cannot reach it, use --artifacts-to s3://bucket/prefix"
        )
        echo(f"files: not copied, still in {files}{hint}")
    if artifacts_to or artifacts:
        settings += f" HPSEARCH_ARTIFACTS={shlex.quote(files)}"
    echo(f"next:  {settings} hpsearch {'status' if is_backup else 'run'} {shlex.quote(study)}")
    if not is_backup:
        original = show_url(definition.study.storage)
        echo(f"note:  the original in {original} is unchanged; continue with only one of the two")
