"""Whether the `put_new` of a store decides anything: a race that proves it, or finds that not."""

from __future__ import annotations

import secrets

from ckptmgr.errors import ObjectNotFoundError
from ckptmgr.store.base import PutResult, Store
from ckptmgr.store.lanes import in_lanes

RACERS = 8
RACES = 24
"""OpenStack Swift lets one race in ten have exactly one winner (measured): this many races miss
such a store with a probability of 10**-24. They take 24 round trips of a put, once in a job."""

PLACE = "proof/"
"""Prefix of the objects that are raced for; they are deleted, and no reader looks there."""


async def is_exclusive(store: Store) -> bool:
    """Let RACERS writers put each of RACES keys at once: has each exactly one winner, and is what
    the winner put what the key holds?

    Raises:
        StoreError: the store failed; nothing is proved.
    """
    place = f"{PLACE}{secrets.token_hex(8)}"
    raced = [f"{place}/{number}" for number in range(RACES)]
    try:
        for key in raced:
            if not await _one_winner(store, key):
                return False
        return True
    finally:
        await in_lanes(store.delete, raced, RACERS)


async def _one_winner(store: Store, key: str) -> bool:
    contents = [f"writer {writer}".encode() for writer in range(RACERS)]

    async def put(content: bytes) -> PutResult:
        return await store.put_new(key, [memoryview(content)])

    results = await in_lanes(put, contents, RACERS)
    if results.count(PutResult.OK) != 1:
        return False
    try:
        return bytes(await store.get(key)) == contents[results.index(PutResult.OK)]
    except ObjectNotFoundError:
        return False
