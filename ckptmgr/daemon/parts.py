"""Parts of saved steps that are fetched into this host's memory, once for all who read them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ckptmgr.daemon.intake import Held, make_buffer
from ckptmgr.daemon.job import Job
from ckptmgr.repository.manifest import Manifest
from ckptmgr.restore.plan import chunks_of
from ckptmgr.restore.slot import capacity_for, fetch_into_slot, fetch_more
from ckptmgr.staging.control import Lent, Ranges
from ckptmgr.staging.hostbuffer import HostBuffer
from ckptmgr.staging.slots import free_slot
from ckptmgr.types import Binding, Snapshot, StepId

Key = tuple[str, StepId, int, str]
"""URL of the job, step, saved rank, and nonce: another incarnation has steps of the same name."""


@dataclass(slots=True, eq=False)
class FetchedPart:
    """A part whose chunks are brought into host memory as they are asked for.

    `keep` is the buffer of the reader's own rank where the whole part has gone into a slot of it;
    then it stays there as any snapshot does.
    """

    manifest: Manifest
    buffer: HostBuffer
    slot: int
    keep: Held | None
    snapshot: Snapshot | None = None
    chunks: set[int] = field(default_factory=set)
    readers: set[object] = field(default_factory=set)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def is_gone(self) -> bool:
        """Whether the rank in whose buffer it is has put a snapshot of its own there since."""
        kept = self.snapshot if self.keep is not None else None
        return kept is not None and not self.buffer.unchanged(kept)

    def lent(self) -> Lent:
        """Where it is, for a rank."""
        assert self.snapshot is not None
        path, generation = str(self.buffer.path), self.snapshot.generation
        return Lent(self.manifest.rank, "store", path, self.slot, generation)

    def free(self) -> None:
        """Give its memory back."""
        if self.keep is None:
            self.buffer.unlink()
            self.buffer.close()


class Lending:
    """Fetched parts, each shared by all readers of this host, so that a byte is fetched once."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._parts: dict[Key, FetchedPart] = {}

    async def fetch(
        self, reader: object, job: Job, manifest: Manifest, ranges: Ranges, own: Held | None
    ) -> Lent:
        """Bring `ranges` of a part into memory, verified; it stays until `release(reader)`.

        A whole part goes into a free slot of `own`, the buffer of the reader's rank, if it fits.

        Raises:
            DamageError: it does not hold.
            StoreUnreachableError: the store can not be read now.
            HostMemoryError: not enough shared memory.
        """
        wanted = chunks_of(manifest, ranges)
        key = job.url, manifest.id, manifest.rank, manifest.nonce
        while True:
            part = self._parts.get(key)
            if part is None or part.is_gone:
                part = self._parts[key] = self._make(job, manifest, wanted, own)
            async with part.lock:
                if self._parts.get(key) is not part:
                    continue  # whoever began to fetch it was ended, and it was freed
                is_new = reader not in part.readers
                part.readers.add(reader)
                try:
                    await _bring(job, part, wanted)
                except BaseException:
                    if is_new:
                        part.readers.discard(reader)
                    self._free_unread(key, part)
                    raise
                return part.lent()

    def _make(
        self, job: Job, manifest: Manifest, wanted: list[int], own: Held | None
    ) -> FetchedPart:
        capacity = capacity_for(manifest)
        if own is not None and len(wanted) == len(manifest.chunks):
            # Never a part with holes: what is sealed in a rank's own buffer is taken for whole.
            slot = free_slot(own.buffer.capacity.slots, own.snapshots())
            if slot is not None and own.buffer.capacity.holds(
                capacity.table_bytes, capacity.data_bytes
            ):
                return FetchedPart(manifest, own.buffer, slot, own)
        binding = Binding(job.url, manifest.rank, manifest.world)
        buffer, _ = make_buffer(self._directory, binding, capacity)
        return FetchedPart(manifest, buffer, 0, None)

    def release(self, reader: object) -> None:
        """The reader needs nothing any more; what nobody else reads is freed."""
        for key, part in list(self._parts.items()):
            part.readers.discard(reader)
            self._free_unread(key, part)

    def _free_unread(self, key: Key, part: FetchedPart) -> None:
        """One that is being fetched has the reader for whom it is."""
        if not part.readers:
            del self._parts[key]
            part.free()


async def _bring(job: Job, part: FetchedPart, wanted: Iterable[int]) -> None:
    missing = sorted(set(wanted) - part.chunks)
    where = part.manifest, part.buffer, part.slot
    if part.snapshot is None:
        part.snapshot = await fetch_into_slot(job.reading.store, *where, job.pool, chunks=missing)
    elif missing:
        await fetch_more(job.reading.store, *where, job.pool, missing)
    part.chunks.update(missing)
