"""A local store lets go of empty directories of steps that were given up, and of nothing else."""

from __future__ import annotations

import asyncio
import os
import random
import time
from pathlib import Path

import pytest

from ckptmgr.errors import StoreUnreachableError
from ckptmgr.store import local, tree
from ckptmgr.store.base import PutResult
from ckptmgr.store.local import LocalStore
from ckptmgr.store.retry import RetryingStore


async def test_only_empty_directories_below_the_prefix_go(store: LocalStore, root: Path) -> None:
    for key in ("data/1/2/0/p", "data/1/2/1/p", "data/1/3/0/p", "data/1/20/0/p"):
        await store.put_new(key, [])
    for key in ("data/1/2/0/p", "data/1/3/0/p", "data/1/20/0/p"):
        await store.delete(key)
    await store.prune("data/1/2/")
    assert sorted(os.listdir(root / "data/1")) == ["2", "20", "3"]
    assert os.listdir(root / "data/1/2") == ["1"]
    await store.prune("data/1/3/")
    assert sorted(os.listdir(root / "data/1")) == ["2", "20"]
    await store.prune("data/1/4/")
    await store.prune("man/1/4/")


@pytest.mark.parametrize("amid_a_put", [False, True])
async def test_a_directory_that_is_made_anew_is_made_durable_anew(
    store: LocalStore, root: Path, monkeypatch: pytest.MonkeyPatch, *, amid_a_put: bool
) -> None:
    """Though it gets the inode of the one that was removed, as most file systems give it."""
    monkeypatch.setattr(tree, "_identity", lambda _: (1, 1))
    synced: list[str] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        if synced == [str(root / "data/1")] and amid_a_put:
            store._tree.prune(["data", "1", "2"], lambda: None)

    await store.put_new("data/1/3/p", [])
    monkeypatch.setattr(os, "fsync", noted)
    if amid_a_put:
        with pytest.raises(StoreUnreachableError):
            await store.put_new("data/1/2/p", [])
    else:
        await store.put_new("data/1/2/p", [])
        await store.delete("data/1/2/p")
        await store.prune("data/1/2/")
    synced.clear()
    synced.append("again")
    await store.put_new("data/1/2/p", [])
    assert str(root / "data/1") in synced, "where its name is"


async def test_what_others_have_put_there_stays(
    store: LocalStore, root: Path, outside: Path
) -> None:
    await store.put_new("data/1/p", [])
    (root / "data/1/link").symlink_to(outside)
    (root / "data/1/.notes").write_text("a file that no key can name")
    (root / "data/1/empty").mkdir()
    await store.delete("data/1/p")
    await store.prune("data/1/")
    assert sorted(os.listdir(root / "data/1")) == [".notes", "link"]
    assert os.listdir(outside) == ["object"]


async def test_a_prefix_that_is_a_link_is_not_followed(
    store: LocalStore, root: Path, outside: Path
) -> None:
    (outside / "empty").mkdir()
    await store.put_new("data/p", [])
    (root / "data/1").symlink_to(outside)
    await store.prune("data/1/")
    assert sorted(os.listdir(outside)) == ["empty", "object"]


async def test_a_put_that_loses_its_directory_is_made_again(root: Path) -> None:
    """Pruned again and again, while many objects are put: each that was answered for is there."""
    writer, pruner = RetryingStore(LocalStore(str(root))), LocalStore(str(root))
    lost: list[FileNotFoundError] = []
    put_link = local._link

    def slow_link(*arguments: object) -> bool:
        time.sleep(0.001)
        try:
            return put_link(*arguments)  # type: ignore[arg-type]
        except FileNotFoundError as error:
            lost.append(error)
            raise

    async def prune(ended: asyncio.Event) -> None:
        while not ended.is_set():
            await pruner.prune("data/1/")
            await asyncio.sleep(random.uniform(0, 0.01))  # a put that is made again gets its turn

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "_link", slow_link)
        ended = asyncio.Event()
        pruning = asyncio.create_task(prune(ended))
        for number in range(20):
            key = f"data/1/{number % 3}/{number}"
            assert await writer.put_new(key, [memoryview(b"x")]) is PutResult.OK
            assert await pruner.list("data/1/") == [key]
            await writer.delete(key)
        ended.set()
        await pruning
    assert lost, "no put has lost its directory"
    await writer.aclose()
    await pruner.aclose()
