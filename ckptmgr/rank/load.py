"""A restored slot becomes live objects; and `load`, which reads without claiming anything."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from ckptmgr.config import RESTORE_SECONDS_MAX, runtime_dir
from ckptmgr.errors import NothingToRestoreError, TornSnapshotError
from ckptmgr.rank.arguments import absolute_url, parse_step
from ckptmgr.rank.place import Saved, place, rebuild
from ckptmgr.staging.control import Done, Load, Release, Restored
from ckptmgr.staging.hostbuffer import HostBuffer
from ckptmgr.staging.launch import connect_or_start
from ckptmgr.staging.layout import decode_layout
from ckptmgr.types import Snapshot


def load(
    url: str | os.PathLike[str],
    into: MutableMapping[str, Any] | None = None,
    *,
    step: int | str | None = None,
) -> Any:
    """Read the last consistent step of a job, or `step` (1200, or "3.1200" for attempt 3).

    With `into` (as `state` of a Checkpointer; random states are left alone) the saved state is
    put into the live objects, and its step number is returned. Entries that `into` leaves out
    are left out. Without `into`, returns the saved state as nested containers of new tensors.

    Raises:
        NothingToRestoreError: there is no such step.
        StateMismatchError: it does not fit `into`; nothing was changed.
        DamageError: no step can be read.
        StoreUnreachableError: the store does not answer.
    """
    attempt, number = parse_step(step)
    request = Load(absolute_url(url), 0, number, attempt)
    with connect_or_start(runtime_dir()) as client:
        reply = client.ask(request, Restored, RESTORE_SECONDS_MAX)
        if reply.attempt == 0:
            raise NothingToRestoreError("the job has no committed step", subject=os.fspath(url))
        try:
            with HostBuffer.open(Path(reply.path)) as buffer:
                return _take(buffer, reply, into)
        finally:
            client.ask(Release(), Done)


def _take(buffer: HostBuffer, reply: Restored, into: MutableMapping[str, Any] | None) -> Any:
    if into is not None:
        place_from(buffer, reply, into, rng=False, partial=True)
        return reply.step
    _, saved = read_saved(buffer, reply)
    return rebuild(saved)


def place_from(
    buffer: HostBuffer,
    reply: Restored,
    state: MutableMapping[str, Any],
    *,
    rng: bool = True,
    partial: bool = False,
) -> None:
    """Copy a restored snapshot from its slot into the live objects; arguments as for `place`.

    Raises:
        StateMismatchError: it does not fit; nothing was changed.
        TornSnapshotError: the slot was reused meanwhile.
    """
    snapshot, saved = read_saved(buffer, reply)
    place(state, saved, rng=rng, partial=partial)
    if not buffer.unchanged(snapshot):
        raise TornSnapshotError("slot was reused during restore", subject=str(buffer.path))


def read_saved(buffer: HostBuffer, reply: Restored) -> tuple[Snapshot, Saved]:
    """The snapshot that a reply names, with its decoded layout."""
    snapshot = buffer.snapshot(reply.slot)
    if snapshot is None or snapshot.generation != reply.generation:
        raise TornSnapshotError("slot was reused before restore", subject=str(buffer.path))
    table = buffer.table(snapshot)
    layout = decode_layout(table.layout, subject=str(buffer.path))
    return snapshot, Saved(layout, table.values, buffer.data(snapshot.slot))
