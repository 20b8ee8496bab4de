"""Commands that try the product on this machine."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from ckptmgr.commands.app import STATUS, Json, app, command
from ckptmgr.errors import CkptmgrError, UsageError


@command
def demo(
    as_json: Json = False,
    keep_files: Annotated[bool, typer.Option("--keep-files", help="Leave the files.")] = False,
    seed: Annotated[int | None, typer.Option(help="Kill at the same steps again.")] = None,
) -> None:
    """Train a small model, kill it, restore it, and prove that nothing was lost."""
    from ckptmgr.demo import run_demo

    raise typer.Exit(run_demo(as_json=as_json, keep_files=keep_files, seed=seed))


@app.command(epilog=STATUS, context_settings={"ignore_unknown_options": True})
def bench(
    mib: Annotated[int, typer.Option(min=1, help="Size of the state.")] = 1024,
    tensors: Annotated[int, typer.Option(min=1, help="In how many tensors.")] = 50,
    repeat: Annotated[int, typer.Option(min=2, help="Snapshots.")] = 7,
    codec: Annotated[str, typer.Option(help="auto, none, zstd or planes.")] = "auto",
    directory: Annotated[Path | None, typer.Option(help="Where the store is made.")] = None,
    as_json: Json = False,
    more: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
) -> None:
    """Measure stall, commit and restore against bare copies, writes and reads on this machine."""
    from ckptmgr.repository.codec import NAMES

    if codec not in NAMES:
        raise UsageError(f"{codec!r} is not a codec", hint="Choose auto, none, zstd or planes.")
    if directory is not None and not directory.is_dir():
        raise UsageError("is not a directory", subject=str(directory))
    if find_spec("torch") is None:
        hint = "Install torch (`pip install 'ckptmgr[torch]'`)."
        raise CkptmgrError("is not installed", subject="torch", hint=hint)
    given = [f"--mib={mib}", f"--tensors={tensors}", f"--repeat={repeat}", f"--codec={codec}"]
    given += [f"--directory={directory}"] if directory is not None else []
    given += ["--json"] if as_json else []
    started = [sys.executable, "-m", "ckptmgr.rank.bench", *given, *(more or [])]
    raise typer.Exit(subprocess.run(started, check=False).returncode)
