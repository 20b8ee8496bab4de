"""What the status page shows: the state of the daemon, put into words and steps for people.

The document is the page's own, not a contract: scripts read `ckptmgr status --json`.
"""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptmgr import __version__
from ckptmgr.daemon.drain import Drainer
from ckptmgr.daemon.glance import Shown
from ckptmgr.daemon.history import PASSAGES_MAX, Passage
from ckptmgr.daemon.intake import Held
from ckptmgr.daemon.job import Job
from ckptmgr.daemon.trouble import late_after, troubles_of, verdict_of
from ckptmgr.repository.commit import Decision
from ckptmgr.types import Outcome, Snapshot, StepId, StepState

if TYPE_CHECKING:
    from ckptmgr.daemon.service import Service

_GAPS_MAX = 9
"""Gaps between the newest snapshots whose median is the usual interval."""

_TAGS_MAX, _TAG_CHARS_MAX = 12, 80
_HOME = re.compile(r"/(?:home|Users)/[^/\s:;,'\"]+|/root(?=[/\s:;,'\"]|$)")

InMemory = dict[StepId, list[tuple[Snapshot, Outcome]]]
"""Steps, and what this host's memory holds of each."""


def page_document(service: Service) -> dict[str, Any]:
    """Everything the page shows; asks for a glance into the stores, for the next time."""
    now = time.time()
    jobs = []
    for job in service.jobs.values():
        job.glance.soon()
        buffers = service.intake.of_job(job.url)
        writing = service._pipeline.state(job.store.url)
        drainer = service.drainers.get(job.url)
        jobs.append(job_document(job, drainer, buffers, writing, now))
    document = {
        "at": now,
        "version": __version__,
        "pid": os.getpid(),
        "host": service.host.rpartition(".")[0],
        "undecided": service.undecided(),
        "trainers": sum(held.writer_alive for held in service.intake.held.values()),
        "max_store_gbps": service.settings.max_store_gbps or None,
        "jobs": jobs,
    }
    found: dict[str, Any] = without_homes(document, str(Path.home()))
    return found


def job_document(
    job: Job,
    drainer: Drainer | None,
    buffers: list[Held],
    writing: dict[str, Any],
    now: float,
) -> dict[str, Any]:
    """One job."""
    in_memory: InMemory = {}
    for held in buffers:
        for snapshot, outcome in held.snapshots():
            in_memory.setdefault(snapshot.id, []).append((snapshot, outcome))
    spooled: dict[StepId, set[int]] = {}
    for part in job.spool.parts if job.spool else ():
        spooled.setdefault(part.id, set()).add(part.rank)
    copied = job.mirror is not None and job.mirror.followed and not job.mirror.state()["behind"]
    shown = job.glance.shown
    steps = [
        step_document(passage, in_memory, spooled, shown, copied=copied, job=job)
        for passage in merged(job.history.passages, shown, in_memory, spooled)
    ]
    last = last_commit(steps)
    interval = usual_interval(steps)
    troubles = troubles_of(job, drainer, buffers, now)
    return {
        "label": job.label,
        "url": job.url,
        "verdict": verdict_of(buffers, troubles, len(spooled), last, interval, now),
        "troubles": troubles,
        "last_commit": last,
        "interval_seconds": interval,
        "late_after_seconds": late_after(interval) if interval else None,
        "writing": writing,
        "ranks": [_rank(held) for held in sorted(buffers, key=lambda one: one.binding.rank)],
        "spool": {"snapshots": len(job.spool.parts), "bytes": job.spool.used_bytes}
        if job.spool
        else None,
        "mirror": job.mirror.state() if job.mirror else None,
        "store_seen_at": shown.at or None,
        "steps": steps,
    }


def merged(
    passages: Iterable[Passage], shown: Shown, in_memory: InMemory, spooled: Iterable[StepId]
) -> list[Passage]:
    """What was seen, completed by what the store and this host hold; oldest first."""
    found = {passage.id: passage for passage in passages}
    for step in {*shown.decisions, *in_memory, *spooled}:
        passage = found.get(step, Passage(step))
        if passage.state is StepState.UNDECIDED:
            passage = _of_memory(passage, in_memory.get(step, []))
            passage = _of_store(passage, shown.decisions.get(step))
        found[step] = passage
    newest = sorted(found, reverse=True)[:PASSAGES_MAX]
    return [_marked(found[step], shown) for step in reversed(newest)]


