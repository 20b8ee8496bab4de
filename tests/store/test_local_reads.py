"""Reads out of the page cache, and those that wait for the medium, of which some come too late."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import threading
from pathlib import Path

import pytest

from ckptmgr.config import MIB
from ckptmgr.store.base import Wanted
from ckptmgr.store.local import LocalStore


@pytest.mark.parametrize("answer", ["all", "some", "EAGAIN", "EOPNOTSUPP", "none", "unknown"])
async def test_whatever_the_page_cache_has_the_same_bytes_come(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    content, real, drawn = os.urandom(3 * MIB + 4321), os.preadv, random.Random(1)
    await store.put_new("key", [memoryview(content)])
    asked, nowait = [], os.RWF_NOWAIT
    if answer == "unknown":
        monkeypatch.delattr(os, "RWF_NOWAIT")
        store._knows_nowait = LocalStore(str(tmp_path))._knows_nowait

    def preadv(descriptor: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        (buffer,) = buffers
        asked.append(flags)
        if flags == nowait and answer != "all":
            if answer == "some" and drawn.random() < 0.7:
                buffer = buffer[: drawn.randrange(1, len(buffer) + 1)]
            elif answer == "none":
                return 0  # as Linux 5.9 and 5.10 do
            else:
                number = errno.EAGAIN if answer == "some" else getattr(errno, answer)
                raise OSError(number, os.strerror(number))
        elif not flags:
            buffer = buffer[: drawn.randrange(1, len(buffer) + 1)]  # a read may be short
        return real(descriptor, [buffer], offset, flags)

    monkeypatch.setattr(os, "preadv", preadv)
    room = memoryview(bytearray(len(content)))
    assert await store.get("key", into=room) == content
    again = memoryview(bytearray(len(content) - 99))
    await store.get_many([Wanted("key", 77, again[77:]), Wanted("key", 0, again[:77])])
    assert again == content[: len(again)]
    assert answer == "all" or 0 in asked
    assert asked.count(nowait) == {"EOPNOTSUPP": 1, "unknown": 0}.get(answer, asked.count(nowait))


async def test_a_read_that_comes_back_late_writes_nowhere(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.put_new("key", [memoryview(b"x" * 100)])
    wakes, entered, real = threading.Event(), threading.Event(), os.preadv
    ended = threading.Event()

    def hang(descriptor: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if flags == os.RWF_NOWAIT:
            raise BlockingIOError
        entered.set()
        wakes.wait(60)
        count = real(descriptor, buffers, offset)
        ended.set()
        return count

    monkeypatch.setattr(os, "preadv", hang)
    into = bytearray(100)
    call = asyncio.ensure_future(store.get("key", into=memoryview(into)))
    assert await asyncio.to_thread(entered.wait, 60)
    call.cancel()
    await asyncio.wait({call})
    wakes.set()
    assert await asyncio.to_thread(ended.wait, 60)
    assert bytes(await store.get("key")) == b"x" * 100
    assert into == bytes(100)
