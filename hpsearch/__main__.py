"""The entry point of `hpsearch` and `python -m hpsearch`: runs a command and turns errors into exit statuses."""

import logging
import os
import sys
from pathlib import Path

from typer.exceptions import TyperException

from hpsearch.cli.app import app
from hpsearch.errors import Drained, HpsearchError

_INTERRUPTED = 130  # typer returns it on Ctrl-C without printing anything


def main() -> None:
    """Run the command line. Errors become short messages on stderr and set the exit status."""
    _open_standard_streams()
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    is_debug = len(arguments) < len(sys.argv) - 1
    handler = logging.lastResort or logging.StreamHandler()  # the former writes to the stderr of Rich's live table, too
    handler.setLevel(logging.DEBUG if is_debug else logging.WARNING)
    logging.basicConfig(level=handler.level, format="%(message)s", handlers=[handler])
    logging.captureWarnings(True)
    try:
        status = app(arguments, prog_name="hpsearch", standalone_mode=False)
        if status == _INTERRUPTED:
            _exit_with("interrupted", status, prefix="")
        sys.exit(status)
    except HpsearchError as error:
        if is_debug:
            raise
        _exit_with(str(error), error.exit_status, prefix="" if isinstance(error, Drained) else "error: ")
    except TyperException as error:  # `hpsearch` alone: its message is the help
        _exit_with(error.format_message(), error.exit_code, prefix="")
    except OSError as error:
        if is_debug:
            raise
        _exit_with(f"{error.filename or 'I/O error'}: {error.strerror or error}", 1)
    except Exception as error:
        if is_debug:
            raise
        hint = "This looks like a bug in hpsearch. Re-run with --debug for the full traceback."
        _exit_with(f"internal error: {type(error).__name__}: {error}\n{hint}", 1)


def _open_standard_streams() -> None:
    """Open closed streams on the null device. Otherwise, files opened later get their numbers, and what is printed."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            stream = Path(os.devnull).open(mode)  # noqa: SIM115 - until this process exits
            os.dup2(stream.fileno(), number)
            os.set_inheritable(number, True)  # `dup2` does so only if the numbers differ
            setattr(sys, name, stream)


def _exit_with(message: str, exit_status: int, prefix: str = "error: ") -> None:
    print(f"{prefix}{message}", file=sys.stderr)
    sys.exit(exit_status)


if __name__ == "__main__":
    main()
