"""Whether a store keeps its contract: proved with objects under `doctor/`, which are deleted."""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from ckptmgr.doctor.racer import WRITERS, winners
from ckptmgr.errors import DamageError, ObjectNotFoundError, StoreError
from ckptmgr.repository.commit import check_format
from ckptmgr.store.base import Store
from ckptmgr.store.finding import Finding, Health
from ckptmgr.store.lanes import in_lanes

PLACE = "doctor/"
"""No reader of steps looks there. One level deep, because a store of files keeps directories."""

PROCESSES = 4
RACES = 24
"""As many as decide a job's mode (repository/exclusion.py), here between processes, each with a
client of its own: a cache or a proxy may make one client exclusive and not two."""

OBSERVED_SECONDS_MAX = 30.0
"""How long something that should have been visible is waited for, to tell how late it is."""

DELETES_AT_ONCE = 8
_LOOK_SECONDS = 0.05


@dataclass(slots=True)
class Scratch:
    """Keys of one run of the doctor, so that all of them can be deleted."""

    name: str = field(default_factory=lambda: secrets.token_hex(8))
    made: list[str] = field(default_factory=list)

    def key(self) -> str:
        """A key that nobody has used."""
        key = f"{PLACE}{self.name}.{len(self.made)}"
        self.made.append(key)
        return key

    async def delete(self, store: Store) -> None:
        """Delete all that may have been put."""
        await in_lanes(store.delete, self.made, DELETES_AT_ONCE)


# ---- exclusive --------------------------------------------------------------


async def exclusive(store: Store, scratch: Scratch) -> Finding:
    """Race for keys between processes: has each exactly one winner, and does the key hold what that
    one put?

    Raises:
        StoreError: the store failed; nothing is proved.
    """
    relied_on = await _relied_on(store)
    keys = [scratch.key() for _ in range(RACES)]
    found = [await _contents(store, key, won) for key, won in await _raced(store, keys)]
    worst = max(len(won) for won, _ in found)
    single = sum(len(won) == 1 and won[0] == content for won, content in found)
    evidence = f"{single} of {RACES} races of {PROCESSES * WRITERS} writers had one winner" + (
        f", up to {worst} in one race" if worst > 1 else ""
    )
    if single == RACES:
        return Finding("put-if-absent", Health.OK, "of concurrent puts one wins", evidence)
    if relied_on:
        return Finding(
            "put-if-absent",
            Health.FAILURE,
            "more than one writer may win a key, and daemons rely on that it is one",
            evidence,
            "Stop the job, take a new URL for it, and set CKPTMGR_SINGLE_DECIDER=1 on all hosts.",
        )
    return Finding(
        "put-if-absent",
        Health.WARNING,
        "more than one writer may win a key: only the daemon of rank 0 can decide (docs/scale.md)",
        evidence,
        "Nothing, if CKPTMGR_SINGLE_DECIDER=1 is set or a job has found it out by itself.",
    )


async def _relied_on(store: Store) -> bool:
    """Whether the store says of itself that it is exclusive, or its mark says it of a job."""
    declared = store.exclusive
    with suppress(DamageError):
        await check_format(store, create=False)
    marked, store.exclusive = store.exclusive, declared
    return bool(marked)


async def _contents(store: Store, key: str, won: list[str]) -> tuple[list[str], str]:
    try:
        return won, bytes(await store.get(key)).decode(errors="replace")
    except ObjectNotFoundError:
        return won, ""


async def _raced(store: Store, keys: Sequence[str]) -> list[tuple[str, list[str]]]:
    if store.url.startswith("memory://"):  # which other processes do not share
        return [(key, await winners(store, key, "here", PROCESSES * WRITERS)) for key in keys]
    async with _racers(store.url) as racers:
        return [(key, await _one_race(racers, key)) for key in keys]


@asynccontextmanager
async def _racers(url: str) -> AsyncIterator[list[Process]]:
    command = (sys.executable, "-m", "ckptmgr.doctor.racer", url)
    racers = [
        await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE)
        for _ in range(PROCESSES)
    ]
    try:
        yield racers
    finally:
        for racer in racers:
            with suppress(ProcessLookupError):
                racer.kill()
        await asyncio.gather(*(racer.wait() for racer in racers))


async def _one_race(racers: list[Process], key: str) -> list[str]:
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write(f"{key}\n".encode())
    won: list[str] = []
    for racer in racers:
        assert racer.stdout is not None
        line = await racer.stdout.readline()
        answer = json.loads(line) if line else {"failed": "a process of the race died"}
        if "failed" in answer:
            raise StoreError(str(answer["failed"]), subject=key)
        won += answer["won"]
    return won


# ---- visible ----------------------------------------------------------------


async def visible(store: Store, other: Store, scratch: Scratch) -> list[Finding]:
    """Put with one client, then get and list with another: at once, or in the declared time."""
    content = secrets.token_bytes(4096)
    key = scratch.key()

    async def read() -> bool:
        try:
            return bytes(await other.get(key)) == content
        except ObjectNotFoundError:
            return False

    async def listed() -> bool:
        return key in await other.list(PLACE)

    await store.put_new(key, [memoryview(content)])
    start = time.monotonic()
    lag = store.visibility_lag_seconds
    late = [await _late(read, start, lag), await _late(listed, start, lag)]
    names = ("read-after-write", "list-after-write")
    whats = ("what was put can be read", "what was put is listed")
    found = [_visibility(*one, lag) for one in zip(names, whats, late, strict=True)]
    return [*found, _lag(lag, late)]


async def _late(look: Callable[[], Awaitable[bool]], start: float, lag: float) -> float | None:
    """How late something was still not to be seen, in seconds after `start`: 0 if it was at the
    first look, None if it was not in time to tell.
    """
    unseen = 0.0
    while True:
        begun = time.monotonic() - start
        if await look():
            return unseen
        unseen = begun
        if begun > lag + OBSERVED_SECONDS_MAX:
            return None
        await asyncio.sleep(_LOOK_SECONDS)


def _visibility(name: str, what: str, unseen: float | None, lag: float) -> Finding:
    if unseen is not None and (not unseen or unseen <= lag):
        told = "at once" if not unseen else f"after {unseen:.1f} s"
        return Finding(name, Health.OK, what, f"another client saw it {told}")
    told = f"{unseen:.1f} s" if unseen is not None else f"{lag + OBSERVED_SECONDS_MAX:g} s or more"
    return Finding(
        name,
        Health.FAILURE,
        f"{what} too late",
        f"another client did not see it for {told}; the store declares {lag:g} s",
        "Switch off caches between this host and the store (for NFS: lookupcache=none, noac).",
    )


def _lag(lag: float, late: list[float | None]) -> Finding:
    seen = [one for one in late if one is not None]
    evidence = f"declared {lag:g} s, seen {max(seen, default=0.0):.2f} s from this host"
    if lag:
        return Finding(
            "visibility lag",
            Health.OK,
            "other hosts may see an object late, and ckptmgr waits for it",
            evidence,
        )
    return Finding("visibility lag", Health.OK, "objects are visible at once", evidence)
