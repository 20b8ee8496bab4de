"""What is stuck and why, in one sentence for a job, and in the words of its last failures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ckptmgr.daemon.drain import Drainer
from ckptmgr.daemon.intake import Held
from ckptmgr.daemon.job import Job

LATE_INTERVALS, LATE_SECONDS_MIN = 3.0, 30.0
"""So many usual intervals, and so many seconds, without a commit are told."""

AWAITED_SECONDS = 10.0
"""A rank's part that has not come so long after another's is told: its host is slow, or dead."""

Trouble = dict[str, Any]


def _told(
    where: str, why: str, *, kind: str, retry_at: float = 0.0, since: float | None = None
) -> Trouble:
    words, _, hint = why.partition("\nhint: ")
    return {
        "kind": kind,
        "where": where,
        "why": words.replace("\n", " "),
        "hint": hint,
        "retry_at": retry_at or None,
        "since": since,
    }


def troubles_of(
    job: Job, drainer: Drainer | None, buffers: Iterable[Held], now: float
) -> list[Trouble]:
    """Everything that is stuck, the worst first.

    `kind` is `superseded`, `store`, `spooled` (the store takes nothing, but the spool does),
    `spool` (which is full), `waiting`, `mirror` or `note`.
    """
    found = [_superseded(held) for held in buffers if held.superseded_by is not None]
    failing: dict[str, list[Held]] = {}
    for held in buffers:
        if held.last_failure:
            failing.setdefault(held.last_failure, []).append(held)
    for why, ranks in failing.items():
        retry_at = min(held.retry_at for held in ranks)
        found.append(
            _told(_ranks(held.binding.rank for held in ranks), why, kind="store", retry_at=retry_at)
        )
    kept = job.spool is not None and bool(job.spool.parts) and not failing
    kind, failure = "spooled" if kept else "store", job.history.failure
    if drainer is not None and drainer.last_failure:
        found.append(_told("spool", drainer.last_failure, kind=kind, retry_at=drainer.retry_at))
    elif failure is not None and not failing:
        found.append(_told("store", failure.why, kind=kind, since=failure.since))
    if job.spool is not None and job.spool.full:
        found.append(_told("spool", "has no room for another snapshot", kind="spool"))
    found += _waiting(job, now)
    if job.mirror is not None and job.mirror.state()["last_failure"]:
        found.append(_told("mirror", job.mirror.state()["last_failure"], kind="mirror"))
    found += [_told(_ranks([h.binding.rank]), h.note, kind="note") for h in buffers if h.note]
    return found


def _superseded(held: Held) -> Trouble:
    why = f"attempt {held.superseded_by} has taken over; what this trainer snapshots is given up"
    return _told(_ranks([held.binding.rank]), why, kind="superseded")


def _waiting(job: Job, now: float) -> list[Trouble]:
    """Steps whose part of another rank is late."""
    found = []
    for passage in job.history.passages:
        missing = job.committer.missing(passage.id)
        if missing and passage.begun_at and now - passage.begun_at > AWAITED_SECONDS:
            why = f"waits for {_ranks(missing)} of {passage.world}"
            found.append(_told(f"step {passage.id}", why, kind="waiting", since=passage.begun_at))
    return found


def _ranks(ranks: Iterable[int]) -> str:
    listed = sorted(ranks)
    shown = ", ".join(map(str, listed[:8])) + (" ..." if len(listed) > 8 else "")
    return f"rank{'s' if len(listed) > 1 else ''} {shown}"


def late_after(interval: float) -> float:
    """Age in seconds at which the last commit is overdue."""
    return max(LATE_INTERVALS * interval, LATE_SECONDS_MIN)


def verdict_of(
    buffers: list[Held],
    troubles: list[Trouble],
    spooled: int,
    last_commit: dict[str, Any] | None,
    interval: float | None,
    now: float,
) -> dict[str, str]:
    """One sentence on a job, and how bad that is: `good`, `busy`, `late`, `bad` or `off`."""
    kinds = {trouble["kind"] for trouble in troubles}
    alive = any(held.writer_alive for held in buffers)
    undecided = sum(held.undecided() for held in buffers)
    if "superseded" in kinds:
        return {"level": "bad", "text": "A newer attempt of this job has taken over."}
    if "spool" in kinds:
        return {"level": "bad", "text": "The store takes nothing, and the spool is full."}
    if "store" in kinds:
        return {"level": "bad", "text": "The store does not take snapshots."}
    if "spooled" in kinds:
        return {"level": "late", "text": "The store takes nothing; the spool keeps everything."}
    if "waiting" in kinds:
        return {"level": "late", "text": "A step waits for ranks of other hosts."}
    if spooled:
        return {"level": "busy", "text": "The spool is being emptied into the store."}
    if not alive:
        if undecided:
            return {"level": "busy", "text": "The trainer is gone; its snapshots are finished."}
        return {"level": "off", "text": "No trainer runs here."}
    if last_commit is None:
        return {"level": "busy", "text": "No step is committed yet."}
    if interval and now - last_commit["at"] > late_after(interval):
        return {"level": "late", "text": "The next commit is overdue."}
    return {"level": "good", "text": "Commits come as usual."}
