"""The one memory budget: page-aligned buffers of one pack each, made when first needed, kept."""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import ParamSpec, TypeVar

from ckptmgr.config import MIB, PACK_BYTES
from ckptmgr.types import PAGE_BYTES

LEASE_BYTES = PACK_BYTES + PAGE_BYTES
"""A pack with its header page."""


P = ParamSpec("P")
T = TypeVar("T")


async def in_thread(work: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """Run `work` in a thread. Cancelled, it ends only when the thread has ended.

    `asyncio.to_thread` returns at once and leaves the thread behind, which then reads and writes
    memory that was leased, or a slot that was released, to somebody else meanwhile.
    """
    running = asyncio.ensure_future(asyncio.to_thread(work, *arguments, **named))
    try:
        return await asyncio.shield(running)
    finally:
        while not running.done():
            try:
                await asyncio.wait([running])
            except asyncio.CancelledError:
                continue  # the first one is on its way already
        if not running.cancelled():
            running.exception()  # looked at, so that a failure after a cancel is not reported


class BufferPool:
    """Hands out buffers of LEASE_BYTES; waits when `budget_bytes` are in use.

    Buffers are reused: a fresh page costs ten times what a copy into a warm one does.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.count = max(1, budget_bytes // (LEASE_BYTES + MIB))
        self._free: list[mmap.mmap] = []
        self._gate = asyncio.Semaphore(self.count)

    @property
    def has_free(self) -> bool:
        """Whether a lease would not wait now."""
        return not self._gate.locked()

    @asynccontextmanager
    async def lease(self) -> AsyncIterator[memoryview]:
        """A buffer, for as long as the block lasts."""
        async with self._gate:
            buffer = self._free.pop() if self._free else mmap.mmap(-1, LEASE_BYTES)
            view = memoryview(buffer)
            try:
                yield view
            finally:
                self._free.append(buffer)
