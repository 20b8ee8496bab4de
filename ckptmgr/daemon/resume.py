"""Claiming an attempt, and deciding which step it resumes from."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Collection, Iterable
from dataclasses import dataclass, field
from enum import Enum

from ckptmgr.daemon.log import warning
from ckptmgr.errors import (
    DamageError,
    ObjectNotFoundError,
    RegisterConflictError,
    StoreError,
    StoreUnreachableError,
    UsageError,
)
from ckptmgr.repository import keys
from ckptmgr.repository.catalog import Catalog, decided_steps, exists
from ckptmgr.repository.commit import (
    FROM_SCRATCH,
    Active,
    Claim,
    Have,
    Resume,
    check_format,
    claim_of,
    decide,
    get_record,
    put_record,
)
from ckptmgr.repository.hold import host_name
from ckptmgr.repository.record import Kind
from ckptmgr.repository.rules import LOTS, next_attempt, resume_order
from ckptmgr.store.base import PutResult, Store
from ckptmgr.store.lanes import in_lanes
from ckptmgr.types import ATTEMPT_MAX, Outcome, Reach, Snapshot, StepId

DECISION_SECONDS_MAX = 30.0
"""How long a daemon leaves a resume decision to that of rank 0; then it decides itself."""

DECISION_LOOK_SECONDS_MIN, DECISION_LOOK_SECONDS_MAX = 0.01, 0.5

READS_AT_ONCE = 64
"""Records of hosts read at a time by the daemon that decides: all other ranks wait for it."""

Skipped = tuple[str, str]
"""A step that could not be used, and why."""


def candidates(
    standing: Collection[StepId],
    complete: Collection[StepId],
    rejected: Collection[StepId],
    step: int | None,
    of_attempt: int | None,
) -> list[StepId]:
    """What may be resumed from, best first; with `step` only steps of that number (and attempt).

    `standing` may hold steps that turn out to be ABORT.
    """
    return [
        found
        for found in resume_order(standing, complete, (), rejected)
        if step in (None, found.step) and of_attempt in (None, found.attempt)
    ]


def usable_in_memory(snapshots: list[tuple[Snapshot, Outcome]]) -> list[Snapshot]:
    """Sealed snapshots that may be resumed from: all but those whose step was given up."""
    return [snapshot for snapshot, outcome in snapshots if outcome is not Outcome.ABORTED]


async def claim_attempt(store: Store, world: int, run_id: str) -> tuple[int, str]:
    """Claim the next attempt of a job; returns its number and nonce (32 hex digits).

    Raises:
        UnsupportedFormatError: the store was written by a newer ckptmgr.
        UsageError: the job has used up the numbers of attempts.
    """
    await check_format(store, create=True)
    nonce = secrets.token_hex(16)
    while True:
        taken = [keys.parse_attempt(key) or 0 for key in await store.list("attempts/")]
        attempt = next_attempt(taken, lot=0 if store.exclusive else 1 + secrets.randbelow(LOTS - 1))
        if attempt > ATTEMPT_MAX:
            raise UsageError(
                f"has no number left after attempt {max(taken)}",
                subject=store.url,
                hint="Give the job a new URL; `ckptmgr.load` reads the steps of this one.",
            )
        claim = Claim(attempt, nonce, world, host_name(), run_id, time.time())
        result = await put_record(store, Kind.CLAIM, keys.claim(attempt), claim)
        if result is PutResult.OK:
            return attempt, nonce


class Standing(Enum):
    """How a store knows the attempt of a snapshot in host memory."""

    OURS = "ours"
    OTHER = "claimed by another incarnation: the store was emptied and used again"
    MISSING = "not claimed: the store was emptied, or is not mounted"


class Standings:
    """Whether the attempts of snapshots were claimed in a store, asked once for each attempt.

    Host memory may hold the steps of a job that no longer exists. A store that refuses to be
    read contradicts nothing, and is asked again.
    """

    def __init__(self) -> None:
        self._claims: dict[int, Claim | None] = {}

    async def of(self, store: Store, snapshot: Snapshot) -> Standing:
        """As far as the store tells."""
        attempt = snapshot.attempt
        if attempt not in self._claims:
            try:
                found = await get_record(store, Kind.CLAIM, keys.claim(attempt), Claim)
            except ObjectNotFoundError:
                found = None
            except (StoreError, DamageError):
                return Standing.OURS
            self._claims[attempt] = found
        claim = self._claims[attempt]
        if claim is None:
            return Standing.MISSING
        return Standing.OURS if claim.nonce == snapshot.nonce else Standing.OTHER


async def standing_of(store: Store, snapshot: Snapshot) -> Standing:
    """How the store knows the attempt of a snapshot now."""
    return await Standings().of(store, snapshot)


async def publish_have(
    store: Store,
    attempt: int,
    host: str,
    found: Iterable[tuple[int, int, int]],
    reached: Iterable[Reach] = (),
) -> None:
    """Say which parts (attempt, step, rank) `host` holds, and how far earlier attempts came there,
    once per attempt.
    """
    record = Have(host, tuple(found), tuple(reached))
    await put_record(store, Kind.HAVE, keys.have(attempt, host), record)


@dataclass(slots=True)
class ActiveMarks:
    """What a job knows of the marks of active attempts, so that a save need not read them again.

    `held` are the attempts whose mark was found to hold, and has been there ever since; `told` are
    those whose mark does not hold, told once each.
    """

    held: set[int] = field(default_factory=set)
    told: set[int] = field(default_factory=set)


async def newest_active(store: Store, attempt: int, marks: ActiveMarks) -> int:
    """The newest attempt from `attempt` on that has put a snapshot, by a mark that holds; or 0."""
    newest = 0
    async for looked_at in claimed_from(store, attempt):
        if not await exists(store, keys.active(looked_at)):
            marks.held.discard(looked_at)
        elif looked_at in marks.held or await _holds(store, looked_at, marks):
            marks.held.add(looked_at)
            newest = looked_at
    return newest


async def claimed_from(store: Store, attempt: int) -> AsyncIterator[int]:
    """`attempt`, and every later one that is claimed, in order.

    They are claimed one after the other, so asking for the next claim is enough: a listing of all
    would grow with their number, and with that of the hosts, at every save. In single-decider mode
    their numbers have gaps.
    """
    yield attempt
    if store.exclusive is False:
        found = {keys.parse_attempt(key) or 0 for key in await store.list("attempts/")}
        for later in sorted(one for one in found if one > attempt):
            yield later
        return
    later = attempt + 1
    while await exists(store, keys.claim(later)):
        yield later
        later += 1


async def _holds(store: Store, attempt: int, marks: ActiveMarks) -> bool:
    """Whether the mark of an attempt is one, and of the incarnation that claimed the attempt.

    A name alone must not end a job: it may be all that is left of the object, or a stray copy.
    """
    try:
        mark = await get_record(store, Kind.ACTIVE, keys.active(attempt), Active)
        claim = await get_record(store, Kind.CLAIM, keys.claim(attempt), Claim)
    except (DamageError, ObjectNotFoundError) as error:
        why = f"{error.subject}: {error.message}"
    else:
        if (mark.attempt, claim.attempt, claim.nonce) == (attempt, attempt, mark.nonce):
            return True
        why = "is not of the incarnation that claimed the attempt"
    if attempt not in marks.told:
        marks.told.add(attempt)
        warning("active_ignored", attempt=attempt, why=why)
    return False


async def put_active(
    store: Store, attempt: int, nonce: str, marks: ActiveMarks | None = None
) -> int:
    """Mark the attempt as active; returns the newest active attempt, which may be a newer one.

    Raises:
        RegisterConflictError: another incarnation has marked this attempt.
    """
    marks = marks or ActiveMarks()
    newest = await newest_active(store, attempt, marks)
    if newest < attempt:
        await _mark(store, Active(attempt, nonce))
        marks.held.add(attempt)
        newest = max(attempt, await newest_active(store, attempt, marks))
    return newest


async def _mark(store: Store, mark: Active) -> None:
    key = keys.active(mark.attempt)
    if await put_record(store, Kind.ACTIVE, key, mark) is PutResult.OK:
        return
    try:
        found = await get_record(store, Kind.ACTIVE, key, Active)
    except DamageError:
        # A mark decides nothing, and whoever puts it puts these bytes: it may be put again.
        await store.delete(key)
        await put_record(store, Kind.ACTIVE, key, mark)
        return
    if found != mark:
        raise RegisterConflictError("is of another incarnation", subject=key)
    await store.make_durable(key)


async def decide_resume(store: Store, attempt: int, k: int, choice: StepId) -> StepId:
    """Put `choice` as the k-th resume decision, or return what was decided."""
    record = Resume(choice.attempt, choice.step)
    return (await decide(store, Kind.RESUME, keys.resume(attempt, k), record)).id


async def await_resume(store: Store, attempt: int, k: int) -> StepId | None:
    """The k-th resume decision, made durable; None if it is not made in DECISION_SECONDS_MAX.

    Raises:
        StoreUnreachableError: in single-decider mode, where nobody else may make it.
    """
    key, deadline = keys.resume(attempt, k), time.monotonic() + DECISION_SECONDS_MAX
    pause = DECISION_LOOK_SECONDS_MIN
    while True:
        try:
            await store.make_durable(key)
            return (await get_record(store, Kind.RESUME, key, Resume)).id
        except ObjectNotFoundError:
            if time.monotonic() >= deadline:
                if store.exclusive is False:
                    raise StoreUnreachableError(
                        "was not put by the daemon of rank 0, and only that one may", subject=key
                    ) from None
                return None
        await asyncio.sleep(pause)
        pause = min(2 * pause, DECISION_LOOK_SECONDS_MAX)


async def resume_decisions(store: Store, attempt: int, first: int, end: int) -> list[StepId]:
    """What resume decisions `first` to `end` - 1 of an attempt say."""
    records = [
        await get_record(store, Kind.RESUME, keys.resume(attempt, k), Resume)
        for k in range(first, end)
    ]
    return [record.id for record in records]


@dataclass(frozen=True, slots=True)
class HeldByHosts:
    """What the hosts of an attempt hold together: ranks of each step, and worlds of attempts."""

    ranks: dict[StepId, set[int]]
    worlds: dict[int, int]


async def held_by_hosts(store: Store, attempt: int) -> HeldByHosts:
    """Parts that can be had without a commit: in some host's memory, or in the store.

    Every daemon publishes what it holds before its first rank has joined, so that all of it is
    there once all ranks have.
    """
    ranks: dict[StepId, set[int]] = {}

    async def read(key: str) -> None:
        with contextlib.suppress(ObjectNotFoundError, DamageError):  # candidates only
            have = await get_record(store, Kind.HAVE, key, Have)
            for a, s, rank in have.snapshots:
                ranks.setdefault(StepId(a, s), set()).add(rank)

    await in_lanes(read, await store.list(keys.haves(attempt)), READS_AT_ONCE)
    for step in list(ranks):
        found = (keys.parse_rank(key) for key in await store.list(keys.manifests(step)))
        ranks[step].update(rank for rank in found if rank is not None)
    claims = {a: await claim_of(store, a) for a in {step.attempt for step in ranks}}
    return HeldByHosts(ranks, {a: claim.world for a, claim in claims.items() if claim is not None})


async def parent_of(catalog: Catalog, step: StepId) -> StepId:
    """The commit before `step`: the newest one that stands and is older."""
    decided, retired = await decided_steps(catalog.store)
    for found in sorted(decided - retired, reverse=True):
        if found >= step:
            continue
        try:
            if (await catalog.decision(found)).committed:
                return found
        except (DamageError, ObjectNotFoundError):
            continue
    return FROM_SCRATCH
