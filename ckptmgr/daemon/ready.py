"""Whether the daemon can make commits now, for probes: no URL, path or bucket name in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckptmgr.daemon.service import Service


def readiness(service: Service) -> dict[str, Any]:
    """`ready`, and why not. `ckptmgr status` has the words of the failure."""
    why = []
    if not service.adopted:
        why.append("host memory and spool of the daemon before are being adopted")
    if service.ending:
        why.append("the daemon was told to end")
    for job in service.jobs.values():
        failure = job.history.failure
        if failure is not None:
            why.append(f"the store of job {job.label} fails: {failure.kind}")
    return {"ready": not why, "why": why}
