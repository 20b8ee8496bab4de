"""The way back of files that `watch` adopted: each leaf is a file again (docs/format.md 11)."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ckptmgr.errors import RecordDamagedError
from ckptmgr.repository import keys
from ckptmgr.repository.budget import BufferPool
from ckptmgr.repository.manifest import Manifest
from ckptmgr.restore.fetch import fetch
from ckptmgr.restore.files import Progress, take_space
from ckptmgr.restore.plan import Move, plan_moves
from ckptmgr.store.base import Store
from ckptmgr.store.lanes import in_lanes
from ckptmgr.types import Leaf

SOURCE, KIND = "watch.source", "watch.kind"
CONTENT, STAT = "watch.content", "watch.stat"
"""Tags of an adopted step: the name of what was adopted, its kind, a digest of its bytes, and one
of the names, lengths and times of its files."""

DTYPE = "uint8"

SEGMENT_BYTES_MAX = 255
"""Longest name of a file on every file system of Linux."""

_FILES_AT_ONCE = 3


def is_adopted(manifests: Sequence[Manifest]) -> bool:
    """Whether a step is files that `watch` adopted."""
    return len(manifests) == 1 and SOURCE in manifests[0].tags


def check_path(path: str) -> tuple[str, ...]:
    """The segments of the path of a file below a directory.

    Raises:
        ValueError: it leads out of the directory, or no file can have it.
    """
    segments = tuple(path.split("/"))
    for segment in segments:
        if segment in ("", ".", "..") or "\0" in segment:
            raise ValueError(f"{path!r} leads out of its directory")
        if len(segment.encode()) > SEGMENT_BYTES_MAX:
            raise ValueError(f"{path!r} is too long a name")
    return segments


async def write_adopted(
    store: Store, manifest: Manifest, directory: Path, pool: BufferPool, progress: Progress
) -> None:
    """Write every file of an adopted step below `directory`, which nobody else writes into.

    Bytes go from the store to the files through the memory budget, whatever their length.

    Raises:
        DamageError: something of the step does not hold, or is not there.
    """
    subject = keys.manifest(manifest.id, manifest.rank)
    places: dict[tuple[str, ...], Leaf] = {}
    for leaf in manifest.read_layout().leaves:
        try:
            segments = check_path(leaf.path)
        except (ValueError, UnicodeError) as error:
            raise RecordDamagedError(str(error), subject=subject) from error
        if leaf.dtype != DTYPE or leaf.shape != (leaf.nbytes,) or segments in places:
            raise RecordDamagedError(f"{leaf.path!r} is not one file", subject=subject)
        places[segments] = leaf
    for segments in places:
        if any(segments[:end] in places for end in range(1, len(segments))):
            raise RecordDamagedError(f"{'/'.join(segments)!r} is below a file", subject=subject)
        directory.joinpath(*segments[:-1]).mkdir(parents=True, exist_ok=True)

    async def write(place: tuple[tuple[str, ...], Leaf]) -> None:
        segments, leaf = place
        await _write(store, manifest, leaf, directory.joinpath(*segments), pool, progress)

    await in_lanes(write, list(places.items()), _FILES_AT_ONCE)


async def _write(
    store: Store,
    manifest: Manifest,
    leaf: Leaf,
    path: Path,
    pool: BufferPool,
    progress: Progress,
) -> None:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o644)
    try:
        if not leaf.nbytes:
            return
        take_space(descriptor, leaf.nbytes)
        mapped = mmap.mmap(descriptor, leaf.nbytes)
        try:
            with memoryview(mapped) as target:
                plan = plan_moves(manifest, [Move(leaf.offset, 0, leaf.nbytes)], leaf.nbytes)
                await fetch(store, plan, target, pool, progress)
            mapped.flush()
        finally:
            # A read that was cancelled may hold a piece until its call into the kernel ends.
            with suppress(BufferError):
                mapped.close()
    finally:
        os.close(descriptor)
