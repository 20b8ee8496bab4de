"""Whatever is done in whatever order, the local store answers as its twin in memory does."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
import tempfile
from collections.abc import Awaitable, Callable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ckptmgr.errors import StoreError
from ckptmgr.store.base import Store
from ckptmgr.store.local import LocalStore
from ckptmgr.store.memory import MemoryStore
from scale import scaled

# No key is a directory of another: a file system can not hold both.
KEYS = st.sampled_from(
    ["a/1", "a/2", "a/10", "a.b/1", "a-b/1", "b/c/d/e", "b/c/d/f", "tmp/x", "format", "A/1"]
)
PREFIXES = st.sampled_from(["", "a/", "b/", "b/c/", "b/c/d/", "format/", "tmp/", "none/", "A/"])
CONTENTS = st.lists(st.binary(max_size=5000), max_size=4)
OFFSETS = st.integers(0, 9000)


class LocalIsMemory(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.root = tempfile.mkdtemp()
        self.stores: list[Store] = [LocalStore(self.root), MemoryStore(secrets.token_hex(8))]

    def both(self, call: Callable[[Store], Awaitable[object]]) -> None:
        local, memory = (self.loop.run_until_complete(outcome(call(s))) for s in self.stores)
        assert local == memory

    @rule(key=KEYS, contents=CONTENTS)
    def put_new(self, key: str, contents: list[bytes]) -> None:
        self.both(lambda store: store.put_new(key, [memoryview(part) for part in contents]))

    @rule(key=KEYS, offset=OFFSETS, length=st.none() | OFFSETS)
    def get(self, key: str, offset: int, length: int | None) -> None:
        self.both(lambda store: store.get(key, offset, length))

    @rule(key=KEYS, offset=OFFSETS, length=OFFSETS)
    def get_into(self, key: str, offset: int, length: int) -> None:
        self.both(lambda store: store.get(key, offset, into=memoryview(bytearray(length))))

    @rule(prefix=PREFIXES)
    def list(self, prefix: str) -> None:
        self.both(lambda store: store.list(prefix))

    @rule(key=KEYS)
    def delete(self, key: str) -> None:
        self.both(lambda store: store.delete(key))

    @rule(key=KEYS)
    def make_durable(self, key: str) -> None:
        self.both(lambda store: store.make_durable(key))

    @rule()
    def open_again(self) -> None:
        self.loop.run_until_complete(self.stores[0].aclose())
        self.stores[0] = LocalStore(self.root)

    @rule()
    def sweep(self) -> None:
        local = self.stores[0]
        assert isinstance(local, LocalStore)
        assert self.loop.run_until_complete(local.sweep_temporaries(0)) == 0

    @invariant()
    def both_hold_the_same_keys(self) -> None:
        self.both(lambda store: store.list(""))

    def teardown(self) -> None:
        for store in self.stores:
            self.loop.run_until_complete(store.aclose())
        with contextlib.closing(self.loop):
            shutil.rmtree(self.root)


async def outcome(call: Awaitable[object]) -> object:
    """What the call returned, or the type and the words of its error."""
    try:
        result = await call
    except StoreError as error:
        return type(error), error.message, error.subject
    return bytes(result) if isinstance(result, memoryview) else result


TestLocalIsMemory = LocalIsMemory.TestCase
TestLocalIsMemory.settings = settings(
    max_examples=scaled(25, 2000), stateful_step_count=30, deadline=None
)
