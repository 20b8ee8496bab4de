"""Commands that read a store."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from ckptmgr import present
from ckptmgr.commands.app import Json, Mirror, Step, Url, command, out, with_store
from ckptmgr.config import runtime_dir
from ckptmgr.errors import (
    EXIT_FELL_BACK,
    EXIT_OK,
    CkptmgrError,
    DaemonError,
    DamageError,
    MissingObjectError,
    NothingToRestoreError,
    RecordDamagedError,
    UsageError,
)

RETIRED_MAX = 100
"""Retired steps that `ls` shows: their registers stay for ever, and are read one by one."""


@command
def ls(
    url: Url,
    every: Annotated[
        bool, typer.Option("--all", help=f"Of retired steps more than the newest {RETIRED_MAX}.")
    ] = False,
    mirror: Mirror = "",
    as_json: Json = False,
) -> None:
    """List the steps of a job, newest first."""
    tiers = _tiers(url)
    most = None if every else RETIRED_MAX
    found = with_store(url, lambda catalog: catalog.entries(retired_max=most), mirror=mirror)
    entries = present.with_tiers(found, tiers)
    rows = [present.entry_json(entry, tiers) for entry in entries]
    out(rows, as_json, lambda: present.entries(entries, tiers, retired_max=most))


def _tiers(url: str) -> present.Tiers:
    """What the memory and the spool of this host hold of a job, if a daemon runs here."""
    from ckptmgr.staging.control import Stated, Status
    from ckptmgr.staging.launch import connect
    from ckptmgr.store.registry import normalise_url

    try:
        with connect(runtime_dir()) as client:
            jobs = client.ask(Status(), Stated).state["jobs"]
    except DaemonError:
        jobs = []
    return present.Tiers.of(jobs, normalise_url(url))


@command
def show(
    url: Url,
    step: Step = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every leaf.")] = False,
    as_json: Json = False,
) -> None:
    """Show one step: state, ranks, bytes, packs, tags, leaves, and who is missing."""
    from ckptmgr.restore.choose import find_entry

    tiers = _tiers(url)

    async def use(catalog: Any) -> dict[str, Any]:
        entry = await find_entry(catalog, step)
        committed = entry.decision is not None and entry.decision.committed
        manifests = await catalog.manifests(entry.decision) if committed else []
        return present.step_json(entry, tiers, [m.manifest for m in manifests], tensors=tensors)

    document = with_store(url, use)
    out(document, as_json, lambda: present.step(document))


@command
def verify(
    url: Url,
    step: Step = None,
    every: Annotated[bool, typer.Option("--all", help="All committed steps.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Existence and lengths only.")] = False,
    mirror: Mirror = "",
    as_json: Json = False,
) -> None:
    """Read committed steps back and name everything in them that does not hold."""
    from ckptmgr.restore.check import damaged_store, verify_store

    if every and step is not None:
        raise UsageError("give a step or --all, not both", hint="Leave the step out for all.")

    async def use(catalog: Any) -> list[dict[str, Any]]:
        with present.progress("verifying") as advance:
            return await verify_store(catalog, step, every=every, quick=quick, progress=advance)

    try:
        reports = with_store(url, use, mirror=mirror, objects=False)
    except (
        RecordDamagedError,
        MissingObjectError,
    ) as error:  # the mark of the store itself, without which none is read
        reports = [damaged_store(error)]
    out(reports, as_json, lambda: present.reports(reports))
    if any(report["damage"] for report in reports):
        raise typer.Exit(DamageError.exit_status)
    if not any(report["committed"] for report in reports):
        raise NothingToRestoreError("holds no committed step", subject=url)


FORMATS = ("safetensors", "torch", "dcp", "files")


@command
def restore(
    url: Url,
    step: Step = None,
    to: Annotated[Path, typer.Option("--to", help="Directory to make.")] = Path("restored"),
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="safetensors, torch or dcp; files for what watch adopted, its default.",
        ),
    ] = "",
    before: Annotated[
        str,
        typer.Option(
            help='The newest step before this first held of its tags, as "loss > 4 or loss < 0".'
        ),
    ] = "",
    mirror: Mirror = "",
    as_json: Json = False,
) -> None:
    """Write a committed step as files. Needs no daemon."""
    from ckptmgr.restore.check import restore_files
    from ckptmgr.restore.files import new_directory

    if form and form not in FORMATS:
        raise UsageError(f"{form!r} is not a format", hint=f"Choose {', '.join(FORMATS)}.")
    if before and step is not None:
        raise UsageError("give a step or --before, not both", hint="Leave the step out.")

    made: list[Path] = []

    async def use(catalog: Any) -> dict[str, Any]:
        with new_directory(to) as directory, present.progress("restoring") as advance:
            made.append(directory)
            document = await restore_files(catalog, step, form, directory, advance, before=before)
            if "buffers" in document:
                await _export(map(Path, document.pop("buffers")), form, directory)
            found = (path for path in directory.rglob("*") if path.is_file())
            files = sorted(str(path.relative_to(directory)) for path in found)
            return {**document, "to": str(to), "files": files}

    def leave_nothing() -> None:
        for directory in made:
            shutil.rmtree(directory, ignore_errors=True)

    document = with_store(url, use, leave_nothing, mirror=mirror)
    out(document, as_json, lambda: present.restored(document))
    raise typer.Exit(EXIT_FELL_BACK if document["skipped"] else EXIT_OK)


async def _export(found: Iterable[Path], form: str, directory: Path) -> None:
    """Only a process of its own imports torch: this one must work without it."""
    buffers = list(found)
    arguments = ("-m", "ckptmgr.rank.export", form, str(directory), *map(str, buffers))
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        _, errors = await process.communicate()
    except asyncio.CancelledError:
        process.kill()
        await process.wait()
        raise
    for buffer in buffers:
        buffer.unlink()
    if process.returncode:
        why = errors.decode(errors="replace").strip() or f"it ended with {process.returncode}"
        hint = "Free space, give --to a directory on another disk, or use --format safetensors."
        if "No module named 'torch" in why:
            hint = "Install torch (`pip install 'ckptmgr[torch]'`), or use --format safetensors."
        raise CkptmgrError(
            f"torch could not write the files: {why.splitlines()[-1]}", subject=form, hint=hint
        )
