"""Commands that run the daemon of this host, and ask it."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from ckptmgr import present
from ckptmgr.commands.app import Json, Url, command, out
from ckptmgr.commands.live import watch_status
from ckptmgr.config import (
    DRAIN_SECONDS,
    GIB,
    STORE_TIMEOUT_SECONDS,
    DaemonSettings,
    checked_limit,
    checked_number,
    checked_port,
    runtime_dir,
)
from ckptmgr.errors import CkptmgrError, SupersededError, UsageError
from ckptmgr.types import RANK_MAX


@command
def daemon(
    prepare: Annotated[bool, typer.Option("--prepare", hidden=True)] = False,
    idle_seconds: Annotated[
        float | None, typer.Option(help="End after this long without work; 0 never.")
    ] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="Prometheus port on 127.0.0.1; 0 any, -1 off.")
    ] = None,
    max_store_gbps: Annotated[
        float | None,
        typer.Option(
            help="Gigabits (10^9 bits) per second to and from all stores; 8 are 1 GB/s; 0 no limit."
        ),
    ] = None,
    spool: Annotated[
        Path | None, typer.Option(help="Directory for snapshots while a store is down or slow.")
    ] = None,
    spool_max_gib: Annotated[
        float | None, typer.Option(help="Most that the spool may take; 0 what the disk has.")
    ] = None,
    mirror: Annotated[
        str | None, typer.Option(help="Second store, with a place for each job below it.")
    ] = None,
) -> None:
    """Run the daemon of this user on this host in the foreground.

    Also set by CKPTMGR_SPOOL, CKPTMGR_SPOOL_MAX_GIB and CKPTMGR_MIRROR, which a daemon that a
    trainer starts takes from it.
    """
    from dataclasses import replace

    if prepare:  # before a service manager listens for a daemon that it may start later
        from ckptmgr.daemon.alone import prepare_alone

        prepare_alone(runtime_dir())
        return

    from ckptmgr.daemon import log
    from ckptmgr.daemon.notify import Supervisor
    from ckptmgr.daemon.service import Service

    changes: dict[str, Any] = {}
    if idle_seconds is not None:
        changes["idle_seconds"] = checked_number(idle_seconds, "--idle-seconds")
    if metrics_port is not None:
        changes["metrics_port"] = checked_port(metrics_port, "--metrics-port")
    if max_store_gbps is not None:
        changes["max_store_gbps"] = checked_limit(max_store_gbps, "--max-store-gbps")
    if spool is not None:
        changes["spool_dir"] = spool.absolute()
    if spool_max_gib is not None:
        gib = checked_number(spool_max_gib, "--spool-max-gib")
        changes["spool_bytes_max"] = int(gib * GIB)
    if mirror is not None:
        changes["mirror_url"] = mirror
    settings = replace(DaemonSettings.from_env(auto=False), **changes)
    log.configure()
    asyncio.run(Service(settings, Supervisor.from_env()).run())


@command
def status(
    watch: Annotated[
        bool, typer.Option("--watch", help="Show it anew every second, until Ctrl-C.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what the daemon on this host holds and does.

    The same is on the page that it serves: see `page` in the first line.
    """
    from ckptmgr.staging.control import Stated, Status
    from ckptmgr.staging.launch import connect

    def ask() -> dict[str, Any]:
        with connect(runtime_dir()) as client:
            return client.ask(Status(), Stated).state

    if watch:
        watch_status(ask, as_json=as_json)
        return
    state = ask()
    out(state, as_json, lambda: present.status(state))


@command
def prefetch(
    url: Url,
    ranks: Annotated[
        str, typer.Option(help="Those of this host, as in 0-7 or 8,9; all if left out.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Bring the newest step into this host's memory, for a trainer that is about to start.

    It returns at once; the daemon, which is started if none runs, does the rest while the trainer
    imports its libraries and builds its state. The memory goes back when the trainer has restored,
    or after a quarter of an hour.
    """
    from ckptmgr.staging.control import Prefetch, Prefetching
    from ckptmgr.staging.launch import connect_or_start
    from ckptmgr.store.registry import normalise_url

    request = Prefetch(normalise_url(url), _ranks_of(ranks))
    with connect_or_start(runtime_dir()) as client:
        found = client.ask(request, Prefetching, 2 * STORE_TIMEOUT_SECONDS)
    step = f"{found.attempt}.{found.step}" if found.attempt else None
    document = {"step": step, "ranks": list(found.ranks), "bytes": found.nbytes}
    out(document, as_json, lambda: present.prefetching(document))


def _ranks_of(text: str) -> tuple[int, ...]:
    """Ranks as numbers: 0, 1, 2 and 7 of "0-2,7"."""
    found: list[int] = []
    for part in filter(None, text.split(",")):
        first, dash, last = part.partition("-")
        if not (first.isdecimal() and (last.isdecimal() or not dash)):
            raise UsageError(f"{text!r} names no ranks", hint="Write them as in 0-7 or 8,9.")
        if max(len(first), len(last)) > len(str(RANK_MAX)):
            raise UsageError(f"{part!r} goes beyond the last rank", hint=f"It is {RANK_MAX}.")
        if int(last or first) < int(first):
            raise UsageError(f"{part!r} goes backwards", hint=f"Write it as {last}-{first}.")
        found += range(int(first), int(last or first) + 1)
    return tuple(dict.fromkeys(found))


@command
def drain(
    timeout: Annotated[float, typer.Option(help="Seconds to wait.")] = DRAIN_SECONDS,
    stop: Annotated[bool, typer.Option("--stop", help="End the daemon afterwards.")] = False,
    as_json: Json = False,
) -> None:
    """Wait until every sealed snapshot on this host is committed.

    Exit status 6 says that a trainer still runs here though a newer attempt of its job has taken
    over: what it snapshots is given up, and nothing of it will be committed.
    """
    if not 0 <= timeout < math.inf:
        raise UsageError(f"{timeout} is not a number of seconds", subject="--timeout")
    from ckptmgr.staging.control import Done, Drain, Stated, Status, Stop
    from ckptmgr.staging.launch import connect

    with connect(runtime_dir()) as client, present.waiting("draining"):
        left = client.ask(Drain(timeout), Done, timeout + 10).left
        jobs = client.ask(Status(), Stated).state["jobs"]
        if stop:
            left = client.ask(Stop(), Done).left
    stale = [(job["url"], b) for job in jobs for b in job["buffers"] if b["superseded_by"]]
    document = {"undecided": left, "superseded": len(stale)}
    out(document, as_json, lambda: typer.echo(f"{left} snapshots undecided"))
    if left:
        raise CkptmgrError(
            f"{left} snapshots are not committed after {timeout} s",
            hint="The daemon ends now; the next one on this host finds them in host memory."
            if stop
            else "Look at `ckptmgr status` for the failure; the daemon goes on trying.",
        )
    for url, buffer in stale:
        raise SupersededError(
            f"attempt {buffer['superseded_by']} has taken over from rank {buffer['rank']} here",
            subject=url,
        )
