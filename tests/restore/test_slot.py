"""A slot that a step is fetched into, and that its trainer begins to write meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
from test_fetch import MADE

from ckptmgr.errors import HostMemoryError
from ckptmgr.repository.budget import BufferPool
from ckptmgr.restore import fetch
from ckptmgr.restore.fetch import LANES
from ckptmgr.restore.slot import capacity_for, fetch_into_slot
from ckptmgr.staging.hostbuffer import HostBuffer
from ckptmgr.store.base import Store, Wanted
from ckptmgr.testing import FaultyStore
from ckptmgr.types import Binding, SlotState
from small_step import memory_store


class TakingStore(FaultyStore):
    """Another writer begins the slot while this serves its first batch."""

    def __init__(self, inner: Store, buffer: HostBuffer) -> None:
        super().__init__(inner)
        self.buffer = buffer
        self.batches = 0

    async def get_many(self, wanted: Sequence[Wanted]) -> None:
        self.batches += 1
        if self.batches == 1:
            self.buffer.begin(0)
        await super().get_many(wanted)


def test_a_slot_that_is_taken_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "BATCH_READS_MAX", 1)
    _, objects, manifest = MADE["none"]
    with HostBuffer.create(tmp_path, Binding("memory://x", 0, 1), capacity_for(manifest)) as buffer:
        store = TakingStore(memory_store(objects), buffer)
        with pytest.raises(HostMemoryError, match="slot 0 is written by somebody else"):
            asyncio.run(fetch_into_slot(store, manifest, buffer, 0, BufferPool(1)))
        assert buffer.state(0) == (SlotState.WRITING, 2), "it is the other one's"
        assert store.batches <= LANES < len(manifest.chunks), "nothing more was read into it"
