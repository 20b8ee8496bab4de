"""Who may write the store, but has no key, can not make us read anything but what was saved."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ckptmgr.daemon import pipeline
from ckptmgr.errors import (
    ChunkDamagedError,
    DamageError,
    LockedError,
    RecordDamagedError,
    UnsupportedFormatError,
    UntrustedError,
    WrongKeyError,
)
from ckptmgr.repository import keys, record
from ckptmgr.repository.catalog import Catalog
from ckptmgr.repository.chunk import hash_of
from ckptmgr.repository.envelope import Envelope
from ckptmgr.repository.keyring import NO_KEYS, Keyring, keyring_of
from ckptmgr.repository.manifest import Manifest, read_manifest
from ckptmgr.restore import verify
from ckptmgr.types import StepId
from security.forged import (
    GROUP_BYTES,
    NEWEST,
    OTHER,
    OURS,
    RING,
    SECRET_NAME,
    SECRET_NOTE,
    SECRET_TAG,
    Forger,
    made,
    restored,
    restores,
    state_of,
    verified,
)
from small_step import Objects

HERE = (NEWEST, 0, 0)
"""The chunk that is attacked: step, rank, index."""

ELSEWHERE = {
    "pack": (NEWEST, 0, 1),
    "another pack": (NEWEST, 0, 3),
    "another rank": (NEWEST, 1, 0),
    "an older step": (StepId(2, 10), 0, 0),
    "another attempt": (StepId(1, 20), 0, 0),
}


@pytest.fixture(scope="module")
def sealed() -> Objects:
    """Two chunks to a pack, so that there are chunks of the same and of another one."""
    with pytest.MonkeyPatch.context() as patch:
        few = partial(pipeline.packs_of, pack_bytes=2 * GROUP_BYTES)
        patch.setattr(pipeline, "packs_of", few)
        return made(RING)


@pytest.fixture
def forger(sealed: Objects) -> Forger:
    return Forger(dict(sealed))


def test_what_nobody_touched_is_read(sealed: Objects, tmp_path: Path) -> None:
    assert verified(sealed, NEWEST) == []
    assert restores(sealed, NEWEST, tmp_path)["skipped"] == []
    packs = Forger(sealed).manifest(NEWEST, 0).packs
    assert len(packs) == 2


@pytest.mark.parametrize("where", ELSEWHERE)
def test_a_moved_chunk_is_refused_by_its_hash(forger: Forger, where: str, tmp_path: Path) -> None:
    """Swapped with another one: the first thing that is looked at is the stored hash."""
    theirs, ours = forger.chunk_bytes(*ELSEWHERE[where]), forger.chunk_bytes(*HERE)
    key, chunk = forger.place(*HERE)
    forger.write_chunk(*HERE, theirs)
    forger.write_chunk(*ELSEWHERE[where], ours)
    assert (key, chunk.pack_offset) in {(d.key, d.offset) for d in verified(forger.objects, NEWEST)}
    error = restored(forger.objects, NEWEST, tmp_path)
    assert isinstance(error, ChunkDamagedError)
    assert error.subject.startswith("data/")
    assert "recorded hash" in error.message


@pytest.mark.parametrize("where", ELSEWHERE)
def test_a_moved_chunk_whose_hash_is_forged_is_refused_with_its_manifest(
    forger: Forger, where: str, tmp_path: Path
) -> None:
    forger.write_chunk(*HERE, forger.chunk_bytes(*ELSEWHERE[where]))
    forger.rehash(NEWEST, 0)
    assert verified(forger.objects, NEWEST, NO_KEYS) == [], "the forgery is not a good one"
    (damage,) = verified(forger.objects, NEWEST)
    assert damage.key == keys.manifest(NEWEST, 0)
    error = restored(forger.objects, NEWEST, tmp_path)
    assert isinstance(error, RecordDamagedError)
    assert error.subject == keys.manifest(NEWEST, 0)


@pytest.mark.parametrize("where", ELSEWHERE)
@pytest.mark.parametrize("what", ["swapped", "replayed"])
def test_a_moved_chunk_with_the_same_hash_is_refused_by_its_tag(
    forger: Forger, where: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """XXH3 is no cryptographic hash: take it that he finds other bytes with the same one."""
    theirs, ours = forger.chunk_bytes(*ELSEWHERE[where]), forger.chunk_bytes(*HERE)
    forger.write_chunk(*HERE, theirs)
    if what == "swapped":
        forger.write_chunk(*ELSEWHERE[where], ours)
    key, chunk = forger.place(*HERE)
    monkeypatch.setattr(verify, "check_stored", lambda *_, **__: None)
    assert (key, chunk.pack_offset) in {(d.key, d.offset) for d in verified(forger.objects, NEWEST)}
    error = restored(forger.objects, NEWEST, tmp_path)
    assert isinstance(error, ChunkDamagedError)
    assert error.subject.startswith("data/")
    assert error.message == "is not what was encrypted as this chunk"


def test_every_bit_of_a_chunk_is_authenticated(
    forger: Forger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of 64 places alone, with the hash taken for collided."""
    monkeypatch.setattr(verify, "check_stored", lambda *_, **__: None)
    whole = forger.chunk_bytes(*HERE)
    for number in range(64):
        flipped = bytearray(whole)
        flipped[number * len(whole) // 64] ^= 1 << number % 8
        forger.write_chunk(*HERE, bytes(flipped))
        assert isinstance(restored(forger.objects, NEWEST, tmp_path), ChunkDamagedError)
    forger.write_chunk(*HERE, whole)
    assert verified(forger.objects, NEWEST) == []


def replaced(name: str, value: Any) -> Any:
    return lambda manifest: msgspec.structs.replace(manifest, **{name: value})


def cut_short(manifest: Manifest) -> Manifest:
    """The last chunk of each pack is said to be shorter than it is: by whole pages."""
    *front, last = manifest.chunks
    shorter = msgspec.structs.replace(last, stored_bytes=4096, raw_bytes=4096)
    packs = (*manifest.packs[:-1], (manifest.packs[-1][0], manifest.packs[-1][1] - 4096))
    return msgspec.structs.replace(manifest, chunks=(*front, shorter), packs=packs)


def one_chunk_less(manifest: Manifest) -> Manifest:
    packs = (*manifest.packs[:-1], (manifest.packs[-1][0], manifest.packs[-1][1] - GROUP_BYTES))
    return msgspec.structs.replace(manifest, chunks=manifest.chunks[:-1], packs=packs)


def without_envelope(manifest: Manifest) -> Manifest:
    return msgspec.structs.replace(manifest, envelope=msgspec.UNSET)


def changed_envelope(manifest: Manifest, **changes: Any) -> Manifest:
    assert isinstance(manifest.envelope, Envelope)
    envelope = msgspec.structs.replace(manifest.envelope, **changes)
    return msgspec.structs.replace(manifest, envelope=envelope)


EDITS = {
    "a chunk cut short": cut_short,
    "a chunk less": one_chunk_less,
    "other tags": replaced("tags", {"loss": 0.0}),
    "other times": replaced("sealed_at", 1.0),
    "a larger world": replaced("world", 3),
    "no sealed tags": replaced("sealed_tags", msgspec.UNSET),
    "another codec": lambda m: msgspec.structs.replace(
        m, chunks=(msgspec.structs.replace(m.chunks[0], codec=1), *m.chunks[1:])
    ),
    "a raw hash": lambda m: msgspec.structs.replace(
        m, chunks=(msgspec.structs.replace(m.chunks[0], raw_hash=bytes(16)), *m.chunks[1:])
    ),
    "no envelope": without_envelope,
    "an empty envelope": lambda m: changed_envelope(m, sealed=b""),
    "a truncated envelope": lambda m: changed_envelope(m, sealed=m.envelope.sealed[:-1]),
    "another data key": lambda m: changed_envelope(m, wrapped=bytes(40)),
    "a short data key": lambda m: changed_envelope(m, wrapped=bytes(24)),
    "no data key": lambda m: changed_envelope(m, wrapped=b""),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_changed_manifest_is_refused(forger: Forger, edit: str, tmp_path: Path) -> None:
    forger.change(NEWEST, 0, EDITS[edit])
    error = restored(forger.objects, NEWEST, tmp_path)
    assert isinstance(error, DamageError)
    assert error.subject in (keys.manifest(NEWEST, 0), keys.manifests(NEWEST))


@pytest.mark.parametrize("where", ["another rank", "an older step", "another attempt"])
@pytest.mark.parametrize("what", ["manifest", "envelope", "data key"])
def test_what_belongs_to_another_part_is_refused(
    forger: Forger, where: str, what: str, tmp_path: Path
) -> None:
    """A whole older part in the place of a newer one, and pieces of its envelope."""
    step, rank, _ = ELSEWHERE[where]
    theirs, ours = forger.manifest(step, rank), forger.manifest(NEWEST, 0)
    assert isinstance(theirs.envelope, Envelope)
    assert isinstance(ours.envelope, Envelope)
    if what == "manifest":
        place = {"attempt": 2, "step": 20, "rank": 0, "nonce": ours.nonce}
        packs = []
        for name, nbytes in theirs.packs:
            moved = f"{keys.packs(NEWEST, 0)}{name.rpartition('/')[2]}"
            forger.objects[moved] = forger.objects[name]
            packs.append((moved, nbytes))
        forged = msgspec.structs.replace(theirs, **place, packs=tuple(packs))
    elif what == "envelope":
        forged = msgspec.structs.replace(ours, envelope=theirs.envelope)
    else:
        envelope = msgspec.structs.replace(ours.envelope, wrapped=theirs.envelope.wrapped)
        forged = msgspec.structs.replace(ours, envelope=envelope)
    forger.put_manifest(NEWEST, 0, forged)
    error = restored(forger.objects, NEWEST, tmp_path)
    assert isinstance(error, RecordDamagedError)
    assert error.subject == keys.manifest(NEWEST, 0)


def test_ranks_of_two_incarnations_are_not_mixed(sealed: Objects, tmp_path: Path) -> None:
    """The store was emptied and used again; he kept a part of before, which is authentic."""
    before, now = Forger(made(RING)), Forger(dict(sealed))
    old = before.manifest(NEWEST, 1)
    now.objects.update({name: before.objects[name] for name, _ in old.packs})
    now.put_manifest(NEWEST, 1, old)
    error = restored(now.objects, NEWEST, tmp_path)
    assert isinstance(error, RecordDamagedError)
    assert (error.subject, error.message) == (
        keys.manifest(NEWEST, 1),
        "is of another incarnation",
    )


def test_a_truncated_pack_is_refused(forger: Forger, tmp_path: Path) -> None:
    key, chunk = forger.place(*HERE)
    whole = forger.objects[key]
    for length in (0, 1, 4096, chunk.pack_offset, chunk.pack_offset + 1, len(whole) - 1):
        forger.objects[key] = whole[:length]
        assert key in {damage.key for damage in verified(forger.objects, NEWEST)}
        error = restored(forger.objects, NEWEST, tmp_path)
        assert isinstance(error, ChunkDamagedError)
        assert error.subject.startswith(key)


def test_tags_of_another_step_are_refused(forger: Forger) -> None:
    theirs = forger.commit(StepId(2, 10)).sealed_tags
    forger.put_commit(msgspec.structs.replace(forger.commit(NEWEST), sealed_tags=theirs))
    with pytest.raises(RecordDamagedError) as refused:
        verified(forger.objects, NEWEST)
    assert refused.value.subject == keys.commit(NEWEST)


def test_tags_in_clear_are_refused(forger: Forger) -> None:
    """Somebody may choose the step to go back to by its loss."""
    tags = {"tags": {"loss": 0.0}, "sealed_tags": msgspec.UNSET}
    forger.put_commit(msgspec.structs.replace(forger.commit(NEWEST), **tags))
    with pytest.raises(UntrustedError) as refused:
        verified(forger.objects, NEWEST)
    assert refused.value.subject == keys.commit(NEWEST)


# -- keys -----------------------------------------------------------------------------------------


def test_a_wrong_key_says_so_and_a_missing_one_too(sealed: Objects, tmp_path: Path) -> None:
    wrong = restored(sealed, NEWEST, tmp_path, keyring_of(OTHER))
    assert isinstance(wrong, WrongKeyError)
    assert wrong.message == f"was encrypted with key {OURS.id}, given {OTHER.id}"
    missing = restored(sealed, NEWEST, tmp_path, NO_KEYS)
    assert isinstance(missing, LockedError)
    assert missing.message == f"was encrypted with key {OURS.id}, and no key is given"
    assert "CKPTMGR_KEY_FILE" in missing.hint
    with pytest.raises(WrongKeyError):
        verified(sealed, NEWEST, keyring_of(OTHER))


def test_after_a_rotation_the_former_key_still_reads(sealed: Objects, tmp_path: Path) -> None:
    assert restores(sealed, NEWEST, tmp_path, keyring_of(OTHER, OURS))["id"] == str(NEWEST)


def test_without_a_key_stored_hashes_are_verified(forger: Forger) -> None:
    assert verified(forger.objects, NEWEST, NO_KEYS) == []
    key, chunk = forger.place(*HERE)
    forger.write_chunk(*HERE, bytes(chunk.stored_bytes))
    (damage,) = verified(forger.objects, NEWEST, NO_KEYS)
    assert (damage.key, damage.offset) == (key, chunk.pack_offset)


def test_who_has_a_key_takes_nothing_in_clear_unless_told(tmp_path: Path) -> None:
    """Else he would put a step of his own making, which needs no key, in the place of ours."""
    clear = made(NO_KEYS)
    error = restored(clear, NEWEST, tmp_path)
    assert isinstance(error, UntrustedError)
    assert "CKPTMGR_TAKE_CLEAR" in error.hint
    told = Keyring(OURS, {OURS.id: OURS}, take_clear=True)
    assert restores(clear, NEWEST, tmp_path, told)["id"] == str(NEWEST)


def test_a_reader_of_version_1_alone_refuses_it_as_newer(
    sealed: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "_versions", lambda _kind: (record.VERSION,))
    with pytest.raises(UnsupportedFormatError, match="has version 2, not 1"):
        read_manifest(NEWEST, 0, sealed[keys.manifest(NEWEST, 0)])


# -- what can be seen -----------------------------------------------------------------------------


def seen_in(objects: Objects) -> set[str]:
    """Which secrets can be found by who looks at every byte of a store."""
    everything = b"".join(objects.values()) + b"".join(
        record._unpack(key, memoryview(blob)[64:], int.from_bytes(blob[16:24], "little"))
        for key, blob in objects.items()
        if key.startswith("man/")
    )
    raw = state_of(2, 20, 0)[f"{SECRET_NAME}.uint64"].tobytes()
    probes = {
        "names": SECRET_NAME.encode(),
        "values": SECRET_NOTE.encode(),
        "names of tags": SECRET_TAG.encode(),
        "bytes": raw[:64],
        "hashes": hash_of(raw),
    }
    return {name for name, probe in probes.items() if probe in everything}


@pytest.mark.parametrize("codec", ["none", "zstd", "planes", "auto"])
def test_nothing_of_a_state_can_be_seen(codec: str) -> None:
    assert len(seen_in(made(NO_KEYS, codec))) == 5, "the probes find nothing"
    assert seen_in(made(RING, codec)) == set()


def test_an_opened_manifest_can_not_be_stored(sealed: Objects) -> None:
    """By no mistake of ours do secrets go back to the store."""
    import asyncio

    from small_step import memory_store

    async def opened() -> Manifest:
        catalog = Catalog(memory_store(sealed), RING)
        return (await catalog.manifest(await catalog.decision(NEWEST), 0)).manifest

    with pytest.raises(TypeError):
        msgspec.msgpack.encode(asyncio.run(opened()))
