"""The command line: the daemon, and everything a person asks of a store or of a daemon."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, TypeVar

import typer

from ckptmgr import __version__, foreground, present
from ckptmgr.config import (
    BUDGET_BYTES,
    DRAIN_SECONDS,
    GIB,
    DaemonSettings,
    checked_limit,
    runtime_dir,
)
from ckptmgr.errors import (
    EXIT_FELL_BACK,
    EXIT_OK,
    CkptmgrError,
    DaemonError,
    DamageError,
    MissingObjectError,
    NothingToRestoreError,
    RecordDamagedError,
    SupersededError,
    UsageError,
)

STATUS = """EXIT STATUS: 0 done, 1 error, 2 usage, 3 damage found, 4 nothing to restore,
5 store unreachable, 6 superseded by a newer attempt, 7 fell back to an older step."""

app = typer.Typer(
    name="ckptmgr",
    help="Fault-tolerant checkpoint manager for PyTorch training.",
    epilog=STATUS,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Url = Annotated[
    str, typer.Argument(help="Where the job's steps are: file:///data/run7, or a path.")
]
Step = Annotated[
    str | None, typer.Argument(help="1200, or 3.1200 for attempt 3; the newest if left out.")
]
Mirror = Annotated[
    str,
    typer.Option(
        envvar="CKPTMGR_MIRROR", help="Mirror to read what the store does not give, as of daemon."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]

T = TypeVar("T")


def command(function: Callable[..., Any]) -> Callable[..., Any]:
    """Register a command; every help text ends with the exit statuses."""
    return app.command(epilog=STATUS)(function)


def _out(document: Any, as_json: bool, human: Callable[[], None]) -> None:
    if as_json:
        typer.echo(json.dumps(document, indent=2))
    else:
        human()


def _nothing() -> None:
    pass


def _with_store(
    url: str,
    use: Callable[[Any], Awaitable[T]],
    leave_nothing: Callable[[], None] = _nothing,
    *,
    mirror: str = "",
    objects: bool = True,
) -> T:
    """Run `use` on a catalog of the store at `url`; nothing is created.

    `leave_nothing` deletes what `use` made, when an interrupt has to end the process without it.
    What the store does not give is read from its place below `mirror`, and told; single objects
    only with `objects`.
    """
    from ckptmgr.repository import keys
    from ckptmgr.repository.catalog import Catalog
    from ckptmgr.repository.commit import check_format
    from ckptmgr.store.mirrored import open_for_reading

    async def run() -> T:
        store = open_for_reading(url, mirror, present.read_mirror, keys.FORMAT, objects=objects)
        try:
            if not await check_format(store, create=False):
                raise NothingToRestoreError("is not a ckptmgr store", subject=store.url)
            return await use(Catalog(store))
        finally:
            await store.aclose()

    return foreground.run(run(), leave_nothing)


# -- the daemon -----------------------------------------------------------------------------------


@command
def daemon(
    auto: Annotated[bool, typer.Option("--auto", hidden=True)] = False,
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

    from ckptmgr.daemon import log
    from ckptmgr.daemon.service import Service

    limit = None if max_store_gbps is None else checked_limit(max_store_gbps, "--max-store-gbps")
    given: dict[str, Any] = {
        "idle_seconds": idle_seconds,
        "metrics_port": metrics_port,
        "max_store_gbps": limit,
        "spool_dir": None if spool is None else spool.absolute(),
        "spool_bytes_max": None if spool_max_gib is None else int(spool_max_gib * GIB),
        "mirror_url": mirror,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    settings = replace(DaemonSettings.from_env(auto=auto), **changes)
    log.configure()
    try:
        asyncio.run(Service(settings).run())
    except DaemonError:
        if not auto:  # two ranks may start one at the same moment: one of the two is enough
            raise


@command
def status(as_json: Json = False) -> None:
    """Show what the daemon on this host holds and does."""
    from ckptmgr.staging.control import Stated, Status
    from ckptmgr.staging.launch import connect

    with connect(runtime_dir()) as client:
        state = client.ask(Status(), Stated).state
    _out(state, as_json, lambda: present.status(state))


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
    from ckptmgr.staging.control import Done, Drain, Stated, Status, Stop
    from ckptmgr.staging.launch import connect

    with connect(runtime_dir()) as client, present.waiting("draining"):
        left = client.ask(Drain(timeout), Done, timeout + 10).left
        jobs = client.ask(Status(), Stated).state["jobs"]
        if stop:
            client.ask(Stop(), Done)
    stale = [(job["url"], b) for job in jobs for b in job["buffers"] if b["superseded_by"]]
    document = {"undecided": left, "superseded": len(stale)}
    _out(document, as_json, lambda: typer.echo(f"{left} snapshots undecided"))
    if left:
        raise CkptmgrError(
            f"{left} snapshots are not committed after {timeout} s",
            hint="Look at `ckptmgr status` for the failure; the daemon goes on trying.",
        )
    for url, buffer in stale:
        raise SupersededError(
            f"attempt {buffer['superseded_by']} has taken over from rank {buffer['rank']} here",
            subject=url,
        )


# -- reading a store ------------------------------------------------------------------------------


@command
def ls(url: Url, mirror: Mirror = "", as_json: Json = False) -> None:
    """List the steps of a job, newest first."""
    tiers = _tiers(url)
    found = _with_store(url, lambda catalog: catalog.entries(), mirror=mirror)
    entries = present.with_tiers(found, tiers)
    rows = [present.entry_json(entry, tiers) for entry in entries]
    _out(rows, as_json, lambda: present.entries(entries, tiers))


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

    document = _with_store(url, use)
    _out(document, as_json, lambda: present.step(document))


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
        raise UsageError("give a step or --all, not both")

    async def use(catalog: Any) -> list[dict[str, Any]]:
        with present.progress("verifying") as advance:
            return await verify_store(catalog, step, every=every, quick=quick, progress=advance)

    try:
        reports = _with_store(url, use, mirror=mirror, objects=False)
    except (
        RecordDamagedError,
        MissingObjectError,
    ) as error:  # the mark of the store itself, without which none is read
        reports = [damaged_store(error)]
    _out(reports, as_json, lambda: present.reports(reports))
    if any(report["damage"] for report in reports):
        raise typer.Exit(DamageError.exit_status)
    if not any(report["committed"] for report in reports):
        raise NothingToRestoreError("holds no committed step", subject=url)


@command
def restore(
    url: Url,
    step: Step = None,
    to: Annotated[Path, typer.Option("--to", help="Directory to make.")] = Path("restored"),
    form: Annotated[
        str, typer.Option("--format", help="safetensors, torch or dcp.")
    ] = "safetensors",
    mirror: Mirror = "",
    as_json: Json = False,
) -> None:
    """Write a committed step as files. Needs no daemon."""
    from ckptmgr.restore.check import restore_files
    from ckptmgr.restore.files import new_directory

    if form not in ("safetensors", "torch", "dcp"):
        raise UsageError(f"{form!r} is not a format", hint="Choose safetensors, torch or dcp.")

    made: list[Path] = []

    async def use(catalog: Any) -> dict[str, Any]:
        with new_directory(to) as directory, present.progress("restoring") as advance:
            made.append(directory)
            document = await restore_files(catalog, step, form, directory, advance)
            if form != "safetensors":
                await _export(map(Path, document.pop("buffers")), form, directory)
            found = (path for path in directory.rglob("*") if path.is_file())
            files = sorted(str(path.relative_to(directory)) for path in found)
            return {**document, "to": str(to), "files": files}

    def leave_nothing() -> None:
        for directory in made:
            shutil.rmtree(directory, ignore_errors=True)

    document = _with_store(url, use, leave_nothing, mirror=mirror)
    _out(document, as_json, lambda: present.restored(document))
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


# -- changing a store -----------------------------------------------------------------------------


@command
def gc(
    url: Url,
    keep: Annotated[int, typer.Option(help="Committed steps to keep, at least 2.")] = 3,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell.")] = False,
    as_json: Json = False,
) -> None:
    """Give up old steps and delete what unfinished ones left behind."""
    from ckptmgr.daemon.retain import collect
    from ckptmgr.repository.budget import BufferPool

    if keep < 1:
        raise UsageError(f"{keep} is not allowed", subject="--keep")

    async def use(catalog: Any) -> list[dict[str, Any]]:
        done = await collect(catalog, BufferPool(BUDGET_BYTES), keep, dry_run=dry_run)
        return [{**g.step.document(), "action": g.action, "why": g.why} for g in done]

    done = _with_store(url, use)
    _out(done, as_json, lambda: present.collected(done, dry_run=dry_run))


@command
def hold(
    url: Url,
    step: Annotated[str, typer.Argument(help="1200, or 3.1200 for attempt 3.")],
    why: Annotated[str, typer.Option(help="A note for people.")] = "",
    as_json: Json = False,
) -> None:
    """Keep retention away from a step; prints the id to release it by."""
    import secrets

    from ckptmgr.repository.hold import put_hold
    from ckptmgr.restore.choose import find

    async def use(catalog: Any) -> dict[str, Any]:
        decision = await find(catalog, step)
        hold_id = secrets.token_hex(8)
        await put_hold(catalog.store, decision.id, hold_id, why)
        return {**decision.id.document(), "hold": hold_id}

    document = _with_store(url, use)
    _out(document, as_json, lambda: typer.echo(document["hold"]))


@command
def release(
    url: Url,
    step: Annotated[str, typer.Argument(help="1200, or 3.1200 for attempt 3.")],
    hold_id: Annotated[str, typer.Argument(help="As printed by hold.")],
    as_json: Json = False,
) -> None:
    """Release a hold."""
    from ckptmgr.repository.catalog import list_steps
    from ckptmgr.repository.hold import release_hold
    from ckptmgr.restore.choose import find

    async def use(catalog: Any) -> dict[str, Any]:
        decision = await find(catalog, step)
        if hold_id not in (await list_steps(catalog.store)).holds.get(decision.id, ()):
            raise UsageError(f"has no hold {hold_id}", subject=f"step {decision.id}")
        await release_hold(catalog.store, decision.id, hold_id)
        return {**decision.id.document(), "released": hold_id}

    document = _with_store(url, use)
    _out(document, as_json, lambda: typer.echo(f"released {hold_id}"))


# -- trying it ------------------------------------------------------------------------------------


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
    try:
        # Not `app()`, which puts an excepthook of its own in the place of ours.
        typer.main.get_command(app)(standalone_mode=True)
    except CkptmgrError as error:
        if present.debug:
            raise
        for line in f"ckptmgr: {error}".splitlines():
            typer.echo(present.printable(line), err=True)
        foreground.end(error.exit_status)


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