def _of_memory(passage: Passage, parts: list[tuple[Snapshot, Outcome]]) -> Passage:
    """What host memory tells of a step whose decision this daemon has not seen."""
    for snapshot, outcome in parts:
        passage = replace(
            passage,
            world=snapshot.world,
            sealed_at=passage.sealed_at or snapshot.sealed_at,
            stall_seconds=max(passage.stall_seconds or 0.0, snapshot.stall_seconds),
        )
        if outcome.decided:
            done = outcome is Outcome.COMMITTED
            passage = replace(passage, state=StepState.COMMITTED if done else StepState.ABORTED)
    return passage


def _of_store(passage: Passage, decision: Decision | None) -> Passage:
    """What the register of a step tells."""
    if decision is None:
        return passage
    if not decision.committed:
        return replace(passage, state=StepState.ABORTED, why=decision.why)
    return replace(
        passage,
        state=StepState.COMMITTED,
        world=decision.world,
        raw_bytes=decision.raw_bytes,
        stored_bytes=decision.stored_bytes,
        sealed_at=decision.sealed_at,
        tags=decision.tags,
    )


def _marked(passage: Passage, shown: Shown) -> Passage:
    if passage.state is not StepState.COMMITTED:
        return passage
    if passage.id in shown.retired:
        return replace(passage, state=StepState.RETIRED)
    if passage.id in shown.verified:
        return replace(passage, state=StepState.VERIFIED)
    return passage


def step_document(
    passage: Passage,
    in_memory: InMemory,
    spooled: dict[StepId, set[int]],
    shown: Shown,
    *,
    copied: bool,
    job: Job,
) -> dict[str, Any]:
    """One step: its state, where it is, and what it cost."""
    stands = passage.state in (StepState.COMMITTED, StepState.VERIFIED)
    places = {
        "memory": passage.id in in_memory,
        "spool": passage.id in spooled,
        "store": stands,
        "mirror": stands and (passage.mirrored or copied),
    }
    undecided = passage.state is StepState.UNDECIDED
    tags = list(passage.tags.items())[:_TAGS_MAX]
    return {
        "step": str(passage.id),
        "state": passage.state.value,
        "held": passage.id in shown.held,
        "tiers": [name for name, there in places.items() if there],
        "world": passage.world or None,
        "missing": list(job.committer.missing(passage.id)) if undecided else [],
        "raw_bytes": passage.raw_bytes,
        "stored_bytes": passage.stored_bytes,
        "raw_rate": passage.here_raw_bytes / passage.seconds if passage.seconds else None,
        "stored_rate": passage.here_stored_bytes / passage.seconds if passage.seconds else None,
        "seconds": passage.seconds,
        "stall_seconds": passage.stall_seconds,
        "sealed_at": passage.sealed_at,
        "begun_at": passage.begun_at if undecided else None,
        "committed_at": passage.committed_at,
        "why": passage.why,
        "tags": {key[:_TAG_CHARS_MAX]: str(value)[:_TAG_CHARS_MAX] for key, value in tags},
    }


def last_commit(steps: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The newest step that is committed, and since when."""
    for step in reversed(steps):
        if step["state"] in ("committed", "verified"):
            return {"step": step["step"], "at": step["committed_at"] or step["sealed_at"]}
    return None


def usual_interval(steps: list[dict[str, Any]]) -> float | None:
    """Median time between the newest snapshots of one attempt; None before there are three.

    The daemon is not told how often a trainer means to snapshot, and a slow store spreads it.
    """
    attempt = steps[-1]["step"].partition(".")[0] if steps else ""
    times = [
        step["sealed_at"]
        for step in steps
        if step["sealed_at"] and step["step"].partition(".")[0] == attempt
    ][-_GAPS_MAX - 1 :]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    return statistics.median(gaps) if len(gaps) > 1 else None


def _rank(held: Held) -> dict[str, Any]:
    busy = next(iter(held.busy.values()), None)
    return {
        "rank": held.binding.rank,
        "world": held.binding.world,
        "bytes": held.buffer.capacity.file_bytes,
        "alive": held.writer_alive,
        "superseded_by": held.superseded_by,
        "writing": str(busy.id) if busy else None,
        "undecided": held.undecided(),
    }


def without_homes(value: Any, home: str) -> Any:
    """The same document with `~` for every home directory: a page is shown around."""
    if isinstance(value, str):
        text = value.replace(home, "~") if len(home) > 1 else value
        return _HOME.sub("~", text)
    if isinstance(value, dict):
        return {without_homes(k, home): without_homes(v, home) for k, v in value.items()}
    if isinstance(value, list):
        return [without_homes(one, home) for one in value]
    return value
