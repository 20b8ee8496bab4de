"""Child of test_local_faults: puts objects until it is killed, a line after each.

Usage: killed_writer.py ROOT TURN
"""

from __future__ import annotations

import asyncio
import hashlib
import mmap
import sys

from ckptmgr.store.local import LocalStore

SIZES = (0, 1, 4096, 70_000, 1 << 20, 3 << 20)


def content_of(key: str) -> bytes:
    """What belongs under a key: its last segment is the size."""
    size = int(key.rpartition("/")[2])
    return hashlib.shake_128(key.encode()).digest(min(size, 4096)) * (size // 4096 + 1)


async def main(root: str, turn: str) -> None:
    store = LocalStore(root)
    print("ready", flush=True)

    async def write(writer: int) -> None:
        for number in range(1_000_000):
            size = SIZES[(number + writer) % len(SIZES)]
            key = f"{turn}/{writer}/{number}/{size}"
            content = content_of(key)
            with mmap.mmap(-1, max(len(content), 1)) as pages:  # aligned: O_DIRECT for the big
                pages[: len(content)] = content
                view = memoryview(pages)
                await store.put_new(key, [view[: len(content)]])
                view.release()
            print(key, flush=True)

    await asyncio.gather(*(write(writer) for writer in range(4)))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
