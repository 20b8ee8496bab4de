"""Commands that say how it stands: what is wrong here, how often to snapshot, what it cost."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ckptmgr import foreground, present
from ckptmgr.commands.app import Json, Url, command, out, with_store
from ckptmgr.config import GIB, runtime_dir
from ckptmgr.errors import CkptmgrError, DaemonError, NothingToRestoreError, UsageError

_MARKS = {"ok": "  ok  ", "warning": " WARN ", "failure": " FAIL ", "not checked": "  --  "}


@command
def doctor(
    url: Annotated[
        str | None, typer.Argument(help="Store to prove, in a place of its own; as of ls.")
    ] = None,
    state_gib: Annotated[
        float, typer.Option(help="GiB that all ranks of this host save at a step.")
    ] = 0.0,
    every: Annotated[str, typer.Option(help="Time between snapshots: 90s, 5m, 1h.")] = "5m",
    probe_mib: Annotated[
        int, typer.Option(help="MiB to write and read for the bandwidth; 0 not to.")
    ] = 256,
    as_json: Json = False,
) -> None:
    """Prove that this host and a store keep what checkpoints rest on; a fix for each finding.

    Objects are put under doctor/ in the store and deleted again. Warnings leave the exit status
    at 0.
    """
    from ckptmgr.doctor.checkup import look_at_host, look_at_store
    from ckptmgr.doctor.load import load_of

    load = load_of(state_gib, every)
    findings = look_at_host(runtime_dir(), load)
    unreachable: CkptmgrError | None = None
    if url is not None:
        with present.waiting("looking at the store"):
            checkup = foreground.run(look_at_store(url, load, probe_mib), lambda: None)
        findings += checkup.findings
        unreachable = checkup.unreachable
    rows = [finding.document() for finding in findings]
    out(rows, as_json, lambda: _show_findings(rows))
    if unreachable is not None:
        raise typer.Exit(unreachable.exit_status)
    if any(row["state"] == "failure" for row in rows):
        raise typer.Exit(CkptmgrError.exit_status)


def _show_findings(rows: list[dict[str, str]]) -> None:
    for row in rows:
        _echo(f"[{_MARKS[row['state']]}] {row['check']}: {row['what']}")
        if row["evidence"]:
            _echo(f"         {row['evidence']}")
        if row["fix"]:
            _echo(f"         fix: {row['fix']}")
    counts = {state: sum(row["state"] == state for row in rows) for state in _MARKS}
    _echo(", ".join(f"{count} {state}" for state, count in counts.items() if count))


def _echo(text: str) -> None:
    typer.echo(present.printable(text))


# ---- advise -----------------------------------------------------------------


@command
def advise(
    url: Url,
    state_gib: Annotated[
        float | None, typer.Option(help="GiB that one rank saves at a step, if no commit tells.")
    ] = None,
    world: Annotated[int | None, typer.Option(help="Ranks, if no attempt tells.")] = None,
    mtbf_hours: Annotated[
        float | None, typer.Option(help="Hours between failures of the job, if you know better.")
    ] = None,
    restart_seconds: Annotated[
        float | None, typer.Option(help="Seconds from a failure to the next step.")
    ] = None,
    slots: Annotated[int, typer.Option(help="Snapshots that host memory holds, 2 or 3.")] = 2,
    as_json: Json = False,
) -> None:
    """Say how often to snapshot, and what a failure then costs, from the history of the job.

    What the history does not tell is assumed, and said.
    """
    from ckptmgr.advise import Given, advice, facts_of

    given = Given(
        None if state_gib is None else _positive(state_gib, "--state-gib") * GIB,
        None if world is None else int(_positive(world, "--world")),
        None if mtbf_hours is None else _positive(mtbf_hours, "--mtbf-hours") * 3600,
        None if restart_seconds is None else _positive(restart_seconds, "--restart-seconds"),
        slots,
    )
    if slots not in (2, 3):
        raise UsageError(f"{slots} is not allowed", subject="--slots", hint="Give 2 or 3.")
    history, goodput = _history(url)
    facts = facts_of(history, goodput, given, _measured(url))
    if facts is None:
        raise UsageError(
            "has no commit that tells the size of the state",
            subject=url,
            hint="Give --state-gib: what one rank saves at a step.",
        )
    document = advice(facts)
    out(document, as_json, lambda: _show_advice(document))


def _positive(value: float, option: str) -> float:
    if not 0 < value < float("inf"):
        raise UsageError(
            f"{value:g} is not allowed", subject=option, hint="Look at `ckptmgr advise --help`."
        )
    return value


def _history(url: str) -> tuple[Any, Any]:
    """History and goodput of a job; empty where there is no job yet."""
    from ckptmgr.goodput import account
    from ckptmgr.repository.history import History, read_history, sealed_reach

    try:
        history = with_store(url, read_history)
    except NothingToRestoreError:
        return History(()), None
    decisions = [entry.decision for entry in history.entries if entry.decision is not None]
    stalls = sum((decision.stall_seconds for decision in decisions), 0.0)
    ends = [decision.sealed_at for decision in decisions]
    ends += [one.reached.last_at for one in history.attempts if one.reached is not None]
    # To the last sign of life: a job that has ended is not down.
    until = max([*ends, *(attempt.claimed_at for attempt in history.attempts)], default=0.0)
    return history, account(history.attempts, sealed_reach(history.entries), stalls, until)


def _measured(url: str) -> Any:
    """The means that the daemon of this host tells of a job, if one runs here."""
    import urllib.request

    from prometheus_client.parser import text_string_to_metric_families

    from ckptmgr.advise import Measured
    from ckptmgr.daemon.log import label_of
    from ckptmgr.staging.control import Stated, Status
    from ckptmgr.staging.launch import connect
    from ckptmgr.store.registry import normalise_url

    try:
        with connect(runtime_dir()) as client:
            port = client.ask(Status(), Stated).state["metrics_port"]
        address = f"http://127.0.0.1:{port}/metrics"
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is this host
        with direct.open(address, timeout=10) as reply:
            text = reply.read().decode()
    except (DaemonError, OSError):
        return None
    job = label_of(normalise_url(url))
    found = {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels.get("job") == job and "le" not in sample.labels
    }
    stall, commit = (_mean_of(found, f"ckptmgr_{n}_seconds") for n in ("stall", "commit_duration"))
    return Measured(stall, commit)


def _mean_of(found: dict[str, float], name: str) -> float | None:
    count = found.get(f"{name}_count", 0.0)
    return found[f"{name}_sum"] / count if count else None


def _show_advice(document: dict[str, Any]) -> None:
    optimal, classic = (document[f"{n}_seconds"] for n in ("availability_optimal", "young_daly"))
    limit = "the store takes no more" if document["limited_by"] == "store" else "the best interval"
    _echo(f'every="{document["every"]}"  {limit}: {document["interval_seconds"]:.0f} s')
    _echo(f"  availability-optimal {optimal:.0f} s, Young/Daly {classic:.0f} s")
    _echo(f"  {document['overhead']:.2%} of the time goes to stalls, lost work and restarts")
    if document["present_interval_seconds"] is not None:
        now, lost = document["present_interval_seconds"], document["present_overhead"]
        _echo(f"  at the present {now:.0f} s it is {lost:.2%}")
    _echo("expected loss of a failure:")
    for loss in document["loss"]:
        cost = "all of it" if loss["seconds"] is None else f"{loss['seconds']:.0f} s"
        _echo(f"  {loss['failure']:<22} {cost:<10} {loss['why']}")
    for source in ("measured", "assumed"):
        for note in document[source]:
            _echo(f"{source:<9} {note}")


# ---- report -----------------------------------------------------------------


@command
def report(
    url: Url,
    to: Annotated[Path, typer.Option("--to", help="File to write.")] = Path("report.html"),
    as_json: Json = False,
) -> None:
    """Write one HTML page of a job: steps, stalls, throughput, restarts and goodput.

    It loads nothing and needs no script; of paths it has the last part only.
    """
    from ckptmgr.report import Job, name_of, page
    from ckptmgr.store.registry import normalise_url

    history, goodput = _history(url)
    if goodput is None:
        raise NothingToRestoreError("is not a ckptmgr store", subject=url)
    tiers = present.Tiers({}, {})
    rows = [present.entry_json(entry, tiers) for entry in history.entries]
    text = page(Job(name_of(normalise_url(url)), rows, history, goodput, time.time()))
    _write(to, text)
    document = {"to": str(to), "steps": len(rows), "goodput": goodput.document()}
    out(document, as_json, lambda: _echo(f"{len(rows)} steps are in {to}"))


def _write(path: Path, text: str) -> None:
    """Replace a file whole, so that whoever serves it never shows a part."""
    if not path.name:
        hint = "Give --to a file in a directory that you may write."
        raise UsageError("is a directory", subject=str(path), hint=hint)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UsageError(
            f"can not be written: {error.strerror}",
            subject=str(path),
            hint="Give --to a file in a directory that you may write.",
        ) from error
