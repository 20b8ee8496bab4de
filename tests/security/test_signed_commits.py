"""Who has public keys takes no commit that none of them signed, and nothing but what it says."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from ckptmgr.daemon.committer import Committer
from ckptmgr.errors import ChunkDamagedError, DamageError, UntrustedError
from ckptmgr.repository import keys
from ckptmgr.repository.catalog import Catalog
from ckptmgr.repository.commit import Decision, abort_step, commit_step, signed
from ckptmgr.repository.keyring import NO_KEYS, Keyring
from ckptmgr.repository.manifest import SealedManifest
from ckptmgr.repository.signature import Signer, parse_signer
from ckptmgr.restore import verify
from ckptmgr.restore.check import restore_files
from ckptmgr.store.memory import MemoryStore
from ckptmgr.types import StepId
from security.forged import NEWEST, RING, Forger, made, restored, restores, verified
from small_step import Objects, memory_store, shelf_of


def signer_of(secret: bytes) -> Signer:
    private = Ed25519PrivateKey.from_private_bytes(secret)
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return parse_signer(pem, subject="test")


SIGNER, FOREIGN = signer_of(bytes(range(32))), signer_of(bytes(range(2, 34)))
WRITER = Keyring(signer=SIGNER)
READER = Keyring(trusted={SIGNER.id: SIGNER.public})


@pytest.fixture(scope="module", params=["in clear", "encrypted"])
def written(request: pytest.FixtureRequest) -> tuple[Objects, Keyring]:
    """A signed store, and a keyring to read it with."""
    if request.param == "encrypted":
        return made(replace(RING, signer=SIGNER)), replace(RING, trusted=READER.trusted)
    return made(WRITER, "planes"), READER


def test_a_signed_step_is_read(written: tuple[Objects, Keyring], tmp_path: Path) -> None:
    objects, reader = written
    assert verified(objects, NEWEST, reader) == []
    document = restores(objects, NEWEST, tmp_path, reader)
    assert document["id"] == str(NEWEST)
    assert document["tags"] == {"loss": 1 / 20, "seed": 20}


def changed(**changes: Any) -> Any:
    return lambda decision, _forger: msgspec.structs.replace(decision, **changes)


def moved(decision: Decision, forger: Forger) -> Decision:
    """The signature of another step."""
    theirs = forger.commit(StepId(2, 10))
    return msgspec.structs.replace(decision, signature=theirs.signature, signer=theirs.signer)


def copied(_decision: Decision, forger: Forger) -> Decision:
    """An older commit, all of it, under the name of the newest."""
    return msgspec.structs.replace(forger.commit(StepId(2, 10)), step=NEWEST.step)


FORGERIES: dict[str, Any] = {
    "no signature": changed(signature=msgspec.UNSET, signer=msgspec.UNSET),
    "no signer": changed(signer=msgspec.UNSET),
    "an empty signature": changed(signature=""),
    "no hex": changed(signature="x" * 128),
    "other bits": changed(signature="00" * 64),
    "another signer": lambda decision, _: signed(decision, FOREIGN),
    "another signer by the name of ours": lambda decision, _: msgspec.structs.replace(
        signed(decision, FOREIGN), signer=SIGNER.id
    ),
    "another parent": changed(parent=(1, 10)),
    "another time": changed(sealed_at=1.0),
    "other tags": changed(tags={"loss": 0.0}, sealed_tags=msgspec.UNSET),
    "other manifests": lambda decision, _: msgspec.structs.replace(
        decision, manifests=decision.manifests[::-1]
    ),
    "another incarnation": changed(nonce="5a" * 16),
    "that of another step": moved,
    "a commit of another step": copied,
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_commit_is_refused_and_the_step_before_is_taken(
    written: tuple[Objects, Keyring], forgery: str, tmp_path: Path
) -> None:
    objects, reader = written
    forger = Forger(dict(objects))
    forger.put_commit(FORGERIES[forgery](forger.commit(NEWEST), forger))
    error = restored(forger.objects, NEWEST, tmp_path / "newest", reader)
    assert isinstance(error, UntrustedError)
    assert error.subject == keys.commit(NEWEST)
    to = tmp_path / "any"
    to.mkdir()
    catalog = Catalog(memory_store(forger.objects), reader)
    document = asyncio.run(restore_files(catalog, None, "safetensors", to, lambda _: None))
    assert document["id"] == "2.10"
    assert [one["id"] for one in document["skipped"]] == [str(NEWEST)]


def test_an_unsigned_store_is_refused(tmp_path: Path) -> None:
    error = restored(made(NO_KEYS), NEWEST, tmp_path, READER)
    assert isinstance(error, UntrustedError)
    assert error.message == "is not signed"


def test_a_chunk_is_vouched_for_though_its_hash_were_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """XXH3 finds damage: a signature over it alone would let anybody exchange the bytes."""
    for codec in ("none", "planes"):
        forger = Forger(made(WRITER, codec))
        stored = bytearray(forger.chunk_bytes(NEWEST, 0, 0))
        stored[-1] ^= 1
        forger.write_chunk(NEWEST, 0, 0, bytes(stored))
        with monkeypatch.context() as patch:
            patch.setattr(verify, "check_stored", lambda *_, **__: None)
            error = restored(forger.objects, NEWEST, tmp_path, READER)
        assert isinstance(error, ChunkDamagedError)
        assert error.message == "is not what was signed"


def test_a_commit_without_digests_of_its_chunks_vouches_for_nothing(tmp_path: Path) -> None:
    """Ranks whose daemons had no key to sign with, and one that had."""
    forger = Forger(made(NO_KEYS))
    forger.put_commit(signed(forger.commit(NEWEST), SIGNER))
    error = restored(forger.objects, NEWEST, tmp_path, READER)
    assert isinstance(error, UntrustedError)
    assert error.subject == keys.manifest(NEWEST, 0)


def undecided() -> tuple[MemoryStore, list[SealedManifest]]:
    """The newest step as its ranks have written it, before anybody decided."""
    objects = made(WRITER)
    commit = Forger(objects).commit(NEWEST)
    store = memory_store(objects)
    del shelf_of(store)[keys.commit(NEWEST)]
    of_step = Catalog(store).manifests(commit)
    return store, asyncio.run(of_step)


BOTH = replace(READER, signer=SIGNER)


def test_a_commit_that_is_not_trusted_is_not_told() -> None:
    """A daemon without the signing key was faster: readers would refuse what it put."""

    async def main() -> None:
        store, manifests = undecided_step
        unsigned = await commit_step(store, manifests, StepId(2, 10))
        told: list[Decision] = []
        committer = Committer(Catalog(store, BOTH), told.append, 120.0)
        with pytest.raises(UntrustedError, match="is not signed"):
            await committer.decision(unsigned.nonce, manifests[0])
        with pytest.raises(UntrustedError, match="is not signed"):
            await abort_step(store, NEWEST, "it is late", BOTH)
        with pytest.raises(UntrustedError, match="is not signed"):
            await commit_step(store, manifests, StepId(2, 10), BOTH)
        assert not told
        assert unsigned == await Catalog(store).decision(NEWEST), "it is left as it is"

    undecided_step = undecided()
    asyncio.run(main())


def test_who_can_not_sign_puts_no_commit_that_he_would_refuse() -> None:
    store, manifests = undecided()
    with pytest.raises(UntrustedError, match="is not signed"):
        asyncio.run(commit_step(store, manifests, StepId(2, 10), READER))
    assert keys.commit(NEWEST) not in shelf_of(store)


def test_manifests_and_chunks_can_not_be_changed(
    written: tuple[Objects, Keyring], tmp_path: Path
) -> None:
    objects, reader = written
    forger = Forger(dict(objects))
    register = forger.objects[keys.commit(NEWEST)]
    forger.change(NEWEST, 0, lambda manifest: msgspec.structs.replace(manifest, host="elsewhere"))
    forger.objects[keys.commit(NEWEST)] = register
    error = restored(forger.objects, NEWEST, tmp_path, reader)
    assert isinstance(error, DamageError)
    assert error.subject == keys.manifest(NEWEST, 0)


def test_daemons_that_race_put_the_same_bytes() -> None:
    """A register decided by whichever daemon: equal inputs, equal signatures."""
    objects = made(replace(RING, signer=SIGNER))
    forger = Forger(objects)

    async def again() -> Decision:
        store = memory_store(objects)
        await store.delete(keys.commit(NEWEST))
        catalog = Catalog(store, RING)
        manifests = [
            await catalog.manifest(forger.commit(NEWEST), rank, closed=True) for rank in (0, 1)
        ]
        parent = StepId(*forger.commit(NEWEST).parent)
        await commit_step(store, manifests, parent, replace(RING, signer=SIGNER))
        return await Catalog(store).decision(NEWEST)

    assert asyncio.run(again()) == forger.commit(NEWEST)
