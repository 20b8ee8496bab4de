"""Plan: the reads that serve the bytes one reader wants; a pure function of the chunk table."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ckptmgr.errors import UsageError
from ckptmgr.repository.chunk import Chunk
from ckptmgr.repository.manifest import ChunkCheck, Manifest


@dataclass(frozen=True, slots=True)
class Move:
    """Bytes wanted: `nbytes` from `source` in the saved data region to `target` in the reader's."""

    source: int
    target: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Read:
    """One chunk to read from pack `key`, and where its raw bytes go.

    A move's `source` counts from the start of the chunk. `check` is for stored bytes that have
    their hash, before they are decoded: it decrypts them in place where they are encrypted.
    """

    key: str
    chunk: Chunk
    moves: tuple[Move, ...]
    check: ChunkCheck | None = None

    @property
    def direct(self) -> bool:
        """Whether the whole chunk goes to one place, so that it needs no copy."""
        move = self.moves[0]
        return len(self.moves) == 1 and move.source == 0 and move.nbytes == self.chunk.raw_bytes


@dataclass(frozen=True, slots=True)
class Plan:
    """Reads in the order of the packs, each chunk at most once."""

    reads: tuple[Read, ...]
    target_bytes: int

    @property
    def stored_bytes(self) -> int:
        """Bytes that will be read from the store."""
        return sum(read.chunk.stored_bytes for read in self.reads)


def plan_moves(manifest: Manifest, moves: Iterable[Move], target_bytes: int) -> Plan:
    """The reads that serve `moves`, which must lie inside the manifest's data region.

    Raises:
        LockedError: the manifest is closed.
    """
    check = manifest.chunk_check
    starts = [chunk.raw_offset for chunk in manifest.chunks]
    wanted: dict[int, list[Move]] = {}
    for move in moves:
        at, end = move.source, move.source + move.nbytes
        index = bisect_right(starts, at) - 1
        while at < end:
            chunk = manifest.chunks[index]
            length = min(end, chunk.end) - at
            piece = Move(at - chunk.raw_offset, move.target + at - move.source, length)
            wanted.setdefault(index, []).append(piece)
            at += length
            index += 1
    reads = (
        Read(
            manifest.packs[manifest.chunks[i].pack][0], manifest.chunks[i], tuple(wanted[i]), check
        )
        for i in sorted(wanted)
    )
    return Plan(tuple(reads), target_bytes)


def plan_whole(manifest: Manifest) -> Plan:
    """Everything, to the same offsets: the way into a slot of the same layout."""
    nbytes = manifest.chunks[-1].end if manifest.chunks else 0
    return plan_moves(manifest, [Move(0, 0, nbytes)] if nbytes else [], nbytes)


def chunks_of(manifest: Manifest, ranges: Sequence[tuple[int, int]]) -> list[int]:
    """Indices of the chunks that hold bytes `start` to `stop` of the data region, for each range.

    Raises:
        UsageError: a range that is not inside the data region.
    """
    end = manifest.chunks[-1].end if manifest.chunks else 0
    check_ranges(ranges, end, subject=f"step {manifest.id}")
    starts = [chunk.raw_offset for chunk in manifest.chunks]
    found: set[int] = set()
    for start, stop in ranges:
        if start < stop:
            found.update(range(bisect_right(starts, start) - 1, bisect_right(starts, stop - 1)))
    return sorted(found)


def check_ranges(ranges: Iterable[tuple[int, int]], data_bytes: int, *, subject: str) -> None:
    """Refuse byte ranges (start, stop) that are not inside a data region.

    Raises:
        UsageError: one of them is not.
    """
    for start, stop in ranges:
        if not 0 <= start <= stop <= data_bytes:
            raise UsageError(f"has no bytes {start} to {stop}", subject=subject)


def plan_chunks(manifest: Manifest, indices: Iterable[int]) -> Plan:
    """Whole chunks, to the same offsets."""
    wanted = [manifest.chunks[index] for index in indices]
    moves = [Move(chunk.raw_offset, chunk.raw_offset, chunk.raw_bytes) for chunk in wanted]
    return plan_moves(manifest, moves, max((chunk.end for chunk in wanted), default=0))
