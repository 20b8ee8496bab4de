"""The command that adopts checkpoints which other programs write."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ckptmgr import foreground, present
from ckptmgr.commands.app import Json, command, out
from ckptmgr.commands.keeping import Best, Daily, Every, Hourly, Last, policy_of
from ckptmgr.config import DaemonSettings
from ckptmgr.errors import UsageError

QUIET_SECONDS = 5.0
"""Longer than a writer on one host pauses between two files of a checkpoint; the end of one is
told by what it leaves last all the same."""

CODECS = ("auto", "none", "zstd")


@command
def watch(
    directory: Annotated[Path, typer.Argument(help="Where checkpoints appear.")],
    to: Annotated[str, typer.Option("--to", help="Store for them: file:///data/run7, or a path.")],
    keep: Last = "3",
    keep_every: Every = 0,
    keep_hourly: Hourly = 0,
    keep_daily: Daily = 0,
    keep_best: Best = None,
    match: Annotated[
        list[str] | None,
        typer.Option(help="Only names that match, as 'last*.pt'; may be repeated."),
    ] = None,
    quiet_seconds: Annotated[
        float, typer.Option(help="Nothing of a checkpoint may have changed for so long.")
    ] = QUIET_SECONDS,
    codec: Annotated[str, typer.Option(help="auto, none or zstd.")] = "auto",
    once: Annotated[
        bool, typer.Option("--once", help="Adopt what is whole when it is quiet, then end.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Adopt checkpoints that other programs write as files, and commit each as a step.

    Taken are checkpoint-N directories of a Hugging Face Trainer, directories of
    torch.distributed.checkpoint, and files of torch.save and safetensors with a number in their
    name. Runs in the foreground until it is ended; its events are those of docs/events.md.
    Restore with `ckptmgr restore URL --to DIR`. --json prints what was done, with --once.
    """
    from ckptmgr.daemon import log

    policy = policy_of(keep, keep_every, keep_hourly, keep_daily, keep_best)
    if codec not in CODECS:
        hint = f"Choose {', '.join(CODECS)}."
        raise UsageError(f"{codec!r} is not allowed", subject="--codec", hint=hint)
    if not (math.isfinite(quiet_seconds) and quiet_seconds > 0):
        hint = "Give a number of seconds above 0."
        raise UsageError(f"{quiet_seconds} is not allowed", subject="--quiet-seconds", hint=hint)
    if not directory.is_dir():
        hint = "Give the directory that the other program writes its checkpoints into."
        raise UsageError("is not a directory", subject=str(directory), hint=hint)
    if as_json and not once:
        hint = "Add --once, or read the events on standard error, which are JSON lines."
        raise UsageError("has no document before it ends", subject="--json", hint=hint)
    log.configure()
    document = foreground.run(
        _watch(directory.absolute(), to, policy, match or [], quiet_seconds, codec, once=once),
        lambda: None,
    )
    out(document, as_json, lambda: _show(document))


def _show(document: dict[str, Any]) -> None:
    for one in document["adopted"]:
        typer.echo(present.printable(f"{one['source']} is step {one['id']}"))
    for one in document["left"]:
        typer.echo(present.printable(f"{one['source']} {one['why']}"))


async def _watch(
    directory: Path,
    url: str,
    keep: Any,
    patterns: list[str],
    quiet_seconds: float,
    codec: str,
    *,
    once: bool,
) -> dict[str, Any]:
    from ckptmgr.bucket import Bucket, bytes_per_second
    from ckptmgr.daemon.job import Job
    from ckptmgr.daemon.pipeline import Pipeline
    from ckptmgr.metrics import Metrics
    from ckptmgr.repository.budget import LEASE_BYTES, BufferPool
    from ckptmgr.repository.keyring import load_keyring
    from ckptmgr.store.registry import normalise_url
    from ckptmgr.watch.adopting import Adopter
    from ckptmgr.watch.watcher import Watcher

    settings = DaemonSettings.from_env(auto=False)
    gbps = settings.max_store_gbps
    pool = BufferPool(settings.budget_bytes)
    job = Job.open(
        normalise_url(url),
        Metrics(),
        pool,
        settings,
        Bucket(bytes_per_second(gbps)) if gbps else None,
        keyring=load_keyring(os.environ),
        background=BufferPool(LEASE_BYTES),
    )
    try:
        adopter = Adopter(directory, job, Pipeline(pool), codec)
        watcher = Watcher(
            directory,
            job,
            adopter,
            keep,
            patterns=patterns,
            quiet_seconds=quiet_seconds,
            once=once,
        )
        await watcher.run()
    finally:
        await job.aclose()
    left = [{"source": name, "why": why} for name, why in sorted(watcher.outcome.left.items())]
    return {"adopted": watcher.outcome.adopted, "left": left}
