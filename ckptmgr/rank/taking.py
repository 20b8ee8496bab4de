"""The step that was decided on: planned from its tables, fetched, and looked at."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ckptmgr.config import RESTORE_SECONDS_MAX
from ckptmgr.errors import RecordDamagedError, StateMismatchError, TornSnapshotError
from ckptmgr.rank.sources import Ranges, Table
from ckptmgr.staging.control import Describe, Described, Fetch, Fetched, Lent, Restored
from ckptmgr.staging.hostbuffer import HostBuffer
from ckptmgr.staging.layout import decode_layout
from ckptmgr.staging.tables import read_tables
from ckptmgr.types import Snapshot, StepId

Ask = Callable[[Any, type[Any], float], Any]
"""A request to the daemon: `ask` of a Link or of a Client."""


class Plan(Protocol):
    """What a reader will do with a step, and the bytes of each saved rank that it needs for it."""

    @property
    def needs(self) -> Mapping[int, Ranges]:
        """Byte ranges of each saved rank."""

    @property
    def complete(self) -> bool:
        """Whether no other saved rank can have more of what is wanted."""


P = TypeVar("P", bound=Plan)


def all_tables(ask: Ask) -> list[Table]:
    """What all ranks say of the step.

    Raises:
        DamageError: one of them does not hold.
    """
    described = ask(Describe(), Described, RESTORE_SECONDS_MAX)
    return _read(described.tables)


def _read(path: str) -> list[Table]:
    return [
        Table(one.rank, decode_layout(one.layout, subject=path), one.values)
        for one in read_tables(Path(path)).ranks
    ]


def planned(
    ask: Ask,
    reply: Restored,
    plan: Callable[[Sequence[Table]], P],
    *,
    everything: bool = False,
) -> P:
    """A plan by the table of the own part, if that is enough; else, or for `everything` that was
    saved, by those of all ranks.

    Raises:
        DamageError: a table does not hold; another step may.
        StateMismatchError: what was saved does not fit.
    """
    if reply.damage:
        raise RecordDamagedError(reply.damage, subject=f"step {StepId(reply.attempt, reply.step)}")
    own = _read(reply.tables)
    if reply.world == len(own):
        return plan(own)
    if not everything:
        with contextlib.suppress(StateMismatchError):
            found = plan(own)
            if found.complete:
                return found
    return plan(all_tables(ask))


@dataclass(frozen=True, slots=True)
class Taken:
    """Bytes of a step that are here: the data region of each saved rank; only what was asked for
    may be read. `source` is "memory" or "store".
    """

    source: str
    data: dict[int, memoryview]
    _lent: tuple[tuple[HostBuffer, Snapshot], ...]

    def check_unchanged(self) -> None:
        """Call it after the last read.

        Raises:
            TornSnapshotError: a slot was reused meanwhile.
        """
        for buffer, snapshot in self._lent:
            if not buffer.unchanged(snapshot):
                raise TornSnapshotError("slot was reused during restore", subject=str(buffer.path))


@contextlib.contextmanager
def taken(ask: Ask, needs: Mapping[int, Ranges], own: HostBuffer | None = None) -> Iterator[Taken]:
    """Fetch bytes of a step; some may be in the buffer that this process writes, `own`.

    Raises:
        DamageError: they can not be read; another step may do.
    """
    wanted = Fetch(tuple(sorted(needs.items())))
    lents = ask(wanted, Fetched, RESTORE_SECONDS_MAX).parts
    with contextlib.ExitStack() as opened:
        found = [_open(opened, lent, own) for lent in lents]
        data = {snapshot.rank: buffer.data(snapshot.slot) for buffer, snapshot in found}
        from_memory = all(lent.source == "memory" for lent in lents)
        yield Taken("memory" if from_memory else "store", data, tuple(found))


def _open(
    opened: contextlib.ExitStack, lent: Lent, own: HostBuffer | None
) -> tuple[HostBuffer, Snapshot]:
    if own is not None and Path(lent.path) == own.path:
        buffer = own  # closing a second descriptor would drop the writer's lock
    else:
        buffer = opened.enter_context(HostBuffer.open(Path(lent.path)))
    snapshot = buffer.snapshot(lent.slot)
    if snapshot is None or (snapshot.generation, snapshot.rank) != (lent.generation, lent.rank):
        raise TornSnapshotError("slot was reused before restore", subject=str(buffer.path))
    return buffer, snapshot
