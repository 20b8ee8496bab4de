"""The step that was decided on: fetched, checked, and put into the live objects."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptmgr.config import RESTORE_SECONDS_MAX
from ckptmgr.errors import RecordDamagedError, TornSnapshotError
from ckptmgr.rank.place import Saved, check, place
from ckptmgr.staging.control import Fetch, Fetched, Lent, Restored
from ckptmgr.staging.hostbuffer import HostBuffer
from ckptmgr.staging.layout import decode_layout
from ckptmgr.staging.tables import read_tables
from ckptmgr.types import Snapshot, StepId

Ask = Callable[[Fetch, type[Fetched], float], Fetched]
"""A request to the daemon: `ask` of a Link or of a Client."""


@dataclass(frozen=True, slots=True)
class Taken:
    """A step whose bytes are here; `source` is "memory" or "store"."""

    source: str
    saved: Saved
    _buffer: HostBuffer
    _snapshot: Snapshot

    def check(self, state: MutableMapping[str, Any], *, rng: bool) -> None:
        """Compare it with the live state, changing nothing; as `place.check`."""
        check(state, self.saved, rng=rng)

    def apply(
        self, state: MutableMapping[str, Any], *, rng: bool = True, partial: bool = False
    ) -> None:
        """Put it into the live objects; as `place.place`.

        Raises:
            TornSnapshotError: the slot was reused meanwhile.
        """
        place(state, self.saved, rng=rng, partial=partial)
        if not self._buffer.unchanged(self._snapshot):
            raise TornSnapshotError(
                "slot was reused during restore", subject=str(self._buffer.path)
            )


@contextlib.contextmanager
def taken(ask: Ask, reply: Restored, own: HostBuffer | None = None) -> Iterator[Taken]:
    """Fetch this rank's part of a step; it may be in the buffer that this process writes, `own`.

    Raises:
        DamageError: it can not be read; another step may do.
    """
    if reply.damage:
        raise RecordDamagedError(reply.damage, subject=f"step {StepId(reply.attempt, reply.step)}")
    (table,) = read_tables(Path(reply.tables)).ranks
    layout = decode_layout(table.layout, subject=reply.tables)
    wanted = Fetch(((table.rank, ((0, layout.data_bytes),)),))
    (lent,) = ask(wanted, Fetched, RESTORE_SECONDS_MAX).parts
    with contextlib.ExitStack() as opened:
        if own is not None and Path(lent.path) == own.path:
            buffer = own  # closing a second descriptor would drop the writer's lock
        else:
            buffer = opened.enter_context(HostBuffer.open(Path(lent.path)))
        snapshot = _lent_snapshot(buffer, lent)
        data = buffer.data(lent.slot)
        yield Taken(lent.source, Saved(layout, table.values, data), buffer, snapshot)


def _lent_snapshot(buffer: HostBuffer, lent: Lent) -> Snapshot:
    snapshot = buffer.snapshot(lent.slot)
    if snapshot is None or snapshot.generation != lent.generation:
        raise TornSnapshotError("slot was reused before restore", subject=str(buffer.path))
    return snapshot
