"""The packs of one snapshot: started as the route to the store says, ended together."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Protocol

from ckptmgr.daemon.route import Route, Send, Work
from ckptmgr.store.lanes import together


class Packs(Protocol):
    """What a flow has done with packs, which it knows by their number."""

    def spare(self) -> bool:
        """Whether a pack could be compressed without waiting for a buffer."""

    async def raw(self, index: int) -> None:
        """Put a pack as it is, from where it is; it has a place."""

    async def compressed(self, index: int, encoded: Callable[[], None]) -> None:
        """Compress a pack, say that it is encoded, and put it when there is a place."""

    async def copied(self, index: int, encoded: Callable[[], None]) -> None:
        """As `compressed`, but only copy it, or encrypt it."""

    async def probe(self) -> None:
        """Measure the codec on a little of the snapshot."""


async def flow(
    route: Route, sizes: Sequence[int], codec: str, packs: Packs, *, copied: bool = False
) -> None:
    """Bring packs of `sizes` raw bytes to the store; if they must be `copied`, none in place: all
    that need a buffer take it before a place, lest two kinds wait for each other.

    Raises:
        CkptmgrError: the first failure; whatever else was under way has ended.
    """
    async with together() as tasks:
        if codec == "auto" and route.probe_is_due(sum(sizes)):
            tasks.create_task(packs.probe())
        await _start_all(route, sizes, codec, packs, tasks, copied=copied)


async def _start_all(
    route: Route,
    sizes: Sequence[int],
    codec: str,
    packs: Packs,
    tasks: asyncio.TaskGroup,
    *,
    copied: bool,
) -> None:
    pending = deque(enumerate(sizes))
    route.pending_bytes += sum(sizes)
    try:
        while pending:
            index, nbytes = pending[0]
            bell = route.bell
            send = route.next(codec, nbytes, spare=packs.spare(), copied=copied)
            if send is None:
                await bell.wait()
                continue
            pending.popleft()
            route.pending_bytes -= nbytes
            if send is Send.RAW and not copied:
                _start(tasks, packs.raw(index), route.leave_place, route.take_place(nbytes))
            else:
                work = route.start_encoding(nbytes)
                ended = partial(route.stop_encoding, work)
                bring = packs.copied if send is Send.RAW else packs.compressed
                _start(tasks, bring(index, ended), route.stop_encoding, work)
            await asyncio.sleep(0)  # it takes its buffer, so that `spare` tells the truth
    finally:
        route.pending_bytes -= sum(nbytes for _, nbytes in pending)


def _start(
    tasks: asyncio.TaskGroup,
    work: Coroutine[Any, Any, None],
    ended: Callable[[Work], None],
    token: Work,
) -> None:
    """Start a task; `ended` hears of its end even if it is cancelled before it has begun."""
    tasks.create_task(work).add_done_callback(lambda _: ended(token))
