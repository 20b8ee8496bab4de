"""The command line: its commands are registered by importing them."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Annotated, Any, NoReturn

import typer

from ckptmgr import __version__, foreground, present
from ckptmgr.commands import (  # noqa: F401 - registers them
    changing,
    installing,
    keeping,
    knowing,
    reading,
    running,
    trying,
    watching,
)
from ckptmgr.commands.app import STATUS, app
from ckptmgr.errors import CkptmgrError
from ckptmgr.heap import keep_freed_memory

__all__ = ["STATUS", "app", "main"]

_PARSER_ERROR: type[Exception] = typer.BadParameter.mro()[1]
"""A usage error of the parser: its name is in click, or within typer, as typer's version goes."""

_PRINTERS = {"click", "rich", "typer"}
"""The packages that write to standard output."""


@app.callback(invoke_without_command=True)
def _top(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit
    present.debug = debug


def main() -> None:
    """Run a command; an error is one line and a hint, a traceback only with --debug."""
    sys.excepthook = _last_words
    keep_freed_memory()
    try:
        # Not `app()`, which puts an excepthook of its own in the place of ours.
        sys.exit(typer.main.get_command(app)(prog_name="ckptmgr", standalone_mode=False))
    except _PARSER_ERROR as error:
        _refuse(error)
    except CkptmgrError as error:
        if present.debug:
            raise
        for line in f"ckptmgr: {error}".splitlines():
            typer.echo(present.printable(line), err=True)
        foreground.end(error.exit_status)
    except OSError as error:
        if present.debug or not _is_of_output(error):
            raise
        typer.echo(f"ckptmgr: standard output: can not be written: {error.strerror}", err=True)
        typer.echo("hint: Make room where it goes, or send it elsewhere.", err=True)
        foreground.end(1)


def _is_of_output(error: OSError) -> bool:
    """Whether those who print met it; what goes wrong with any file elsewhere is not theirs."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__"))
    return module.partition(".")[0] in _PRINTERS


def _refuse(error: Any) -> NoReturn:
    """What the parser says, in the form of all other errors; no arguments at all ask for help."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
    else:
        path = error.ctx.command_path if error.ctx else "ckptmgr"
        typer.echo(f"ckptmgr: {present.printable(error.format_message().rstrip('.'))}", err=True)
        typer.echo(f"hint: Run `{path} --help` to see what it takes.", err=True)
    sys.exit(error.exit_code)


def _last_words(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """What nobody expected: the name of the error, and how to see where it came from."""
    if present.debug:
        sys.__excepthook__(kind, error, trace)
        return
    typer.echo(f"ckptmgr: {kind.__name__}: {present.printable(str(error))}", err=True)
    typer.echo("hint: Run it again with `ckptmgr --debug` to see where.", err=True)


if __name__ == "__main__":
    main()
