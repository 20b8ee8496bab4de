"""Commands that try the product on this machine."""

from __future__ import annotations

import subprocess
import sys
from typing import Annotated

import typer

from ckptmgr.commands.app import Json, command


@command
def demo(
    as_json: Json = False,
    keep_files: Annotated[bool, typer.Option("--keep-files", help="Leave the files.")] = False,
    seed: Annotated[int | None, typer.Option(help="Kill at the same steps again.")] = None,
) -> None:
    """Train a small model, kill it, restore it, and prove that nothing was lost."""
    from ckptmgr.demo import run_demo

    raise typer.Exit(run_demo(as_json=as_json, keep_files=keep_files, seed=seed))


@command
def bench(
    arguments: Annotated[list[str] | None, typer.Argument(help="See --help of the bench.")] = None,
) -> None:
    """Measure stall, commit and restore against bare copies, writes and reads on this machine."""
    module = "ckptmgr.rank.bench"
    raise typer.Exit(
        subprocess.run([sys.executable, "-m", module, *(arguments or [])], check=False).returncode
    )
