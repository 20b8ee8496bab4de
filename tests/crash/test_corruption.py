"""Whatever happens to the bytes of a store: verify says where, restore never gives other bits.

The store holds every kind of object. The sweeps damage copies in memory and ask the code that the
commands run; a sample goes through the commands themselves, on files.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import secrets
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ckptmgr.daemon.intake import Intake
from ckptmgr.daemon.job import Job
from ckptmgr.daemon.reader import Reader, Session
from ckptmgr.errors import CkptmgrError, DamageError
from ckptmgr.metrics import Metrics
from ckptmgr.repository import keys
from ckptmgr.repository.budget import BufferPool
from ckptmgr.repository.catalog import Catalog
from ckptmgr.repository.commit import Claim, check_format
from ckptmgr.repository.pack import pack_header
from ckptmgr.repository.record import Kind, seal
from ckptmgr.restore import fetch, verify
from ckptmgr.restore.check import restore_files, verify_store
from ckptmgr.staging.hostbuffer import HostBuffer
from ckptmgr.store.memory import MemoryStore
from ckptmgr.types import PAGE_BYTES, StepId
from scale import FULL, scaled
from small_step import (
    Objects,
    SavedStep,
    made_in_memory,
    memory_store,
    same_bits,
    save_every_kind,
    save_steps,
    shelf_of,
    write_tree,
)

pytestmark = pytest.mark.reliability

KINDS = {
    "format": "format",
    "attempts": "attempts/",
    "registers": "commit/",
    "manifests": "man/",
    "marks": ("retired/", "holds/", "verified/"),
    "packs": "data/",
}

LOSES_NOTHING = (
    "attempts/00000001/have/",
    "attempts/00000002/resume/",
    "commit/00000001/000000000025",  # ABORT of a step of which nothing else was stored
    "holds/",
    "tags/",  # a copy
    "verified/",
)
"""Objects that may be missing in a healthy store too: nobody can say that they are gone."""


@dataclass
class Rig:
    """A damaged copy of a store, the truth about it, and what was counted."""

    saved: list[SavedStep]
    objects: Objects
    store: MemoryStore
    directory: Path
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def newest(self) -> SavedStep:
        return self.saved[-1]

    def keys_of(self, kind: str) -> list[str]:
        return [key for key in self.objects if key.startswith(KINDS[kind])]

    def put_back(self) -> None:
        shelf = shelf_of(self.store)
        shelf.clear()
        shelf.update({key: bytearray(blob) for key, blob in self.objects.items()})

    async def verify(self) -> list[tuple[str, int]]:
        """What `ckptmgr verify --all` does; the places that it names."""
        try:
            await check_format(self.store, create=False)
            reports = await verify_store(
                Catalog(self.store), None, every=True, quick=False, progress=lambda _: None
            )
        except DamageError as error:
            return [(error.subject, 0)]
        return [(d["key"], d["offset"]) for report in reports for d in report["damage"]]

    async def restore(self) -> str:
        """What `ckptmgr restore` does; the step it gave, after its bits were compared."""
        for path in self.directory.iterdir():
            path.unlink()
        try:
            document = await restore_files(
                Catalog(self.store), None, "safetensors", self.directory, lambda _: None
            )
        except DamageError:
            self.counts["refused"] += 1
            return ""
        truth = {str(one.id): one for one in self.saved}[document["step"]]
        assert same_bits(self.directory, truth), "SILENTLY WRONG"
        skipped = [one["step"] for one in document["skipped"]]
        if truth is self.newest:
            self.counts["exact"] += 1
        else:
            told = [*skipped, *document["not_committed"]]
            assert str(self.newest.id) in told, "fell back and did not say so"
            self.counts["fell back"] += 1
        return document["step"]

    async def judge(self, key: str, offset: int | None = None) -> None:
        """Both must do right by an object that is damaged (at `offset`)."""
        found = await self.verify()
        assert key in {name for name, _ in found}, f"verify did not find {key}: {found}"
        if offset is not None and key.startswith("data/"):
            assert any(n == key and at <= offset < at + 4 * PAGE_BYTES for n, at in found), found
        self.counts["found"] += 1
        await self.restore()

    def tell(self, what: str) -> None:
        parts = ", ".join(f"{count} {name}" for name, count in sorted(self.counts.items()))
        print(f"\n{what}: {parts}")


@pytest.fixture(scope="module")
def made() -> tuple[list[SavedStep], Objects]:
    return made_in_memory(save_every_kind)


async def at_once(work: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Stand in for `in_thread`: half a million flips can not afford a thread for each chunk."""
    return work(*arguments, **named)


