"""A rank's part of a step from one store into another: packs, each verified, then the manifest."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ckptmgr.errors import (
    ChunkDamagedError,
    DamageError,
    MissingObjectError,
    ObjectNotFoundError,
    RegisterConflictError,
    StoreError,
    StoreUnreachableError,
)
from ckptmgr.repository.budget import BufferPool, in_thread
from ckptmgr.repository.catalog import exists
from ckptmgr.repository.manifest import Manifest, SealedManifest
from ckptmgr.repository.pack import check_padding, pack_header, padded
from ckptmgr.restore.verify import check_stored, subject_of
from ckptmgr.store.base import PutResult, Store
from ckptmgr.store.mirrored import from_either
from ckptmgr.types import PAGE_BYTES


async def copy_packs(
    source: Store,
    target: Store,
    manifest: Manifest,
    pool: BufferPool,
    copied: Callable[[int], None] = lambda _: None,
) -> None:
    """Put every pack of a part that `target` does not hold yet; durable when it returns.

    One pack is in memory at a time. `copied` is told the bytes of each that was written.

    Raises:
        DamageError: a pack in `source` does not hold, or is gone; nothing of it was written.
        RegisterConflictError: `target` holds something else under the name of a pack.
        StoreError: one of the stores failed.
    """
    for index, (key, nbytes) in enumerate(manifest.packs):
        if await exists(target, key):
            await _check_same(target, key, manifest)
            continue
        async with pool.lease() as lease:
            view = lease[:nbytes]
            await from_either(source, key, partial(_read, manifest, index, view))
            if await target.put_new(key, [view]) is PutResult.CONFLICT:
                await _check_same(target, key, manifest)
                continue
        copied(nbytes)


async def put_manifest(target: Store, sealed: SealedManifest) -> bool:
    """Put a manifest whose packs are durable in `target`; False if there is one already."""
    return await target.put_new(sealed.key, [memoryview(sealed.record)]) is PutResult.OK


async def _check_same(target: Store, key: str, manifest: Manifest) -> None:
    """A pack that an earlier copy has put, which may not be durable yet.

    Its name has 80 random bits and it was put whole, so that its first page tells enough.
    """
    await target.make_durable(key)
    expected = pack_header(key, manifest.id, manifest.rank, manifest.nonce)
    for _ in range(2):  # a line may change a byte
        if await target.get(key, 0, PAGE_BYTES) == expected:
            return
    raise RegisterConflictError("is held by another writer", subject=key)


async def _read(manifest: Manifest, index: int, view: memoryview, source: Store) -> None:
    """Read a pack and check it; errors as `copy_packs`."""
    key, _ = manifest.packs[index]
    try:
        await source.get(key, into=view)
    except ObjectNotFoundError as error:
        raise MissingObjectError("is gone", subject=key) from error
    except StoreUnreachableError:
        raise
    except StoreError as error:
        raise ChunkDamagedError(error.message, subject=key) from error
    await in_thread(_check, manifest, index, view)


def _check(manifest: Manifest, index: int, view: memoryview) -> None:
    """Refuse a pack of which a byte is not what was written."""
    key, _ = manifest.packs[index]
    if view[:PAGE_BYTES] != pack_header(key, manifest.id, manifest.rank, manifest.nonce):
        raise DamageError("does not have the header it was written with", subject=key)
    for chunk in manifest.chunks:
        if chunk.pack == index:
            end = chunk.pack_offset + chunk.stored_bytes
            page_end = chunk.pack_offset + padded(chunk.stored_bytes)
            subject = subject_of(key, chunk)
            check_stored(chunk, view[chunk.pack_offset : end], subject=subject)
            check_padding(view[end:page_end], subject=subject)
