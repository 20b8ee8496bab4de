"""An encrypted and signed store of a released version is read by ckptmgr, and by docs/format.md."""

from __future__ import annotations

import asyncio
import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import msgspec
import xxhash
import zstandard
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.keywrap import aes_key_unwrap

from ckptmgr.repository.catalog import Catalog
from ckptmgr.repository.envelope import Key
from ckptmgr.repository.keyring import Keyring
from ckptmgr.restore.check import restore_files, verify_store
from ckptmgr.store.local import LocalStore
from golden.document import chunk_of
from small_step import read_safetensors

ROOT = Path(__file__).parent / "encrypted"
EXPECTED = json.loads((ROOT / "expected.json").read_text())
SECRET, PUBLIC = bytes.fromhex(EXPECTED["key"]), bytes.fromhex(EXPECTED["public"])
STEPS = ("1.10", "1.30")


def sha256(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()


def test_it_is_read_bit_by_bit(tmp_path: Path) -> None:
    key = Key.of(SECRET)
    signer = hashlib.blake2b(PUBLIC, digest_size=8).hexdigest()
    trusted = {signer: Ed25519PublicKey.from_public_bytes(PUBLIC)}
    catalog = Catalog(LocalStore(str(ROOT / "store")), Keyring(key, {key.id: key}, None, trusted))

    async def main() -> None:
        reports = await verify_store(
            catalog, None, every=True, quick=False, progress=lambda _: None
        )
        assert [(one["id"], one["damage"]) for one in reports] == [("1.30", []), ("1.10", [])]
        for step in STEPS:
            out = tmp_path / step
            out.mkdir()
            document = await restore_files(catalog, step, "safetensors", out, lambda _: None)
            assert document["tags"] == {"loss": 1 / int(step[2:]), "seed": int(step[2:])}
            found = read_safetensors(out / "state.safetensors")
            assert {name: sha256(entry[2]) for name, entry in found.items()} == {
                name: entry[2] for name, entry in EXPECTED["leaves"][step].items()
            }

    asyncio.run(main())


# -- by the document alone ------------------------------------------------------------------------


def opened(envelope: list[Any], what: int, number: int, context: list[Any], sealed: bytes) -> bytes:
    """Section 11."""
    key_id, wrapped, _ = envelope
    assert key_id == hashlib.blake2b(b"ckptmgr key id", key=SECRET, digest_size=8).hexdigest()
    data_key = aes_key_unwrap(SECRET, wrapped)
    nonce = struct.pack("<IQ", what, number)
    return AESGCM(data_key).decrypt(nonce, sealed, msgspec.msgpack.encode(context))


def test_the_document_is_enough_to_read_an_encrypted_step() -> None:
    codecs = set()
    for step in STEPS:
        at = f"00000001/{int(step[2:]):012d}"
        blob = (ROOT / "store/man" / at / "000000").read_bytes()
        assert (blob[8], blob[9]) == (6, 2)
        manifest = msgspec.msgpack.decode(zstandard.ZstdDecompressor().decompress(blob[64:]))
        assert (manifest["layout"], manifest["values"], manifest["tags"]) == (b"", b"", {})
        key_id, wrapped, sealed = envelope = manifest["envelope"]
        empty = {**manifest, "envelope": [key_id, wrapped, b""]}
        plain = opened(envelope, 1, 0, ["manifest", empty], sealed)
        secrets = msgspec.msgpack.decode(zstandard.ZstdDecompressor().decompress(plain))
        layout, _values, tags, raw_hashes, chunk_tags = secrets
        data = b""
        part = [1, int(step[2:]), manifest["nonce"], 0, 1]
        for number, chunk in enumerate(manifest["chunks"]):
            pack, offset, length, start, raw_length, codec, raw_hash, stored_hash = chunk
            assert raw_hash == b""
            name, _ = manifest["packs"][pack]
            stored = (ROOT / "store" / name).read_bytes()[offset : offset + length]
            assert xxhash.xxh3_128_digest(stored) == stored_hash
            context = ["chunk", *part, start, raw_length, codec]
            tag = chunk_tags[16 * number : 16 * number + 16]
            raw = chunk_of(opened(envelope, 0, start, context, stored + tag), codec, raw_length)
            assert xxhash.xxh3_128_digest(raw) == raw_hashes[16 * number : 16 * number + 16]
            data += raw
            codecs.add(codec)
        leaves = msgspec.msgpack.decode(layout)[0]
        assert {
            path: [dtype, list(shape), sha256(data[begin : begin + nbytes])]
            for path, dtype, shape, begin, nbytes, *_ in leaves
        } == EXPECTED["leaves"][step]
        check_commit(at, part, tags)
    assert codecs == {0, 1, 2}


def check_commit(at: str, part: list[Any], tags: dict[str, Any]) -> None:
    """Sections 11 and 12."""
    payload = (ROOT / "store/commit" / at).read_bytes()[64:]
    commit = json.loads(payload)
    assert commit["tags"] == {}
    key_id, wrapped, sealed = commit["sealed_tags"]
    envelope = [key_id, msgspec.json.decode(json.dumps(wrapped), type=bytes), b""]
    found = opened(
        envelope, 2, 0, ["tags", *part[:3]], msgspec.json.decode(json.dumps(sealed), type=bytes)
    )
    assert msgspec.msgpack.decode(found) == tags
    signature = bytes.fromhex(commit.pop("signature"))
    signed = json.dumps(commit, separators=(",", ":")).encode()
    assert payload.startswith(signed[:-1]), "the fields are in another order"
    public = Ed25519PublicKey.from_public_bytes(PUBLIC)
    public.verify(signature, b"ckptmgr commit\0" + signed)
    assert commit["signer"] == hashlib.blake2b(PUBLIC, digest_size=8).hexdigest()