@pytest.fixture
def rig(made: tuple[list[SavedStep], Objects], monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    monkeypatch.setattr(fetch, "in_thread", at_once)
    monkeypatch.setattr(verify, "in_thread", at_once)
    directory = Path(f"/dev/shm/ckptmgr-test-{secrets.token_hex(6)}")
    directory.mkdir()
    saved, objects = made
    yield Rig(saved, objects, memory_store(objects), directory)
    shutil.rmtree(directory)


def test_the_store_is_whole_before_anything_is_damaged(rig: Rig) -> None:
    assert asyncio.run(rig.verify()) == []
    assert asyncio.run(rig.restore()) == str(rig.newest.id)
    words = {word for key in rig.objects for word in key.split("/")}
    assert {"format", "claim", "active", "have", "resume", "data", "man", "commit"} <= words
    assert {"retired", "holds", "verified"} <= words


@pytest.mark.parametrize("kind", KINDS)
def test_every_flipped_bit_is_found_and_none_comes_back(rig: Rig, kind: str) -> None:
    async def main() -> None:
        shelf = shelf_of(rig.store)
        bits = [
            (key, at, bit)
            for key in rig.keys_of(kind)
            for at in range(len(rig.objects[key]))
            for bit in range(8)
        ]
        sample = scaled(1200 if kind == "packs" else 300, len(bits))
        if sample < len(bits):
            bits = random.sample(bits, sample)
        for key, at, bit in bits:
            shelf[key][at] ^= 1 << bit
            await rig.judge(key, at)
            shelf[key][at] ^= 1 << bit
        rig.counts["flips"] = len(bits)

    asyncio.run(main())
    rig.tell(f"bits of {kind}")


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

    asyncio.run(main())
    rig.tell(f"lengths of {kind}")


def test_every_object_that_grew_is_found(rig: Rig) -> None:
    async def main() -> None:
        shelf = shelf_of(rig.store)
        for key, whole in rig.objects.items():
            for tail in (b"\0", b"x", whole, bytes(PAGE_BYTES), b"x" * 100_000):
                shelf[key] = bytearray(whole + tail)
                await rig.judge(key)
            shelf[key] = bytearray(whole)

    asyncio.run(main())
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

    asyncio.run(main())
    rig.tell("swaps")


def test_every_object_under_the_name_of_another_is_found(rig: Rig) -> None:
    async def main() -> None:
        shelf = shelf_of(rig.store)
        for one, other in itertools.permutations(rig.objects, 2):
            shelf[other] = bytearray(rig.objects[one])
            await rig.judge(other)
            shelf[other] = bytearray(rig.objects[other])

    asyncio.run(main())
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

    asyncio.run(main())
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

    asyncio.run(main())
    rig.tell("deletions")


def test_a_newest_step_that_lost_its_register_is_missed(rig: Rig) -> None:
    """Its copy under tags/ shows that the register was there: verify names it, restore falls back."""
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
        assert document["step"] == "1.10"
        assert [one["step"] for one in document["skipped"]] == ["1.20"]

    asyncio.run(main())


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
        assert [(r["step"], r["committed"], r["damage"]) for r in reports] == [
            ("1.20", False, []),
            ("1.10", True, []),
        ]
        document = await restore_files(catalog, None, "safetensors", rig.directory, lambda _: None)
        assert (document["step"], document["not_committed"]) == ("1.10", ["1.20"])

    asyncio.run(main())


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
    assert asyncio.run(rig.verify()) == []
    assert asyncio.run(rig.restore()) == str(rig.newest.id)


# -- the daemon's way back ------------------------------------------------------------------------


def test_the_daemon_falls_back_and_never_gives_other_bits(rig: Rig) -> None:
    """The Reader that serves trainers, on damage of every kind to everything it reads."""

    async def restored(directory: Path) -> tuple[str, list[str]]:
        pool = BufferPool(1 << 27)
        job = Job(rig.store.url, rig.store, Catalog(rig.store), "test", Metrics(), pool)
        session = Session(job, 0)
        try:
            answer = await Reader(Intake(directory), directory).restore(
                session, None, None, frozenset()
            )
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


# -- the commands ---------------------------------------------------------------------------------


def ckptmgr(*arguments: str) -> tuple[int, Any, str]:
    done = subprocess.run(
        [sys.executable, "-m", "ckptmgr.cli", *arguments, "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        document = json.loads(done.stdout)
    except ValueError:
        document = None
    return done.returncode, document, done.stderr


def test_the_commands_say_it_with_their_exit_codes(rig: Rig, tmp_path: Path) -> None:
    """A flipped bit of each kind of object, in files, through the real command line."""
    url = write_tree(tmp_path / "store", rig.objects)
    assert ckptmgr("verify", url, "--all")[0] == 0
    newest, older = str(rig.newest.id), str(rig.saved[0].id)
    for number, kind in enumerate(KINDS):
        key = rig.keys_of(kind)[-1] if kind in ("manifests", "packs") else rig.keys_of(kind)[0]
        key = keys.commit(rig.newest.id) if kind == "registers" else key
        at = PAGE_BYTES + 5 if kind == "packs" else random.randrange(len(rig.objects[key]))
        path = tmp_path / "store" / key
        damaged = bytearray(rig.objects[key])
        damaged[at] ^= 1 << random.randrange(8)
        path.write_bytes(damaged)

        status, reports, errors = ckptmgr("verify", url, "--all")
        assert status == 3, f"{key}: {reports} {errors}"
        named = errors if reports is None else json.dumps(reports)
        assert key in named

        to = tmp_path / f"restored{number}"
        status, document, errors = ckptmgr("restore", url, "--to", str(to))
        if kind == "format":
            assert status == 3
            assert "format" in errors
            assert not to.exists()
        elif kind in ("attempts", "marks"):
            assert (status, document["step"]) == (0, newest)
            assert same_bits(to, rig.newest)
        else:
            assert (status, document["step"]) == (7, older), f"{key}: {document} {errors}"
            assert document["skipped"][0]["step"] == newest
            assert same_bits(to, rig.saved[0])
        path.write_bytes(rig.objects[key])


def test_the_other_reading_commands_tell_damage_too(rig: Rig, tmp_path: Path) -> None:
    url = write_tree(tmp_path / "store", rig.objects)
    register = tmp_path / "store" / keys.commit(rig.newest.id)
    register.write_bytes(register.read_bytes()[:-1])

    status, entries, _ = ckptmgr("ls", url)
    assert status == 0, "a damaged step hides the others"
    assert {entry["id"]: bool(entry["damage"]) for entry in entries} == {
        "1.30": True,
        "1.25": False,
        "1.20": False,
        "1.10": False,
    }
    assert ckptmgr("show", url)[0] == ckptmgr("show", url, "1.30")[0] == 3
    assert ckptmgr("show", url, "1.20")[0] == 0
    assert ckptmgr("verify", url)[0] == 3
    assert ckptmgr("verify", url, "1.20")[0] == 0
    out = tmp_path / "out"
    status, _, errors = ckptmgr("restore", url, "1.30", "--to", str(out))
    assert (status, out.exists()) == (3, False)
    assert str(keys.commit(rig.newest.id)) in errors


def test_no_command_leaves_files_when_no_step_holds(rig: Rig, tmp_path: Path) -> None:
    url = write_tree(tmp_path / "store", rig.objects)
    for key in rig.keys_of("manifests"):
        (tmp_path / "store" / key).unlink()
    status, _, errors = ckptmgr("restore", url, "--to", str(tmp_path / "out"))
    assert status == 3
    assert "is gone" in errors
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))
    assert isinstance(DamageError("x"), CkptmgrError)
