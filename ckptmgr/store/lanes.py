"""Work at the same time: tasks that end together, and the same work on many objects."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class _Group(asyncio.TaskGroup):
    """A task group that knows what is under way."""

    def __init__(self) -> None:
        super().__init__()
        self.under_way: set[asyncio.Task[Any]] = set()

    def create_task(self, *work: Any, **named: Any) -> asyncio.Task[Any]:
        task = super().create_task(*work, **named)
        self.under_way.add(task)
        task.add_done_callback(self.under_way.discard)
        return task


@asynccontextmanager
async def together() -> AsyncIterator[asyncio.TaskGroup]:
    """A task group whose first error is raised, when all others have been cancelled.

    A cancellation that comes while they clean up goes first: a task group forgets it over the
    error, and whoever catches that and tries again would never end.
    """
    own = asyncio.current_task()
    assert own is not None
    before = own.cancelling()
    try:
        async with _Group() as group:
            yield group
            # Here, and not at its end: there it does not take back (Python 3.11) the cancellation
            # by which it wakes its owner, which could not be told from one by somebody else.
            while group.under_way:
                await asyncio.wait(group.under_way)
    except BaseExceptionGroup as errors:
        if own.cancelling() > before:
            raise asyncio.CancelledError from None
        raise errors.exceptions[0] from None


async def in_lanes(work: Callable[[T], Awaitable[R]], items: Iterable[T], at_once: int) -> list[R]:
    """What `work` returns for each item, in their order.

    Errors as `together`.
    """
    found: dict[int, R] = {}
    all_items = list(items)
    places = iter(enumerate(all_items))

    async def lane() -> None:
        for place, item in places:
            found[place] = await work(item)

    async with together() as group:
        for _ in range(min(at_once, len(all_items))):
            group.create_task(lane())
    return [found[place] for place in range(len(found))]
