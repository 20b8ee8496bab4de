"""A child with little memory: each bomb must be refused by a typed error. Run by test_bombs.py."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import zstandard

from ckptmgr.errors import CkptmgrError
from ckptmgr.repository import keys
from ckptmgr.repository.catalog import Catalog
from ckptmgr.repository.chunk import Chunk, hash_of
from ckptmgr.repository.codec import Codec
from ckptmgr.repository.commit import Decision, get_record
from ckptmgr.repository.manifest import read_manifest
from ckptmgr.repository.record import _HEAD, MAGIC, Kind, _digest, seal, unseal
from ckptmgr.restore.check import verify_store
from ckptmgr.restore.verify import unpack
from ckptmgr.staging.hostbuffer import HostBuffer
from ckptmgr.staging.layout import decode_layout
from ckptmgr.staging.revive import decode_tree, decode_values
from ckptmgr.store.local import LocalStore
from ckptmgr.types import StepId

STEP = StepId(1, 1)
COMMIT = keys.commit(STEP)
MANIFEST = keys.manifest(STEP, 0)
GIB = 1 << 30

MAP = {
    "attempt": 1,
    "step": 1,
    "nonce": "00" * 16,
    "rank": 0,
    "world": 1,
    "host": "h",
    "layout": b"\x94\x90\x90\x00\xc4\x00",
    "values": b"",
    "packs": (),
    "chunks": (),
    "raw_bytes": 0,
    "stored_bytes": 0,
    "sealed_at": 0.0,
}


def record(
    kind: Kind, key: str, stored: bytes, raw_length: int, *, zstd: bool, length: int | None = None
) -> bytes:
    """A record whose digest is right, whatever it declares."""
    declared = len(stored) if length is None else length
    head = _HEAD.pack(MAGIC, kind, 1, int(zstd), 0, raw_length, declared)
    return head + _digest(head, key, stored) + stored


def manifest(payload: bytes, **declared: Any) -> bytes:
    stored = zstandard.ZstdCompressor(level=1).compress(payload)
    raw_length = declared.get("raw_length", len(payload))
    return record(Kind.MANIFEST, MANIFEST, stored, raw_length, zstd=True)


def streamed(nbytes: int, **parameters: int) -> bytes:
    """A frame of zeros, made piece by piece: it does not say how long it is."""
    made = zstandard.ZstdCompressionParameters.from_level(1, **parameters)
    compressor = zstandard.ZstdCompressor(compression_params=made).compressobj()
    piece = bytes(1 << 20)
    return b"".join(compressor.compress(piece) for _ in range(nbytes >> 20)) + compressor.flush()


def claims_content(frame: bytes, nbytes: int) -> bytes:
    """A zstd frame header with an 8-byte content size, before the blocks of `frame`."""
    return frame[:4] + bytes([0b11100000]) + struct.pack("<Q", nbytes) + frame[6:]


def with_field(name: str, encoded: bytes) -> bytes:
    """A manifest payload in which one field is given bytes as they are."""
    others = {key: value for key, value in MAP.items() if key != name}
    body = msgspec.msgpack.encode(others)
    return bytes([body[0] + 1]) + body[1:] + msgspec.msgpack.encode(name) + encoded


def read(payload: bytes, **declared: Any) -> Callable[[], Any]:
    made = manifest(payload, **declared)
    return lambda: read_manifest(STEP, 0, made)


def raw_record(stored: bytes, raw_length: int) -> Callable[[], Any]:
    made = record(Kind.MANIFEST, MANIFEST, stored, raw_length, zstd=True)
    return lambda: read_manifest(STEP, 0, made)


def chunk(codec: int, stored: bytes, raw_bytes: int = 1 << 20) -> Callable[[], Any]:
    raw = memoryview(bytearray(raw_bytes))
    one = Chunk(0, 4096, len(stored), 0, raw_bytes, codec, b"\0" * 16, hash_of(stored))
    return lambda: unpack(one, memoryview(stored), raw, subject="bomb")


def commit_json(text: bytes) -> Callable[[], Any]:
    made = record(Kind.COMMIT, COMMIT, text, len(text), zstd=False)
    return lambda: unseal(Kind.COMMIT, COMMIT, made, Decision)


def huge_object(root: Path, key: str, head: bytes) -> Callable[[], Any]:
    """A sparse file of a TiB in place of a record."""
    path = root / key
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(1 << 40)
    store = LocalStore(str(root))
    return lambda: asyncio.run(get_record(store, Kind.COMMIT, key, Decision))


def huge_pack(root: Path) -> Callable[[], Any]:
    """A commit and a manifest that hold, and name a pack of a TiB."""
    name = keys.new_pack(STEP, 0)
    layout = msgspec.msgpack.encode(((), ((0, 4096, 1, False),), 4096, b"\xc0"))
    one = (0, 4096, 4096, 0, 4096, 0, b"\0" * 16, b"")
    payload = {**MAP, "layout": layout, "packs": ((name, 1 << 40),), "chunks": (one,)}
    made = manifest(msgspec.msgpack.encode(payload))
    digest = made[32:64].hex()
    decision = Decision("COMMIT", 1, 1, "00" * 16, 1, (0, 0), (digest,))
    for key, blob in ((MANIFEST, made), (COMMIT, seal(Kind.COMMIT, COMMIT, decision))):
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        (root / key).write_bytes(blob)
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    with (root / name).open("wb") as file:
        file.truncate(1 << 40)
    store = LocalStore(str(root))

    def look() -> None:
        reports = asyncio.run(
            verify_store(Catalog(store), None, every=True, quick=False, progress=lambda _: None)
        )
        if reports[0]["damage"]:
            raise CkptmgrError("found by verify")

    return look


def host_buffer(root: Path) -> Callable[[], Any]:
    """A header that declares slots of exabytes."""
    path = root / f"{'0' * 32}.buf"
    path.parent.mkdir(parents=True, exist_ok=True)
    head = struct.pack("<8sIIQQ16sI12x", b"CKPTHB\r\n", 1, 2, 1 << 60, 1 << 61, bytes(16), 0)
    path.write_bytes(head + hash_of(head) + bytes(8192))
    return lambda: HostBuffer.open(path)


def array32(count: int) -> bytes:
    return b"\xdd" + struct.pack(">I", count)


def swarms() -> dict[str, Callable[[], Any]]:
    """Values of a byte or two each that become objects of 64."""
    return {
        "20 million empty arrays": lambda: decode_values(array32(20 << 20) + b"\x90" * (20 << 20)),
        "20 million empty lists": lambda: decode_values(
            array32(20 << 20) + b"\x91\x05" * (20 << 20)
        ),
        "20 million empty maps": lambda: decode_values(array32(20 << 20) + b"\x80" * (20 << 20)),
        "20 million extensions": lambda: decode_values(
            array32(20 << 20) + b"\xd4\x05\x00" * (20 << 20)
        ),
        "a tree of 20 million tuples": lambda: decode_tree(
            array32(20 << 20) + b"\x04" + b"\x91\x04" * ((20 << 20) - 1), [], lambda *_: None
        ),
    }


def bombs(root: Path) -> dict[str, Callable[[], Any]]:
    zeros = streamed(GIB)
    tiny_pack = b"\x92\xa0\x00"
    tiny_chunk = b"\x98\x00\x00\x00\x00\x00\x00\xc4\x00\xc4\x00"
    tiny_leaf = b"\x95\xa0\xa0\x90\x00\x00"
    planes_head = struct.pack("<BB6x", 4, 0) + bytes(3 << 18)
    many_leaves = b"\x94" + array32(10 << 20) + tiny_leaf * (10 << 20) + b"\x90\x00\xc4\x00"
    return {
        "raw length of an exabyte": read(b"\x80", raw_length=1 << 60),
        "a GiB of zeros that says so": raw_record(claims_content(zeros, GIB), GIB),
        "a GiB of zeros that says nothing": raw_record(zeros, 1000),
        "a GiB of zeros that says little": raw_record(claims_content(zeros, 1000), 1000),
        "a content size of an exabyte": raw_record(claims_content(zeros, 1 << 60), 1 << 60),
        "a window of 2 GiB": raw_record(streamed(1 << 20, window_log=31), 1 << 20),
        "256 MiB of zeros as a manifest": read(bytes(256 << 20)),
        "packs without end": read(with_field("packs", array32((1 << 32) - 1))),
        "chunks without end": read(with_field("chunks", array32((1 << 32) - 1))),
        "20 million packs": read(with_field("packs", array32(20 << 20) + tiny_pack * (20 << 20))),
        "10 million chunks": read(
            with_field("chunks", array32(10 << 20) + tiny_chunk * (10 << 20))
        ),
        "10 million tags": read(
            with_field("tags", b"\xdf" + struct.pack(">I", 10 << 20) + b"\xa1x\x00" * (10 << 20))
        ),
        "10 million leaves": lambda: decode_layout(many_leaves, subject="bomb"),
        "leaves without end": lambda: decode_layout(b"\x94" + array32(1 << 31), subject="bomb"),
        "deep MessagePack": read(with_field("chunks", b"\x91" * (64 << 20))),
        "deep layout": lambda: decode_layout(b"\x91" * (16 << 20), subject="bomb"),
        "deep values": lambda: decode_values(b"\x91" * (16 << 20)),
        "deep tree": lambda: decode_tree(b"\x92\x05" * (8 << 20), [], lambda *_: None),
        "deep but decodable values": lambda: decode_values(b"\x91" + b"\x92\x05" * 500 + b"\xc0"),
        "values without end": lambda: decode_values(array32((1 << 32) - 1)),
        "a factory that is no factory": lambda: decode_values(b"\x91\x92\x0c\xa6system"),
        "deep JSON": commit_json(b"[" * (8 << 20)),
        "deep JSON in a field": commit_json(b'{"tags": ' + b'{"a":' * (1 << 20)),
        "17 MiB of JSON": commit_json(b'{"why": "' + b"x" * (17 << 20) + b'"}'),
        "a number of a million digits": commit_json(b'{"attempt": ' + b"9" * (1 << 20) + b"}"),
        "a record of a TiB": huge_object(root / "a", COMMIT, b""),
        "a record of a TiB that says so": huge_object(
            root / "b", COMMIT, _HEAD.pack(MAGIC, Kind.COMMIT, 1, 0, 0, 1 << 40, 1 << 40)
        ),
        "a record of a TiB that says 16 MiB": huge_object(
            root / "c", COMMIT, _HEAD.pack(MAGIC, Kind.COMMIT, 1, 0, 0, 16 << 20, 16 << 20)
        ),
        "a pack of a TiB": huge_pack(root / "d"),
        "a chunk that says a GiB": chunk(Codec.ZSTD, claims_content(zeros, GIB)),
        "a chunk that says nothing": chunk(Codec.ZSTD, zeros),
        "a chunk that says little": chunk(Codec.ZSTD, claims_content(zeros, 1 << 20)),
        "a chunk with a window of 2 GiB": chunk(Codec.ZSTD, streamed(1 << 20, window_log=31)),
        "planes whose exponents say a GiB": chunk(
            Codec.PLANES, planes_head + claims_content(zeros, GIB)
        ),
        "planes of no size": chunk(Codec.PLANES, bytes(8)),
        "planes of a GiB": chunk(Codec.PLANES, planes_head + zeros),
        "an unknown codec": chunk(250, b"x"),
        "host memory of exabytes": host_buffer(root / "e"),
    }


def address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main(root: Path, room: int) -> None:
    """Set each bomb off with `room` bytes to spare, and print what came of it."""
    results = {}
    for name, go in (bombs(root) | swarms()).items():
        limit = address_space() + room
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        try:
            go()
        except CkptmgrError as error:
            results[name] = f"refused: {type(error).__name__}"
        except BaseException as error:
            results[name] = f"{type(error).__name__}: {error}"
        else:
            results[name] = "let through"
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
