"""Before a commit names a part, only the daemon that wrote it can vouch for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import msgspec
import pytest
from msgspec import UNSET

from ckptmgr.daemon.committer import Committer
from ckptmgr.daemon.job import Job
from ckptmgr.daemon.reader import _manifest_to_come
from ckptmgr.errors import UntrustedError
from ckptmgr.metrics import Metrics
from ckptmgr.repository import keys
from ckptmgr.repository.budget import BufferPool
from ckptmgr.repository.catalog import Catalog
from ckptmgr.repository.commit import Decision, commit_step, stored_manifest
from ckptmgr.repository.keyring import NO_KEYS, Keyring
from ckptmgr.repository.manifest import Manifest, SealedManifest, seal_manifest
from ckptmgr.repository.opening import signed_manifest
from ckptmgr.store.memory import MemoryStore
from ckptmgr.types import StepId
from security.forged import NEWEST, RING, Forger, made
from security.test_signed_commits import BOTH, FOREIGN, SIGNER, WRITER
from small_step import memory_store, shelf_of

Forgery = Callable[[Manifest], Manifest]

FORGERIES: dict[str, Forgery] = {
    "no signature": lambda part: msgspec.structs.replace(part, signature=UNSET),
    "no signer": lambda part: msgspec.structs.replace(part, signer=UNSET),
    "no hex": lambda part: msgspec.structs.replace(part, signature="x" * 128),
    "other values": lambda part: msgspec.structs.replace(part, values=b"\x90"),
    "other digests": lambda part: msgspec.structs.replace(part, chunk_digests=bytes(4 * 32)),
    "another signer": lambda part: signed_manifest(part, FOREIGN),
    "another signer by the name of ours": lambda part: msgspec.structs.replace(
        signed_manifest(part, FOREIGN), signer=SIGNER.id
    ),
}


def undecided(keyring: Keyring, forgery: Forgery) -> MemoryStore:
    """The newest step as its ranks have written it, that of rank 1 exchanged by who can write."""
    objects = made(keyring)
    forger = Forger(objects)
    forged = seal_manifest(forgery(forger.manifest(NEWEST, 1)))
    store = memory_store({**objects, forged.key: forged.record})
    del shelf_of(store)[keys.commit(NEWEST)]
    return store


def decided_by(store: MemoryStore, keyring: Keyring) -> Decision:
    """What the daemon of rank 0, whose turn it is, makes of a step."""

    async def main() -> Decision:
        own: SealedManifest = await stored_manifest(store, NEWEST, 0)
        committer = Committer(Catalog(store, keyring), lambda _: None, 120.0)
        return await committer.decision(own.manifest.nonce, own)

    return asyncio.run(main())


@pytest.mark.parametrize("reader", [WRITER, BOTH], ids=["signs", "signs and verifies"])
@pytest.mark.parametrize("forgery", FORGERIES)
def test_an_exchanged_part_is_not_signed_for(forgery: str, reader: Keyring) -> None:
    store = undecided(WRITER, FORGERIES[forgery])
    with pytest.raises(UntrustedError, match="is not signed") as raised:
        decided_by(store, reader)
    assert raised.value.subject == keys.manifest(NEWEST, 1)
    assert keys.commit(NEWEST) not in shelf_of(store)


@pytest.mark.parametrize("writer", [WRITER, replace(RING, signer=SIGNER)], ids=["clear", "locked"])
def test_parts_that_their_daemons_signed_are_committed(writer: Keyring) -> None:
    decision = decided_by(undecided(writer, lambda part: part), writer)
    assert (decision.committed, decision.signer) == (True, SIGNER.id)


def test_who_does_not_sign_asks_for_no_signature() -> None:
    store = undecided(NO_KEYS, lambda part: part)
    assert decided_by(store, NO_KEYS).committed


def test_who_signs_asks_for_the_signature_of_a_closed_part_too() -> None:
    """It is not opened by who commits it, so that encryption alone refuses nothing here."""
    store = memory_store(made(RING))

    async def main() -> None:
        ranks = [await stored_manifest(store, NEWEST, rank) for rank in (0, 1)]
        with pytest.raises(UntrustedError, match="is not signed"):
            await commit_step(store, ranks, StepId(2, 10), WRITER)

    asyncio.run(main())


@pytest.mark.parametrize("forgery", FORGERIES)
def test_an_exchanged_part_is_not_resumed_from(forgery: str) -> None:
    store = undecided(WRITER, FORGERIES[forgery])

    async def main() -> None:
        catalog = Catalog(store, BOTH)
        job = Job(store.url, store, catalog, "test", Metrics(), BufferPool(1))
        assert (await _manifest_to_come(job, NEWEST, 0)).rank == 0
        with pytest.raises(UntrustedError, match="is not signed"):
            await _manifest_to_come(job, NEWEST, 1)

    asyncio.run(main())
