"""What `ckptmgr status` tells of a job; its fields are a contract (docs/cli-json.md)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ckptmgr.daemon.drain import Drainer
from ckptmgr.daemon.intake import Held
from ckptmgr.daemon.job import Job
from ckptmgr.daemon.spool import Part


def job_state(
    job: Job, drainer: Drainer | None, buffers: Iterable[Held], writing: dict[str, Any]
) -> dict[str, Any]:
    """One job: its commits, what was measured while writing, spool, mirror and host buffers."""
    key = job.catalog.keyring.encrypting
    return {
        "url": job.url,
        "key": key.id if key is not None else None,
        "last_commit": str(job.last_commit) if job.last_commit else None,
        "single_decider": job.store.exclusive is False,
        "writing": writing,
        "spool": _spool_state(job, drainer),
        "mirror": job.mirror.state() if job.mirror else None,
        "buffers": [_buffer_state(held) for held in buffers],
    }


def _spool_state(job: Job, drainer: Drainer | None) -> dict[str, Any] | None:
    if job.spool is None or drainer is None:
        return None
    copied = job.spool.copied
    return {
        "full": job.spool.full,
        "last_failure": drainer.last_failure,
        "parts": [_part_state(part, copied=part in copied) for part in job.spool.parts],
    }


def _part_state(part: Part, *, copied: bool) -> dict[str, Any]:
    return {
        "step": str(part.id),
        "rank": part.rank,
        "bytes": part.nbytes,
        "sealed_at": part.sealed_at,
        "copied": copied,
    }


def _buffer_state(held: Held) -> dict[str, Any]:
    return {
        "id": held.buffer.id,
        "rank": held.binding.rank,
        "world": held.binding.world,
        "bytes": held.buffer.capacity.file_bytes,
        "trainer_alive": held.writer_alive,
        "max_d2h_gbps": held.max_d2h_gbps or None,
        "superseded_by": held.superseded_by,
        "writing": next((str(snapshot.id) for snapshot in held.busy.values()), None),
        "last_failure": held.last_failure,
        "snapshots": [
            {
                "step": str(snapshot.id),
                "outcome": outcome.name.lower(),
                "bytes": snapshot.data_bytes,
                "sealed_at": snapshot.sealed_at,
                "stall_seconds": snapshot.stall_seconds,
            }
            for snapshot, outcome in held.snapshots()
        ],
    }
