"""Every crash of the real repository, commit, resume and retention code, and a second one while
recovering from it: whatever became of the change that was under way, the invariants hold.

A change that was under way is lost; visible but not durable; made; made, and once more after the
recovery; or made only after it. A power cut follows each recovery. A point is one such history.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from ckptmgr.daemon import resume, retain
from ckptmgr.repository import commit
from ckptmgr.repository.budget import BufferPool
from ckptmgr.repository.commit import Decision
from ckptmgr.restore import verify
from ckptmgr.store.base import PutResult, Store
from ckptmgr.store.retry import RetryingStore
from ckptmgr.types import StepId
from crash.crash_job import SCRIPTS, Job, Script, check, last_recovery, recovery
from crash.crash_store import Change, CrashStore, State, ViolatedError
from scale import scaled

pytestmark = pytest.mark.reliability

POINTS_MIN = 100_000
STARTS = scaled(1, 0)
"""Every so many first crashes is followed by second ones; 0 means all."""

FATES = ("lost", "visible", "made", "made twice", "late")


@dataclass
class Count:
    """Histories that were tried, and recoveries that ran for them: equal stores recover alike."""

    points: int = 0
    runs: int = 0
    known: dict[object, list[tuple[State, Change]]] = field(default_factory=dict)


def left_behind(instant: State, change: Change, fate: str) -> tuple[State, Change | None]:
    """What a crash leaves: the store, and the change that is still to come."""
    if fate == "lost":
        return instant, None
    if fate == "late":
        return instant, change
    after = instant.after(change, durable=fate != "visible")
    return after, change if fate == "made twice" else None


_FIRST_NUMBER = {recovery: 10_000, last_recovery: 20_000}


@contextmanager
def repeatable(script: Script) -> Iterator[None]:
    """Names and nonces are numbers, other ones in each script; time stands still."""
    with pytest.MonkeyPatch.context() as patch:
        numbers = itertools.count(_FIRST_NUMBER.get(script, 1))
        patch.setattr(secrets, "token_hex", lambda n: f"{next(numbers):0{2 * n}x}")
        patch.setattr(resume, "time", SimpleNamespace(time=float, monotonic=float))
        patch.setattr(verify, "in_thread", _here)
        patch.setattr(retain, "event", lambda *_, **__: None)
        yield


async def _here(work: Callable[..., Any], *arguments: Any) -> Any:
    return work(*arguments)


async def run(script: Script, state: State, world: int, pool: BufferPool) -> CrashStore:
    with repeatable(script):
        store = CrashStore(state)
        await script(Job(store, store, world, pool))
        return store


async def run_ambiguous(script: Script, at: int, world: int, pool: BufferPool) -> CrashStore:
    """A run in which the answer to one change is lost, so that it is made twice."""
    with repeatable(script):
        inner = CrashStore(State(), ambiguous=at)
        store = RetryingStore(inner, jitter=lambda: 0.0)
        await script(Job(inner, store, world, pool))
        return inner


class Enumeration:
    """All crashes of one script, and of the recoveries from them."""

    def __init__(self, world: int) -> None:
        self._world = world
        self._pool = BufferPool(1 << 27)
        self.points = 0
        self.runs = 0
        self._recovered: dict[tuple[int, object], CrashStore] = {}
        self._checked: set[object] = set()

    async def explore(self, script: Script) -> None:
        whole = await run(script, State(), self._world, self._pool)
        check(whole.now)
        for instant, change in whole.instants:
            for fate in FATES:
                await self._first(instant, change, fate)
        for at in range(len(whole.instants)):
            again = await run_ambiguous(script, at, self._world, self._pool)
            self.points += 1
            self._check(again.now)

    async def _first(self, instant: State, change: Change, fate: str) -> None:
        start, late = left_behind(instant, change, fate)
        self._check(start)
        self.points += 1
        done = await self._recover(recovery, start)
        self._finally(done.now, late)
        for second, other in done.instants:
            for then in FATES:
                await self._second(second, other, then, late)

    async def _second(self, instant: State, change: Change, fate: str, late: Change | None) -> None:
        start, later = left_behind(instant, change, fate)
        self._check(start)
        self.points += 1
        done = await self._recover(last_recovery, start)
        for one in (late, later):
            self._finally(done.now, one)

    async def _recover(self, script: Script, start: State) -> CrashStore:
        name = (id(script), start.name())
        if name not in self._recovered:
            self._check(start.cut())
            self.runs += 1
            self._recovered[name] = await run(script, start, self._world, self._pool)
        return self._recovered[name]

    def _finally(self, state: State, late: Change | None) -> None:
        if late is not None:
            state = state.after(late, durable=True)
        self._check(state)
        self._check(state.cut())

    def _check(self, state: State) -> None:
        name = state.name()
        if name not in self._checked:
            check(state)
            self._checked.add(name)


def enumerated(world: int, script: Script) -> Enumeration:
    enumeration = Enumeration(world)
    asyncio.run(enumeration.explore(script))
    return enumeration


def test_no_crash_breaks_anything() -> None:
    points = 0
    for name, (world, script) in SCRIPTS.items():
        found = enumerated(world, script)
        print(f"{name}: {found.points:,} points, {found.runs:,} recoveries", flush=True)
        points += found.points
    print(f"crash points: {points:,}")
    assert points >= POINTS_MIN
