"""Whole saves onto an emulated 3FS mount: nothing copied, nothing lost by kills, damage found."""

from __future__ import annotations

import asyncio
import mmap
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ckptmgr.config import BUDGET_BYTES, MIB, PACK_BYTES
from ckptmgr.daemon.pipeline import Pipeline, Source
from ckptmgr.repository.budget import BufferPool
from ckptmgr.repository.catalog import Catalog
from ckptmgr.repository.manifest import SealedManifest
from ckptmgr.restore.fetch import fetch
from ckptmgr.restore.plan import plan_whole
from ckptmgr.restore.verify import verify_step
from ckptmgr.staging.hostbuffer import HostBuffer
from ckptmgr.store.retry import RetryingStore
from ckptmgr.types import PAGE_BYTES, Outcome
from ckptmgr_hf3fs.own import OwnClient
from ckptmgr_hf3fs.store import Hf3fsStore
from driven import Daemon, Rank, until
from hf3fs.mounted import Mounted
from processes import end_processes_of
from small_step import HOST, encode_state, fill_slot, host_buffer

NONCE = "cd" * 16


def store_at(mount: Mounted, name: str) -> Hf3fsStore:
    root = mount.point / name
    return Hf3fsStore(str(root), f"hf3fs://{root}", OwnClient)


def noise(nbytes: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.random.default_rng(7).integers(0, 256, nbytes, np.uint8)


# ---- zero copy ---------------------------------------------------------------------


async def save(
    store: Hf3fsStore, buffer: HostBuffer, nbytes: int, codec: str = "none"
) -> tuple[SealedManifest, bytes]:
    """Write a snapshot by the real pipeline; its manifest and the bytes that were sealed."""
    encoded = encode_state({"noise": noise(nbytes)})
    snapshot = fill_slot(buffer, 0, encoded, attempt=1, nonce=NONCE, step=10)
    source = Source(buffer, snapshot, RetryingStore(store), HOST)
    pipeline = Pipeline(BufferPool(BUDGET_BYTES))
    return await pipeline.write(source, codec, lambda _raw, _stored: None), encoded.data


async def read(store: Hf3fsStore, sealed: SealedManifest) -> bytes:
    target = bytearray(sum(chunk.raw_bytes for chunk in sealed.manifest.chunks))
    await fetch(store, plan_whole(sealed.manifest), memoryview(target), BufferPool(1))
    return bytes(target)


@pytest.mark.parametrize("how", ["shared", "not shared", "shared, compressed"])
def test_a_save_from_shared_memory_copies_the_header_page_of_each_pack_and_nothing_else(
    shared_mount: Mounted, how: str
) -> None:
    nbytes = PACK_BYTES + 8 * MIB + 123

    async def main() -> None:
        store = store_at(shared_mount, how.replace(" ", ""))
        with host_buffer(store.url, nbytes + PAGE_BYTES) as buffer:
            if how != "not shared":
                # By way of the wrapper that the daemon uses.
                RetryingStore(store).share(buffer.memory, str(buffer.path))
            codec = "zstd" if "compressed" in how else "none"
            sealed, data = await save(store, buffer, nbytes, codec)
            packs = sealed.manifest.packs
            assert store.ring_bytes == sum(length for _, length in packs)
            copied = len(packs) * PAGE_BYTES if how == "shared" else store.ring_bytes
            assert (len(packs), store.copied_bytes) == (2, copied)
            RetryingStore(store).unshare(buffer.memory)
        assert await read(store, sealed) == data
        await store.aclose()

    asyncio.run(main())


def test_shared_memory_stays_mapped_until_it_is_unshared(shared_mount: Mounted) -> None:
    """Else its address could become that of other memory, which would be written in its place."""
    path = Path(f"/dev/shm/hf3fs-test-shared-{os.getpid()}")
    path.write_bytes(os.urandom(MIB))
    with path.open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), MIB)
    memory = memoryview(mapped)
    content = bytes(memory)

    async def main() -> None:
        store = store_at(shared_mount, "mapped")
        store.share(memory, str(path))
        part = memory[PAGE_BYTES:]
        await store.put_new("a", [part])
        assert store.copied_bytes == 0
        part.release()
        registered = len(shared_mount.registered())
        memory.release()
        with pytest.raises(BufferError):
            mapped.close()
        store.unshare(memory)
        store.unshare(memory)
        mapped.close()
        until(lambda: len(shared_mount.registered()) == registered - 1, "the daemon lets go")
        assert await store.get("a") == content[PAGE_BYTES:]
        await store.aclose()

    try:
        asyncio.run(main())
    finally:
        path.unlink()


