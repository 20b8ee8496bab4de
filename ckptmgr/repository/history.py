"""What became of a job so far, as its store tells: attempts, what each resumed from, and steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from ckptmgr.errors import DamageError, ObjectNotFoundError
from ckptmgr.repository import keys
from ckptmgr.repository.catalog import Catalog, StepEntry, decided_steps
from ckptmgr.repository.commit import Claim, Decision, Have, Resume, claim_of, get_record
from ckptmgr.repository.record import Kind
from ckptmgr.store.base import Store
from ckptmgr.store.lanes import in_lanes
from ckptmgr.types import Reach, StepId

READS_AT_ONCE = 16

ATTEMPTS_MAX = 1000
"""Attempts that are read, newest first: a job that restarts more often has other worries."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One incarnation of the job.

    `resumed_from` is None where it never asked, and StepId(0, 0) from scratch. `reached` is how far
    it came, as the memory of some host told a later attempt; None where no host could tell.
    """

    number: int
    claimed_at: float
    world: int
    resumed_from: StepId | None = None
    reached: Reach | None = None


@dataclass(frozen=True, slots=True)
class History:
    """Attempts, oldest first, and steps, newest first."""

    attempts: tuple[Attempt, ...]
    entries: tuple[StepEntry, ...] = ()


async def read_attempts(store: Store) -> tuple[Attempt, ...]:
    """The attempts of a job, oldest first; a record that does not hold is left out."""
    found = await store.list("attempts/")
    numbers = sorted({keys.parse_attempt(key) or 0 for key in found} - {0})[-ATTEMPTS_MAX:]
    claims = await in_lanes(partial(claim_of, store), numbers, READS_AT_ONCE)
    resumes = {keys.parse_attempt(key): key for key in found if "/resume/" in key}
    resumed = await in_lanes(partial(_resumed, store), resumes.items(), READS_AT_ONCE)
    haves = [key for key in found if "/have/" in key and keys.parse_attempt(key) in numbers]
    told = await in_lanes(partial(_reached, store), haves, READS_AT_ONCE)
    reached = furthest(one for of_host in told for one in of_host)
    return tuple(
        _attempt(claim, dict(resumed).get(claim.attempt), reached.get(claim.attempt))
        for claim in claims
        if claim is not None
    )


def _attempt(claim: Claim, resumed_from: StepId | None, reached: Reach | None) -> Attempt:
    return Attempt(claim.attempt, claim.at, claim.world, resumed_from, reached)


async def _resumed(store: Store, found: tuple[int | None, str]) -> tuple[int, StepId | None]:
    attempt, key = found
    with contextlib.suppress(ObjectNotFoundError, DamageError):
        return attempt or 0, (await get_record(store, Kind.RESUME, key, Resume)).id
    return attempt or 0, None


async def _reached(store: Store, key: str) -> tuple[Reach, ...]:
    with contextlib.suppress(ObjectNotFoundError, DamageError):
        return (await get_record(store, Kind.HAVE, key, Have)).reached
    return ()


def furthest(told: Iterable[Reach | None]) -> dict[int, Reach]:
    """By attempt: of what several ranks or hosts tell of it, the one that came furthest."""
    found: dict[int, Reach] = {}
    for reach in told:
        if reach is None:
            continue
        before = found.get(reach.attempt)
        if before is None or before.last_step < reach.last_step:
            found[reach.attempt] = reach
    return found


def sealed_reach(entries: Iterable[StepEntry]) -> dict[int, Reach]:
    """By attempt: its first and last commit, so that it came at least so far."""
    found: dict[int, Reach] = {}
    for entry in sorted(entries, key=lambda one: one.id):
        decision = entry.decision
        if decision is not None and decision.committed:
            found[entry.id.attempt] = _grown(found.get(entry.id.attempt), decision)
    return found


def _grown(before: Reach | None, decision: Decision) -> Reach:
    step, at = decision.step, decision.sealed_at
    if before is None:
        return Reach(decision.attempt, step, at, step, at)
    return Reach(before.attempt, before.first_step, before.first_at, step, at)


async def read_sealed(catalog: Catalog, attempts: Iterable[Attempt]) -> dict[int, Reach]:
    """As `sealed_reach`, of the attempts of which no host told; reads two registers of each."""
    silent = {one.number for one in attempts if one.reached is None}
    decided, _ = await decided_steps(catalog.store)
    found: dict[int, Reach] = {}
    for attempt in silent:
        steps = sorted(step for step in decided if step.attempt == attempt)
        for step in (*steps[:1], *steps[1:][-1:]):
            with contextlib.suppress(ObjectNotFoundError, DamageError):
                decision = await catalog.decision(step)
                if decision.committed:
                    found[attempt] = _grown(found.get(attempt), decision)
    return found


async def read_history(catalog: Catalog) -> History:
    """Everything that the store tells of a job: one small record per attempt, host and step."""
    return History(await read_attempts(catalog.store), tuple(await catalog.entries()))
