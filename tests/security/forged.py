"""An adversary who may write anything into a store, and has no key.

What needs no key he does right: digests of records, hashes of stored bytes, the COMMIT that names
the manifests. So what refuses him is encryption, or a signature, and nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ckptmgr.config import BUDGET_BYTES
from ckptmgr.daemon.resume import claim_attempt
from ckptmgr.errors import CkptmgrError
from ckptmgr.repository import keys
from ckptmgr.repository.budget import BufferPool
from ckptmgr.repository.catalog import Catalog
from ckptmgr.repository.chunk import Chunk, hash_of
from ckptmgr.repository.commit import Decision
from ckptmgr.repository.envelope import Key
from ckptmgr.repository.keyring import Keyring, keyring_of
from ckptmgr.repository.manifest import Manifest, read_manifest, seal_manifest
from ckptmgr.repository.record import Kind, seal, unseal
from ckptmgr.restore.check import restore_files
from ckptmgr.restore.verify import Damage, verify_step
from ckptmgr.types import StepId
from small_step import (
    Objects,
    commit_ranks,
    encode_state,
    memory_store,
    objects_of,
)

OURS = Key.of(bytes(range(32)))
OTHER = Key.of(bytes(range(1, 33)))
RING = keyring_of(OURS)

GROUP_BYTES = 8192
SECRET_NAME = "layer_of_great_value"
SECRET_NOTE = "the learning rate that made it work"
SECRET_TAG = "seed"
NEWEST = StepId(2, 20)


def state_of(attempt: int, step: int, rank: int) -> dict[str, Any]:
    """Four groups of one length, of bits that do not compress: chunks that could be exchanged."""
    rng = np.random.default_rng([attempt, step, rank])
    arrays = {
        f"{SECRET_NAME}.{dtype}": rng.integers(0, 256, GROUP_BYTES, np.uint8).view(dtype)
        for dtype in ("uint8", "uint16", "uint32", "uint64")
    }
    return {**arrays, "note": SECRET_NOTE, "step": step}


def made(keyring: Keyring, codec: str = "none") -> Objects:
    """Two attempts of two steps of two ranks each."""

    async def main() -> Objects:
        store = memory_store({})
        for number in (1, 2):
            attempt, nonce = await claim_attempt(store, 2, "")
            for step in (10, 20):
                states = [encode_state(state_of(number, step, rank)) for rank in (0, 1)]
                await commit_ranks(store, attempt, nonce, step, states, codec, keyring)
        return await objects_of(store)

    return asyncio.run(main())


@dataclass
class Forger:
    """Changes objects so that everything that needs no key is in order again."""

    objects: Objects
    touched: set[str] = field(default_factory=set)

    def manifest(self, step: StepId, rank: int) -> Manifest:
        return read_manifest(step, rank, self.objects[keys.manifest(step, rank)]).manifest

    def chunk_bytes(self, step: StepId, rank: int, index: int) -> bytes:
        key, chunk = self.place(step, rank, index)
        return self.objects[key][chunk.pack_offset : chunk.pack_offset + chunk.stored_bytes]

    def place(self, step: StepId, rank: int, index: int) -> tuple[str, Chunk]:
        found = self.manifest(step, rank)
        chunk = found.chunks[index]
        return found.packs[chunk.pack][0], chunk

    def write_chunk(self, step: StepId, rank: int, index: int, stored: bytes) -> None:
        """Other stored bytes in the place of a chunk; its hash stays as it is."""
        key, chunk = self.place(step, rank, index)
        assert len(stored) == chunk.stored_bytes
        blob = bytearray(self.objects[key])
        blob[chunk.pack_offset : chunk.pack_offset + len(stored)] = stored
        self.objects[key] = bytes(blob)

    def change(self, step: StepId, rank: int, edit: Callable[[Manifest], Manifest]) -> None:
        """Another manifest, and the COMMIT that names it."""
        self.put_manifest(step, rank, edit(self.manifest(step, rank)))

    def put_manifest(self, step: StepId, rank: int, manifest: Manifest) -> None:
        sealed = seal_manifest(manifest)
        key = keys.manifest(step, rank)
        assert sealed.key == key
        self.objects[key] = sealed.record
        self.recommit(step, rank, sealed.digest.hex())

    def commit(self, step: StepId) -> Decision:
        key = keys.commit(step)
        return unseal(Kind.COMMIT, key, self.objects[key], Decision)

    def recommit(self, step: StepId, rank: int, digest: str) -> None:
        named = list(self.commit(step).manifests)
        named[rank] = digest
        self.put_commit(msgspec.structs.replace(self.commit(step), manifests=tuple(named)))

    def put_commit(self, decision: Decision) -> None:
        key = keys.commit(decision.id)
        self.objects[key] = seal(Kind.COMMIT, key, decision)

    def rehash(self, step: StepId, rank: int) -> None:
        """Stored hashes of what the packs hold now."""

        def edit(manifest: Manifest) -> Manifest:
            chunks = tuple(
                msgspec.structs.replace(
                    chunk, stored_hash=hash_of(self.chunk_bytes(step, rank, index))
                )
                for index, chunk in enumerate(manifest.chunks)
            )
            return msgspec.structs.replace(manifest, chunks=chunks)

        self.change(step, rank, edit)


async def _verified(objects: Objects, step: StepId, keyring: Keyring) -> list[Damage]:
    catalog = Catalog(memory_store(objects), keyring)
    return await verify_step(catalog, await catalog.decision(step), BufferPool(BUDGET_BYTES))


def verified(objects: Objects, step: StepId, keyring: Keyring = RING) -> list[Damage]:
    """What `ckptmgr verify` finds."""
    return asyncio.run(_verified(objects, step, keyring))


def restored(objects: Objects, step: StepId, to: Path, keyring: Keyring = RING) -> CkptmgrError:
    """The error of `ckptmgr restore` of this step alone."""
    to.mkdir(exist_ok=True)
    try:
        asyncio.run(
            restore_files(
                Catalog(memory_store(objects), keyring), str(step), "safetensors", to, _ignore
            )
        )
    except CkptmgrError as error:
        return error
    raise AssertionError("it was restored")


def restores(objects: Objects, step: StepId, to: Path, keyring: Keyring = RING) -> dict[str, Any]:
    """What `ckptmgr restore` of this step says."""
    to.mkdir(exist_ok=True)
    catalog = Catalog(memory_store(objects), keyring)
    return asyncio.run(restore_files(catalog, str(step), "safetensors", to, _ignore))


def _ignore(_nbytes: int) -> None:
    pass
