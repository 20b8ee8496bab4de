"""Which slot may be written next: pure decisions on what the slots hold."""

from __future__ import annotations

from ckptmgr.types import Outcome, Snapshot

Sealed = list[tuple[Snapshot, Outcome]]
"""The sealed snapshots of a buffer, each with what became of it."""


def free_slot(slots: int, sealed: Sealed) -> int | None:
    """A slot that nobody needs: empty first, then the oldest decided; never the newest sealed."""
    taken = {snapshot.slot for snapshot, _ in sealed}
    for slot in range(slots):
        if slot not in taken:
            return slot
    newest = max(snapshot.generation for snapshot, _ in sealed)
    decided = [
        snapshot
        for snapshot, outcome in sealed
        if outcome is not Outcome.UNDECIDED and snapshot.generation != newest
    ]
    return min(decided, key=lambda s: s.generation).slot if decided else None


def superseded_slot(sealed: Sealed) -> Snapshot | None:
    """The undecided snapshot that is given up when the store does not move: the oldest one.

    The newest sealed snapshot is never given up, so None if it is the only one.
    """
    if len(sealed) < 2:
        return None
    newest = max(snapshot.generation for snapshot, _ in sealed)
    older = [snapshot for snapshot, _ in sealed if snapshot.generation != newest]
    return min(older, key=lambda s: s.generation)
