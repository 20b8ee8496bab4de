"""Names never lead out of a store: not from a key, and not from a manifest or a commit."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from ckptmgr.errors import DamageError, RecordDamagedError, UsageError
from ckptmgr.repository import keys
from ckptmgr.repository.catalog import Catalog
from ckptmgr.repository.commit import Decision
from ckptmgr.repository.manifest import Manifest, read_manifest
from ckptmgr.repository.record import Kind, digest_of, seal
from ckptmgr.restore.check import restore_files, verify_store
from ckptmgr.store.base import check_key
from ckptmgr.store.local import LocalStore
from ckptmgr.store.memory import MemoryStore
from small_step import made_in_memory, save_steps, write_tree

TRAVERSALS = [
    "../outside",
    "/etc/passwd",
    "a/../../outside",
    "..",
    ".",
    "a/./b",
    "a//b",
    "~/x",
    "a\\..\\b",
    "a/%2e%2e/b",
    "a\0b",
    "a\nb",
    "-rf",
    ".tmp/x",
    "a/.hidden",
    "\u2025/x",
    "a" * 200,
]


@pytest.mark.parametrize("key", TRAVERSALS)
def test_a_key_that_leads_elsewhere_is_refused_by_every_store(tmp_path: Path, key: str) -> None:
    outside = tmp_path / "outside"
    outside.write_text("precious")

    async def main() -> None:
        for store in (LocalStore(str(tmp_path / "store")), MemoryStore("paths")):
            with pytest.raises(UsageError):
                await store.get(key)
            with pytest.raises(UsageError):
                await store.put_new(key, [memoryview(b"x")])
            with pytest.raises(UsageError):
                await store.delete(key)
            await store.aclose()

    with pytest.raises(UsageError):
        check_key(key)
    asyncio.run(main())
    assert outside.read_text() == "precious"
    assert not (tmp_path / "store").exists()


NAMES = [
    "../../../../outside",
    "data/00000001/000000000020/000000/../../../../../outside",
    "data/00000001/000000000020/000000//x.pack",
    "data/00000001/000000000020/000000/.x.pack",
    "data/00000001/000000000020/000000/",
    "data/00000001/000000000010/000000/x.pack",
    "data/00000001/000000000020/000001/x.pack",
    "man/00000001/000000000020/000000",
    "/etc/passwd",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_manifest_that_names_a_pack_elsewhere_is_damage(tmp_path: Path, name: str) -> None:
    """Its digests are right: whoever can write to a store can make them so. Restore falls back."""
    saved, objects = made_in_memory(save_steps)
    step = saved[1].id
    (tmp_path / "outside").write_bytes(bytes(1 << 20))
    key = keys.manifest(step, 0)
    good = read_manifest(step, 0, objects[key]).manifest
    packs = tuple((name, nbytes) for _, nbytes in good.packs)
    forged = seal(Kind.MANIFEST, key, msgspec.structs.replace(good, packs=packs))
    with pytest.raises(RecordDamagedError, match="pack of another step"):
        read_manifest(step, 0, forged)

    digest = digest_of(forged).hex()
    decision = msgspec.structs.replace(saved[1].decision, manifests=(digest,))
    objects = {**objects, key: forged}
    objects[keys.commit(step)] = seal(Kind.COMMIT, keys.commit(step), decision)
    write_tree(tmp_path / "store", objects)
    out = tmp_path / "out"
    out.mkdir()

    async def main() -> None:
        store = LocalStore(str(tmp_path / "store"))
        catalog = Catalog(store)
        reports = await verify_store(
            catalog, None, every=True, quick=False, progress=lambda _: None
        )
        assert key in [damage["key"] for damage in reports[0]["damage"]]
        document = await restore_files(catalog, None, "safetensors", out, lambda _: None)
        assert (document["id"], document["skipped"][0]["id"]) == ("1.10", "1.20")
        await store.aclose()

    asyncio.run(main())


FORGED: list[dict[str, object]] = [
    {"world": 0, "manifests": ()},
    {"world": 2},
    {"world": 1 << 40},
    {"world": -1},
    {"manifests": ()},
    {"manifests": ("00" * 32, "11" * 32)},
    {"attempt": 2},
    {"step": -20},
    {"manifests": ("not hex",)},
]


@pytest.mark.parametrize("changes", FORGED, ids=str)
def test_a_forged_commit_is_damage_and_no_crash(tmp_path: Path, changes: dict[str, object]) -> None:
    saved, objects = made_in_memory(save_steps)
    key = keys.commit(saved[1].id)
    forged = msgspec.structs.replace(saved[1].decision, **changes)
    write_tree(tmp_path / "store", {**objects, key: seal(Kind.COMMIT, key, forged)})
    out = tmp_path / "out"
    out.mkdir()

    async def main() -> None:
        store = LocalStore(str(tmp_path / "store"))
        catalog = Catalog(store)
        with pytest.raises(DamageError):
            await catalog.manifests(await catalog.decision(saved[1].id))
        reports = await verify_store(
            catalog, None, every=False, quick=False, progress=lambda _: None
        )
        assert reports[0]["damage"]
        document = await restore_files(catalog, None, "safetensors", out, lambda _: None)
        assert document["id"] == "1.10"
        await store.aclose()

    asyncio.run(main())
    assert isinstance(forged, Decision)
    assert Manifest.__struct_config__.frozen
