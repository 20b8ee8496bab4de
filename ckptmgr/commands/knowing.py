"""Commands that say how it stands: what is wrong here, how often to snapshot, what it cost."""

from __future__ import annotations

from typing import Annotated

import typer

from ckptmgr import foreground, present
from ckptmgr.commands.app import Json, command, out
from ckptmgr.config import runtime_dir
from ckptmgr.errors import CkptmgrError

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
