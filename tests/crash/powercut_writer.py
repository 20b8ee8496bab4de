"""Child of test_powercut_store: puts objects, a line after each acknowledged one.

Usage: powercut_writer.py ROOT COUNT careful|no-directory-sync|no-file-sync|make-durable

`careful` is the product. The next two leave a sync out, to prove that the harness sees it.
`make-durable` puts without the sync of directories, as a writer that died before it, and
acknowledges what another store has made durable afterwards.
"""

from __future__ import annotations

import asyncio
import hashlib
import mmap
import os
import stat
import sys
from collections.abc import Callable

from ckptmgr.store.base import PutResult
from ckptmgr.store.local import LocalStore

SIZES = (0, 100, 4096, 70_000, 1 << 20)
WRITERS = 3

real_fsync = os.fsync


def content_of(key: str) -> bytes:
    """What belongs under a key: its last segment is the size."""
    size = int(key.rpartition("/")[2])
    blocks = range(0, size, 4096)
    return b"".join(
        hashlib.shake_128(f"{key} {start}".encode()).digest(min(4096, size - start))
        for start in blocks
    )


def sync_only(wanted: Callable[[int], bool]) -> None:
    """From here on, fsync of other modes does nothing and says that all is well."""
    os.fsync = lambda file: real_fsync(file) if wanted(os.fstat(file).st_mode) else None


async def put(store: LocalStore, key: str) -> None:
    content = content_of(key)
    with mmap.mmap(-1, max(len(content), 1)) as pages:  # aligned: O_DIRECT for the big ones
        pages[: len(content)] = content
        view = memoryview(pages)
        buffers = [view[: len(content)]]
        assert await store.put_new(key, buffers) is PutResult.OK
        buffers[0].release()
        view.release()


async def main(root: str, count: str, mode: str) -> None:
    store, other = LocalStore(root), LocalStore(root)
    if mode == "no-file-sync":
        sync_only(stat.S_ISDIR)
    if mode in {"no-directory-sync", "make-durable"}:
        sync_only(stat.S_ISREG)

    async def write(writer: int) -> None:
        for number in range(int(count)):
            key = f"{writer}/{number % 4}/{number}/{SIZES[(number + writer) % len(SIZES)]}"
            await put(store, key)
            if mode != "make-durable":
                print(key, flush=True)

    await asyncio.gather(*(write(writer) for writer in range(WRITERS)))
    if mode == "make-durable":
        os.fsync = real_fsync
        for key in await other.list(""):
            await other.make_durable(key)
            print(key, flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