def no_file() -> tuple[mmap.mmap, str]:
    descriptor = os.memfd_create("no name")
    os.ftruncate(descriptor, MIB)
    return mmap.mmap(descriptor, MIB), f"/proc/{os.getpid()}/fd/{descriptor}"


def elsewhere(directory: Path) -> tuple[mmap.mmap, str]:
    path = directory / "memory"
    path.write_bytes(bytes(MIB))
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), MIB), str(path)


@pytest.mark.parametrize("where", ["memfd", "another file system"])
def test_memory_that_the_daemon_of_the_mount_can_not_map_is_copied(
    shared_mount: Mounted, tmp_path: Path, where: str
) -> None:
    mapped, path = no_file() if where == "memfd" else elsewhere(tmp_path)
    mapped[:] = os.urandom(MIB)

    async def main() -> None:
        store = store_at(shared_mount, f"unmapped-{where[0]}")
        with memoryview(mapped) as memory:
            store.share(memory, path)
            await store.put_new("a", [memory])
            assert (store.copied_bytes, store.ring_bytes) == (MIB, MIB)
            store.unshare(memory)
        assert await store.get("a") == mapped[:]
        await store.aclose()

    asyncio.run(main())


# ---- the real daemon -----------------------------------------------------------------


def test_the_daemon_saves_and_restores_over_rings_and_is_killed_amid(
    runtime: Path, mount: Mounted
) -> None:
    url = f"hf3fs://{mount.point}/run7"
    held = mount.fault("ring-hold")
    with Daemon(runtime) as daemon, Rank(runtime, url, mib=6) as rank:
        rank.save(1)
        daemon.await_event("rings_opened")
        temporaries = mount.backing / "run7/.tmp"
        until(lambda: list(temporaries.iterdir()), "a pack is being written")
        names = set(mount.registered())
        daemon.process.kill()
        daemon.process.wait()
        until(lambda: not names & set(mount.registered()), "the mount takes it back")
        held.unlink()
        # The rank has started the next daemon, which adopts what was sealed.
        assert rank.wait(1).outcome == Outcome.COMMITTED
        rank.save(2)
        assert rank.wait(2).outcome == Outcome.COMMITTED
    end_processes_of(runtime)
    for path in (runtime / "buffers").iterdir():
        path.unlink()
    with Daemon(runtime), Rank(runtime, url, mib=6) as rank:
        reply = rank.restore()
        assert (reply.attempt, reply.step, reply.source) == (1, 2, "store")


def test_saves_resume_by_themselves_when_the_daemon_of_the_mount_was_killed(
    runtime: Path, mount: Mounted
) -> None:
    url = f"hf3fs://{mount.point}/run7"
    with Daemon(runtime) as daemon, Rank(runtime, url, mib=6) as rank:
        rank.save(1)
        assert rank.wait(1).outcome == Outcome.COMMITTED
        held = mount.fault("ring-hold")
        before = len(daemon.events("writing"))
        rank.save(2)
        daemon.await_event("writing", before + 1)
        mount.kill()
        daemon.await_event("store_failed")
        held.unlink()
        mount.restart()
        assert rank.wait(2).outcome == Outcome.COMMITTED
        assert rank.restore().step == 2


# ---- damage ----------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def punch(path: Path) -> None:
    """As a chunk is that the storage has lost."""
    size = path.stat().st_size
    os.truncate(path, MIB)
    os.truncate(path, size)


def test_damage_below_the_mount_is_found_by_verify(runtime: Path, shared_mount: Mounted) -> None:
    name = runtime.name
    with (
        Daemon(runtime),
        Rank(runtime, f"hf3fs://{shared_mount.point}/{name}", mib=6) as rank,
    ):
        rank.save(1)
        assert rank.wait(1).outcome == Outcome.COMMITTED

    async def found_after(damage: Callable[[Path], None]) -> None:
        copy = f"{name}-{damage.__name__}"
        shutil.copytree(shared_mount.backing / name, shared_mount.backing / copy)
        store = store_at(shared_mount, copy)
        catalog = Catalog(RetryingStore(store))
        (entry,) = await catalog.entries()
        assert entry.decision is not None
        assert not await verify_step(catalog, entry.decision, BufferPool(1))
        (pack,) = (shared_mount.backing / copy / "data").rglob("*.pack")
        damage(pack)
        found = await verify_step(catalog, entry.decision, BufferPool(1))
        assert found, damage.__name__
        assert all(pack.name in str(one) for one in found)
        await store.aclose()

    for damage in (flip, cut, punch):
        asyncio.run(found_after(damage))
