"""The step that was decided on: its tables read, its bytes fetched, and put into live objects."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptmgr.config import RESTORE_SECONDS_MAX
from ckptmgr.errors import RecordDamagedError, StateMismatchError, TornSnapshotError
from ckptmgr.rank.place import Placing, plan_building, plan_placing
from ckptmgr.rank.sources import Ranges, Table
from ckptmgr.staging.control import Describe, Described, Fetch, Fetched, Lent, Restored
from ckptmgr.staging.hostbuffer import HostBuffer
from ckptmgr.staging.layout import decode_layout
from ckptmgr.staging.tables import read_tables
from ckptmgr.types import Snapshot, StepId

Ask = Callable[..., Any]
"""A request to the daemon, the type of its answer, and seconds: `ask` of a Link or of a Client."""


@dataclass(frozen=True, slots=True)
class Here:
    """The wanted bytes of saved ranks in this process's memory; `source` is "memory" or "store"."""

    source: str
    data: dict[int, memoryview]
    _slots: list[tuple[HostBuffer, Snapshot]]

    def check_unchanged(self) -> None:
        """Look whether what was copied was still what was lent.

        Raises:
            TornSnapshotError: a slot was reused meanwhile.
        """
        for buffer, snapshot in self._slots:
            if not buffer.unchanged(snapshot):
                raise TornSnapshotError("slot was reused during restore", subject=str(buffer.path))


@dataclass(frozen=True, slots=True)
class Taken:
    """A step that fits the live state, and whose bytes are here."""

    here: Here
    placing: Placing

    @property
    def source(self) -> str:
        """Where the bytes were: "memory" or "store"."""
        return self.here.source

    def write(self) -> None:
        """Put it into the live objects, after `placing.load()`; as `Placing.write`.

        Raises:
            TornSnapshotError: a slot was reused meanwhile.
        """
        self.placing.write()
        self.here.check_unchanged()

    def apply(self) -> None:
        """Both of that, in a process that is alone; errors as `Placing.apply` and `write`."""
        self.placing.apply()
        self.here.check_unchanged()


@contextlib.contextmanager
def taken(
    ask: Ask,
    reply: Restored,
    state: MutableMapping[str, Any],
    own: HostBuffer | None = None,
    **options: Any,
) -> Iterator[Taken]:
    """Fetch what the live state takes of a step; it is checked when this returns, and unchanged.

    Args:
        ask: puts requests to the daemon.
        reply: the step that was decided on.
        state: the live state.
        own: the buffer that this process writes, in which some of it may be.
        options: `rank`, `rng`, `partial` and `alone` of plan_placing.

    Raises:
        StateMismatchError: it does not fit.
        DamageError: it can not be read; another step may do.
    """

    def plan(tables: list[Table]) -> Placing:
        return plan_placing(state, tables, saved_world=reply.world, **options)

    placing = _planned(ask, reply, plan)
    with _fetched(ask, placing.needs, own) as here:
        placing.verify(here.data)
        yield Taken(here, placing)


def built(ask: Ask, reply: Restored) -> Any:
    """The state of all ranks of a step as new objects; private parts are those of rank 0.

    Raises:
        DamageError: it can not be read; another step may do.
    """
    plan = plan_building(_tables(ask, reply, everything=True), own=reply.own)
    with _fetched(ask, plan.needs, None) as here:
        made = plan.build(here.data)
        here.check_unchanged()
        return made


def _planned(ask: Ask, reply: Restored, plan: Callable[[list[Table]], Placing]) -> Placing:
    """The plan by the own rank's table alone, if that has everything, else by those of all."""
    if reply.world > 1:
        with contextlib.suppress(StateMismatchError):
            placing = plan(_tables(ask, reply, everything=False))
            if placing.complete:
                return placing
    return plan(_tables(ask, reply, everything=True))


def _tables(ask: Ask, reply: Restored, *, everything: bool) -> list[Table]:
    if reply.damage:
        raise RecordDamagedError(reply.damage, subject=f"step {StepId(reply.attempt, reply.step)}")
    path = reply.tables
    if everything and reply.world > 1:
        path = ask(Describe(), Described, RESTORE_SECONDS_MAX).tables
    return [
        Table(one.rank, decode_layout(one.layout, subject=path), one.values)
        for one in read_tables(Path(path)).ranks
    ]


@contextlib.contextmanager
def _fetched(ask: Ask, needs: dict[int, Ranges], own: HostBuffer | None) -> Iterator[Here]:
    wanted = Fetch(tuple(needs.items()))
    parts = ask(wanted, Fetched, RESTORE_SECONDS_MAX).parts
    with contextlib.ExitStack() as opened:
        slots, data = [], {}
        for lent in parts:
            if own is not None and Path(lent.path) == own.path:
                buffer = own  # closing a second descriptor would drop the writer's lock
            else:
                buffer = opened.enter_context(HostBuffer.open(Path(lent.path)))
            snapshot = _lent_snapshot(buffer, lent)
            slots.append((buffer, snapshot))
            data[lent.rank] = buffer.data(lent.slot)
        sources = {lent.source for lent in parts}
        yield Here("memory" if sources <= {"memory"} else "store", data, slots)


def _lent_snapshot(buffer: HostBuffer, lent: Lent) -> Snapshot:
    snapshot = buffer.snapshot(lent.slot)
    if snapshot is None or snapshot.generation != lent.generation:
        raise TornSnapshotError("slot was reused before restore", subject=str(buffer.path))
    return snapshot
