"""How command lines are parsed and help is laid out: commands in groups, one line per option, old names explained."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from typer.core import TyperCommand, TyperGroup
from typer.exceptions import TyperException

from hpsearch.cli.options import name_study
from hpsearch.errors import HpsearchError, UsageError

_NEW_NAMES = {
    "launch": "run --ray",
    "show": "trials",
    "replay": "trials --replay",
    "enqueue": "add",
    "extend": "add",
    "backup": "copy --to",
}
_ADDRESS = "auto|local|.*:.*"  # of a Ray cluster


@contextmanager
def _in_one_line(ctx: Any) -> Iterator[None]:
    """Raise a `UsageError` of one line where typer refuses the arguments."""
    try:
        yield
    except TyperException as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            raise
        message = re.sub(r"^Invalid value for '(.*?)': (Value error, )?", r"\1: ", error.format_message()).rstrip(".")
        message = re.sub(r"\.? (?:\(Possible options: (.*)\)|Did you mean (.*)\?)$", r"; did you mean \1\2?", message)
        message = re.sub(r"^[A-Z](?=[a-z])", lambda letter: letter[0].lower(), message)
        hint = "" if message.endswith("?") else f"; see: {ctx.command_path} -h"
        raise UsageError(message + hint) from error


class Command(TyperCommand):
    """A command whose help has one line per argument and option, and whose errors name the study as it was typed."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments. The value of `--ray` is optional: it is what looks like an address, else empty."""
        for i, argument in enumerate(args):
            if argument == "--ray" and not re.fullmatch(_ADDRESS, "".join(args[i + 1 : i + 2])):
                args[i] = "--ray="
        with _in_one_line(ctx):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Call the command; a STUDY in the message of an error becomes the study that the command names."""
        try:
            return super().invoke(ctx)
        except HpsearchError as error:
            if " STUDY" in str(error) and (study := ctx.params.get("study")):
                error.args = (str(error).replace(" STUDY", f" {name_study(study, ctx.params.get('storage'))}"),)
            raise

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the words of the usage line, without typer's braces around arguments."""
        return [re.sub("[{}]", "", piece) for piece in super().collect_usage_pieces(ctx)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write one line for each argument and option."""
        parameters: list[Any] = self.get_params(ctx)
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_dl(
                [
                    (each.metavar, each.help) if each.param_type_name == "argument" else each.get_help_record(ctx)
                    for each in parameters
                ]
            )


class Group(TyperGroup):
    """All commands, in groups, each described on one line."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the options before the command."""
        with _in_one_line(ctx):
            return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command. Raises `UsageError` for the old name of one."""
        if new := _NEW_NAMES.get(args[0]):
            command = f"hpsearch {new.split()[0]} -h"
            raise UsageError(f"`hpsearch {args[0]}` is now `hpsearch {new}`; see: {command}")
        with _in_one_line(ctx):
            return super().resolve_command(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write one line for each command."""
        rows, last = [], ""
        for name, command in self.commands.items():
            group = str(command.rich_help_panel)  # type: ignore[attr-defined]
            rows.append((f"{'' if group == last else group:8}{name}", str(command.help).partition("\n")[0]))
            last = group
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_dl(rows)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the names of the options, and how to start."""
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text("Options: " + ", ".join(max(each.opts, key=len) for each in self.get_params(ctx)))
            formatter.write_text(self.epilog)
