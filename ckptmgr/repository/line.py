"""The line of a step: the commits that its state came through, from attempt to attempt."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from ckptmgr.errors import DamageError, ObjectNotFoundError
from ckptmgr.repository import keys
from ckptmgr.repository.breakout import Breakout
from ckptmgr.repository.commit import FROM_SCRATCH, Decision, Resume, get_record
from ckptmgr.repository.record import Kind
from ckptmgr.store.base import Store
from ckptmgr.types import StepId


async def resumed_from(store: Store, attempt: int) -> StepId | None:
    """What an attempt resumed from: its last resume decision, if it made one."""
    made = await store.list(keys.resumes(attempt))
    if not made:
        return None
    return (await get_record(store, Kind.RESUME, made[-1], Resume)).id


async def sources_of(store: Store, attempts: Iterable[int]) -> dict[int, StepId]:
    """What attempts resumed from; one whose decisions can not be read counts as one without any."""
    found = {}
    for attempt in sorted(attempts):
        try:
            source = await resumed_from(store, attempt)
        except (DamageError, ObjectNotFoundError):
            continue
        if source is not None:
            found[attempt] = source
    return found


def line_of(
    newest: StepId, steps: Collection[StepId], sources: Mapping[int, StepId]
) -> list[StepId]:
    """The steps that the state of `newest` came through, oldest first, `newest` the last.

    An attempt goes on from what it resumed from. One that made no resume decision is taken to go on
    from the newest step of an older attempt that has a lower number than its own first.

    Args:
        newest: where the line ends.
        steps: commits, those that were retired too.
        sources: what each attempt resumed from, FROM_SCRATCH for nothing.
    """
    line: list[StepId] = []
    end: StepId | None = newest
    while end is not None:
        own = sorted(s for s in steps if s.attempt == end.attempt and s.step <= end.step)
        line = [*own, *line]
        first = own[0] if own else end
        source = sources.get(first.attempt)
        if source is None:
            older = (s for s in steps if s.attempt < first.attempt and s.step < first.step)
            end = max(older, default=None)
        else:
            # A resume decision that names no older attempt would lead round in a circle.
            end = source if source > FROM_SCRATCH and source.attempt < first.attempt else None
    return line


def steps_before(
    breakout: Breakout, commits: Iterable[Decision], line: Sequence[StepId]
) -> tuple[list[StepId], StepId | None]:
    """The steps of a line, newest first, that come before the first one that breaks out; and that
    one, or None where none does.
    """
    tags = {one.id: one.tags for one in commits}
    for at, step in enumerate(line):
        if step in tags and breakout.holds(tags[step]):
            return [*reversed(line[:at])], step
    return [*reversed(line)], None
