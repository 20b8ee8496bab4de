"""The same work on many objects, a few at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


async def in_lanes(work: Callable[[T], Awaitable[R]], items: Iterable[T], at_once: int) -> list[R]:
    """What `work` returns for each item, in their order.

    The first error is raised, when all others that were under way have been cancelled.
    """
    found: dict[int, R] = {}
    all_items = list(items)
    places = iter(enumerate(all_items))

    async def lane() -> None:
        for place, item in places:
            found[place] = await work(item)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(at_once, len(all_items))):
                group.create_task(lane())
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [found[place] for place in range(len(found))]
