"""What a released version wrote stays readable, bit by bit: by ckptmgr, and by docs/format.md."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import msgspec
import pytest
import xxhash
import zstandard

from ckptmgr.daemon.retain import collect
from ckptmgr.repository.budget import BufferPool
from ckptmgr.repository.catalog import Catalog
from ckptmgr.repository.commit import check_format
from ckptmgr.restore.check import restore_files, verify_store
from ckptmgr.restore.records import list_objects
from ckptmgr.staging.hostbuffer import HostBuffer
from ckptmgr.staging.layout import decode_layout
from ckptmgr.staging.revive import decode_tree, decode_values
from ckptmgr.store.local import LocalStore
from ckptmgr.types import Outcome, StepState
from golden.document import chunk_of
from small_step import read_safetensors, save_steps

HERE = Path(__file__).parent
VERSIONS = sorted(path for path in HERE.glob("v*") if path.is_dir())
every_version = pytest.mark.parametrize("golden", VERSIONS, ids=lambda path: path.name)


def expected_of(golden: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((golden / "expected.json").read_text())
    return found


def sha256(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()


def test_there_is_a_version() -> None:
    assert [path.name for path in VERSIONS][:1] == ["v1"]
    for golden in VERSIONS:
        assert sum(p.stat().st_size for p in golden.rglob("*") if p.is_file()) < 200_000


@every_version
def test_a_store_of_every_version_is_read_bit_by_bit(golden: Path, tmp_path: Path) -> None:
    async def main() -> None:
        store = LocalStore(str(golden / "store"))
        catalog = Catalog(store)
        assert await check_format(store, create=False)
        reports = await verify_store(
            catalog, None, every=True, quick=False, progress=lambda _: None
        )
        assert [(r["id"], r["damage"]) for r in reports] == [("1.30", []), ("1.20", [])]
        assert {str(e.id): e.state for e in await catalog.entries()} == {
            "1.30": StepState.VERIFIED,
            "1.25": StepState.ABORTED,
            "1.20": StepState.COMMITTED,
            "1.10": StepState.RETIRED,
        }
        files = {p.relative_to(golden / "store") for p in golden.rglob("store/**/*") if p.is_file()}
        assert {Path(key) for key in await list_objects(store)} == files
        await store.aclose()

    asyncio.run(main())
    for step in ("1.20", "1.30"):
        check_restored(golden, step, tmp_path / step)


def check_restored(golden: Path, step: str, directory: Path) -> None:
    """`restore` on a copy, since it puts a hold."""
    shutil.copytree(golden / "store", directory / "store")
    out = directory / "out"
    out.mkdir()

    async def main() -> None:
        store = LocalStore(str(directory / "store"))
        await restore_files(Catalog(store), step, "safetensors", out, lambda _: None)
        await store.aclose()

    asyncio.run(main())
    expected = expected_of(golden)[step]
    found = read_safetensors(out / "state.safetensors")
    assert {p: [list(e[1]), sha256(e[2])] for p, e in found.items()} == {
        path: [shape, digest] for path, (_, shape, digest) in expected["leaves"].items()
    }
    values = json.loads((out / "values.json").read_text())
    assert {name: values[name] for name in expected["values"]} == expected["values"]


@every_version
def test_a_store_of_every_version_is_written_on(golden: Path, tmp_path: Path) -> None:
    """A job goes on where the old version stopped; retention understands the old steps."""
    shutil.copytree(golden / "store", tmp_path / "store")

    async def main() -> None:
        store = LocalStore(str(tmp_path / "store"))
        saved = await save_steps(store, (40, 50))
        assert str(saved[0].id) == "3.40"
        assert saved[0].decision.parent == (1, 30)
        await collect(Catalog(store), BufferPool(1), 2)
        reports = await verify_store(
            Catalog(store), None, every=True, quick=False, progress=lambda _: None
        )
        assert [(r["id"], r["damage"]) for r in reports] == [
            ("3.50", []),
            ("3.40", []),
            ("1.20", []),  # held
        ]
        await store.aclose()

    asyncio.run(main())


@every_version
def test_a_host_buffer_of_every_version_is_read_bit_by_bit(golden: Path, tmp_path: Path) -> None:
    (path,) = (golden / "buffers").glob("*.buf")
    copy = shutil.copy(path, tmp_path / path.name)
    with HostBuffer.open(Path(copy)) as buffer:
        assert buffer.id == path.stem
        assert (buffer.binding.url, buffer.binding.codec, buffer.binding.keep) == (
            "file:///golden/store",
            "planes",
            2,
        )
        first, second = buffer.snapshots()
        assert (first.attempt, first.step, first.nonce) == (3, 50, "5a" * 16)
        assert buffer.outcome(first) is Outcome.COMMITTED
        assert buffer.outcome(second) is Outcome.UNDECIDED
        for snapshot in (first, second):
            expected = expected_of(golden)[f"buffer.{snapshot.step}"]
            table = buffer.table(snapshot)
            layout = decode_layout(table.layout, subject="golden")
            with buffer.data(snapshot.slot) as data:
                found = {
                    leaf.path: [
                        leaf.dtype,
                        list(leaf.shape),
                        sha256(bytes(data[leaf.offset : leaf.offset + leaf.nbytes])),
                    ]
                    for leaf in layout.leaves
                }
            assert found == expected["leaves"]
            assert table.tags == {"loss": 1.0 / snapshot.step, "seed": snapshot.step}
            tree = decode_tree(layout.tree, decode_values(table.values), lambda index, _: index)
            assert {name: tree[name] for name in expected["values"]} == expected["values"]


# -- by the document alone ------------------------------------------------------------------------


def payload_of(root: Path, key: str, kind: int) -> Any:
    """Section 3 of docs/format.md, with nothing of ckptmgr."""
    blob = (root / key).read_bytes()
    magic, found, version, flags, zero, raw, length = struct.unpack_from("<8sBBHIQQ", blob)
    assert (magic, found, version, zero) == (b"\x89CKPT\r\n\x1a", kind, 1, 0)
    stored = blob[64 : 64 + length]
    digest = hashlib.blake2b(blob[:32] + key.encode() + stored, digest_size=32)
    assert blob[32:64] == digest.digest()
    if not flags:
        assert raw == length
        return json.loads(stored)
    plain = zstandard.ZstdDecompressor().decompress(stored)
    assert (flags, raw) == (1, len(plain))
    return msgspec.msgpack.decode(plain)


def test_the_document_is_enough_to_read_version_1() -> None:
    root = HERE / "v1/store"
    assert payload_of(root, "format", 1) == {"version": 1}
    codecs = set()
    for step in (20, 30):
        at = f"00000001/{step:012d}"
        commit = payload_of(root, f"commit/{at}", 7)
        manifest = payload_of(root, f"man/{at}/000000", 6)
        assert (commit["decision"], commit["step"]) == ("COMMIT", step)
        assert [(root / f"man/{at}/000000").read_bytes()[32:64].hex()] == commit["manifests"]
        data = bytearray()
        for pack, offset, length, start, raw_length, codec, raw_hash, hashed in manifest["chunks"]:
            key, nbytes = manifest["packs"][pack]
            blob = (root / key).read_bytes()
            assert len(blob) == nbytes
            stored = blob[offset : offset + length]
            assert not any(blob[offset + length : -(-(offset + length) // 4096) * 4096])
            assert start == len(data)
            raw = chunk_of(stored, codec, raw_length)
            assert xxhash.xxh3_128_digest(raw) == raw_hash
            assert not hashed or xxhash.xxh3_128_digest(stored) == hashed
            data += raw
            codecs.add(codec)
        leaves, groups, data_bytes, _tree = msgspec.msgpack.decode(manifest["layout"])
        assert len(data) == data_bytes == sum(group[1] for group in groups)
        expected = expected_of(HERE / "v1")[f"1.{step}"]["leaves"]
        assert {
            path: [dtype, shape, sha256(bytes(data[offset : offset + nbytes]))]
            for path, dtype, shape, offset, nbytes, *_ in leaves
        } == expected
    assert codecs == {0, 1, 2}
    assert payload_of(root, "verified/00000001/000000000030", 10)["commit"] == (
        (root / "commit/00000001/000000000030").read_bytes()[32:64].hex()
    )
    assert payload_of(root, "retired/00000001/000000000010", 8)["step"] == 10
    assert payload_of(root, "holds/00000001/000000000020/test", 9)["id"] == "test"
    assert payload_of(root, "commit/00000001/000000000025", 7)["decision"] == "ABORT"
    assert payload_of(root, "tags/00000001/000000000030", 11) == payload_of(
        root, "commit/00000001/000000000030", 7
    )
    assert payload_of(root, "attempts/00000002/claim", 2)["attempt"] == 2
    assert payload_of(root, "attempts/00000001/active", 3)["attempt"] == 1
    assert payload_of(root, "attempts/00000002/resume/0000", 5) == {"attempt": 1, "step": 30}
