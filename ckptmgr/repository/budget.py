"""The one memory budget: page-aligned buffers of one pack each, made when first needed, kept."""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ckptmgr.config import MIB, PACK_BYTES
from ckptmgr.types import PAGE_BYTES

LEASE_BYTES = PACK_BYTES + PAGE_BYTES
"""A pack with its header page."""


class BufferPool:
    """Hands out buffers of LEASE_BYTES; waits when `budget_bytes` are in use.

    Buffers are reused: a fresh page costs ten times what a copy into a warm one does.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.count = max(1, budget_bytes // (LEASE_BYTES + MIB))
        self._free: list[mmap.mmap] = []
        self._gate = asyncio.Semaphore(self.count)

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
