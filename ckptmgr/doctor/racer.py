"""One of several processes that race for the keys of a store: `python -m ckptmgr.doctor.racer URL`.

Standard input has one key a line; the answer to each is one line of JSON: the contents that won it,
or why the store failed.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys

from ckptmgr.errors import StoreError
from ckptmgr.store.base import PutResult, Store
from ckptmgr.store.lanes import in_lanes
from ckptmgr.store.registry import open_store

WRITERS = 2
"""Writers of a process at one key, so that both the store and its client are raced."""


async def winners(store: Store, key: str, name: str, writers: int) -> list[str]:
    """Put `key` from so many writers at once; the contents of those that were told OK."""

    async def put(content: str) -> str | None:
        result = await store.put_new(key, [memoryview(content.encode())])
        return content if result is PutResult.OK else None

    told = await in_lanes(put, [f"{name}.{number}" for number in range(writers)], writers)
    return [content for content in told if content is not None]


async def _race(url: str) -> None:
    store = open_store(url)
    try:
        while line := await asyncio.to_thread(sys.stdin.readline):
            answer: dict[str, object]
            try:
                answer = {"won": await winners(store, line.strip(), str(os.getpid()), WRITERS)}
            except StoreError as error:
                answer = {"failed": error.message}
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()
    finally:
        await store.aclose()


if __name__ == "__main__":
    asyncio.run(_race(sys.argv[1]))
