"""Whatever happens to the bytes of a store: verify says where, restore never gives other bits.

The store holds every kind of object. The sweeps damage copies in memory and ask the code that the
commands run; test_corruption_commands.py goes through the commands themselves, on files.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from pathlib import Path

import pytest

from ckptmgr.daemon.intake import Intake
from ckptmgr.daemon.job import Job
from ckptmgr.daemon.reader import Reader
from ckptmgr.daemon.session import Session
from ckptmgr.metrics import Metrics
from ckptmgr.repository import keys
from ckptmgr.repository.budget import BufferPool
from ckptmgr.repository.catalog import Catalog
from ckptmgr.repository.commit import Claim
from ckptmgr.repository.pack import pack_header
from ckptmgr.repository.record import Kind, seal
from ckptmgr.restore.check import restore_files, verify_store
from ckptmgr.staging.hostbuffer import HostBuffer
from ckptmgr.types import PAGE_BYTES, StepId
from crash.damaged import KINDS, LOSES_NOTHING, Rig, run_at_once
from reading import bring
from scale import FULL, scaled
from small_step import (
    made_in_memory,
    memory_store,
    save_steps,
    shelf_of,
)

pytestmark = pytest.mark.reliability


def test_the_store_is_whole_before_anything_is_damaged(rig: Rig) -> None:
    assert run_at_once(rig.verify()) == []
    assert run_at_once(rig.restore()) == str(rig.newest.id)
    words = {word for key in rig.objects for word in key.split("/")}
    assert {"format", "claim", "active", "have", "resume", "data", "man", "commit"} <= words
    assert {"retired", "holds", "verified"} <= words


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "packs"])
def test_every_flipped_bit_is_found_and_none_comes_back(rig: Rig, kind: str) -> None:
    async def main() -> None:
        shelf = shelf_of(rig.store)
        bits = [
            (key, at, bit)
            for key in rig.keys_of(kind)
            for at in range(len(rig.objects[key]))
            for bit in range(8)
        ]
        sample = scaled(300, len(bits))
        if sample < len(bits):
            bits = random.sample(bits, sample)
        for key, at, bit in bits:
            shelf[key][at] ^= 1 << bit
            await rig.judge(key)
            shelf[key][at] ^= 1 << bit
        rig.counts["flips"] = len(bits)

    run_at_once(main())
    rig.tell(f"bits of {kind}")


ALONE_EVERY = 16
"""Of so many places in a page one is verified with no other damage beside it, too."""


def test_every_flipped_bit_of_a_pack_is_found_and_none_comes_back(rig: Rig) -> None:
    """The same bit of every page at once for verify, which must name each of the pages; every
    flip alone for restore, which gives up at the first damage that it meets.
    """

    async def main() -> None:
        shelf = shelf_of(rig.store)
        pages = [
            (key, start)
            for key in rig.keys_of("packs")
            for start in range(0, len(rig.objects[key]), PAGE_BYTES)
        ]
        bits = [(at, bit) for at in range(PAGE_BYTES) for bit in range(8)]
        for number, (at, bit) in enumerate(random.sample(bits, scaled(200, len(bits)))):
            for key, start in pages:
                shelf[key][start + at] ^= 1 << bit
            assert set(pages) <= set(await rig.verify())
            rig.counts["found"] += len(pages)
            for key, start in pages:
                shelf[key][start + at] ^= 1 << bit
            for key, start in pages:
                shelf[key][start + at] ^= 1 << bit
                if number % ALONE_EVERY == 0:
                    assert (key, start) in await rig.verify()
                    rig.counts["found alone"] += 1
                await rig.restore_with_damaged(key)
                shelf[key][start + at] ^= 1 << bit
            rig.counts["flips"] += len(pages)

    run_at_once(main())
    rig.tell("bits of packs")


@pytest.mark.parametrize("kind", KINDS)
def test_every_cut_is_found_and_none_comes_back(rig: Rig, kind: str) -> None:
    async def main() -> None:
        shelf = shelf_of(rig.store)
        for key in rig.keys_of(kind):
            whole = rig.objects[key]
            lengths = set(range(len(whole)))
            if not FULL:
                page = PAGE_BYTES if kind == "packs" else 32  # half of a record's header
                edges = range(0, min(len(whole), 8 * page), page)
                edges = {n + d for n in edges for d in (-1, 0, 1)} | {len(whole) - 1}
                lengths &= edges | set(random.sample(range(len(whole)), 25))
            for length in lengths:
                shelf[key] = bytearray(whole[:length])
                await rig.judge(key)
                rig.counts["cuts"] += 1
            shelf[key] = bytearray(whole)

    run_at_once(main())
    rig.tell(f"lengths of {kind}")


def test_every_object_that_grew_is_found(rig: Rig) -> None:
    async def main() -> None:
        shelf = shelf_of(rig.store)
        for key, whole in rig.objects.items():
            for tail in (b"\0", b"x", whole, bytes(PAGE_BYTES), b"x" * 100_000):
                shelf[key] = bytearray(whole + tail)
                await rig.judge(key)
            shelf[key] = bytearray(whole)

    run_at_once(main())
    rig.tell("grown objects")


def test_every_pair_of_swapped_objects_is_found(rig: Rig) -> None:
    async def main() -> None:
        shelf = shelf_of(rig.store)
        pairs = list(itertools.combinations(rig.objects, 2))
        for one, other in pairs:
            shelf[one], shelf[other] = shelf[other], shelf[one]
            found = {name for name, _ in await rig.verify()}
            wanted = {"format"} & {one, other} or {one, other}  # without it nothing else is read
            assert wanted <= found
            await rig.restore()
            shelf[one], shelf[other] = shelf[other], shelf[one]
        rig.counts["swaps"] = len(pairs)

    run_at_once(main())
    rig.tell("swaps")


def test_every_object_under_the_name_of_another_is_found(rig: Rig) -> None:
    async def main() -> None:
        shelf = shelf_of(rig.store)
        for one, other in itertools.permutations(rig.objects, 2):
            shelf[other] = bytearray(rig.objects[one])
            await rig.judge(other)
            shelf[other] = bytearray(rig.objects[other])

    run_at_once(main())
    rig.tell("overwritten with another object")


def new_names(key: str) -> list[str]:
    """Names of the same kind that no object has yet: another attempt, step, rank, host, id."""
    names = {
        key.replace("00000001/", "00000002/", 1),
        key.replace("00000001/", "00000009/", 1),
        key.replace("00000002/", "00000003/", 1),
        *(key.replace(f"{n:012d}", f"{other:012d}") for n in (10, 20, 25, 30) for other in (5, 40)),
        *(key.replace(f"{n:012d}", "000000000030") for n in (10, 20, 25)),
        key.replace("/000000", "/000001") if key.startswith(("man/", "data/")) else key,
        key.replace("/0000", "/0001") if "/resume/" in key else key,
        key.replace("/have/", "/have/other-") if "/have/" in key else key,
        f"{key[:-6]}0.pack" if key.startswith("data/") else key,
        f"{key}x" if key.startswith("holds/") else key,
    }
    return sorted(names - {key})


def test_every_object_copied_to_a_new_name_is_found(rig: Rig) -> None:
    async def main() -> None:
        shelf = shelf_of(rig.store)
        for key, blob in rig.objects.items():
            for name in new_names(key):
                if name not in rig.objects:
                    shelf[name] = bytearray(blob)
                    await rig.judge(name)
                    del shelf[name]

    run_at_once(main())
    rig.tell("copies under a new name")
    assert rig.counts["found"] > 50
    assert rig.counts["refused"] == rig.counts["fell back"] == 0, "a stray copy cost a good step"


def test_every_deleted_object_that_matters_is_missed(rig: Rig) -> None:
    async def main() -> None:
        shelf = shelf_of(rig.store)
        for key in rig.objects:
            del shelf[key]
            found = {name for name, _ in await rig.verify()}
            if key.startswith(LOSES_NOTHING):
                assert not found
                rig.counts["not needed"] += 1
            elif key.startswith("retired/"):
                assert any(name.startswith("man/00000001/000000000010/") for name in found)
            else:
                assert key in found
                rig.counts["found"] += 1
            await rig.restore()
            shelf[key] = bytearray(rig.objects[key])

    run_at_once(main())
    rig.tell("deletions")


def test_a_newest_step_that_lost_its_register_is_missed(rig: Rig) -> None:
    """Its copy under tags/ shows that it was there: verify names it, restore falls back."""
    saved, objects = made_in_memory(save_steps)
    register = keys.commit(saved[1].id)

    async def main() -> None:
        catalog = Catalog(memory_store(objects))
        shelf_of(catalog.store).pop(register)  # type: ignore[arg-type]
        reports = await verify_store(
            catalog, None, every=True, quick=False, progress=lambda _: None
        )
        assert [d["key"] for r in reports for d in r["damage"]] == [register]
        document = await restore_files(catalog, None, "safetensors", rig.directory, lambda _: None)
        assert document["id"] == "1.10"
        assert [one["id"] for one in document["skipped"]] == ["1.20"]

    run_at_once(main())


def test_a_newest_step_without_register_and_copy_is_told(rig: Rig) -> None:
    """Without both, the step looks like a save that was cut short: no damage, but nobody is left
    to believe that it is the newest."""
    saved, objects = made_in_memory(save_steps)

    async def main() -> None:
        catalog = Catalog(memory_store(objects))
        for key in (keys.commit(saved[1].id), keys.tags(saved[1].id)):
            shelf_of(catalog.store).pop(key)  # type: ignore[arg-type]
        reports = await verify_store(
            catalog, None, every=False, quick=False, progress=lambda _: None
        )
        assert [(r["id"], r["committed"], r["damage"]) for r in reports] == [
            ("1.20", False, []),
            ("1.10", True, []),
        ]
        document = await restore_files(catalog, None, "safetensors", rig.directory, lambda _: None)
        assert (document["id"], document["not_committed"]) == ("1.10", ["1.20"])

    run_at_once(main())


def test_an_unfinished_or_foreign_object_is_no_damage(rig: Rig) -> None:
    """What a crash leaves behind, and what people put beside it, must not look like damage."""
    step = StepId(1, 35)
    pack, orphan = keys.new_pack(step, 0), keys.new_pack(rig.newest.id, 0)
    left = {
        pack: pack_header(pack, step, 0, "00" * 16) + b"cut short",
        orphan: pack_header(orphan, rig.newest.id, 0, "00" * 16) + bytes(PAGE_BYTES),
        keys.claim(3): seal(Kind.CLAIM, keys.claim(3), Claim(3, "00" * 16, 1, "h", "", 0.0)),
        "README": b"do not delete",
        "notes/why.txt": b"because",
    }
    shelf_of(rig.store).update({key: bytearray(blob) for key, blob in left.items()})
    assert run_at_once(rig.verify()) == []
    assert run_at_once(rig.restore()) == str(rig.newest.id)


# -- the daemon's way back ------------------------------------------------------------------------


def test_the_daemon_falls_back_and_never_gives_other_bits(rig: Rig) -> None:
    """The Reader that serves trainers, on damage of every kind to everything it reads."""

    async def restored(directory: Path) -> tuple[str, list[str]]:
        pool = BufferPool(1 << 27)
        job = Job(rig.store.url, rig.store, Catalog(rig.store), "test", Metrics(), pool)
        session = Session(job, 0)
        try:
            answer = await bring(Reader(Intake(directory), directory), session)
            with HostBuffer.open(Path(answer.path)) as buffer:
                (snapshot,) = buffer.snapshots()
                with buffer.data(snapshot.slot) as data:
                    found = bytes(data[: snapshot.data_bytes])
                table = buffer.table(snapshot)
        finally:
            await session.release()
        truth = {str(one.id): one for one in rig.saved}[f"{answer.attempt}.{answer.step}"].encoded
        assert found == truth.data, "SILENTLY WRONG"
        assert (table.layout, table.values) == (truth.layout_bytes, truth.values), "SILENTLY WRONG"
        return f"{answer.attempt}.{answer.step}", [step for step, _ in answer.skipped]

    async def main() -> None:
        shelf = shelf_of(rig.store)
        newest = str(rig.newest.id)
        mine = [key for key in rig.objects if keys.parse_step(key) == rig.newest.id]
        for _ in range(scaled(400, 20_000)):
            key = random.choice(mine)
            whole = rig.objects[key]
            if random.random() < 0.8:
                shelf[key][random.randrange(len(whole))] ^= 1 << random.randrange(8)
            elif random.random() < 0.5:
                shelf[key] = bytearray(whole[: random.randrange(len(whole))])
            else:
                del shelf[key]
            step, skipped = await restored(rig.directory)
            gone = key not in shelf and key.startswith("commit/")
            assert step == newest or newest in skipped or gone, f"fell back silently: {key}"
            rig.counts["exact" if step == newest else "fell back"] += 1
            shelf[key] = bytearray(whole)

    asyncio.run(main())
    rig.tell("the daemon's Reader")
    assert rig.counts["fell back"] > rig.counts["exact"] // 10
