"""Every crash of the real repository, commit, resume and retention code, and a second one while
recovering from it: whatever became of the change that was under way, the invariants hold.

A change that was under way is lost; visible but not durable; made; made, and once more after the
recovery; or made only after it. A power cut follows each recovery. A point is one such history.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest

from ckptmgr.daemon import resume, retain
from ckptmgr.errors import CkptmgrError, ObjectNotFoundError
from ckptmgr.repository import keys
from ckptmgr.repository.budget import BufferPool
from ckptmgr.repository.catalog import Catalog
from ckptmgr.repository.commit import (
    FROM_SCRATCH,
    Decision,
    Retired,
    abort_of,
    decide,
    put_record,
)
from ckptmgr.repository.record import Kind
from ckptmgr.restore import verify
from ckptmgr.store.base import Store
from ckptmgr.store.retry import RetryingStore
from ckptmgr.types import StepId
from crash import crash_job
from crash.crash_job import SCRIPTS, Job, Script, check, last_recovery, recovery
from crash.crash_store import Change, CrashStore, State, ViolatedError
from scale import FULL, scaled

pytestmark = [pytest.mark.reliability, pytest.mark.timeout(scaled(600, 1800))]

POINTS_MIN = {"first run": 20_000, "second run": 35_000, "reading": 25_000, "zombie": 70_000}

FATES = ("lost", "visible", "made", "made twice", "late")


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
        patch.setattr(secrets, "randbelow", lambda n: next(numbers) % n)
        patch.setattr(resume, "time", SimpleNamespace(time=float, monotonic=float))
        patch.setattr(verify, "in_thread", _here)
        patch.setattr(keys, "parse_step", _parse_step)
        patch.setattr(retain, "event", lambda *_, **__: None)
        yield


_parse_step = cache(keys.parse_step)
"""Parsed a million times."""


async def _here(work: Callable[..., Any], *arguments: Any) -> Any:
    return work(*arguments)


async def run(script: Script, state: State, world: int, pool: BufferPool) -> CrashStore:
    with repeatable(script):
        store = CrashStore(state)
        await script(Job(store, store, world, pool))
        return store


async def run_ambiguous(
    script: Script, state: State, at: int, world: int, pool: BufferPool
) -> CrashStore:
    """A run in which the answer to one change is lost, so that it is made twice."""
    with repeatable(script):
        inner = CrashStore(state, ambiguous=at)
        store = RetryingStore(inner, jitter=lambda: 0.0)
        await script(Job(inner, store, world, pool))
        return inner


class Enumeration:
    """All crashes of one script, and of the recoveries from them."""

    def __init__(self, world: int, *, exclusive: bool = True) -> None:
        self._world = world
        self._empty = State(exclusive=exclusive)
        self._pool = BufferPool(1 << 27)
        self.points = 0
        self.runs = 0
        self._recovered: dict[tuple[int, object], CrashStore] = {}
        self._checked: set[object] = set()

    async def explore(self, script: Script) -> None:
        whole = await run(script, self._empty, self._world, self._pool)
        check(whole.now)
        for instant, change in whole.instants:
            for fate in FATES:
                await self._first(instant, change, fate)
        for at in range(len(whole.instants)):
            again = await run_ambiguous(script, self._empty, at, self._world, self._pool)
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


@pytest.mark.parametrize("name", SCRIPTS if FULL else ["second run", "zombie"])
def test_no_crash_breaks_anything(name: str) -> None:
    world, script = SCRIPTS[name]
    enumeration = Enumeration(world)
    asyncio.run(enumeration.explore(script))
    print(f"{name}: {enumeration.points:,} points, {enumeration.runs:,} recoveries")
    assert enumeration.points >= POINTS_MIN[name]


@pytest.mark.parametrize("name", SCRIPTS if FULL else ["first run"])
def test_no_crash_breaks_anything_where_one_decides_alone(name: str) -> None:
    world, script = SCRIPTS[name]
    enumeration = Enumeration(world, exclusive=False)
    asyncio.run(enumeration.explore(script))
    print(f"{name}, single decider: {enumeration.points:,} points, {enumeration.runs:,} recoveries")
    assert enumeration.points >= POINTS_MIN[name]


def test_there_are_enough_points() -> None:
    assert POINTS_MIN["second run"] + POINTS_MIN["zombie"] >= 100_000, "in every run of the suite"


# -- seeded bugs ----------------------------------------------------------------------------------


async def _delete_first(store: Store, step: StepId, why: str, _nbytes: int) -> bool:
    await retain._delete(store, step)
    mark = Retired(step.attempt, step.step, why)
    await put_record(store, Kind.RETIRED, keys.retired(step), mark)
    return True


async def _delete_blindly(store: Store, step: StepId) -> bool:
    await store.make_durable(keys.retired(step))
    await retain._delete(store, step)
    return True


async def _delete_on_sight(store: Store, step: StepId) -> bool:
    if await store.list(keys.holds(step)):
        return False
    await retain._delete(store, step)
    return True


async def _no_abort(_store: Store, step: StepId, why: str) -> Decision:
    return Decision("ABORT", step.attempt, step.step, why=why)


async def _believe(self: Catalog, step: StepId) -> Decision | None:
    try:
        return await self.decision(step)
    except ObjectNotFoundError:
        return None


async def _choose_alone(_store: Store, _attempt: int, _k: int, choice: StepId) -> StepId:
    return choice


def _never_durable(prefix: str) -> Callable[[CrashStore, str], Awaitable[None]]:
    honest = CrashStore.make_durable

    async def make_durable(self: CrashStore, key: str) -> None:
        if not key.startswith(prefix):
            await honest(self, key)

    return make_durable


async def _nobody(*_: Any) -> bool:
    return False


Patch = tuple[Any, str, Any]
BUGS: dict[str, tuple[str, *tuple[Patch, ...]]] = {
    "data goes before the mark": ("first run", (retain, "retire", _delete_first)),
    "holds are not looked at": ("reading", (retain, "_delete_retired", _delete_blindly)),
    "a mark of others is believed": ("first run", (retain, "_delete_retired", _delete_on_sight)),
    "garbage goes without ABORT": ("second run", (retain, "abort_step", _no_abort)),
    "a register of others is believed": ("first run", (Catalog, "registered", _believe)),
    "each rank chooses for itself": ("first run", (crash_job, "decide_resume", _choose_alone)),
    "manifests of others are believed": (
        "first run",
        (CrashStore, "make_durable", _never_durable("man/")),
    ),
    "commits of others are believed": (
        "first run",
        (CrashStore, "make_durable", _never_durable("commit/")),
    ),
    "one newer commit is enough": (
        "first run",
        (retain, "victims", lambda commits, _held, _keep: sorted(commits)[:-1]),
    ),
    "retention forgets what is held": (
        "reading",
        (
            retain,
            "victims",
            lambda commits, _held, keep: retain_victims(commits, frozenset(), keep),
        ),
        (retain, "_wanted_by_now", _nobody),
    ),
}
retain_victims = retain.victims


@pytest.mark.parametrize("name", BUGS)
def test_a_seeded_bug_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, *changes = BUGS[name]
    for change in changes:
        monkeypatch.setattr(*change)
    world, script = SCRIPTS[where]
    enumeration = Enumeration(world)
    with pytest.raises((ViolatedError, CkptmgrError)) as found:
        asyncio.run(enumeration.explore(script))
    print(f"{name}: after {enumeration.points:,} points: {found.value}")


async def _abort_without_mark(store: Store, step: StepId, why: str) -> Decision:
    return await decide(store, Kind.COMMIT, keys.commit(step), abort_of(step, why))


async def _two_steps(job: Job) -> None:
    await job.enter()
    await job.save(1)
    await job.save(2)


async def _three_more(job: Job) -> None:
    await job.enter()
    for _ in range(3):
        await job.save(job.base.step + 1)
        job.base = StepId(job.attempt, job.base.step + 1)
        await job.collect()


async def _commit_that_comes_late() -> State:
    """A host dies with all memory while its COMMIT is on the way; the next attempt, which can not
    know, gives the step up and deletes it; then the COMMIT arrives.
    """
    pool = BufferPool(1 << 27)
    whole = await run(_two_steps, State(exclusive=False), 2, pool)
    commits = [pair for pair in whole.instants if pair[1].key.startswith("commit/")]
    instant, late = commits[1]
    start = replace(instant, ledger=replace(instant.ledger, sealed=()))
    done = await run(_three_more, start, 2, pool)
    assert keys.packs(keys.parse_step(late.key) or FROM_SCRATCH, 0) not in str(done.now.objects)
    return done.now.after(late, durable=True)


def test_where_one_decides_alone_a_late_commit_finds_the_mark(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check(asyncio.run(_commit_that_comes_late()))
    for module in (retain, crash_job):
        monkeypatch.setattr(module, "abort_step", _abort_without_mark)
    late = asyncio.run(_commit_that_comes_late())
    with pytest.raises(ViolatedError, match="I1"):
        check(late)
