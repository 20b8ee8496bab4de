"""A store that fails when, where and how a test says."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from ckptmgr.errors import StoreUnreachableError
from ckptmgr.store.base import Buffers, PutResult, Store

T = TypeVar("T")

Operation = Literal["put_new", "get", "list", "delete", "make_durable"]


@dataclass(frozen=True, slots=True)
class Fault:
    """Which operations of a `FaultyStore` go wrong, and how.

    An operation matches if it is `operation` (None: any) and its key or prefix starts with `key`.
    Of the matching ones the `at`-th, counted from 1 and from when the fault was planned, goes
    wrong; with `and_later` all after it, too. It first waits `delay_seconds` and for `gate`; then
    `error` is raised, `before` the operation or `after` it took effect, which nobody but the
    test can tell: that is an ambiguous answer. Without `error` it only waits.
    """

    error: Exception | None = None
    at: int = 1
    operation: Operation | None = None
    key: str = ""
    when: Literal["before", "after"] = "before"
    and_later: bool = False
    delay_seconds: float = 0.0
    gate: asyncio.Event | None = None

    def matches(self, operation: Operation, key: str) -> bool:
        """Whether the operation counts."""
        return self.operation in (None, operation) and key.startswith(self.key)

    def strikes(self, count: int) -> bool:
        """Whether the `count`-th matching operation goes wrong."""
        return count == self.at or (self.and_later and count > self.at)


def refuse_reads(error: Exception | None = None) -> list[Fault]:
    """A plan in which nothing can be read or listed any more; writes still work."""
    refused = error or StoreUnreachableError("reads are refused by the test")
    return [
        Fault(refused, operation="get", and_later=True),
        Fault(refused, operation="list", and_later=True),
    ]


def dead(error: Exception | None = None) -> list[Fault]:
    """A plan in which every operation fails."""
    return [Fault(error or StoreUnreachableError("is dead by the test's will"), and_later=True)]


class FaultyStore(Store):
    """`inner`, with the faults of a plan and a record of what was asked. `get_many` is many `get`.

    `operations` holds (operation, key or prefix) of every call in the order of its start, those
    that failed too; `aclose` is neither counted nor failed.
    """

    def __init__(self, inner: Store, plan: Iterable[Fault] = ()) -> None:
        self.durable_on_return = inner.durable_on_return
        self.visibility_lag_seconds = inner.visibility_lag_seconds
        self.exclusive = inner.exclusive
        self.operations: list[tuple[Operation, str]] = []
        self._inner = inner
        self._counts: list[tuple[Fault, list[int]]] = []
        self.plan(plan)

    def plan(self, faults: Iterable[Fault]) -> None:
        """Forget all earlier faults and count from here on; `plan(())` heals the store."""
        self._counts = [(fault, [0]) for fault in faults]

    @property
    def url(self) -> str:
        """As `Store.url`."""
        return self._inner.url

    async def put_new(self, key: str, buffers: Buffers) -> PutResult:
        """As `Store.put_new`, or the planned fault."""
        return await self._do("put_new", key, lambda: self._inner.put_new(key, buffers))

    async def get(
        self,
        key: str,
        offset: int = 0,
        length: int | None = None,
        into: memoryview | None = None,
    ) -> memoryview:
        """As `Store.get`, or the planned fault."""
        return await self._do("get", key, lambda: self._inner.get(key, offset, length, into))

    async def uncache(self, key: str) -> None:
        """As `Store.uncache`; no operation that is counted."""
        await self._inner.uncache(key)

    async def prune(self, prefix: str) -> None:
        """As `Store.prune`; no operation that is counted."""
        await self._inner.prune(prefix)

    def share(self, memory: memoryview, path: str) -> None:
        """As `Store.share`."""
        self._inner.share(memory, path)

    def unshare(self, memory: memoryview) -> None:
        """As `Store.unshare`."""
        self._inner.unshare(memory)

    async def list(self, prefix: str) -> list[str]:
        """As `Store.list`, or the planned fault."""
        return await self._do("list", prefix, lambda: self._inner.list(prefix))

    async def delete(self, key: str) -> None:
        """As `Store.delete`, or the planned fault."""
        await self._do("delete", key, lambda: self._inner.delete(key))

    async def make_durable(self, key: str) -> None:
        """As `Store.make_durable`, or the planned fault."""
        await self._do("make_durable", key, lambda: self._inner.make_durable(key))

    async def aclose(self) -> None:
        """As `Store.aclose`."""
        await self._inner.aclose()

    async def _do(self, operation: Operation, key: str, work: Callable[[], Awaitable[T]]) -> T:
        self.operations.append((operation, key))
        struck = self._strike(operation, key)
        for fault in struck:
            await asyncio.sleep(fault.delay_seconds)
            if fault.gate is not None:
                await fault.gate.wait()
            if fault.error is not None and fault.when == "before":
                raise fault.error
        result = await work()
        for fault in struck:
            if fault.error is not None:
                raise fault.error
        return result

    def _strike(self, operation: Operation, key: str) -> Sequence[Fault]:
        struck = []
        for fault, count in self._counts:
            if fault.matches(operation, key):
                count[0] += 1
                if fault.strikes(count[0]):
                    struck.append(fault)
        return struck
